"""POST /v1/completions: prompts of every form, echo, log-probabilities."""

import pytest

from crane.runtime.types import Output, TokenLogprob, Usage
from tests.api.harness import speak
from tests.api.talk import FIM, with_special_tags
from tests.tiny import make_tiny

PATH = "/v1/completions"


@pytest.fixture
def say(model):
    """say(text) -> a script in which every choice of every request says `text` and ends by length."""

    def make(text, logprobs=None):
        def script(request):
            n = request.sampling.n
            parts = [
                speak(model.tokenizer, text, request, index=i, finish="length", logprobs=logprobs)
                for i in range(n)
            ]
            return [list(step) for step in zip(*parts)]

        return script

    return make


def scored(model, text="", k=1):
    """A script that scores the prompt (-1.0 for each but the first) and then says `text` (-2.0 each)."""

    def entry(logprob, token_id):
        return TokenLogprob(logprob, [7] * min(k, 1), [-0.25] * min(k, 1))

    def script(request):
        ids = model.tokenizer.encode(text, add_special_tokens=False)
        prompt = [None] + [entry(-1.0, token_id) for token_id in request.prompt_ids[1:]]
        usage = Usage(len(request.prompt_ids), len(ids))
        outputs = []
        for i in range(request.sampling.n):
            lps = [entry(-2.0, token_id) for token_id in ids]
            outputs.append(
                Output(
                    request.rid,
                    i,
                    ids,
                    "length",
                    logprobs=lps,
                    prompt_logprobs=None if i else prompt,
                    usage=usage,
                )
            )
        return [outputs[::-1]]  # choice 0, which carries the prompt's, comes last

    return script


def test_reply_has_openais_shape(client, say):
    here = client(say(" blue."))
    body = here.post(PATH, {"prompt": "The sky is", "max_tokens": 8}).json()
    assert body.pop("id").startswith("cmpl-") and isinstance(body.pop("created"), int)
    usage = body.pop("usage")
    assert body == {
        "object": "text_completion",
        "model": "org/tiny",
        "choices": [{"index": 0, "text": " blue.", "logprobs": None, "finish_reason": "length"}],
    }
    assert usage["prompt_tokens"] == len(here.link.opened[0].prompt_ids)


def test_stream_has_text_chunks_and_no_role_chunk(client, say):
    chunks = client(say("one two")).post(PATH, {"prompt": "x", "stream": True}).data()
    assert chunks[-1] == "[DONE]"
    assert all(chunk["object"] == "text_completion" for chunk in chunks[:-1])
    assert all(
        set(chunk["choices"][0]) == {"index", "text", "logprobs", "finish_reason"} for chunk in chunks[:-1]
    )
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == "one two"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[-3:-1]] == [None, "length"]


@pytest.mark.parametrize("prompt, count", [("ab", 1), (["ab", "cd"], 2), ([1, 2, 3], 1), ([[1, 2], [3]], 2)])
def test_every_form_of_prompt_gives_one_choice_each(client, say, prompt, count):
    here = client(say("z"))
    body = here.post(PATH, {"prompt": prompt}).json()
    assert [choice["index"] for choice in body["choices"]] == list(range(count))
    assert body["usage"]["prompt_tokens"] == sum(len(request.prompt_ids) for request in here.link.opened)
    if prompt == [1, 2, 3]:
        assert here.link.opened[0].prompt_ids == [1, 2, 3]


