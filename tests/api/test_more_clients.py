"""The openai and anthropic clients on embeddings, responses, scores and messages: a real gunicorn of two
workers, a real engine, a tiny model whose template thinks."""

import base64
import json
import math
import struct

import anthropic
import openai
import pytest

from tests.api.thinker import TEMPLATE
from tests.serving import start_server
from tests.tiny import make_tiny

WORKERS = {"asgi": ("-w", "2"), "gthread": ("-w", "2", "-k", "gthread", "--threads", "20")}


@pytest.fixture(scope="module")
def thinking_path(tmp_path_factory):
    path = make_tiny(tmp_path_factory.mktemp("more") / "tiny-qwen3", "qwen3")
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return path


@pytest.fixture(scope="module", params=WORKERS)
def server(request, thinking_path):
    env = {"CRANE_MODEL_NAME": "org/tiny", "CRANE_MAX_QUEUE": "8"}
    with start_server(thinking_path, *WORKERS[request.param], env=env) as running:
        yield running


@pytest.fixture
def client(server):
    # a connection each, so that both workers get some
    headers = {"Connection": "close"}
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60, default_headers=headers
    ) as made:
        yield made


@pytest.fixture
def claude(server):
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=60) as made:
        yield made


def test_embeddings_are_unit_vectors_and_the_same_in_every_form(client):
    texts = ["The sky is blue.", "A crane is a bird."]
    reply = client.embeddings.create(model="org/tiny", input=texts)  # base64 on the wire
    floats = client.embeddings.create(model="org/tiny", input=texts, encoding_format="float")
    assert [each.index for each in reply.data] == [0, 1]
    for one, other in zip(reply.data, floats.data):
        assert len(one.embedding) == 64 and math.hypot(*one.embedding) == pytest.approx(1, abs=1e-5)
        assert one.embedding == pytest.approx(other.embedding, abs=1e-4)
    assert abs(sum(a * b for a, b in zip(*(each.embedding for each in reply.data)))) < 0.999
    short = client.embeddings.create(model="org/tiny", input=texts[0], dimensions=8)
    assert len(short.data[0].embedding) == 8 and math.hypot(*short.data[0].embedding) == pytest.approx(1, abs=1e-5)
    mean = client.embeddings.create(model="org/tiny", input=texts[0], extra_body={"pooling": "mean"})
    assert mean.data[0].embedding != pytest.approx(reply.data[0].embedding, abs=1e-3)
    assert reply.usage.prompt_tokens == reply.usage.total_tokens > 5


def test_embedding_of_one_text_does_not_depend_on_its_batch(client):
    text = "The sky is blue."
    alone = client.post("/embeddings", body={"input": text, "encoding_format": "base64"}, cast_to=dict)
    many = client.post("/embeddings", body={"input": ["a", text, "b"], "encoding_format": "base64"}, cast_to=dict)
    alone, within = (struct.unpack("<64f", base64.b64decode(data["embedding"]))
                     for data in (alone["data"][0], many["data"][1]))  # fmt: skip
    assert alone == pytest.approx(within, abs=1e-4)


def test_more_texts_than_the_queue_holds_are_embedded_in_one_request(client):
    texts = [f"text {i}" for i in range(50)]
    many = client.embeddings.create(model="org/tiny", input=texts)
    assert [each.index for each in many.data] == list(range(50))
    last = client.embeddings.create(model="org/tiny", input=texts[-1])
    assert many.data[-1].embedding == pytest.approx(last.data[0].embedding, abs=1e-4)


