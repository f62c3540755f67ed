"""OpenAI's embeddings: the model's last hidden state, pooled over a text and of length one."""

import base64
import math
import struct
import uuid
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from crane.api.bodies import QueuedBody, TokenId, decode, invalid
from crane.api.endpoint import Context, Endpoint, Request
from crane.api.gathered import GatheredOutputs
from crane.api.queueing import claim
from crane.api.sampling import fit
from crane.errors import EngineError
from crane.runtime.types import Generate, Output, SamplingParams

MAX_INPUTS = 2048  # OpenAI's own limit
_NO_TOKENS = SamplingParams(max_tokens=0)

_json = msgspec.json.Encoder().encode


class EmbeddingBody(QueuedBody, kw_only=True):
    """POST /v1/embeddings. input: text, token ids, or a list of either.

    dimensions: only the first so many, brought to length one again; of use with models that were
    trained for it. pooling: the last token's state (default) or the mean over all tokens.
    normalize: false leaves vectors as the model made them.
    """

    input: str | Annotated[list[str | int | list[TokenId]], Meta(min_length=1)]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    pooling: Literal["last", "mean"] | None = None
    normalize: bool | None = None
    user: str | None = None


def embeddings(context: Context, request: Request) -> GatheredOutputs:
    """POST /v1/embeddings: embed texts. The last hidden state, pooled (last token or mean), of length one, cut to
    `dimensions` when given; as numbers or base64."""
    body = decode(EmbeddingBody, request.body, context)
    model = context.model
    model.check_name(body.model)
    if body.dimensions is not None and body.dimensions > model.config.hidden_size:
        raise invalid("dimensions", f"expected at most {model.config.hidden_size}, got {body.dimensions}")
    inputs = _inputs(body, context)
    for ids in inputs:
        fit(_NO_TOKENS, len(ids), context.max_model_len, "input")
    own_id = f"embd-{uuid.uuid4().hex}"
    requests = [
        Generate(f"{own_id}-{i}", ids, _NO_TOKENS, pooling=body.pooling or "last")
        for i, ids in enumerate(inputs)
    ]
    num_tokens = sum(map(len, inputs))

    def render(outputs: list[Output]) -> bytes:
        data = [
            {"object": "embedding", "index": i, "embedding": _shaped(output.embedding, body)}
            for i, output in enumerate(outputs)
        ]
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        return _json({"object": "list", "data": data, "model": model.name, "usage": usage})

    return GatheredOutputs(claim(context, body, requests), render)


def unit(values: list[float]) -> list[float]:
    """`values` scaled to length one. Raises EngineError when they have no length."""
    length = math.sqrt(math.fsum(value * value for value in values))
    if not 0 < length < math.inf:
        raise EngineError("internal", f"these embeddings cannot be normalised: their length is {length}")
    return [value / length for value in values]


def _shaped(values: list[float], body: EmbeddingBody) -> list[float] | str:
    if values is None:
        raise EngineError("internal", "the engine sent no embedding")
    values = values[: body.dimensions]
    if body.normalize is not False:
        values = unit(values)
    if body.encoding_format == "base64":
        return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
    return values


def _inputs(body: EmbeddingBody, context: Context) -> list[list[int]]:
    """The token ids of each input."""
    given, model = body.input, context.model
    if isinstance(given, str):
        given = [given]
    kinds = {type(item) for item in given}
    if len(kinds) != 1:
        raise invalid("input", "expected strings, token ids or lists of token ids, got a mixture")
    lists = [given] if kinds == {int} else given
    if len(lists) > MAX_INPUTS:
        raise invalid("input", f"expected at most {MAX_INPUTS} inputs, got {len(lists)}")
    if kinds == {str}:
        return [model.tokenizer.encode(text) for text in lists]
    for i, ids in enumerate(lists):
        model.check_ids(ids, "input" if kinds == {int} else f"input[{i}]")
    return lists


ENDPOINTS = (Endpoint("POST", "/v1/embeddings", embeddings, body=EmbeddingBody),)
