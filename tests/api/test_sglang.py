"""POST /generate: SGLang's shapes, to the key; its streams, batches, log-probabilities and errors."""

import pytest

from crane.api.app import App
from crane.api.constraint import response_grammar
from crane.errors import EngineError
from crane.runtime.settings import Settings
from crane.runtime.types import Output, State, TokenLogprob, Usage
from tests.api.harness import NEVER, speak
from tests.api.thinker import thinking_model
from tests.tiny import special_id

PATH = "/generate"
META = {
    "id", "finish_reason", "prompt_tokens", "weight_version", "num_retractions", "reasoning_tokens",
    "completion_tokens", "cached_tokens",
}  # fmt: skip


@pytest.fixture
def say(model):
    """say(text) -> a script in which every choice of every request says `text`."""

    def make(text, finish="length", eos=None):
        def script(request):
            parts = [
                speak(model.tokenizer, text, request, index=i, finish=finish, eos=eos)
                for i in range(request.sampling.n)
            ]
            return [list(step) for step in zip(*parts)]

        return script

    return make


def scored(model, text="ok"):
    """A script that scores the prompt (-1.0 each) and then says `text` (-2.0 each); the token itself is best."""

    def entry(request, logprob, token_id):
        sampling = request.sampling
        if sampling.logprobs is None:
            return None
        tops = [token_id, 7][: sampling.logprobs]
        return TokenLogprob(logprob, tops, [logprob, -9.0][: len(tops)], [-3.0] * len(sampling.logprob_ids))

    def script(request):
        ids = model.tokenizer.encode(text, add_special_tokens=False)
        prompt = [None] + [entry(request, -1.0, i) for i in request.prompt_ids[1:]]
        outputs = []
        for number in range(request.sampling.n):
            for at, token_id in enumerate(ids):
                last = at == len(ids) - 1
                outputs.append(Output(
                    request.rid, number, [token_id], "length" if last else None,
                    logprobs=[entry(request, -2.0, token_id)] if request.sampling.logprobs is not None else None,
                    prompt_logprobs=prompt if request.sampling.prompt_logprobs and (number, at) == (0, 0) else None,
                    usage=Usage(len(request.prompt_ids), len(ids)) if last else None,
                ))  # fmt: skip
        # of several choices the first, which brings the prompt's, comes last
        return [[output] for output in sorted(outputs, key=lambda output: -output.index)]

    return script


def test_answer_has_sglangs_shape(client, say, model):
    here = client(say(" blue.", finish="stop", eos=special_id("<|im_end|>")))
    response = here.post(PATH, {"text": "The sky is", "sampling_params": {"max_new_tokens": 8}})
    assert (response.status, response.headers["content-type"]) == (200, "application/json")
    answer = response.json()
    assert set(answer) == {"text", "output_ids", "meta_info"}
    assert answer["text"] == " blue."
    ids = model.tokenizer.encode(" blue.") + [special_id("<|im_end|>")]
    assert answer["output_ids"] == ids  # the EOS token stays
    meta = answer["meta_info"]
    assert meta.pop("e2e_latency") >= 0
    assert meta == {
        "id": here.link.opened[0].rid, "finish_reason": {"type": "stop", "matched": special_id("<|im_end|>")},
        "prompt_tokens": len(model.tokenizer.encode("The sky is")), "weight_version": "default",
        "num_retractions": 0, "reasoning_tokens": 0, "completion_tokens": len(ids), "cached_tokens": 0,
    }  # fmt: skip


def test_put_is_post(client, say):
    body = b'{"text": "a"}'
    assert client(say("b")).request("PUT", PATH, body).json()["text"] == "b"


