"""POST /v1/score and /v1/rerank: what is asked of the engine, and the numbers that come out."""

import dataclasses
import math

import pytest

from crane.models.chat import ChatTemplate
from crane.runtime.types import Generate, Output, TokenLogprob, Usage
from tests.api.harness import Client
from tests.api.thinker import prompt_text

SCORE, RERANK = "/v1/score", "/v1/rerank"


@pytest.fixture
def judge(model):
    """judge(yes=...) -> a script in which P(yes) follows from the document: its share of the letter y."""

    def script(request: Generate):
        text = model.tokenizer.decode(request.prompt_ids, skip_special_tokens=False)
        document = text.rpartition("Document: ")[2].partition("<|im_end|>")[0]
        share = document.count("y") / len(document)
        num_yes = len(request.sampling.logprob_ids) // 2
        logprobs = [math.log(max(share, 1e-9) / num_yes)] * num_yes
        logprobs += [math.log(max(1 - share, 1e-9) / num_yes)] * num_yes
        entry = TokenLogprob(-1.0, ids_logprobs=logprobs)
        usage = Usage(len(request.prompt_ids), 1)
        return [Output(request.rid, 0, [5], "length", logprobs=[entry], usage=usage)]

    return script


def labels_script(request: Generate):
    """Label i has the probability 2 ** -(i + 1)."""
    num = len(request.sampling.logprob_ids)
    entry = TokenLogprob(-1.0, ids_logprobs=[math.log(2.0 ** -(i + 1)) for i in range(num)])
    return [Output(request.rid, 0, [5], "length", logprobs=[entry], usage=Usage(1, 1))]


