"""Scores without generating: SGLang's label probabilities, and relevance of documents to queries.

A pair's relevance is the probability that the model, asked whether the document helps with the
query, answers "yes" rather than "no". Nothing is drawn at random: one prompt is computed per pair,
and both log-probabilities are read off its last position.
"""

import math
import time
import uuid
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from crane.api.bodies import Body, QueuedBody, TokenId, decode, invalid
from crane.api.chat_parser import END_THINK
from crane.api.chat_prompt import prepare_chat
from crane.api.endpoint import Context, Endpoint, Request
from crane.api.gathered import GatheredOutputs
from crane.api.queueing import claim
from crane.api.sampling import fit
from crane.api.served import ServedModel
from crane.errors import EngineError, RequestError
from crane.runtime.types import Generate, Output, SamplingParams

MAX_PAIRS = 1024
MAX_LABELS = 1000
INSTRUCTION = "Find documents that help with the query."
_QUESTION = """\
Does the document serve the task? Answer with one word, yes or no.
Task: {instruction}
Query: {query}
Document: {document}"""
_YES = ("yes", "Yes", " yes", " Yes")
_NO = ("no", "No", " no", " No")

_json = msgspec.json.Encoder().encode

Texts = str | Annotated[list[str], Meta(min_length=1, max_length=MAX_PAIRS)]


class ScoreBody(QueuedBody, kw_only=True):
    """POST /v1/score: vLLM's pairs (text_1 and text_2, or queries and documents), or SGLang's labels.

    Pairs: one with one, one with each of a list, or two lists of the same length. Labels: the
    probabilities of `label_token_ids` after query + item, among themselves with apply_softmax.
    """

    model: str | None = None
    text_1: Texts | None = None
    text_2: Texts | None = None
    queries: Texts | None = None
    documents: Texts | None = None
    instruction: str | None = None
    query: str | list[TokenId] | None = None
    items: str | Annotated[list[str | list[TokenId]], Meta(min_length=1, max_length=MAX_PAIRS)] | None = None
    label_token_ids: Annotated[list[TokenId], Meta(min_length=1, max_length=MAX_LABELS)] | None = None
    apply_softmax: bool | None = None
    item_first: bool | None = None
    user: str | None = None


class Document(Body):
    """A document to rank, given as an object."""

    text: str


class RerankBody(QueuedBody, kw_only=True):
    """POST /v1/rerank: documents in the order of their relevance to a query."""

    query: str
    documents: Annotated[list[str | Document], Meta(min_length=1, max_length=MAX_PAIRS)]
    model: str | None = None
    top_n: Annotated[int, Meta(ge=1)] | None = None
    return_documents: bool | None = None
    instruction: str | None = None
    user: str | None = None


def score(context: Context, request: Request) -> GatheredOutputs:
    """POST /v1/score: score pairs of texts, or labels. Relevance by the model's yes or no (vLLM's form), or the
    probabilities of labels after a query (SGLang's)."""
    body = decode(ScoreBody, request.body, context)
    context.model.check_name(body.model)
    pairs = {"text_1": "text_2", "queries": "documents"}
    labels = ("query", "items", "label_token_ids", "apply_softmax", "item_first")
    given = [name for name in body.__struct_fields__ if getattr(body, name) is not None]
    chosen = [name for name in (*pairs, *pairs.values(), "query", "items") if name in given]
    if not chosen:
        raise invalid("text_1", "expected text_1 and text_2, or query, items and label_token_ids")
    if chosen[0] in ("query", "items"):
        _refuse(given, "instruction", "goes with pairs of texts only")
        return _score_labels(context, body)
    left = next(left for left, right in pairs.items() if chosen[0] in (left, right))
    for name in (*pairs, *pairs.values(), *labels):
        if name not in (left, pairs[left]):
            _refuse(given, name, f"does not go with {chosen[0]}")
    first, second = getattr(body, left), getattr(body, pairs[left])
    return _score_pairs(context, body, _pairs(first, second, left, pairs[left]), pairs[left])


def rerank(context: Context, request: Request) -> GatheredOutputs:
    """POST /v1/rerank: sort documents by their relevance to a query. Asked of the model, by its yes or no."""
    body = decode(RerankBody, request.body, context)
    context.model.check_name(body.model)
    texts = [each if isinstance(each, str) else each.text for each in body.documents]
    own_id = f"rerank-{uuid.uuid4().hex}"
    judge = Judge(context.model)
    requests = judge.requests(own_id, [(body.query, text) for text in texts], body.instruction, context, "documents")

    def render(outputs: list[Output]) -> bytes:
        scores = [judge.relevance(output) for output in outputs]
        best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: body.top_n]
        results = [{"index": i, "relevance_score": scores[i]} for i in best]
        if body.return_documents is not False:
            results = [{**result, "document": {"text": texts[result["index"]]}} for result in results]
        head = {"id": own_id, "object": "rerank", "model": context.model.name}
        return _json({**head, "results": results, "usage": _usage(requests)})

    return GatheredOutputs(claim(context, body, requests), render)


