"""Links, the election and the engine process, with an engine that has no model (`tests.fake_engine`)."""

import asyncio
import contextlib
import dataclasses
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from crane import __version__
from crane.errors import EngineError, ModelError, SettingsError
from crane.runtime import client, launch
from crane.runtime.client import Link, LinkThread
from crane.runtime.settings import Settings
from crane.runtime.types import Generate, Hello, SamplingParams, State
from crane.runtime.wire import PROTOCOL, FrameReader, pack
from tests.fake_engine import BREAK_ADD, BREAK_EVERY_STEP, BREAK_STEP, FLOOD, REFUSE, STALL

FAKE = (sys.executable, "-m", "tests.fake_engine")
LONG = 100_000


class Scene:
    """One arbiter, its settings, and the links a test opens. Nothing of it survives the test."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.arbiter = subprocess.Popen(["sleep", "600"])
        self.settings = Settings(model_path=str(folder), linger_s=0.3, graceful_timeout_s=5)
        self.halts: list[str] = []
        self.links: list[Link] = []

    def link(self, **options) -> Link:
        options = {"arbiter_pid": self.arbiter.pid, "command": FAKE, "on_halt": self.halts.append, **options}
        link = Link(self.settings, **options)
        self.links.append(link)
        return link

    async def ready(self, count: int = 1) -> list[Link]:
        links = [self.link() for _ in range(count)]
        for link in links:
            link.start()
        for link in links:
            await link.ready(10)
        return links

    def say(self, name: str, text: str = "yes") -> None:
        (self.folder / name).write_text(text)

    @property
    def starts(self) -> list[int]:
        path = self.folder / "starts"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    @property
    def place(self) -> launch.Meeting:
        return launch.meeting(self.settings, self.arbiter.pid)

    def clean(self) -> None:
        for process in (self.arbiter.pid, *self.starts):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.arbiter.wait()
        for path in launch.run_dir().glob(f"{self.arbiter.pid}-*"):
            path.unlink(missing_ok=True)


@pytest.fixture
def scene(tmp_path):
    made = Scene(tmp_path)
    yield made
    made.clean()


def play(scene: Scene, script) -> None:
    """Run an async test, then stop its links."""

    async def whole():
        try:
            await asyncio.wait_for(script(), 30)
        finally:
            for link in scene.links:
                await link.stop()

    asyncio.run(whole())


def request(rid: str, count: int = 3, kind: int = 1, n: int = 1) -> Generate:
    return Generate(rid, [kind], SamplingParams(max_tokens=count, n=n))


async def collect(stream) -> list:
    outputs = []
    while batch := await stream.next():
        outputs += batch
    return outputs


async def until(condition, timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


def fake(*arguments: str) -> subprocess.CompletedProcess:
    """An engine process run to its end."""
    return subprocess.run([*FAKE, *arguments], capture_output=True, text=True, timeout=30)


def gone(pid: int) -> bool:
    """Whether the process has ended; one that nobody has waited for yet counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):  # the second where it ends between opening and reading
        return True


def test_links_of_one_arbiter_share_one_engine_and_get_their_own_outputs(scene):
    async def script():
        links = await scene.ready(3)
        assert len({link.state.info.pid for link in links}) == 1
        streams = [link.open([request(f"r{i}", 5, n=2)]) for i, link in enumerate(links)]
        for i, stream in enumerate(streams):
            await stream.accepted()
            outputs = await collect(stream)
            assert {output.rid for output in outputs} == {f"r{i}"}
            for index in (0, 1):
                mine = [output for output in outputs if output.index == index]
                assert [token for output in mine for token in output.token_ids] == [0, 1, 2, 3, 4]
                assert mine[-1].finish_reason == "length" and mine[-1].usage.completion_tokens == 5
            assert stream.finished and await stream.next() == []
        assert len(scene.starts) == 1

    play(scene, script)


def test_another_model_or_arbiter_means_another_engine_but_another_port_does_not(scene, tmp_path):
    place = scene.place
    other = tmp_path / "other"
    assert launch.meeting(Settings(model_path=str(other)), scene.arbiter.pid).socket != place.socket
    assert launch.meeting(scene.settings, os.getpid()).socket != place.socket
    api_only = Settings(model_path=str(scene.folder), linger_s=0.3, graceful_timeout_s=5, port=1, workers=4)
    assert launch.meeting(api_only, scene.arbiter.pid) == place