def test_choices_are_numbered_prompt_major(client, model):
    def script(request):
        number = len(request.prompt_ids)
        return [[Output(request.rid, i, [40 + number], "length") for i in (1, 0)]]

    here = client(script)
    body = here.post(PATH, {"prompt": [[1], [1, 2]], "n": 2}).json()
    texts = [model.tokenizer.decode([41])] * 2 + [model.tokenizer.decode([42])] * 2
    assert [choice["text"] for choice in body["choices"]] == texts
    assert body["usage"]["prompt_tokens"] == 3  # each prompt once, whatever n
    assert body["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_in_front(client, say, stream):
    response = client(say(" blue")).post(PATH, {"prompt": "The sky is", "echo": True, "stream": stream})
    if stream:
        text = "".join(chunk["choices"][0]["text"] for chunk in response.data()[:-1])
    else:
        text = response.json()["choices"][0]["text"]
    assert text == "The sky is blue"


def test_echo_of_token_ids_is_their_text(client, say, model):
    ids = model.tokenizer.encode("The sky")
    assert (
        client(say("!")).post(PATH, {"prompt": ids, "echo": True}).json()["choices"][0]["text"] == "The sky!"
    )


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs_covers_prompt_and_output(client, model, stream):
    here = client(scored(model, " blue", k=1))
    response = here.post(PATH, {"prompt": "The sky", "echo": True, "logprobs": 1, "n": 2, "stream": stream})
    sampling = here.link.opened[0].sampling
    assert sampling.prompt_logprobs and sampling.logprobs == 1
    if stream:
        merged = {}
        for chunk in response.data()[:-1]:
            (choice,) = chunk["choices"]
            entry = merged.setdefault(choice["index"], {"text": "", "logprobs": {}})
            entry["text"] += choice["text"]
            for name, values in choice["logprobs"].items():
                entry["logprobs"].setdefault(name, []).extend(values)
        choices = [merged[0], merged[1]]
    else:
        choices = response.json()["choices"]
    ids = here.link.opened[0].prompt_ids + model.tokenizer.encode(" blue", add_special_tokens=False)
    num_prompt = len(here.link.opened[0].prompt_ids)
    for choice in choices:
        assert choice["text"] == "The sky blue"
        logprobs = choice["logprobs"]
        assert "".join(logprobs["tokens"]) == "The sky blue"
        assert logprobs["token_logprobs"] == [None] + [-1.0] * (num_prompt - 1) + [-2.0] * (
            len(ids) - num_prompt
        )
        assert logprobs["top_logprobs"][0] is None
        assert all(
            len(top) == 2 or top.keys() == {model.tokenizer.decode([7])}
            for top in logprobs["top_logprobs"][1:]
        )
        starts = [len("".join(logprobs["tokens"][:i])) for i in range(len(ids))]
        assert logprobs["text_offset"] == starts


@pytest.mark.parametrize("as_ids", [False, True])
def test_echo_spells_out_special_tokens_and_counts_them(client, model, as_ids):
    text = "<|im_start|>user"
    prompt = model.tokenizer.encode(text) if as_ids else text
    choice = (
        client(scored(model, "🙂!<|im_end|>."))
        .post(PATH, {"prompt": prompt, "echo": True, "logprobs": 1})
        .json()["choices"][0]
    )
    assert choice["text"] == "<|im_start|>user🙂!."  # special tokens of the answer are skipped
    offsets = dict(zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]))
    assert (offsets["<|im_start|>"], offsets["u"], offsets["!"], offsets["."]) == (0, 12, 17, 18)


@pytest.mark.parametrize("logprobs", [None, 1])
def test_max_tokens_zero_with_echo_scores_the_prompt(client, model, logprobs):
    here = client(scored(model))
    body = {"prompt": "The sky", "echo": True, "max_tokens": 0, "logprobs": logprobs}
    answer = here.post(PATH, body).json()
    sampling = here.link.opened[0].sampling
    assert sampling.max_tokens == 0 and sampling.prompt_logprobs and sampling.logprobs is not None
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("The sky", "length")
    assert answer["usage"]["completion_tokens"] == 0
    if logprobs is None:
        assert choice["logprobs"] is None
    else:
        assert len(choice["logprobs"]["tokens"]) == len(here.link.opened[0].prompt_ids)


def test_pieces_of_a_character_are_spelled_as_bytes(client, model):
    here = client(lambda r: speak(model.tokenizer, "🙂", r, logprobs=lambda i: TokenLogprob(-1.0)))
    choice = here.post(PATH, {"prompt": "x", "logprobs": 0}).json()["choices"][0]
    assert choice["text"] == "🙂"
    tokens = choice["logprobs"]["tokens"]
    assert len(tokens) > 1 and tokens[0].startswith("bytes:\\xf0")
    assert set(choice["logprobs"]["text_offset"][1:]) <= {0, 1}


def test_prompt_that_fits_exactly_is_scored_but_not_continued(client, model):
    here = client(scored(model))
    ids = [1] * 256
    assert here.post(PATH, {"prompt": ids, "echo": True, "max_tokens": 0, "logprobs": 0}).status == 200
    refused = here.post(PATH, {"prompt": ids, "max_tokens": 1})
    assert refused.status == 400 and refused.json()["error"]["code"] == "context_length_exceeded"


def test_one_finished_prompt_is_aborted_while_others_go_on(client, model):
    def script(request):
        text = "a END b c d e f g" if request.rid.endswith("-1") else "a b c d e f g h i j k"
        return speak(model.tokenizer, text, request, finish="length")

    here = client(script)
    body = here.post(PATH, {"prompt": ["x", "x"], "stop": "END"}).json()
    assert [choice["text"] for choice in body["choices"]] == ["a b c d e f g h i j k", "a "]
    assert here.link.aborted == [(here.link.opened[1].rid, 0)]