def test_scores_and_ranks_agree_and_repeat(client):
    documents = ["The sky is blue.", "Cranes lift things.", "12 + 30 = 42"]
    body = {"text_1": "What lifts?", "text_2": documents}
    scores = [each["score"] for each in client.post("/score", body=body, cast_to=dict)["data"]]
    assert all(0 < score < 1 for score in scores)
    ranked = client.post("/rerank", body={"query": "What lifts?", "documents": documents}, cast_to=dict)["results"]
    assert [each["index"] for each in ranked] == sorted(range(3), key=lambda i: -scores[i])
    assert [each["relevance_score"] for each in ranked] == pytest.approx(sorted(scores, reverse=True), abs=1e-4)
    labels = {"query": [1, 2], "items": [[3], [4]], "label_token_ids": [5, 6, 7]}
    shares = client.post("/score", body={**labels, "apply_softmax": True}, cast_to=dict)["scores"]
    plain = client.post("/score", body=labels, cast_to=dict)["scores"]
    for share, probabilities in zip(shares, plain):
        assert sum(share) == pytest.approx(1)
        assert [p / sum(probabilities) for p in probabilities] == pytest.approx(share, rel=1e-3)


def test_response_streams_what_it_says_at_once(client):
    fields = {"model": "org/tiny", "input": "Why is the sky blue?", "temperature": 0, "max_output_tokens": 24,
              "instructions": "Be brief."}  # fmt: skip
    plain = client.responses.create(**fields)
    assert plain.status in ("completed", "incomplete") and plain.usage.output_tokens <= 24
    with client.responses.stream(**fields) as stream:
        events = list(stream)
    kinds, final = [event.type for event in events], events[-1].response
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == f"response.{final.status}"
    assert final.output_text == plain.output_text and final.usage.output_tokens == plain.usage.output_tokens


def test_responses_are_remembered_by_every_worker(client):
    fields = {"model": "org/tiny", "temperature": 0, "max_output_tokens": 8}
    first = client.responses.create(input="Hi", **fields)
    second = client.responses.create(input="And?", previous_response_id=first.id, **fields)
    for _ in range(8):
        assert client.responses.retrieve(second.id).output_text == second.output_text
    items = client.responses.input_items.list(second.id, order="asc").data
    assert items[0].content[0].text == "Hi" and items[-1].content[0].text == "And?"
    client.responses.delete(first.id)
    for _ in range(8):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError) as raised:
        client.responses.create(input="x", previous_response_id=first.id, **fields)
    assert raised.value.code == "previous_response_not_found"


def test_output_of_a_response_is_input_of_the_next(client):
    fields = {"model": "org/tiny", "temperature": 0, "max_output_tokens": 8, "store": False}
    first = client.responses.create(input="Hi", **fields)
    items = [{"role": "user", "content": "Hi"}, *first.output, {"role": "user", "content": "And?"}]
    assert client.responses.create(input=items, **fields).object == "response"
    counted = client.responses.input_tokens.count(model="org/tiny", input=items)
    assert counted.input_tokens > 5


def test_messages_stream_what_they_say_at_once(claude):
    fields = {"model": "org/tiny", "max_tokens": 24, "system": "Be brief.", "extra_body": {"temperature": 0},
              "messages": [{"role": "user", "content": "Why is the sky blue?"}]}  # fmt: skip
    plain = claude.messages.create(**fields)
    assert plain.role == "assistant" and plain.stop_reason in ("end_turn", "max_tokens")
    with claude.messages.stream(**fields) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == "".join(block.text for block in plain.content if block.type == "text")
    assert [block.type for block in final.content] == [block.type for block in plain.content]
    assert final.usage.output_tokens == plain.usage.output_tokens
    fields = {name: fields[name] for name in ("model", "system", "messages")}
    counted = claude.messages.count_tokens(**fields)
    assert counted.input_tokens == plain.usage.input_tokens + plain.usage.cache_read_input_tokens


def test_anthropic_client_understands_errors(claude):
    message = {"role": "user", "content": "x"}
    with pytest.raises(anthropic.BadRequestError) as raised:
        claude.messages.create(model="org/tiny", max_tokens=0, messages=[message])
    assert raised.value.body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="nope", max_tokens=5, messages=[message])