def test_the_engine_answers_while_it_loads_and_tells_how_far_it_is(scene):
    scene.say("slow", "1.0")

    async def script():
        link = scene.link()
        states = []
        link.on_state.append(states.append)
        with pytest.raises(EngineError, match="loading") as refused:
            link.open([request("early")])
        assert refused.value.code == "loading" and refused.value.retry_after_s
        link.start()
        await until(lambda: link.state.status == "loading" and link.state.loaded_bytes)
        with pytest.raises(EngineError) as refused:
            link.open([request("early")])
        assert refused.value.code == "loading"
        with pytest.raises(EngineError):
            await link.call("stats")
        info = await link.ready(10)
        assert info.pid == scene.starts[0]
        sizes = [state.loaded_bytes for state in states if state.status == "loading"]
        assert len(sizes) > 4 and sizes == sorted(sizes)

    play(scene, script)


def test_a_killed_engine_fails_every_open_stream_at_once_and_a_new_one_serves(scene):
    async def script():
        links = await scene.ready(2)
        groups = [[request(f"r{i}", LONG, n=2), request(f"s{i}", LONG)] for i in range(2)]
        streams = [link.open(group) for link, group in zip(links, groups, strict=True)]
        for stream in streams:
            await stream.accepted()
            await stream.next()
        pid = links[0].state.info.pid
        os.kill(pid, signal.SIGKILL)
        started = time.monotonic()
        for stream in streams:
            outputs = await collect(stream)
            lost = [output for output in outputs if output.finish_reason == "error"]
            assert sorted((output.rid[0], output.index) for output in lost) == [("r", 0), ("r", 1), ("s", 0)]
            assert "engine_lost" in outputs[-1].error
        assert time.monotonic() - started < 0.5
        assert {link.state.status for link in links} == {"lost"}
        for link in links:
            assert (await link.ready(10)).pid != pid
        again = links[1].open([request("r0")])
        assert len(await collect(again)) == 3
        assert len(scene.starts) == 2

    play(scene, script)


def test_a_request_that_was_not_accepted_yet_is_refused_when_the_engine_dies(scene):
    async def script():
        (link,) = await scene.ready()
        os.kill(link.state.info.pid, signal.SIGSTOP)
        stream = link.open([request("r")])
        os.kill(link.state.info.pid, signal.SIGKILL)
        with pytest.raises(EngineError) as refused:
            await stream.accepted()
        assert refused.value.code == "lost"

    play(scene, script)


def test_a_link_that_ends_aborts_its_own_requests_only(scene):
    async def script():
        one, two = await scene.ready(2)
        mine, other = one.open([request("mine", LONG)]), two.open([request("other", LONG)])
        await mine.next()
        await other.next()
        assert (await two.call("stats"))["active_sequences"] == 2
        await one.stop()
        async with asyncio.timeout(5):
            while (await two.call("stats"))["active_sequences"] != 1:
                await asyncio.sleep(0.01)
        assert (await other.next())[0].finish_reason is None

    play(scene, script)


def test_any_link_may_abort_and_the_owner_gets_the_last_output(scene):
    async def script():
        one, two = await scene.ready(2)
        streams = [one.open([request(rid, LONG)]) for rid in "abc"]
        for stream in streams:
            await stream.accepted()
        two.abort("nobody's")
        two.abort("a")
        assert (await collect(streams[0]))[-1].finish_reason == "abort"
        assert not streams[1].finished
        two.abort(None)
        for stream in streams[1:]:
            assert (await collect(stream))[-1].finish_reason == "abort"

    play(scene, script)


def test_any_link_may_abort_all_requests_whose_ids_begin_so(scene):
    async def script():
        one, two = await scene.ready(2)
        streams = {rid: one.open([request(rid, LONG)]) for rid in ("a_0", "a_1", "b_0", "b_1")}
        for stream in streams.values():
            await stream.accepted()
        assert await two.call("abort", ["nobody's", ""]) == 0
        assert await two.call("abort", ["a", ""]) == 2
        assert (await collect(streams["a_0"]))[-1].finish_reason == "abort"
        assert (await collect(streams["a_1"]))[-1].finish_reason == "abort"
        assert not streams["b_0"].finished
        assert await two.call("abort", ["b_1", ""]) == 1
        assert (await collect(streams["b_1"]))[-1].finish_reason == "abort"
        assert await two.call("abort", [None, ""]) == 1
        assert (await collect(streams["b_0"]))[-1].finish_reason == "abort"

    play(scene, script)


