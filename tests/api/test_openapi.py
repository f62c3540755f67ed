"""/openapi.json and /docs: complete, consistent, and made of the types that check requests."""

import re

import msgspec
import pytest

from crane.api.app import ENDPOINTS
from crane.api.bodies import ChatBody
from crane.runtime.settings import Settings


@pytest.fixture
def document(client):
    return client().get("/openapi.json").json()


def operations(document):
    return [(path, method, each) for path, methods in document["paths"].items() for method, each in methods.items()]


def schema_of(document, path):
    """The schema of what is posted to `path`."""
    body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return document["components"]["schemas"][body["$ref"].rpartition("/")[2]]


def test_every_route_is_described_once(document):
    described = {(method.upper(), path) for path, method, _ in operations(document)}
    assert described == {(each.method, re.sub(r":\w+}", "}", each.path)) for each in ENDPOINTS}
    ids = [each["operationId"] for _, _, each in operations(document)]
    assert len(set(ids)) == len(ids)
    for path, method, each in operations(document):
        assert len(each["summary"].split()) >= 2, f"{method} {path}: a summary is a short sentence"
        assert len(each["description"]) > len(each["summary"]) + 20, f"{method} {path}: a description says more"
        assert each["tags"] and "200" in each["responses"] and "500" in each["responses"]
        assert re.findall(r"{(\w+)}", path) == [p["name"] for p in each.get("parameters", []) if p["in"] == "path"]


def test_every_post_says_what_body_it_takes(document):
    missing = [path for path, method, each in operations(document)
               if method == "post" and "requestBody" not in each and path not in BODILESS]  # fmt: skip
    assert missing == []


BODILESS = ("/flush_cache", "/v1/responses/{response_id}/cancel")


def test_references_resolve(document):
    text = msgspec.json.encode(document).decode()
    names = set(re.findall(r'"\$ref":"#/components/schemas/([^"]+)"', text))
    assert names and names <= set(document["components"]["schemas"])


def test_fields_are_those_of_the_struct_with_their_bounds(document):
    schema = schema_of(document, "/v1/chat/completions")
    assert set(schema["properties"]) == set(ChatBody.__struct_fields__)
    assert "messages" in schema["required"] and schema["additionalProperties"] is False
    temperature = schema["properties"]["temperature"]["anyOf"][0]
    assert temperature == {"type": "number", "minimum": 0, "maximum": 100}


def test_fields_that_are_only_tolerated_say_so(document):
    ref = schema_of(document, "/v1/completions")["properties"]["stream_options"]["anyOf"][0]["$ref"]
    options = document["components"]["schemas"][ref.rpartition("/")[2]]["properties"]["include_obfuscation"]
    assert options["enum"] == [None, False] and "not supported" in options["description"]


def test_streams_and_errors_are_noted(document):
    responses = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert "text/event-stream" in responses["200"]["content"]
    assert {"400", "404", "413", "429", "500", "503"} <= set(responses) and "401" not in responses
    assert responses["400"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Error"}
    assert "text/event-stream" not in document["paths"]["/v1/tokenize"]["post"]["responses"]["200"]["content"]


def test_keys_are_described_when_they_are_asked_for(client):
    here = client(settings=Settings(api_key="k"))
    document = here.get("/openapi.json", headers={"x-api-key": "k"}).json()
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert chat["security"] == [{"bearer": []}, {"header": []}] and "401" in chat["responses"]
    assert "security" not in document["paths"]["/health"]["get"]


def test_the_page_shows_all_of_it_and_needs_nothing_from_elsewhere(client, document):
    response = client().get("/docs")
    assert response.status == 200 and response.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in response.headers["content-security-policy"]
    text = response.body.decode()
    for path, _, _ in operations(document):
        assert f"<code>{path}</code>" in text
    for name in document["components"]["schemas"]:
        assert f'id="{name}"' in text
    assert "max_completion_tokens" in text and "<script" not in text and "http" not in text


def test_both_are_there_before_the_model_is(client):
    from crane.runtime.types import State

    here = client(state=State("loading"))
    assert here.get("/openapi.json").status == here.get("/docs").status == 200