def test_defaults_are_the_seeds(client, say):
    here = client(say("x"))
    here.post(PATH, {"text": "a"})
    sampling = here.link.opened[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (128, 0.8, 0.95)
    assert (sampling.top_k, sampling.repetition_penalty, sampling.min_p) == (20, 1.0, 0.0)
    assert (sampling.seed, sampling.n, sampling.logprobs, sampling.prompt_logprobs) == (None, 1, None, False)


def test_every_sampling_field_reaches_the_engine(client, say):
    here = client(say("x"))
    params = {
        "max_new_tokens": 9, "temperature": 0.5, "top_p": 0.5, "top_k": -1, "min_p": 0.1, "frequency_penalty": 1.0,
        "presence_penalty": -1, "repetition_penalty": 1.5, "min_new_tokens": 3, "stop": "end", "ignore_eos": True,
        "stop_token_ids": [5], "skip_special_tokens": False, "deterministic": True,
        "logit_bias": {"3": -2.5}, "seed": 11,
    }  # fmt: skip
    assert here.post(PATH, {"text": "a", "sampling_params": params, "cache_salt": "s"}).status == 200
    (sent,) = here.link.opened
    sampling = sent.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (9, 0.5, 0.5, 0)
    assert (sampling.min_p, sampling.frequency_penalty, sampling.presence_penalty) == (0.1, 1.0, -1)
    assert (sampling.repetition_penalty, sampling.min_tokens, sampling.stop) == (1.5, 3, ("end",))
    assert (sampling.ignore_eos, sampling.stop_token_ids, sampling.skip_special_tokens) == (True, (5,), False)
    assert (sampling.logit_bias, sampling.seed, sent.cache_salt) == ({3: -2.5}, 11, "s")
    assert sampling.deterministic


@pytest.mark.parametrize("params", [{"seed": 4}, {"sampling_seed": 4}, {"seed": 4, "sampling_seed": 4}])
def test_both_names_of_the_seed_are_known(client, say, params):
    here = client(say("x"))
    here.post(PATH, {"text": "a", "sampling_params": params})
    assert here.link.opened[0].sampling.seed == 4
    assert client().post(PATH, {"text": "a", "sampling_params": {"seed": 1, "sampling_seed": 2}}).status == 400


def test_tiny_temperature_is_greedy_and_null_length_is_the_context(client, say, model):
    here = client(say("x"))
    here.post(PATH, {"input_ids": [1, 2], "sampling_params": {"temperature": 1e-7, "max_new_tokens": None}})
    sampling = here.link.opened[0].sampling
    assert sampling.greedy and sampling.max_tokens == 254


def test_batch_is_a_list_in_order_also_of_one(client, say):
    here = client(say("z"))
    one = here.post(PATH, {"text": ["a"]}).json()
    assert [answer["text"] for answer in one] == ["z"]
    two = here.post(PATH, {"input_ids": [[1], [2, 3]]}).json()
    assert [answer["meta_info"]["prompt_tokens"] for answer in two] == [1, 2]


def test_choices_are_listed_prompt_major_with_ids_of_their_own(client, model):
    def script(request):
        return [[Output(request.rid, i, [40 + len(request.prompt_ids) + i], "length") for i in (1, 0)]]

    here = client(script)
    answers = here.post(PATH, {"input_ids": [[1], [1, 2]], "sampling_params": {"n": 2}, "rid": "r"}).json()
    assert [answer["output_ids"] for answer in answers] == [[41], [42], [42], [43]]
    assert [answer["meta_info"]["id"] for answer in answers] == ["r_0#0", "r_0#1", "r_1#0", "r_1#1"]
    single = here.post(PATH, {"input_ids": [1], "sampling_params": {"n": 2}}).json()
    assert len(single) == 2 and len({answer["meta_info"]["id"] for answer in single}) == 2


def test_each_prompt_has_its_own_parameters_and_ids(client, say):
    here = client(say("z"))
    body = {"text": ["a", "b"], "sampling_params": [{"max_new_tokens": 3}, {"max_new_tokens": 4}],
            "rid": ["x", "y"], "cache_salt": ["s", "t"], "extra_key": "k"}  # fmt: skip
    answers = here.post(PATH, body).json()
    assert [answer["meta_info"]["id"] for answer in answers] == ["x", "y"]
    assert [request.sampling.max_tokens for request in here.link.opened] == [3, 4]
    assert [request.cache_salt for request in here.link.opened] == ["s\0k", "t\0k"]


def test_stream_is_cumulative_with_full_meta_info_in_every_event(client, say, model):
    response = client(say("one two")).post(PATH, {"text": "x", "stream": True, "return_prompt_token_ids": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, done = response.data()
    assert done == "[DONE]"
    ids = model.tokenizer.encode("one two")
    assert [event["output_ids"] for event in events] == [ids[: i + 1] for i in range(len(ids))]
    assert [event["text"] for event in events] == [model.tokenizer.decode(ids[: i + 1]) for i in range(len(ids))]
    for event in events:
        assert set(event) == {"text", "output_ids", "meta_info", "prompt_token_ids"}
        assert set(event["meta_info"]) - {"e2e_latency"} == META
        assert event["meta_info"]["completion_tokens"] == len(event["output_ids"])
    assert [event["meta_info"]["finish_reason"] for event in events[-2:]] == [
        None, {"type": "length", "length": len(ids)}]  # fmt: skip
    assert "e2e_latency" in events[-1]["meta_info"] and "e2e_latency" not in events[0]["meta_info"]


def test_stream_has_only_what_is_new_when_the_server_says_so(client, say, model):
    here = client(say("one two END x"), settings=Settings(incremental_streaming_output=True))
    body = {"text": "x", "stream": True, "sampling_params": {"stop": "END", "no_stop_trim": True}}
    *events, _ = here.post(PATH, body).data()
    assert "".join(event["text"] for event in events) == "one two END"
    ids = [token_id for event in events for token_id in event["output_ids"]]
    assert ids == model.tokenizer.encode("one two END x")[: len(ids)] and len(events) > 2
    assert [event["meta_info"]["completion_tokens"] for event in events][-1] == len(ids)
    assert here.post(PATH, {"text": "x"}).json()["text"] == "one two END x"


def test_stream_of_several_says_whose_event_it_is(client, say):
    body = {"text": ["x", "y"], "sampling_params": {"n": 2}, "stream": True}
    *events, done = client(say("one two")).post(PATH, body).data()
    finals = {event["index"]: event["text"] for event in events if event["meta_info"]["finish_reason"]}
    assert finals == dict.fromkeys(range(4), "one two") and done == "[DONE]"
    assert "index" not in client(say("z")).post(PATH, {"text": "x", "stream": True}).data()[0]


def test_stream_interval_thins_the_events(client, say, model):
    num = len(model.tokenizer.encode("one two three"))
    body = {"text": "x", "stream": True, "sampling_params": {"stream_interval": 3}}
    *events, _ = client(say("one two three")).post(PATH, body).data()
    counts = [event["meta_info"]["completion_tokens"] for event in events]
    assert counts == sorted({*range(3, num + 1, 3), num})


@pytest.mark.parametrize("stream", [False, True])
def test_counts_are_known_before_the_engine_has_ended(client, model, stream):
    def script(request):
        first, *rest = speak(model.tokenizer, "a END b c", request)
        return [Output(first.rid, 0, first.token_ids, usage=Usage(1, 1, cached_tokens=16)), *rest]

    body = {"text": "x", "sampling_params": {"stop": "END"}, "stream": stream}
    response = client(script).post(PATH, body)
    for answer in response.data()[:-1] if stream else [response.json()]:
        assert answer["meta_info"]["cached_tokens"] == 16


def test_counts_of_the_engine_are_passed_on(client, model):
    def script(request):
        usage = Usage(3, 1, cached_tokens=2, reasoning_tokens=1, num_preemptions=4)
        return [Output(request.rid, 0, [5], "length", usage=usage)]

    meta = client(script).post(PATH, {"text": "x"}).json()["meta_info"]
    assert (meta["cached_tokens"], meta["reasoning_tokens"], meta["num_retractions"]) == (2, 1, 4)


@pytest.mark.parametrize("keep, text", [(False, "a "), (True, "a END")])
@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_is_trimmed_unless_told_otherwise(client, say, keep, text, stream):
    here = client(say("a END b c"))
    params = {"stop": ["END"], "no_stop_trim": keep}
    response = here.post(PATH, {"text": "x", "sampling_params": params, "stream": stream})
    answer = response.data()[-2] if stream else response.json()
    assert answer["text"] == text
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": "END"}
    assert here.link.aborted == [(here.link.opened[0].rid, 0)]  # the engine need not go on


@pytest.mark.parametrize("keep, skip, text", [(False, False, "a"), (True, True, "a"), (True, False, "a<|im_end|>")])
def test_stop_token_is_visible_only_when_kept_and_not_special(client, say, keep, skip, text):
    here = client(say("a", finish="stop", eos=special_id("<|im_end|>")))
    params = {"no_stop_trim": keep, "skip_special_tokens": skip}
    assert here.post(PATH, {"text": "x", "sampling_params": params}).json()["text"] == text


def test_logprobs_of_the_output_only_by_default(client, model):
    answer = client(scored(model)).post(PATH, {"text": "The sky", "return_logprob": True}).json()
    ids = answer["output_ids"]
    meta = answer["meta_info"]
    assert set(meta) - META == {
        "e2e_latency", "input_token_logprobs", "output_token_logprobs", "output_token_logprobs_length"}  # fmt: skip
    assert meta["input_token_logprobs"] == []
    assert meta["output_token_logprobs"] == [[-2.0, token_id, None] for token_id in ids]
    assert meta["output_token_logprobs_length"] == len(ids)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_logprobs_of_the_prompt_from_a_position_on(client, model, stream, n):
    here = client(scored(model))
    body = {"input_ids": [4, 5, 6], "return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2,
            "token_ids_logprob": [8, 9], "return_text_in_logprobs": True, "stream": stream,
            "sampling_params": {"n": n}}  # fmt: skip
    response = here.post(PATH, body)
    text = model.tokenizer.decode
    if stream:
        answers = [event for event in response.data()[:-1] if event["meta_info"]["finish_reason"]]
        assert all(len(event["meta_info"]["input_token_logprobs"]) == 3 for event in response.data()[:-1])
    else:
        answers = response.json() if n > 1 else [response.json()]
    assert len(answers) == n
    for answer in answers:
        meta = answer["meta_info"]
        assert meta["input_token_logprobs"] == [[None, 4, text([4])], [-1.0, 5, text([5])], [-1.0, 6, text([6])]]
        assert meta["input_top_logprobs"] == [None, [[-1.0, 5, text([5])], [-9.0, 7, text([7])]],
                                              [[-1.0, 6, text([6])], [-9.0, 7, text([7])]]]  # fmt: skip
        assert meta["input_token_ids_logprobs"] == [None] + [[[-3.0, 8, text([8])], [-3.0, 9, text([9])]]] * 2
        ids = answer["output_ids"]
        assert meta["output_top_logprobs"] == [[[-2.0, i, text([i])], [-9.0, 7, text([7])]] for i in ids]
        assert len(meta["output_token_ids_logprobs"]) == len(ids)
    sampling = here.link.opened[0].sampling
    assert (sampling.logprobs, sampling.prompt_logprobs, sampling.logprob_ids) == (2, True, (8, 9))
    body |= {"logprob_start_len": 2, "stream": False, "sampling_params": {}}
    assert here.post(PATH, body).json()["meta_info"]["input_token_logprobs"] == [[-1.0, 6, text([6])]]
    assert here.post(PATH, body | {"logprob_start_len": 4}).status == 400


def test_logprob_fields_may_differ_within_a_batch(client, model):
    here = client(scored(model))
    body = {"input_ids": [[4, 5], [6]], "return_logprob": [True, False], "top_logprobs_num": [1, 0],
            "token_ids_logprob": [[8], None]}  # fmt: skip
    first, second = here.post(PATH, body).json()
    assert "output_top_logprobs" in first["meta_info"] and "output_token_logprobs" not in second["meta_info"]
    assert [request.sampling.logprob_ids for request in here.link.opened] == [(8,), ()]


@pytest.mark.parametrize("stream", [False, True])
def test_aborted_request_answers_what_it_has(client, model, stream):
    def script(request):
        first = speak(model.tokenizer, "half done", request)[:2]
        return [*first, Output(request.rid, 0, [], "abort", usage=Usage(1, 2))]

    response = client(script).post(PATH, {"text": "x", "rid": "mine", "stream": stream})
    assert response.status == 200
    answer = response.data()[-2] if stream else response.json()
    assert answer["meta_info"]["finish_reason"] == {
        "type": "abort", "message": "the request was aborted", "status_code": None, "err_type": None}  # fmt: skip
    assert len(answer["output_ids"]) == 2 and answer["meta_info"]["id"] == "mine"
    assert "half done".startswith(answer["text"]) and answer["text"]


def test_lost_engine_ends_a_stream_with_an_error_event(client, model):
    def script(request):
        lost = Output(request.rid, 0, [], "error", error="engine_lost: the engine ended")
        return [*speak(model.tokenizer, "half done", request)[:2], lost]

    *events, error, done = client(script).post(PATH, {"text": "x", "stream": True}).data()
    assert len(events) == 2 and done == "[DONE]"
    assert error == {"error": {"message": "engine_lost: the engine ended", "type": "server_error", "code": 503,
                               "retryable": True}}  # fmt: skip
    plain = client(script).post(PATH, {"text": "x"})
    assert plain.status == 503 and plain.headers["retry-after"] and set(plain.json()["error"]) == {"message"}


def test_client_that_leaves_ends_its_requests(client):
    here = client(lambda request: [NEVER])
    here.post(PATH, {"text": ["x", "y"]}, leave_after=0)
    assert sorted(here.link.closed) == sorted(request.rid for request in here.link.opened)


@pytest.mark.parametrize("body, message", [
    ({}, "Either text, input_ids or input_embeds should be provided."),
    ({"input_ids": []}, "input_ids cannot be empty."),
    ({"input_ids": [[1], []]}, "input_ids cannot be empty."),
    ({"text": "a", "input_ids": [1]}, "input_ids: goes without text: only one of them can be the prompt"),
    ({"input_ids": [1, [2]]}, "input_ids: expected token ids or lists of token ids, got a mixture"),
    ({"input_ids": [1, 9999]}, "input_ids[1]: expected a token id in 0..322, got 9999"),
    ({"text": ""}, "text: expected at least one token in each prompt"),
    ({"text": ["a", "b"], "rid": ["x", "x"]}, "rid: expected a different one for each prompt"),
    ({"text": "a", "rid": ["x"]}, "rid: expected one value, got a list although text or input_ids is no batch"),
    ({"text": ["a", "b"], "sampling_params": [{}]},
     "sampling_params: expected one entry for each of the 2 prompts, got 1"),
    ({"text": ["a", "b"], "sampling_params": [{"n": 1}, {"n": 2}]},
     "sampling_params: n: expected the same for all prompts of a batch"),
    ({"text": "a", "top_logprobs_num": 1}, "top_logprobs_num: goes with return_logprob: true only"),
    ({"text": "a", "sampling_params": {"stop_token_ids": [400]}},
     "sampling_params.stop_token_ids[0]: expected a token id in 0..322, got 400"),
    ({"text": "a", "sampling_params": {"max_new_tokens": 2, "min_new_tokens": 3}},
     "sampling_params.min_new_tokens: expected at most max_new_tokens (2), got 3"),
    ({"input_ids": [1] * 256}, "The input (256 tokens) is longer than the model's context length (256 tokens)."),
    ({"input_ids": [1] * 200, "sampling_params": {"max_new_tokens": 100}},
     "Requested token count exceeds the model's maximum context length of 256 tokens. You requested a total of "
     "300 tokens: 200 tokens from the input and 100 tokens for the completion."),
])  # fmt: skip
def test_wrong_values_are_400_in_sglangs_form(client, body, message):
    response = client().post(PATH, body)
    assert response.status == 400
    assert response.json() == {"error": {"message": message}}


@pytest.mark.parametrize("body, message", [
    (b"", "the body is empty: expected a JSON object"),
    ({"text": 5}, "text: expected `str | array | null`, got `int`"),
    ({"text": "a", "stream": "yes"}, "stream: expected `bool | null`, got `str`"),
    ({"text": "a", "surprise": 1}, "unknown field 'surprise'"),
    ({"text": "a", "lora_path": "x"}, "lora_path is not supported"),
    ({"text": "a", "image_data": "x"}, "image_data is not supported"),
    ({"text": "a", "return_hidden_states": True}, "return_hidden_states is not supported"),
    ({"text": "a", "sampling_params": {"stop_regex": "x+"}}, "sampling_params.stop_regex is not supported"),
    ({"text": "a", "sampling_params": {"structural_tag": "x"}}, "sampling_params.structural_tag is not supported"),
])  # fmt: skip
def test_wrong_shapes_are_flat_400s_that_name_the_field(client, body, message):
    response = client().post(PATH, body)
    assert response.status == 400
    answer = response.json()
    assert answer == {"object": "error", "message": message, "type": "Bad Request", "param": None, "code": 400}


@pytest.mark.parametrize("params", [{"sed": 1}, [{}, {"sed": 1}]])
def test_unknown_sampling_field_is_named_with_the_known_ones(client, params):
    response = client().post(PATH, {"text": ["a", "b"], "sampling_params": params})
    assert response.status == 400
    error = response.json()["error"]
    assert error.startswith("unknown field `sed`, expected one of `max_new_tokens`, `temperature`, ")


@pytest.mark.parametrize("params, kind", [
    ({"json_schema": '{"type": "object"}'}, {"json": {"type": "object"}}),
    ({"json_schema": "$$ANY$$"}, {"json": True}),
    ({"regex": "[a-c]+"}, {"regex": "[a-c]+"}),
    ({"ebnf": 'root ::= "yes" | "no"'}, {"grammar": 'root ::= "yes" | "no"'}),
    ({"choice": ["yes", "no"]}, {"choice": ["yes", "no"]}),
])  # fmt: skip
def test_constraints_become_grammars(client, say, params, kind):
    here = client(say("x"))
    assert here.post(PATH, {"text": "a", "sampling_params": params}).status == 200
    assert here.link.opened[0].sampling.grammar == response_grammar(**kind)


def test_constraints_differ_within_a_batch(client, say):
    here = client(say("x"))
    here.post(PATH, {"text": ["a", "b"], "sampling_params": [{"choice": ["yes"]}, {}]})
    grammars = [request.sampling.grammar for request in here.link.opened]
    assert grammars == [response_grammar(choice=["yes"]), None]


def test_wrong_constraints_name_their_field(client):
    here = client()
    both = here.post(PATH, {"text": "a", "sampling_params": {"regex": "a", "json_schema": "{}"}})
    assert (both.status, both.json()) == (400, {"error": {"message": (
        "Only one of json_schema, regex, ebnf, or structural_tag can be set.")}})  # fmt: skip
    bad = {"text": ["a", "b"], "sampling_params": [{}, {"json_schema": '{"type": "strin"}'}]}
    response = here.post(PATH, bad)
    assert response.status == 400
    assert response.json()["error"]["message"].startswith("sampling_params[1].json_schema")
    assert not here.link.opened


@pytest.mark.parametrize("text, is_open", [("<think>hm", True), ("<think>hm</think>so", False), ("Hi", False)])
def test_thinking_section_is_described_to_the_engine(client, say, model, text, is_open):
    here = client(say("x"))
    here.app = App(Settings(), link=here.link, model=thinking_model(model))
    body = {"text": [text, "Hi"], "require_reasoning": True, "max_thinking_tokens": 5}
    assert here.post(PATH, body).status == 200
    thinking = here.link.opened[0].sampling.thinking
    assert (thinking.open, thinking.max_tokens) == (is_open, 5)
    assert model.tokenizer.decode(thinking.end_ids) == "</think>"
    assert here.link.opened[1].sampling.thinking.open is False


@pytest.mark.parametrize("field, value", [("require_reasoning", True), ("max_thinking_tokens", 3)])
def test_model_that_does_not_think_refuses_thinking(client, field, value):
    response = client().post(PATH, {"text": "a", field: value})
    assert response.status == 400
    assert response.json() == {"error": {"message": f"{field}: this model has no thinking section"}}


def test_neutral_values_of_unsupported_fields_pass(client, say):
    body = {"text": "a", "image_data": None, "lora_path": None, "return_hidden_states": False, "modalities": [],
            "return_routed_experts": False, "log_metrics": True,
            "sampling_params": {"spaces_between_special_tokens": False, "stop_regex": None, "custom_params": {}}}
    assert client(say("b")).post(PATH, body).status == 200


def test_full_queue_is_503_with_retry_after(client):
    here = client(lambda request: [EngineError("queue_full", "300 requests are waiting", 7.2)])
    response = here.post(PATH, {"text": "a", "stream": True})
    assert (response.status, response.headers["retry-after"]) == (503, "8")
    assert response.json() == {"error": {"message": "The request queue is full."}}


def test_batch_that_can_never_be_queued_is_refused(client):
    response = client(settings=Settings(max_queue=2)).post(PATH, {"text": ["a", "b", "c"]})
    assert response.status == 400 and "at most 2 prompts" in response.json()["error"]["message"]


def test_what_never_reaches_the_route_is_answered_in_sglangs_form_too(client):
    locked = client(settings=Settings(api_key="sesame")).post(PATH, {"text": "a"})
    assert (locked.status, locked.json()) == (401, {"error": "Unauthorized"})
    assert locked.headers["www-authenticate"] == "Bearer"
    large = client(settings=Settings(max_body=10)).post(PATH, {"text": "a" * 20})
    assert large.status == 413 and set(large.json()["error"]) == {"message"}
    loading = client(state=State("loading")).post(PATH, {"text": "a"})
    assert loading.status == 503 and loading.headers["retry-after"] == "2"
    assert loading.json() == {"error": {"message": "the model is still loading"}}
