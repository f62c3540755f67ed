"""The real openai client against a real gunicorn and a real engine with a tiny model."""

import asyncio
import concurrent.futures

import openai
import pytest

from tests.serving import start_server

CHAT = [{"role": "user", "content": "Why is the sky blue?"}]
WORKERS = {"asgi": (), "gthread": ("-k", "gthread", "--threads", "40")}


@pytest.fixture(scope="module", params=WORKERS)
def server(request, tiny_path):
    env = {"CRANE_MODEL_NAME": "org/tiny", "CRANE_DTYPE": "float32"}
    with start_server(tiny_path, *WORKERS[request.param], env=env) as running:
        yield running


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def greedy(**options):
    return {"model": "org/tiny", "temperature": 0, "max_tokens": 12, **options}


def test_models(client):
    assert [model.id for model in client.models.list()] == ["org/tiny"]
    assert client.models.retrieve("org/tiny").owned_by == "crane"
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve("nope")
    assert raised.value.code == "model_not_found"


def test_chat_stream_says_the_same_as_the_plain_reply(client):
    plain = client.chat.completions.create(messages=CHAT, **greedy())
    assert plain.choices[0].finish_reason in ("stop", "length")
    assert plain.usage.total_tokens == plain.usage.prompt_tokens + plain.usage.completion_tokens
    options = greedy(stream=True, stream_options={"include_usage": True})
    chunks = list(client.chat.completions.create(messages=CHAT, **options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == plain.choices[0].message.content
    assert chunks[-1].usage == plain.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )
    assert chunks[-2].choices[0].finish_reason == plain.choices[0].finish_reason


def test_chat_with_every_switch_that_the_client_knows(client):
    reply = client.chat.completions.create(
        messages=[{"role": "developer", "content": "Be brief."}, *CHAT],
        model="org/tiny", max_completion_tokens=4, n=2, seed=7, stop=["\n\n"], logprobs=True, top_logprobs=2,
        frequency_penalty=0.1, presence_penalty=0.1, logit_bias={"5": -100}, temperature=0.9, top_p=0.9,
        user="u", metadata={"a": "b"}, store=False, service_tier="auto", response_format={"type": "text"},
        extra_body={"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1, "min_tokens": 1,
                    "ignore_eos": True},
    )  # fmt: skip
    assert [choice.index for choice in reply.choices] == [0, 1]
    for choice in reply.choices:
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
        assert all(bytes(token.bytes).decode("utf-8", "replace") == token.token for token in choice.logprobs.content)
    assert reply.usage.completion_tokens == sum(len(choice.logprobs.content) for choice in reply.choices)


def test_a_prediction_changes_the_work_and_not_the_answer(client):
    options = {"messages": CHAT, "model": "org/tiny", "max_tokens": 60, "seed": 3, "extra_body": {"ignore_eos": True}}
    plain = client.chat.completions.create(**options)
    assert plain.usage.completion_tokens_details.accepted_prediction_tokens is None
    # odd bytes of a tiny random model do not survive the way through text: a beginning of it is enough
    prediction = {"type": "content", "content": plain.choices[0].message.content}
    guessed = client.chat.completions.create(**options, prediction=prediction)
    assert guessed.choices == plain.choices
    details = guessed.usage.completion_tokens_details
    assert details.accepted_prediction_tokens > 0 and details.rejected_prediction_tokens >= 0
    chunks = list(client.chat.completions.create(
        **options, prediction=prediction, stream=True, stream_options={"include_usage": True}
    ))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == plain.choices[0].message.content
    assert chunks[-1].usage.completion_tokens_details.accepted_prediction_tokens > 0


def test_a_timeline_comes_with_the_answer_that_asks_for_it(client, server):
    options = {"messages": CHAT, **greedy()}
    whole = client.chat.completions.create(**options, extra_body={"timeline": True, "ignore_eos": True})
    (line,) = whole.timeline
    assert line["index"] == 0 and [e["event"] for e in line["events"]][:2] == ["queued", "admitted"]
    stop = whole.choices[0].message.content[4:7]  # matched by the worker: the engine's last word is waited for
    chunks = list(client.chat.completions.create(
        **options, stop=[stop], stream=True, n=2, extra_body={"timeline": True, "ignore_eos": True}
    ))
    assert [each["events"][-1]["event"] for each in chunks[-1].timeline] == ["finished"] * 2
    assert not hasattr(client.chat.completions.create(**options), "timeline")
    status, trace = server.get("/v1/trace")
    assert status == 200 and {"queued", "finished"} <= {event["name"] for event in trace["traceEvents"]}


def test_seed_repeats_and_another_seed_differs(client):
    def text(seed):
        options = {"model": "org/tiny", "max_tokens": 16, "temperature": 1.5, "seed": seed}
        return (
            client.completions.create(prompt="The sky", extra_body={"ignore_eos": True}, **options)
            .choices[0]
            .text
        )

    assert text(1) == text(1) != text(2)


def test_completions_of_every_prompt_form(client):
    tokens = client.post("/tokenize", body={"text": "The sky"}, cast_to=dict)["tokens"]
    one = client.completions.create(prompt="The sky", **greedy()).choices[0].text
    assert client.completions.create(prompt=tokens, **greedy()).choices[0].text == one
    many = client.completions.create(prompt=["The sky", "A crane"], **greedy(n=2))
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert many.choices[0].text == many.choices[1].text == one
    assert many.choices[2].text == client.completions.create(prompt="A crane", **greedy()).choices[0].text
    streamed = client.completions.create(prompt=["The sky", "A crane"], **greedy(n=2, stream=True))
    texts = dict.fromkeys(range(4), "")
    for chunk in streamed:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {choice.index: choice.text for choice in many.choices}


def test_echo_scores_the_prompt_the_same_alone_and_with_an_answer(client):
    alone = client.completions.create(prompt="The sky is blue", **greedy(max_tokens=0, echo=True, logprobs=2))
    more = client.completions.create(prompt="The sky is blue", **greedy(max_tokens=3, echo=True, logprobs=2))
    scores = alone.choices[0].logprobs
    assert alone.choices[0].text == "The sky is blue" and more.choices[0].text.startswith("The sky is blue")
    assert scores.token_logprobs[0] is None and all(score < 0 for score in scores.token_logprobs[1:])
    length = len(scores.tokens)
    assert more.choices[0].logprobs.tokens[:length] == scores.tokens
    assert more.choices[0].logprobs.token_logprobs[1:length] == pytest.approx(
        scores.token_logprobs[1:], abs=1e-4
    )


def test_stop_string_ends_the_text_before_it(client):
    whole = client.completions.create(
        prompt="The sky", **greedy(max_tokens=24, extra_body={"ignore_eos": True})
    )
    text = whole.choices[0].text
    stop = text[len(text) // 2 :][:2]
    cut = client.completions.create(
        prompt="The sky", **greedy(max_tokens=24, stop=stop, extra_body={"ignore_eos": True})
    )
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_tokenize_and_detokenize(client):
    tokens = client.post("/tokenize", body={"text": "Größe 🙂"}, cast_to=dict)
    assert tokens["count"] == len(tokens["tokens"])
    assert client.post("/detokenize", body={"tokens": tokens["tokens"]}, cast_to=dict)["text"] == "Größe 🙂"


def test_errors_arrive_as_the_clients_own_exceptions(client):
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(messages=CHAT, **greedy(top_p=7))
    assert raised.value.param == "top_p" and raised.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(prompt="a b " * 4000, **greedy(stream=True))
    assert raised.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(messages=CHAT, model="other")


def test_refused_requests_leave_the_answer_as_it_was(client):
    before = client.completions.create(prompt="The sky", **greedy()).choices[0].text
    for bad in ({"logprobs": 99}, {"logit_bias": {"999999": 1}}, {"stop": ""}, {"n": 0}):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(prompt="The sky", **greedy(**bad))
    assert client.completions.create(prompt="The sky", **greedy()).choices[0].text == before


def test_health_and_stats(server, client):
    assert server.get("/health") == (200, {"status": "ok"})
    status, stats = server.get("/v1/stats")
    assert status == 200 and stats["completed_requests"] >= 0 and stats["free_pages"] <= stats["num_pages"]


def test_32_clients_at_once_each_get_their_own_answer(server):
    prompts = [f"The number {i} is" for i in range(32)]

    def plain(prompt):
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            return client.completions.create(prompt=prompt, **greedy()).choices[0].text

    async def stream(client, prompt):
        chunks = await client.completions.create(prompt=prompt, **greedy(stream=True))
        return "".join([chunk.choices[0].text async for chunk in chunks])

    async def all_streams():
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60
        ) as client:
            return await asyncio.gather(*(stream(client, prompt) for prompt in prompts))

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        at_once = list(pool.map(plain, prompts))
    assert asyncio.run(all_streams()) == at_once
    assert at_once[:2] == [plain(prompt) for prompt in prompts[:2]]
    stats = server.get("/v1/stats")[1]
    assert stats["active_sequences"] == 0 and stats["free_pages"] == stats["num_pages"]


def test_client_that_leaves_frees_its_pages(server, client):
    options = {"model": "org/tiny", "max_tokens": 900, "extra_body": {"ignore_eos": True}}
    stream = client.completions.create(prompt="The sky", stream=True, **options)
    next(iter(stream))
    aborted = server.get("/v1/stats")[1]["aborted_requests"]
    stream.close()
    for _ in range(100):
        stats = server.get("/v1/stats")[1]
        if stats["aborted_requests"] == aborted + 1 and stats["free_pages"] == stats["num_pages"]:
            return
    raise AssertionError(f"still running: {stats}")