def test_choice_can_be_aborted_by_the_name_that_clients_know(scene):
    async def script():
        (link,) = await scene.ready()
        stream = link.open([request("r", LONG, n=3)])
        await stream.accepted()
        assert await link.call("abort", ["r#1", ""]) == 1 and await link.call("abort", ["r#9", ""]) == 0
        ended = [output for output in await collect_until_last(stream) if output.finish_reason]
        assert [(output.index, output.finish_reason) for output in ended] == [(1, "abort")]
        assert not stream.finished

    play(scene, script)


def test_probe_of_a_busy_engine_is_answered_by_its_own_work(scene):
    async def script():
        (link,) = await scene.ready()
        assert await link.call("probe") == {"alive": True}  # an idle one does a token for it
        assert (await link.call("stats"))["total_requests"] == 1
        stream = link.open([request("r", LONG)])
        await stream.accepted()
        assert await link.call("probe") == {"alive": True}
        stats = await link.call("stats")
        assert (stats["total_requests"], stats["active_sequences"]) == (2, 1)

    play(scene, script)


def test_one_choice_of_a_request_may_end_alone(scene):
    async def script():
        (link,) = await scene.ready()
        stream = link.open([request("r", LONG, n=3)])
        await stream.accepted()
        link.abort("r", 1)
        ended = [output for output in await collect_until_last(stream) if output.finish_reason]
        assert [(output.index, output.finish_reason) for output in ended] == [(1, "abort")]
        assert not stream.finished and {output.index for output in await stream.next()} == {0, 2}

    play(scene, script)


async def collect_until_last(stream) -> list:
    """Outputs until one of them ends a choice."""
    outputs = []
    while not any(output.finish_reason for output in outputs):
        outputs += await stream.next()
    return outputs


def test_a_rid_in_use_is_refused_on_the_same_link_and_on_another(scene):
    async def script():
        one, two = await scene.ready(2)
        stream = one.open([request("r", LONG)])
        await stream.accepted()
        for twice in ([request("r")], [request("x"), request("x")]):
            with pytest.raises(EngineError) as refused:
                one.open(twice)
            assert refused.value.code == "duplicate_rid"
        with pytest.raises(EngineError) as refused:
            await two.open([request("r")]).accepted()
        assert refused.value.code == "duplicate_rid"
        assert (await stream.next())[0].finish_reason is None

    play(scene, script)


def test_a_rid_may_be_used_again_right_after_close(scene):
    async def script():
        (link,) = await scene.ready()
        first = link.open([request("r", LONG)])
        await first.accepted()
        first.close()
        first.close()
        assert await first.next() == []
        second = link.open([request("r", 4)])
        await second.accepted()
        outputs = await collect(second)
        assert [output.finish_reason for output in outputs] == [None, None, None, "length"]

    play(scene, script)


def test_when_one_request_of_a_group_is_refused_none_of_them_runs(scene):
    async def script():
        (link,) = await scene.ready()
        stream = link.open([request("a", LONG), request("b", kind=REFUSE), request("c", LONG)])
        with pytest.raises(EngineError) as refused:
            await stream.accepted()
        assert (refused.value.code, refused.value.retry_after_s) == ("queue_full", 2.0)
        assert (await link.call("stats"))["active_sequences"] == 0

    play(scene, script)


def test_disconnect_wakes_whoever_waits_and_close_aborts(scene):
    async def script():
        (link,) = await scene.ready()
        stream = link.open([request("a", LONG)])
        await stream.accepted()
        asyncio.get_running_loop().call_later(0.1, stream.disconnect)
        await collect(stream)
        stream.close()
        assert (await link.call("stats"))["active_sequences"] == 0

    play(scene, script)


def test_questions_that_the_engine_cannot_answer_are_errors(scene):
    async def script():
        (link,) = await scene.ready()
        with pytest.raises(EngineError, match="unknown question 'riddle'"):
            await link.call("riddle")
        os.kill(link.state.info.pid, signal.SIGSTOP)
        with pytest.raises(EngineError, match="within 0.2 s"):
            await link.call("stats", timeout_s=0.2)
        os.kill(link.state.info.pid, signal.SIGKILL)

    play(scene, script)


