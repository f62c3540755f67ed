"""SGLang's routes on a whole server with two workers and a tiny real model."""

import json
import threading
import time
import urllib.error
import urllib.request

import pytest

from tests.serving import start_server, wait_for
from tests.tiny import make_tiny

ENDLESS = {"max_new_tokens": 50_000, "ignore_eos": True, "temperature": 0}
SHORT = {"max_new_tokens": 6, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module", params=["asgi", "gthread"])
def server(tmp_path_factory, request):
    tiny = make_tiny(tmp_path_factory.mktemp("native") / "tiny", "qwen3", max_position=60_000)
    way = ("-k", "gthread", "--threads", "16") if request.param == "gthread" else ()
    with start_server(tiny, "-w", "2", *way, env={"CRANE_DTYPE": "float32"}) as server:
        yield server


def generate(server, **body) -> dict | list:
    status, answer = server.post("/generate", body)
    assert status == 200, answer
    return answer


def in_background(server, bodies: list[dict]) -> tuple[list[threading.Thread], dict]:
    """Each body's answer in `answers` by its number, once its thread has ended."""
    answers = {}

    def ask(number, body):
        answers[number] = server.post("/generate", body)

    threads = [threading.Thread(target=ask, args=pair, daemon=True) for pair in enumerate(bodies)]
    for thread in threads:
        thread.start()
    return threads, answers


def running(server) -> int:
    return server.get("/v1/stats")[1]["active_sequences"]


def fetch(server, path: str, method: str = "GET") -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(server.url + path, method=method)) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_text_and_its_ids_give_the_same_answer(server):
    by_text = generate(server, text="The sky is", sampling_params=SHORT, return_prompt_token_ids=True)
    by_ids = generate(server, input_ids=by_text["prompt_token_ids"], sampling_params=SHORT)
    assert len(by_text["output_ids"]) == 6
    assert (by_text["text"], by_text["output_ids"]) == (by_ids["text"], by_ids["output_ids"])
    assert by_text["meta_info"]["finish_reason"] == {"type": "length", "length": 6}


def test_batch_gives_what_its_prompts_give_alone(server):
    texts = ["The sky is", "A crane is", "12 + 30"]
    together = generate(server, text=texts, sampling_params=[SHORT, {**SHORT, "max_new_tokens": 3}, SHORT])
    alone = [generate(server, text=text, sampling_params=SHORT) for text in texts]
    assert together[0]["output_ids"] == alone[0]["output_ids"]
    assert together[1]["output_ids"] == alone[1]["output_ids"][:3]
    assert together[2]["output_ids"] == alone[2]["output_ids"]


def test_choices_differ_and_a_seed_repeats_them(server):
    params = {**SHORT, "temperature": 1.5, "n": 3, "sampling_seed": 5, "top_k": -1, "top_p": 1}
    first, again = (generate(server, text="The", sampling_params=params) for _ in range(2))
    outputs = [answer["output_ids"] for answer in first]
    assert outputs == [answer["output_ids"] for answer in again]
    assert len({tuple(ids) for ids in outputs}) == 3
    renamed = {**params, "seed": params.pop("sampling_seed")}
    renamed.pop("sampling_seed", None)
    assert [answer["output_ids"] for answer in generate(server, text="The", sampling_params=renamed)] == outputs


def test_logprobs_of_the_prompt_are_those_of_generating_it(server):
    drawn = generate(server, input_ids=[10, 11], sampling_params=SHORT, return_logprob=True, top_logprobs_num=2)
    ids = [10, 11, *drawn["output_ids"]]
    scored = generate(server, input_ids=ids, sampling_params={"max_new_tokens": 0}, return_logprob=True,
                      logprob_start_len=0, token_ids_logprob=[10, ids[-1]])  # fmt: skip
    given = scored["meta_info"]["input_token_logprobs"]
    assert scored["output_ids"] == [] and given[0] == [None, 10, None]
    for item, known in zip(given[2:], drawn["meta_info"]["output_token_logprobs"], strict=True):
        assert item[1:] == known[1:] and item[0] == pytest.approx(known[0], abs=1e-4)
    assert scored["meta_info"]["input_token_ids_logprobs"][-1][1][:2] == given[-1][:2]
    best = drawn["meta_info"]["output_top_logprobs"]
    assert [tops[0][1] for tops in best] == drawn["output_ids"]  # greedy


def test_constraints_bind_each_prompt_of_a_batch(server):
    wild = {"temperature": 1.5, "top_k": -1, "top_p": 1, "max_new_tokens": 200}
    schema = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 99}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    constraints = [{"choice": ["yes", "no"]}, {"regex": "[ab]{3}"}, {"ebnf": 'root ::= "x" ("y" | "z")'},
                   {"json_schema": json.dumps(schema)}]  # fmt: skip
    answers = generate(server, text=["Q"] * 4, sampling_params=[{**wild, **each} for each in constraints])
    texts = [answer["text"] for answer in answers]
    assert texts[0] in ("yes", "no") and texts[2] in ("xy", "xz")
    assert len(texts[1]) == 3 and set(texts[1]) <= {"a", "b"}
    if answers[3]["meta_info"]["finish_reason"]["type"] == "stop":
        assert list(json.loads(texts[3])) == ["a"]