class Judge:
    """Asks a model whether documents are relevant. Raises RequestError when its tokenizer cannot tell yes from no."""

    def __init__(self, model: ServedModel):
        self._model = model
        yes, no = (self._first_tokens(words) for words in (_YES, _NO))
        self._yes, self._no = sorted(yes - no), sorted(no - yes)
        if not self._yes or not self._no:
            raise RequestError("this model cannot score: its tokenizer has no tokens for yes and for no")
        self._sampling = SamplingParams(
            max_tokens=1, temperature=0.0, logprobs=0, logprob_ids=(*self._yes, *self._no)
        )

    def requests(
        self, own_id: str, pairs: list[tuple[str, str]], instruction: str | None, context: Context, field: str
    ) -> list[Generate]:
        """One request per (query, document). Raises RequestError (context_length_exceeded) naming `field`."""
        made = []
        for i, (query, document) in enumerate(pairs):
            ids = self._prompt(instruction or INSTRUCTION, query, document, context)
            made.append(Generate(f"{own_id}-{i}", ids, fit(self._sampling, len(ids), context.max_model_len, field)))
        return made

    def relevance(self, output: Output) -> float:
        """The probability of yes among yes and no, in [0, 1]."""
        return math.fsum(_probabilities(_label_logprobs(output), softmax=True)[: len(self._yes)])

    def _first_tokens(self, words: tuple[str, ...]) -> set[int]:
        return {self._model.tokenizer.encode(word, False, parse_special=False)[0] for word in words}

    def _prompt(self, instruction: str, query: str, document: str, context: Context) -> list[int]:
        """The question, up to where the answer's one word stands."""
        text = _QUESTION.format(instruction=instruction, query=query, document=document)
        encode = self._model.tokenizer.encode
        if self._model.template is None:
            return encode(text + "\nAnswer:")
        messages = [{"role": "user", "content": text}]
        chat = prepare_chat(context, messages, template_kwargs={"enable_thinking": False})
        opening = f"\n{END_THINK}\n\n" if chat.thinking_open else ""  # it thinks, whatever it is told
        opening += "<answer>\n" if chat.form.answers else ""
        return chat.ids + (encode(opening, False) if opening else [])


def _score_pairs(context: Context, body: ScoreBody, pairs: list[tuple[str, str]], field: str) -> GatheredOutputs:
    own_id = f"score-{uuid.uuid4().hex}"
    judge = Judge(context.model)
    requests = judge.requests(own_id, pairs, body.instruction, context, field)
    head = {"id": own_id, "object": "list", "created": int(time.time()), "model": context.model.name}

    def render(outputs: list[Output]) -> bytes:
        data = [
            {"index": i, "object": "score", "score": judge.relevance(output)} for i, output in enumerate(outputs)
        ]
        return _json({**head, "data": data, "usage": _usage(requests)})

    return GatheredOutputs(claim(context, body, requests), render)


def _score_labels(context: Context, body: ScoreBody) -> GatheredOutputs:
    for name in ("query", "items", "label_token_ids"):
        if getattr(body, name) is None:
            raise RequestError(f"missing field {name!r}", field=name, code="missing_field")
    context.model.check_ids(body.label_token_ids, "label_token_ids")
    labels = tuple(body.label_token_ids)
    sampling = SamplingParams(max_tokens=1, temperature=0.0, logprobs=0, logprob_ids=labels)
    own_id = f"score-{uuid.uuid4().hex}"
    requests = []
    for i, ids in enumerate(_label_prompts(context.model, body)):
        fitted = fit(sampling, len(ids), context.max_model_len, "items")
        requests.append(Generate(f"{own_id}-{i}", ids, fitted))

    def render(outputs: list[Output]) -> bytes:
        scores = [_probabilities(_label_logprobs(output), bool(body.apply_softmax)) for output in outputs]
        return _json(
            {"scores": scores, "model": context.model.name, "object": "scoring", "usage": _usage(requests)}
        )

    return GatheredOutputs(claim(context, body, requests), render)


def _label_prompts(model: ServedModel, body: ScoreBody) -> list[list[int]]:
    """query + item (the other way round with item_first) for each item, all as text or all as token ids."""
    query, items = body.query, body.items
    items = [items] if isinstance(items, str) else items
    if {type(query)} != {type(item) for item in items}:
        raise invalid("items", "expected the same as query: text with text, token ids with token ids")
    joined = [item + query if body.item_first else query + item for item in items]
    if isinstance(query, str):
        return [model.tokenizer.encode(text) for text in joined]
    model.check_ids(query, "query")
    for i, item in enumerate(items):
        model.check_ids(item, f"items[{i}]")
    return joined


def _pairs(first: Any, second: Any, left: str, right: str) -> list[tuple[str, str]]:
    for name, value in ((left, first), (right, second)):
        if value is None:
            raise RequestError(f"missing field {name!r}", field=name, code="missing_field")
    firsts, seconds = ([each] if isinstance(each, str) else each for each in (first, second))
    if len(firsts) == 1:
        firsts = firsts * len(seconds)
    if len(firsts) != len(seconds):
        raise invalid(right, f"expected as many texts as in {left} ({len(firsts)}), got {len(seconds)}")
    return list(zip(firsts, seconds))


def _refuse(given: list[str], name: str, why: str) -> None:
    if name in given:
        raise invalid(name, why)


def _label_logprobs(output: Output) -> list[float]:
    if not output.logprobs or not output.logprobs[0].ids_logprobs:
        raise EngineError("internal", "the engine sent no log-probabilities")
    return output.logprobs[0].ids_logprobs


def _probabilities(logprobs: list[float], softmax: bool) -> list[float]:
    """exp of each, or with softmax their shares of one."""
    if not softmax:
        return [math.exp(logprob) for logprob in logprobs]
    best = max(logprobs)  # compared with it, the unlikely do not all vanish
    values = [math.exp(logprob - best) if best > -math.inf else 1.0 for logprob in logprobs]
    total = math.fsum(values)
    return [value / total for value in values]


def _usage(requests: list[Generate]) -> dict[str, int]:
    num_prompt = sum(len(request.prompt_ids) for request in requests)
    return {"prompt_tokens": num_prompt, "total_tokens": num_prompt}


ENDPOINTS = (
    *(Endpoint("POST", path, score, body=ScoreBody) for path in ("/v1/score", "/score")),
    *(Endpoint("POST", path, rerank, body=RerankBody) for path in ("/v1/rerank", "/rerank", "/v2/rerank")),
)