def test_a_fault_in_one_request_or_step_is_answered_and_the_engine_serves_on(scene):
    async def script():
        (link,) = await scene.ready()
        with pytest.raises(EngineError) as refused:
            await link.open([request("a", kind=BREAK_ADD)]).accepted()
        assert refused.value.code == "internal"
        running = link.open([request("b", LONG)])
        await running.next()
        broken = link.open([request("c", kind=BREAK_STEP)])
        for stream in (running, broken):
            last = (await collect(stream))[-1]
            assert last.finish_reason == "error" and "RuntimeError" in last.error
        assert len(await collect(link.open([request("d")]))) == 3
        assert len(scene.starts) == 1

    play(scene, script)


def test_a_stuck_step_is_told_with_its_place_and_so_is_its_end(scene, capfd):
    scene.settings = dataclasses.replace(scene.settings, step_timeout_s=0.3)
    scene.say("stall")

    async def script():
        (link,) = await scene.ready()
        stream = link.open([request("a", kind=STALL)])
        await stream.accepted()
        async with asyncio.timeout(5):
            while link.state.status != "stuck":
                await asyncio.sleep(0.02)
        assert "more than 0.3 s" in link.state.reason and link.state.info is not None
        with pytest.raises(EngineError, match="stuck") as raised:
            link.open([request("b")])
        assert raised.value.code == "stuck"
        await asyncio.sleep(0.5)
        (scene.folder / "stall").unlink()
        assert len(await collect(stream)) == 3 and len(scene.starts) == 1
        async with asyncio.timeout(5):
            while link.state.status != "ready":
                await asyncio.sleep(0.02)
        assert len(await collect(link.open([request("c")]))) == 3

    play(scene, script)
    log = capfd.readouterr().err
    assert log.count("a step has been running") == 1 and "fake_engine.py" in log and "time.sleep(0.01)" in log


def test_an_engine_rests_once_after_it_has_loaded_and_once_after_it_has_worked(scene):
    async def script():
        (link,) = await scene.ready()
        rests = scene.folder / "rests"
        await asyncio.sleep(2.5)
        assert rests.read_text() == "0\n"
        await collect(link.open([request("a")]))
        await asyncio.sleep(2.5)
        assert rests.read_text() == "0\n0\n"

    play(scene, script)


def test_an_engine_whose_every_step_fails_is_replaced(scene):
    async def script():
        (link,) = await scene.ready()
        pid = link.state.info.pid
        async with asyncio.timeout(10):
            for number in range(100):
                with contextlib.suppress(EngineError):
                    stream = link.open([request(str(number), kind=BREAK_EVERY_STEP)])
                    await stream.accepted()
                    assert (await collect(stream))[-1].finish_reason == "error"
                if link.state.status != "ready":
                    break
        assert (await until_ready(link)).pid != pid
        assert len(await collect(link.open([request("d")]))) == 3

    play(scene, script)


async def until_ready(link: Link):
    await until(lambda: link.state.status == "ready")
    return link.state.info


def test_the_engine_leaves_soon_after_its_arbiter(scene):
    async def script():
        (link,) = await scene.ready()
        pid = link.state.info.pid
        scene.arbiter.kill()
        await link.stop()
        started = time.monotonic()
        await until(lambda: gone(pid))
        assert time.monotonic() - started < 2
        assert not list(launch.run_dir().glob(f"{scene.arbiter.pid}-*"))

    play(scene, script)


def test_the_engine_leaves_its_arbiters_orphaned_workers_too(scene):
    async def script():
        (link,) = await scene.ready()
        scene.arbiter.kill()
        await until(lambda: gone(scene.starts[0]))
        await asyncio.sleep(0.3)
        assert len(scene.starts) == 1 and not scene.halts and link.state.status == "lost"

    play(scene, script)


def test_the_engine_lingers_after_its_last_worker_and_a_new_one_can_start(scene):
    async def script():
        (link,) = await scene.ready()
        await link.stop()
        (link,) = await scene.ready()
        assert len(scene.starts) == 1
        await link.stop()
        await until(lambda: gone(scene.starts[0]))
        assert not scene.place.socket.exists()
        await scene.ready()
        assert len(scene.starts) == 2

    play(scene, script)


def test_a_link_may_stop_at_the_very_moment_it_is_ready(scene):
    async def script():
        for _ in range(3):
            link = scene.link()
            link.start()
            await link.ready(10)
            await asyncio.wait_for(link.stop(), 1)

    play(scene, script)


