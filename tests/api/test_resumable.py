"""Numbered events, and the same events again from the middle, with an engine that follows a script."""

import pytest

from crane.runtime.settings import Settings
from tests.api.harness import Client, speak
from tests.api.talk import CHAT, ROOMY, TOOLS, talking
from tests.api.test_tools import CALL, EOS

TEXT = f"Let me see. <tool_call>\n{CALL}\n</tool_call>"


@pytest.fixture(params=["asgi", "wsgi"])
def here(request, model):
    served = talking(model, thinks=False)
    return Client(request.param, served, lambda wanted: says(served, wanted), state=ROOMY)


def says(served, wanted):
    each = [speak(served.tokenizer, TEXT, wanted, index=i, eos=EOS) for i in range(wanted.sampling.n)]
    return [list(outputs) for outputs in zip(*each)]


def body(**extra):
    return {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "resumable": True, **extra}


def events(response):
    """[(id, data)] of every event."""
    found = []
    for block in response.body.decode().split("\n\n")[:-1]:
        head, _, data = block.partition("\n")
        assert head.startswith("id: ") and data.startswith("data: ")
        found.append((head[4:], data))
    return found


def test_events_are_numbered_and_any_later_part_of_them_can_be_had_again(here):
    options = body(tools=TOOLS, n=2, stream_options={"include_usage": True}, return_token_ids=True)
    first = here.post(CHAT, options)
    assert first.status == 200 and first.headers["content-type"].startswith("text/event-stream")
    all_events = events(first)
    stream_id = all_events[0][0].rpartition(":")[0]
    assert [name for name, _ in all_events] == [f"{stream_id}:{i + 1}" for i in range(len(all_events))]
    assert all_events[-1][1] == "data: [DONE]" and "call_" in first.body.decode() and stream_id in all_events[0][1]
    (request,) = here.link.opened
    here.link.answer = request.journal
    for known in (0, 1, 7, len(all_events) - 1, len(all_events)):
        event_id = {"last-event-id": f"{stream_id}:{known}"}
        for again in (here.get(f"/v1/streams/{stream_id}", headers=event_id), here.post(CHAT, {}, headers=event_id),
                      here.get(f"/v1/streams/{stream_id}?after={known}")):  # fmt: skip
            assert again.status == 200 and events(again) == all_events[known:]
    assert here.link.calls[-1] == ("journal", stream_id) and here.link.resumed[-1].rid == stream_id
    assert len(here.link.opened) == 1
    assert events(here.get(f"/v1/streams/{stream_id}")) == all_events


def test_a_stream_that_does_not_ask_for_it_has_no_ids(here):
    plain = here.post(CHAT, {"messages": [{"role": "user", "content": "Hi"}], "stream": True})
    assert b"id: " not in plain.body.replace(b'"id": ', b"") and here.link.opened[0].journal is None


@pytest.mark.parametrize("event_id", ["chatcmpl-1:5", "5", "nonsense", "a:b:c", "chatcmpl-1:-3"])
def test_a_stream_that_is_not_there_is_a_404_and_never_another_answer(here, event_id):
    here.link.answer = None
    answer = here.post(CHAT, body(), headers={"last-event-id": event_id})
    assert answer.status == 404 and answer.json()["error"]["code"] == "stream_not_found"
    assert here.link.opened == here.link.resumed == []


def test_what_cannot_be_resumed_is_refused_by_name(here):
    for path, extra in ((CHAT, {"stream": False}), ("/v1/completions", {"prompt": ["a", "b"]})):
        given = {**body(), **extra}
        if "prompt" in extra:
            del given["messages"]
        answer = here.post(path, given)
        assert answer.status == 400 and answer.json()["error"]["param"] == "resumable"
    answer = here.get("/v1/streams/x?after=-1")
    assert answer.status == 400 and answer.json()["error"]["param"] == "after"
    answer = here.get("/v1/streams/chatcmpl-2", headers={"last-event-id": "chatcmpl-1:3"})
    assert answer.status == 400 and "another stream" in answer.json()["error"]["message"]
    assert here.link.opened == []


def test_looking_at_the_head_of_a_stream_takes_it_from_nobody(here):
    answer = here.request("HEAD", "/v1/streams/chatcmpl-1")
    assert answer.status == 405 and here.link.calls == here.link.resumed == []


def test_a_stream_of_another_key_is_not_there(client, model):
    here = client(lambda request: speak(model.tokenizer, "Hi", request), settings=Settings(api_key="one,two"))
    first = here.post(CHAT, body(), headers={"authorization": "Bearer one"})
    stream_id = events(first)[0][0].rpartition(":")[0]
    here.link.answer = here.link.opened[0].journal
    assert here.get(f"/v1/streams/{stream_id}").status == 401
    assert here.get(f"/v1/streams/{stream_id}", headers={"authorization": "Bearer two"}).status == 404
    again = here.get(f"/v1/streams/{stream_id}", headers={"authorization": "Bearer one"})
    assert again.body == first.body
