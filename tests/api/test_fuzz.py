"""Bodies that /openapi.json allows, made at random: none may break the server."""

import json
import random

import msgspec
import pytest

from crane.api.app import ENDPOINTS
from crane.errors import EngineError
from crane.runtime.types import Plan
from tests.api.harness import Client

PATHS = sorted({endpoint.path for endpoint in ENDPOINTS if endpoint.body and endpoint.method == "POST"})
TEXTS = ("", "a", "hello world", "é\u2028", "\x00", "<|im_end|>", '{"a": 1}', "[a-z]+", "tiny", "auto")


class Maker:
    """Random values of JSON schemas, as far as msgspec writes them."""

    def __init__(self, schemas: dict, seed: int):
        self._schemas = schemas
        self._random = random.Random(seed)

    def make(self, schema: dict, depth: int = 0):
        pick = self._random.choice
        if "$ref" in schema:
            return self.make(self._schemas[schema["$ref"].rpartition("/")[2]], depth)
        for union in ("anyOf", "oneOf"):
            if union in schema:
                return self.make(pick(schema[union]), depth)
        if "enum" in schema:
            return pick(schema["enum"])
        kind = schema.get("type")
        if kind == "object":
            return self._object(schema, depth)
        if kind == "array":
            low = schema.get("minItems", 0)
            items = schema.get("items", {})
            return [self.make(items, depth + 1) for _ in range(self._random.randint(low, max(low, 3 - depth)))]
        if kind in ("integer", "number"):
            return self._number(schema, kind)
        if kind == "string":
            texts = [text for text in TEXTS if schema.get("minLength", 0) <= len(text) <= schema.get("maxLength", 99)]
            return pick(texts)
        return {"boolean": pick((True, False)), "null": None}.get(kind, pick((None, 1, "a", [], {}, True)))

    def _object(self, schema: dict, depth: int) -> dict:
        required = schema.get("required", ())
        made = {}
        for name, each in schema.get("properties", {}).items():
            if name in required or self._random.random() < 0.25:
                made[name] = self.make(each, depth + 1)
        if "properties" not in schema and depth < 4:
            more = schema.get("additionalProperties")
            key = self._random.choice(("1", "type", "name", "text"))
            made[key] = self.make(more if isinstance(more, dict) else {}, depth + 1)
        return made

    def _number(self, schema: dict, kind: str):
        low = schema.get("minimum", schema.get("exclusiveMinimum", -3))
        high = schema.get("maximum", schema.get("exclusiveMaximum", max(low, 0) + 40))
        value = self._random.choice((low, high, 1, self._random.uniform(low, min(high, low + 300))))
        value = min(max(value, low), high)
        return int(value) if kind == "integer" else float(value)


@pytest.mark.parametrize("path", PATHS)
def test_what_the_schema_allows_is_answered(model, path):
    """By an answer, or a refusal of the request or of a full engine."""
    here = Client("wsgi", model, lambda request: [EngineError("queue_full", "full")], answer=ANSWERS.get(path, {}))
    document = here.get("/openapi.json").json()
    schema = document["paths"][path.replace(":path}", "}")]["post"]["requestBody"]["content"]["application/json"]
    taken = 0
    for seed in range(300):
        body = Maker(document["components"]["schemas"], seed).make(schema["schema"])
        if isinstance(body, dict) and "model" in body:
            body["model"] = model.name
        response = here.post(path, body)
        # SGLang says 503 of a full engine
        assert response.status in (200, 400, 404, 429, 503), (response.status, response.body, json.dumps(body))
        taken += response.status in (200, 429, 503)
    assert taken or path in RARELY_TAKEN, "no body was taken: the schema says too little"


RARELY_TAKEN = ()
ANSWERS = {"/v1/plan": [msgspec.to_builtins(Plan(1, 0, 1, True, 0, 9))]}