def test_sigterm_lets_running_requests_finish_and_refuses_new_ones(scene):
    async def script():
        one, two = await scene.ready(2)
        pid = one.state.info.pid
        stream = one.open([request("r", 80)])
        await stream.accepted()
        os.kill(pid, signal.SIGTERM)
        await until(lambda: two.state.status == "draining")
        with pytest.raises(EngineError) as refused:
            two.open([request("s")])
        assert refused.value.code == "draining"
        assert (await two.call("stats"))["active_sequences"] == 1
        outputs = await collect(stream)
        assert len(outputs) == 80 and outputs[-1].finish_reason == "length"
        await until(lambda: gone(pid))

    play(scene, script)


def test_what_still_runs_at_the_end_of_the_graceful_time_is_aborted(scene):
    scene.settings = Settings(model_path=str(scene.folder), linger_s=0.3, graceful_timeout_s=1)

    async def script():
        (link,) = await scene.ready()
        stream = link.open([request("r", LONG)])
        await stream.accepted()
        os.kill(link.state.info.pid, signal.SIGTERM)
        started = time.monotonic()
        assert (await collect(stream))[-1].finish_reason == "abort"
        assert 0.9 < time.monotonic() - started < 3

    play(scene, script)


def test_a_stale_socket_does_not_block(scene):
    async def script():
        left = socket.socket(socket.AF_UNIX)
        left.bind(str(scene.place.socket))
        left.close()
        assert scene.place.socket.is_socket()
        await scene.ready(2)
        assert len(scene.starts) == 1

    play(scene, script)


def test_an_engine_that_is_still_starting_is_waited_for(scene):
    """Its starter was killed before it listened: a second one would take its memory."""

    async def script():
        starting = subprocess.Popen(["sleep", "600"])
        with launch.locked(scene.place) as fd:
            launch.write_record(fd, launch.Record(True, 0, pid=starting.pid, started_s=time.monotonic()))
        link = scene.link()
        link.start()
        await asyncio.sleep(0.5)
        assert scene.starts == []
        starting.kill()
        starting.wait()
        await link.ready(10)
        assert len(scene.starts) == 1

    play(scene, script)


def test_a_first_start_that_fails_halts_with_the_reason_and_is_not_repeated(scene):
    scene.say("broken", "weights.gguf: truncated")

    async def script():
        links = [scene.link() for _ in range(2)]
        for link in links:
            link.start()
        await until(lambda: len(scene.halts) == 2)
        assert set(scene.halts) == {f"cannot serve {scene.folder}: weights.gguf: truncated"}
        await asyncio.sleep(1.5)
        assert len(scene.starts) == 1 and len(scene.halts) == 2
        with pytest.raises(EngineError, match="truncated") as refused:
            links[0].open([request("r")])
        assert refused.value.code == "failed"

    play(scene, script)


def test_links_find_the_engine_that_was_started_ahead_of_them(scene):
    scene.say("slow", "0.3")
    with launch.engine_ahead(scene.settings, scene.arbiter.pid, FAKE):
        pass

    async def script():
        links = await scene.ready(2)
        assert {link.state.info.pid for link in links} == set(scene.starts) and len(scene.starts) == 1

    play(scene, script)


def test_a_start_that_fails_ends_the_engine_it_began_with(scene):
    scene.say("slow", "60")
    with pytest.raises(ModelError), launch.engine_ahead(scene.settings, scene.arbiter.pid, FAKE):
        while not scene.starts:
            time.sleep(0.01)
        raise ModelError("no such tokenizer")
    assert gone(scene.starts[0]) and not list(launch.run_dir().glob(f"{scene.arbiter.pid}-*"))


@pytest.mark.parametrize("how", ["broken", "die"])
def test_links_that_come_when_the_engine_has_already_failed_halt_with_its_reason(scene, capfd, how):
    scene.say(how)
    with launch.engine_ahead(scene.settings, scene.arbiter.pid, FAKE):
        while not (scene.starts and gone(scene.starts[0])):
            time.sleep(0.01)

    async def script():
        scene.link().start()
        await until(lambda: scene.halts)
        expected = {"broken": f"cannot serve {scene.folder}: yes", "die": "the engine died while it was loading"}
        assert scene.halts == [expected[how]] and len(scene.starts) == 1

    play(scene, script)
    assert "crane: " not in capfd.readouterr().err, "the worker says it, once"


def test_an_engine_that_dies_while_loading_halts_too(scene):
    scene.say("die")

    async def script():
        scene.link().start()
        await until(lambda: scene.halts)
        assert scene.halts == ["the engine died while it was loading (exit status 9)"]

    play(scene, script)


