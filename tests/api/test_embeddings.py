"""POST /v1/embeddings: what reaches the engine, and vectors as clients read them."""

import base64
import math
import struct

import pytest

from crane.runtime.types import Generate, Output, Usage

PATH = "/v1/embeddings"
VECTORS = {"A crane": [3.0, 0.0, 4.0, 0.0], "The sky": [1.0, 2.0, 2.0, 4.0]}


@pytest.fixture
def embed(model):
    """A script that answers with the vector of the text, else one of ones."""
    by_ids = {tuple(model.tokenizer.encode(text)): vector for text, vector in VECTORS.items()}

    def script(request: Generate):
        vector = by_ids.get(tuple(request.prompt_ids), [1.0] * 4)
        usage = Usage(len(request.prompt_ids), 0)
        return [Output(request.rid, 0, [], "length", usage=usage, embedding=vector)]

    return script


def test_reply_has_openais_shape_and_unit_vectors(client, embed, model):
    here = client(embed)
    response = here.post(PATH, {"input": ["A crane", "The sky"], "model": "org/tiny", "user": "u"})
    assert response.status == 200
    num_tokens = sum(len(model.tokenizer.encode(text)) for text in VECTORS)
    assert response.json() == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [0.6, 0.0, 0.8, 0.0]},
            {"object": "embedding", "index": 1, "embedding": [0.2, 0.4, 0.4, 0.8]},
        ],
        "model": "org/tiny",
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
    assert [request.pooling for request in here.link.opened] == ["last", "last"]
    assert all(request.sampling.max_tokens == 0 for request in here.link.opened)


def test_every_input_form_gives_the_same_vector(client, embed, model):
    ids = model.tokenizer.encode("The sky")
    forms = ["The sky", ["The sky"], ids, [ids]]
    answers = [client(embed).post(PATH, {"input": form}).json()["data"] for form in forms]
    assert answers[0][0]["embedding"] == [0.2, 0.4, 0.4, 0.8]
    assert answers == [answers[0]] * 4


def test_dimensions_cut_and_bring_back_to_length_one(client, embed):
    vector = client(embed).post(PATH, {"input": "The sky", "dimensions": 3}).json()["data"][0]["embedding"]
    assert vector == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    raw = {"input": "The sky", "dimensions": 3, "normalize": False}
    assert client(embed).post(PATH, raw).json()["data"][0]["embedding"] == [1.0, 2.0, 2.0]


def test_base64_holds_the_same_floats(client, embed):
    text = client(embed).post(PATH, {"input": "The sky", "encoding_format": "base64"}).json()["data"][0]["embedding"]
    assert struct.unpack("<4f", base64.b64decode(text)) == pytest.approx([0.2, 0.4, 0.4, 0.8], rel=1e-6)


def test_pooling_mean_is_asked_of_the_engine(client, embed):
    here = client(embed)
    assert here.post(PATH, {"input": "x", "pooling": "mean"}).status == 200
    assert here.link.opened[0].pooling == "mean"


@pytest.mark.parametrize(
    "body, param",
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["a", 1]}, "input"),
        ({"input": [1, 100_000]}, "input"),
        ({"input": [1] * 300}, "input"),
        ({"input": "x", "dimensions": 65}, "dimensions"),
        ({"input": "x", "dimensions": 0}, "dimensions"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "x", "pooling": "max"}, "pooling"),
        ({"input": "x", "stream": True}, "stream"),
    ],
)
def test_bad_field_is_a_400_that_names_it(client, embed, body, param):
    here = client(embed)
    response = here.post(PATH, body)
    assert (response.status, response.json()["error"]["param"]) == (400, param)
    assert here.link.opened == []


@pytest.mark.parametrize(
    "ending, status",
    [({"finish_reason": "error", "error": "boom"}, 500), ({"finish_reason": "error", "error": "engine_lost"}, 503),
     ({"finish_reason": "abort"}, 409), ({"finish_reason": "length", "embedding": [0.0] * 4}, 500),
     ({"finish_reason": "length", "embedding": [math.nan] * 4}, 500), ({"finish_reason": "length"}, 500)],
)  # fmt: skip
def test_what_the_engine_could_not_finish_is_an_error(client, ending, status):
    here = client(lambda request: [Output(request.rid, 0, [], **ending)])
    response = here.post(PATH, {"input": "x"})
    assert response.status == status and "error" in response.json()


def test_client_that_leaves_ends_its_requests(client):
    here = client(lambda request: ["never"])
    here.post(PATH, {"input": ["x", "y"]}, leave_after=0)
    assert sorted(here.link.closed) == sorted(request.rid for request in here.link.opened)