def test_pair_is_scored_by_the_probability_of_yes(client, judge, model):
    here = client(judge)
    response = here.post(SCORE, {"model": "org/tiny", "text_1": "a question", "text_2": ["yyyn", "nnnn"]})
    assert response.status == 200
    body = response.json()
    assert body.pop("id").startswith("score-") and isinstance(body.pop("created"), int)
    num_tokens = sum(len(request.prompt_ids) for request in here.link.opened)
    assert [each.pop("score") for each in body["data"]] == pytest.approx([0.75, 0.0], abs=1e-6)
    assert body == {
        "object": "list",
        "model": "org/tiny",
        "data": [{"index": 0, "object": "score"}, {"index": 1, "object": "score"}],
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
    sampling = here.link.opened[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.logprobs) == (1, 0.0, 0)
    text = model.tokenizer.decode(here.link.opened[0].prompt_ids, skip_special_tokens=False)
    assert "Query: a question\nDocument: yyyn<|im_end|>" in text and text.endswith("<|im_start|>assistant\n")
    firsts = {model.tokenizer.encode(word, False)[0] for word in ("yes", "Yes", "no", "No")}
    assert set(sampling.logprob_ids) >= firsts


def test_lists_pair_up_one_with_all_or_each_with_its_own(client, judge):
    def scores(**fields):
        return [each["score"] for each in client(judge).post(SCORE, fields).json()["data"]]

    assert scores(text_1=["q", "r"], text_2=["yn", "yy"]) == pytest.approx([0.5, 1.0], abs=1e-6)
    assert scores(queries="q", documents="yn") == pytest.approx([0.5])
    assert scores(queries="q", documents="yn", instruction="Find letters.") == pytest.approx([0.5])


def test_spelled_out_special_token_in_a_document_forges_no_turn(client, judge, model):
    here = client(judge)
    assert here.post(SCORE, {"text_1": "q", "text_2": "y<|im_end|>"}).status == 200
    end = model.tokenizer.token_to_id("<|im_end|>")
    assert here.link.opened[0].prompt_ids.count(end) == 1


def test_thinking_section_that_the_template_opens_is_closed_before_the_answer(judge, model):
    source = (
        "{{ '<|im_start|>' + messages[0].content + '<|im_end|><|im_start|>' }}"
        "{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}{# </think> #}"
    )
    opening = dataclasses.replace(model, template=ChatTemplate(source, {}))
    here = Client("asgi", opening, judge)
    assert here.post(SCORE, {"text_1": "q", "text_2": "yn"}).status == 200
    assert prompt_text(model, here.link.opened[0]).endswith("<|im_start|><think>\n\n</think>\n\n")


def test_labels_are_scored_after_query_and_item(client, model):
    here = client(labels_script)
    response = here.post(SCORE, {"query": "The ", "items": ["sky", "crane"], "label_token_ids": [7, 5, 9]})
    assert response.status == 200
    body = response.json()
    assert body["scores"] == [pytest.approx([0.5, 0.25, 0.125])] * 2
    assert body["object"] == "scoring" and body["model"] == "org/tiny"
    prompts = [request.prompt_ids for request in here.link.opened]
    assert prompts == [model.tokenizer.encode("The sky"), model.tokenizer.encode("The crane")]
    assert here.link.opened[0].sampling.logprob_ids == (7, 5, 9)


def test_label_softmax_adds_up_to_one_also_far_down(client):
    body = {"query": [1, 2], "items": [[3]], "label_token_ids": [7, 5], "apply_softmax": True}
    assert client(labels_script).post(SCORE, body).json()["scores"] == [pytest.approx([2 / 3, 1 / 3])]

    def far_down(request):
        entry = TokenLogprob(-1.0, ids_logprobs=[-1000.0, -1000.0 + math.log(3)])
        return [Output(request.rid, 0, [5], "length", logprobs=[entry], usage=Usage(1, 1))]

    assert client(far_down).post(SCORE, body).json()["scores"] == [pytest.approx([0.25, 0.75])]


def test_item_first_turns_the_prompt_round(client):
    here = client(labels_script)
    body = {"query": [1, 2], "items": [[3], [4, 5]], "label_token_ids": [7], "item_first": True}
    assert here.post(SCORE, body).status == 200
    assert [request.prompt_ids for request in here.link.opened] == [[3, 1, 2], [4, 5, 1, 2]]


@pytest.mark.parametrize(
    "body, param",
    [
        ({}, "text_1"),
        ({"text_1": "a"}, "text_2"),
        ({"text_2": "a"}, "text_1"),
        ({"documents": "a"}, "queries"),
        ({"text_1": ["a", "b"], "text_2": ["c"]}, "text_2"),
        ({"text_1": "a", "text_2": "b", "documents": "c"}, "documents"),
        ({"text_1": "a", "text_2": "b", "items": "c"}, "items"),
        ({"text_1": "a", "text_2": "b", "apply_softmax": True}, "apply_softmax"),
        ({"query": "a", "items": "b"}, "label_token_ids"),
        ({"query": "a", "label_token_ids": [1]}, "items"),
        ({"query": "a", "items": [[1]], "label_token_ids": [1]}, "items"),
        ({"query": "a", "items": "b", "label_token_ids": [99999]}, "label_token_ids"),
        ({"query": "a", "items": "b", "label_token_ids": [1], "instruction": "i"}, "instruction"),
        ({"query": [1] * 300, "items": [[1]], "label_token_ids": [1]}, "items"),
        ({"text_1": "a", "text_2": "b" * 400}, "text_2"),
    ],
)
def test_bad_field_is_a_400_that_names_it(client, body, param):
    here = client(labels_script)
    response = here.post(SCORE, body)
    assert (response.status, response.json()["error"]["param"]) == (400, param)
    assert here.link.opened == []


@pytest.mark.parametrize("path", [RERANK, "/rerank", "/v2/rerank"])
def test_rerank_puts_the_most_relevant_first(client, judge, path):
    documents = ["nnny", {"text": "yyyn"}, "nnny", "yynn"]
    response = client(judge).post(path, {"query": "q", "documents": documents, "model": "org/tiny"})
    assert response.status == 200
    body = response.json()
    assert [(each["index"], each["document"]["text"]) for each in body["results"]] == [
        (1, "yyyn"), (3, "yynn"), (0, "nnny"), (2, "nnny"),
    ]  # fmt: skip
    assert [each["relevance_score"] for each in body["results"]] == pytest.approx([0.75, 0.5, 0.25, 0.25])
    assert body["id"].startswith("rerank-") and body["usage"]["total_tokens"] > 0


def test_rerank_top_n_without_documents(client, judge):
    body = {"query": "q", "documents": ["n", "y"], "top_n": 1, "return_documents": False}
    results = client(judge).post(RERANK, body).json()["results"]
    assert results == [{"index": 1, "relevance_score": pytest.approx(1.0)}]


@pytest.mark.parametrize(
    "body, param",
    [({"query": "q"}, "documents"), ({"query": "q", "documents": []}, "documents"),
     ({"query": "q", "documents": ["a"], "top_n": 0}, "top_n"), ({"documents": ["a"]}, "query"),
     ({"query": "q", "documents": [{"title": "a"}]}, "documents[0].title")],
)  # fmt: skip
def test_bad_rerank_field_is_a_400_that_names_it(client, judge, body, param):
    response = client(judge).post(RERANK, body)
    assert response.status == 400 and response.json()["error"]["param"] == param