def test_an_engine_that_cannot_come_back_is_tried_three_times_and_stays_down(scene, monkeypatch):
    monkeypatch.setattr(client, "RETRY_S", 0.05)

    async def script():
        links = await scene.ready(2)
        scene.say("broken", "the disk is gone")
        os.kill(scene.starts[0], signal.SIGKILL)
        await until(lambda: all(link.state.status == "failed" and len(scene.starts) == 4 for link in links))
        await asyncio.sleep(0.5)
        assert len(scene.starts) == 4 and not scene.halts
        with pytest.raises(EngineError, match="the disk is gone") as refused:
            links[1].open([request("r")])
        assert refused.value.code == "failed"

    play(scene, script)


def test_a_worker_that_reads_nothing_is_cut_and_nobody_else_notices(scene):
    async def script():
        (link,) = await scene.ready()
        with socket.socket(socket.AF_UNIX) as deaf:
            deaf.connect(str(scene.place.socket))
            deaf.sendall(pack(Hello(PROTOCOL, 1, __version__)))
            deaf.sendall(b"".join(pack(request(f"f{i}", LONG, kind=FLOOD)) for i in range(20)))
            stream = link.open([request("r", 150)])
            await stream.accepted()
            async with asyncio.timeout(20):
                while (await link.call("stats"))["active_sequences"] != 1:
                    await asyncio.sleep(0.05)
            assert (await link.call("stats"))["total_requests"] == 21
            assert len(await collect(stream)) == 150

    play(scene, script)


@pytest.mark.parametrize(
    "junk",
    [b"GET / HTTP/1.1\r\n\r\n", b"\xff\xff\xff\xff", pack(request("r")), pack(State("ready")),
     b"\x01\x00\x00\x00\xc1"],
    ids=["http", "huge frame", "no hello", "wrong side", "no msgpack"],
)
def test_junk_on_the_socket_is_cut(scene, junk):
    async def script():
        (link,) = await scene.ready()
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(5)
            peer.connect(str(scene.place.socket))
            peer.sendall(junk)
            received = await asyncio.to_thread(read_all, peer)
        assert [type(message) for message in FrameReader("api").feed(received)] == [State]
        assert len(await collect(link.open([request("r")]))) == 3

    play(scene, script)