def test_stream_grows_to_the_whole_answer(server):
    whole = generate(server, text="The sky is", sampling_params=SHORT)
    *events, done = server.stream("/generate", {"text": "The sky is", "sampling_params": SHORT}).finish()
    assert done == "[DONE]" and len(events) == 6
    last = json.loads(events[-1])
    assert (last["text"], last["output_ids"]) == (whole["text"], whole["output_ids"])


def test_abort_by_prefix_reaches_the_requests_of_both_workers(server):
    bodies = [{"text": "a", "rid": f"job-{i}", "sampling_params": ENDLESS} for i in range(6)]
    threads, answers = in_background(server, [*bodies, {"text": "a", "rid": "other", "sampling_params": ENDLESS}])
    wait_for(lambda: running(server) == 7)
    assert server.post("/abort_request", {"rid": "job-3"}) == (200, {"success": True, "num_aborted": 1})
    threads[3].join(10)
    assert running(server) == 6
    assert server.post("/abort_request", {"rid": "job"})[1]["num_aborted"] == 5
    for thread in threads[:6]:
        thread.join(10)
    assert running(server) == 1
    assert server.post("/abort_request", {"abort_all": True})[1]["num_aborted"] == 1
    threads[6].join(10)
    assert server.post("/abort_request", {"rid": "job"}) == (200, {"success": True, "num_aborted": 0})
    for number in range(7):
        status, answer = answers[number]
        assert status == 200
        assert answer["meta_info"]["finish_reason"]["type"] == "abort"
        assert answer["meta_info"]["completion_tokens"] == len(answer["output_ids"])


def test_abort_ends_a_chat_stream_too(server):
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 50_000, "ignore_eos": True}
    stream = server.stream("/v1/chat/completions", body).flowing(8)
    rid = json.loads(stream.events[0])["id"]
    assert server.post("/abort_request", {"rid": rid})[1]["num_aborted"] == 1
    events = stream.finish()
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["choices"][0]["finish_reason"] == "abort"


def test_running_id_cannot_be_used_again(server):
    threads, answers = in_background(server, [{"text": "a", "rid": "mine", "sampling_params": ENDLESS}])
    wait_for(lambda: running(server) == 1)
    for _ in range(4):  # whichever worker is asked
        status, answer = server.post("/generate", {"text": "a", "rid": "mine", "sampling_params": SHORT})
        assert status == 400 and "mine" in answer["error"]["message"]
    server.post("/abort_request", {"rid": "mine"})
    threads[0].join(10)
    assert answers[0][0] == 200
    assert generate(server, text="a", rid="mine", sampling_params=SHORT)["meta_info"]["id"] == "mine"


def test_health_generate_works_idle_and_busy_and_leaves_nothing(server):
    for _ in range(3):
        assert server.get("/health_generate") == (200, {"status": "ok"})
    wait_for(lambda: running(server) == 0)
    threads, _ = in_background(server, [{"text": "a", "rid": "busy", "sampling_params": ENDLESS}])
    wait_for(lambda: running(server) == 1)
    before = server.get("/v1/stats")[1]["total_requests"]
    assert server.get("/health_generate") == (200, {"status": "ok"})
    assert server.get("/v1/stats")[1]["total_requests"] == before
    server.post("/abort_request", {"rid": "busy"})
    threads[0].join(10)
    wait_for(lambda: running(server) == 0)


def test_flush_cache_really_forgets_and_refuses_while_busy(server):
    prompt = {"input_ids": [9] * 100, "sampling_params": SHORT}
    generate(server, **prompt)
    warm = generate(server, **prompt)
    assert warm["meta_info"]["cached_tokens"] >= 80
    stopped = generate(server, **prompt | {"sampling_params": {**SHORT, "stop": warm["text"][0]}})
    assert stopped["text"] == "" and stopped["meta_info"]["cached_tokens"] >= 80
    assert fetch(server, "/flush_cache", "POST") == (200, b"Cache flushed.\n")
    assert generate(server, **prompt)["meta_info"]["cached_tokens"] == 0
    threads, _ = in_background(server, [{"text": "a", "rid": "busy", "sampling_params": ENDLESS}])
    wait_for(lambda: running(server) == 1)
    status, text = fetch(server, "/flush_cache")
    assert status == 400 and text.startswith(b"Flush cache failed")
    threading.Timer(0.5, server.post, ("/abort_request", {"rid": "busy"})).start()
    started_s = time.monotonic()
    assert fetch(server, "/flush_cache?timeout=20")[0] == 200
    assert time.monotonic() - started_s < 10
    threads[0].join(10)


def test_info_names_the_model_and_counts(server):
    status, info = server.get("/model_info")
    assert (status, info["architectures"], info["device"]) == (200, ["Qwen3ForCausalLM"], "cpu")
    status, info = server.get("/server_info")
    assert status == 200 and info["stats"]["total_requests"] > 0 and info["internal_states"]