def test_choice_that_stops_leaves_its_siblings_running(client, model):
    def script(request):
        parts = [speak(model.tokenizer, text, request, index=i, finish="length")
                 for i, text in enumerate(("a END b c d e", "a b c d e f"))]  # fmt: skip
        return [list(step) for step in zip(*parts, strict=False)] + [parts[1][-1]]

    here = client(script)
    body = here.post(PATH, {"prompt": "x", "n": 2, "stop": "END", "stream": True}).data()
    texts, ends = {0: "", 1: ""}, []
    for chunk in body[:-1]:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        ends += [choice["index"]] if choice["finish_reason"] else []
    assert ends == [0, 1]  # each once, and the first to stop first
    assert texts == {0: "a ", 1: "a b c d e f"}
    assert here.link.aborted == [(here.link.opened[0].rid, 0)]  # choice 0 only, at once


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_are_returned_on_request(client, say, model, stream):
    here = client(say("one two"))
    response = here.post(PATH, {"prompt": ["a", "bc"], "return_token_ids": True, "stream": stream})
    parts = [c["choices"][0] for c in response.data()[:-1]] if stream else response.json()["choices"]
    for i, request in enumerate(here.link.opened):
        own = [part for part in parts if part["index"] == i]
        assert [part.get("prompt_token_ids") for part in own] == [request.prompt_ids] + [None] * (len(own) - 1)
        token_ids = [each for part in own for each in part["token_ids"]]
        assert token_ids == model.tokenizer.encode("one two", False)


def test_prompt_logprobs_come_with_each_choice(client, model):
    here = client(scored(model, "x"))
    body = here.post(PATH, {"prompt": "one two", "prompt_logprobs": 1, "n": 2}).json()
    request = here.link.opened[0]
    assert request.sampling.prompt_logprobs and request.sampling.logprobs == 1
    for choice in body["choices"]:
        assert choice["logprobs"] is None and choice["text"] == "x"
        first, second, *_ = choice["prompt_logprobs"]
        assert first is None and second["7"]["rank"] == 1
        assert second[str(request.prompt_ids[1])]["logprob"] == -1.0


def test_best_of_keeps_the_likeliest_on_average(client, model):
    values = [-3.0, -1.0, -2.0, -4.0]
    texts = ["three", "one", "two two two", "four"]

    def script(request):
        assert (request.sampling.n, request.sampling.logprobs) == (4, 0)
        outputs = []
        for i, text in enumerate(texts):
            ids = model.tokenizer.encode(text, False)
            lps = [TokenLogprob(values[i])] * len(ids)
            outputs.append(Output(request.rid, i, ids, "stop", logprobs=lps, usage=Usage(1, len(ids))))
        return [outputs]

    body = client(script).post(PATH, {"prompt": "a", "best_of": 4, "n": 2}).json()
    assert [(c["index"], c["text"], c["logprobs"]) for c in body["choices"]] == [
        (0, "one", None),
        (1, "two two two", None),
    ]
    num_all = sum(len(model.tokenizer.encode(text, False)) for text in texts)
    assert body["usage"]["completion_tokens"] == num_all


def test_suffix_makes_a_prompt_to_fill_the_middle(client, say, tmp_path):
    served = with_special_tags(make_tiny(tmp_path / "fim", "qwen2"), FIM)
    here = client(say("mid"))
    here.app._given_model = served
    body = {"prompt": "def f(", "suffix": "return 1<|fim_middle|>", "stop_token_ids": [9]}
    assert here.post(PATH, body).json()["choices"][0]["text"] == "mid"
    request = here.link.opened[0]
    prefix, suffix, middle, pad = (served.tokenizer.token_to_id(mark) for mark in FIM)
    ids = request.prompt_ids
    assert (ids[0], ids[-1], ids.count(suffix), ids.count(middle)) == (prefix, middle, 1, 1)
    text = served.tokenizer.decode(ids, skip_special_tokens=False)
    assert text == "<|fim_prefix|>def f(<|fim_suffix|>return 1<|fim_middle|><|fim_middle|>"
    assert request.sampling.stop_token_ids == (9, pad)
    response = here.post(PATH, {**body, "echo": True})
    assert response.status == 400 and response.json()["error"]["param"] == "suffix"