def read_all(peer: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while part := peer.recv(1 << 16):
            data += part
    return data


def test_a_worker_of_another_version_is_told_so(scene):
    async def script():
        await scene.ready()
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(5)
            peer.connect(str(scene.place.socket))
            peer.sendall(pack(Hello(PROTOCOL, 1, "0.0.0")))
            received = await asyncio.to_thread(read_all, peer)
        last = FrameReader("api").feed(received)[-1]
        assert last.status == "failed" and "0.0.0" in last.reason

    play(scene, script)


def test_the_socket_is_private(scene):
    async def script():
        await scene.ready()
        assert stat.S_IMODE(scene.place.socket.stat().st_mode) == 0o600
        assert stat.S_IMODE(scene.place.socket.parent.stat().st_mode) == 0o700

    play(scene, script)


@pytest.fixture
def own_run_dir(monkeypatch):
    """A run folder of this test's own; below a short path, as sockets need."""
    with tempfile.TemporaryDirectory(prefix="cr") as folder:
        monkeypatch.setattr(launch.tempfile, "gettempdir", lambda: folder)
        assert launch.run_dir().parent == Path(folder)
        yield launch.run_dir()


def test_a_run_folder_that_others_can_write_is_refused(own_run_dir):
    own_run_dir.chmod(0o777)
    with pytest.raises(SettingsError, match="0700"):
        launch.run_dir()


def test_leftovers_of_killed_servers_are_swept_and_live_ones_stay(scene, own_run_dir):
    dead = subprocess.Popen(["true"])
    dead.wait()
    folder = own_run_dir
    for name in (f"{dead.pid}-a.sock", f"{scene.arbiter.pid}-a.sock"):
        left = socket.socket(socket.AF_UNIX)
        left.bind(str(folder / name))
        left.close()
    (folder / f"{dead.pid}-a.sock.lock").touch()
    os.utime(folder / f"{dead.pid}-a.sock.lock", (0, 0))
    (folder / f"{dead.pid}-b.sock.lock").touch()
    launch.sweep()
    left = {path.name for path in folder.iterdir()}
    assert left == {f"{scene.arbiter.pid}-a.sock", f"{dead.pid}-b.sock.lock"}


def test_a_given_engine_socket_is_used_and_never_started(scene, tmp_path):
    path = tmp_path / "own.sock"
    scene.settings = Settings(model_path=str(scene.folder), engine_socket=str(path))

    async def script():
        link = scene.link()
        link.start()
        await until(lambda: link.state.status == "lost")
        with pytest.raises(EngineError, match="own.sock"):
            link.open([request("r")])
        assert scene.starts == []
        engine = subprocess.Popen([*FAKE, "--socket", str(path), f"CRANE_MODEL_PATH={scene.folder}"])
        try:
            assert (await until_ready(link)).pid == engine.pid
            second = fake("--socket", str(path), f"CRANE_MODEL_PATH={scene.folder}")
            assert second.returncode == 1 and second.stderr == f"crane: another engine listens on {path}\n"
            assert len(await collect(link.open([request("r")]))) == 3
        finally:
            engine.terminate()
        assert await asyncio.to_thread(engine.wait, 10) == 0

    play(scene, script)


def test_an_engine_nobody_listens_to_says_in_one_line_why_it_failed(scene, tmp_path):
    scene.say("broken", "no such tensor")
    run = fake("--socket", str(tmp_path / "s"), f"CRANE_MODEL_PATH={scene.folder}", "CRANE_LOG_LEVEL=error")
    assert run.returncode == 1
    assert run.stderr == f"crane: cannot serve {scene.folder}: no such tensor\n"
    run = fake("--socket", "/s", "CRANE_PORT=high")
    assert (run.returncode, run.stderr) == (1, "crane: CRANE_PORT must be a whole number, got 'high'\n")


def test_the_record_survives_a_cut_write(scene):
    with launch.locked(scene.place) as fd:
        assert launch.read_record(fd) == launch.Record()
        launch.write_record(fd, launch.Record(True, 2, "why"))
        assert launch.read_record(fd) == launch.Record(True, 2, "why")
        os.ftruncate(fd, 5)
        assert launch.read_record(fd) == launch.Record()
        with launch.locked(scene.place) as second:
            assert second is None
    with launch.locked(scene.place) as fd:
        assert fd is not None


def test_outside_gunicorn_a_process_shares_its_engine_with_nobody():
    import gunicorn.arbiter  # noqa: F401  being there is not being its worker

    assert launch.own_arbiter() == os.getpid()


def test_claims_are_given_once_per_arbiter(scene):
    assert [launch.claim("t", scene.arbiter.pid) for _ in range(3)] == [True, False, False]


def test_threads_can_use_a_link_too(scene):
    link = LinkThread(scene.settings, arbiter_pid=scene.arbiter.pid, command=FAKE, on_halt=scene.halts.append)
    link.start()
    link.start()
    try:
        assert link.ready(10).pid == scene.starts[0] and link.state.status == "ready"
        assert link.call("stats")["total_requests"] == 0
        stream = link.open([request("r", LONG)])
        stream.accepted(5)
        assert stream.next(5)
        link.abort("r")
        outputs = []
        while batch := stream.next(5):
            outputs += batch
        assert outputs[-1].finish_reason == "abort" and stream.finished
        with pytest.raises(EngineError):
            link.open([request("s", kind=REFUSE)]).accepted(5)

        os.kill(scene.starts[0], signal.SIGSTOP)
        waiting = link.open([request("t", 2)])
        assert waiting.next(0.1) is None
        with pytest.raises(EngineError, match="no answer"):
            waiting.accepted(0.1)
        os.kill(scene.starts[0], signal.SIGCONT)

        idle = link.open([request("u", LONG)])
        idle.accepted(5)
        idle.disconnect()
        while idle.next(5):
            pass
        idle.close()
        assert link.call("stats")["active_sequences"] == 0
    finally:
        link.stop()


def test_a_record_is_replaced_by_a_shorter_one_in_one_write(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "ftruncate", None)  # between that and the write a killed writer would leave nothing
    with open(tmp_path / "lock", "w+b") as file:
        launch.write_record(file.fileno(), launch.Record(was_ready=True, attempts=2, reason="long " * 40, pid=1234))
        launch.write_record(file.fileno(), launch.Record(was_ready=True))
        assert launch.read_record(file.fileno()) == launch.Record(was_ready=True)
