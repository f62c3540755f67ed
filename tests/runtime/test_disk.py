"""Pages on disk: they come back after a restart, and a file that is not what it should be is as good as none."""

import errno
import logging
import os
import random
import stat
import threading
import time
from array import array

import pytest

from crane.errors import SettingsError
from crane.runtime import disk as disks
from crane.runtime.disk import DiskTier, Job, next_name, root_name
from crane.runtime.engine import Engine
from crane.runtime.settings import Settings
from crane.runtime.types import Accepted, Generate, SamplingParams
from tests.tiny import make_tiny

PAGE = 64
PRINT = b"p" * 32


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"), "qwen3")


def until(condition, seconds=10.0):
    end_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end_s, "it does not come"
        time.sleep(0.002)


def open_tier(folder, max_bytes=1 << 20, print_=PRINT):
    tier = DiskTier(str(folder), max_bytes, PAGE, lambda: print_)
    until(lambda: tier.ready)
    return tier


def page(number, tokens=(1, 2, 3, 4)):
    """A page of a file: (name, tokens, content)."""
    content = random.Random(number).randbytes(PAGE)
    return next_name(root_name(PRINT, ""), (number, *tokens)), array("I", tokens), bytearray(content)


def done(tier, kind, pages):
    job = Job(kind, [(name, tokens, memoryview(buffer)) for name, tokens, buffer in pages], tier.epoch)
    tier.submit(job)
    until(lambda: job in tier.finished)
    tier.finished.remove(job)
    return job.num_done


def read(tier, written):
    """What comes back for the name and the tokens of a page that was written, or None."""
    buffer = bytearray(PAGE)
    return bytes(buffer) if done(tier, "read", [(written[0], written[1], buffer)]) else None


def files(folder):
    return sorted(folder.rglob("*.kv"))


def test_a_page_comes_back_as_it_was_and_only_its_owner_may_read_the_file(tmp_path):
    tier = open_tier(tmp_path / "new" / "folder")
    assert not tier.has(page(1)[0]) and read(tier, page(1)) is None
    assert done(tier, "write", [page(1), page(2)]) == 2
    again = open_tier(tmp_path / "new" / "folder")
    assert again.has(page(1)[0]) and read(again, page(1)) == bytes(page(1)[2])
    assert [stat.S_IMODE(path.stat().st_mode) for path in files(tmp_path)] == [0o600] * 2
    assert (again.num_files, again.num_bytes) == (2, sum(path.stat().st_size for path in files(tmp_path)))
    assert done(again, "write", [page(1)]) == 0, "it is there already"


DAMAGE = {
    "a flipped bit in the page": lambda data: data[:-40] + bytes([data[-40] ^ 1]) + data[-39:],
    "a flipped bit in the checksum": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "other tokens": lambda data: data[:76] + b"\x09" + data[77:],
    "another model": lambda data: data[:8] + b"q" * 32 + data[40:],
    "another page": lambda data: data[:40] + b"n" * 32 + data[72:],
    "cut short": lambda data: data[:-1],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"x",
    "something else": lambda data: b"x" * len(data),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_a_miss_and_is_removed(tmp_path, damage, caplog):
    tier = open_tier(tmp_path)
    done(tier, "write", [page(1), page(2)])
    for path in files(tmp_path):
        path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING, "crane.engine"):
        assert read(tier, page(1)) is None and read(tier, page(2)) is None
    assert len(caplog.records) == 1, "one warning for all"
    assert files(tmp_path) == [] and tier.num_bad == 2 and tier.writable
    done(tier, "write", [page(1)])
    assert read(tier, page(1)) == bytes(page(1)[2])


def test_tokens_are_compared_in_full_even_under_the_right_name(tmp_path):
    tier = open_tier(tmp_path)
    name, tokens, content = page(1)
    done(tier, "write", [(name, tokens, content)])
    assert read(tier, (name, array("I", [1, 2, 3, 5]), content)) is None and files(tmp_path) == []


def test_what_is_no_regular_file_is_not_followed(tmp_path, caplog):
    tier = open_tier(tmp_path / "cache")
    done(tier, "write", [page(1), page(2)])
    first, second = (tier._path(page(number)[0]) for number in (1, 2))
    elsewhere = tmp_path / "elsewhere"
    first.rename(elsewhere)
    first.symlink_to(elsewhere)
    second.unlink()
    os.mkfifo(second)
    assert read(tier, page(1)) is None and read(tier, page(2)) is None
    assert elsewhere.exists() and not os.path.lexists(first) and not second.exists() and tier.writable
    second.mkdir()
    assert read(tier, page(2)) is None and tier.writable


def test_a_full_disk_stops_the_writing_with_one_warning_and_nothing_else(tmp_path, monkeypatch, caplog):
    tier = open_tier(tmp_path)
    done(tier, "write", [page(1)])
    create = disks._create
    monkeypatch.setattr(disks, "_create", lambda path: (os.close(create(path)), os.open("/dev/full", os.O_WRONLY))[1])
    with caplog.at_level(logging.WARNING, "crane.engine"):
        assert done(tier, "write", [page(2), page(3)]) == 0
        assert done(tier, "write", [page(3)]) == 0
    assert [os.strerror(errno.ENOSPC) in record.getMessage() for record in caplog.records] == [True]
    assert not tier.writable and read(tier, page(1)) == bytes(page(1)[2])
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [files(tmp_path)[0].name], "no rests"


def test_the_folder_stays_below_its_size_and_the_least_used_go_first(tmp_path):
    size = 72 + 4 + 16 + PAGE + 32
    tier = open_tier(tmp_path, max_bytes=10 * size)
    for number in range(10):
        done(tier, "write", [page(number)])
        os.utime(tier._path(page(number)[0]), (1000 + number, 1000 + number))
    assert read(tier, page(0)) is not None  # used just now
    done(tier, "write", [page(10)])
    left = {number for number in range(11) if tier.has(page(number)[0])}
    assert left == {0, 3, 4, 5, 6, 7, 8, 9, 10}
    assert (tier.num_files, tier.num_bytes) == (9, 9 * size)


def test_files_that_are_not_ours_are_left_alone_and_old_temporary_ones_are_removed(tmp_path):
    other = tmp_path / "notes.txt"
    other.write_text("mine")
    stale, fresh = tmp_path / ".tmp-1-1", tmp_path / ".tmp-1-2"
    stale.write_text("x"), fresh.write_text("x")
    os.utime(stale, (1000, 1000))
    tier = open_tier(tmp_path, max_bytes=1)
    done(tier, "write", [page(1)])
    done(tier, "flush", [])
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [".tmp-1-2", "notes.txt"]


def test_engines_that_share_a_folder_do_not_disturb_each_other(tmp_path):
    """Four write, read and shrink at once; whatever is read is right."""
    tiers = [open_tier(tmp_path, max_bytes=6 * 200) for _ in range(4)]
    wrong = []

    def work(tier, seed):
        rng = random.Random(seed)
        for _ in range(60):
            number = rng.randrange(12)
            done(tier, "write", [page(number)])
            number = rng.randrange(12)
            got = read(tier, page(number))
            if got not in (None, bytes(page(number)[2])):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(tier, seed)) for seed, tier in enumerate(tiers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and all(tier.writable and tier.num_bad == 0 for tier in tiers)
    assert sum(tier.num_read for tier in tiers) > 0


def test_after_a_flush_nothing_is_found_not_even_while_it_goes_on(tmp_path):
    tier = open_tier(tmp_path)
    other = open_tier(tmp_path, print_=b"o" * 32)
    done(tier, "write", [page(1)]), done(other, "write", [page(1)])
    late = Job("write", [(*page(2)[:2], memoryview(page(2)[2]))], tier.epoch)
    tier.submit(late)
    tier.flush()
    assert not tier.has(page(1)[0])
    until(lambda: tier.ready)
    assert late.num_done in (0, 1) and not tier.has(page(1)[0]) and not tier.has(page(2)[0])
    assert other.has(page(1)[0]), "another model's"


def test_a_folder_that_cannot_be_used_is_said_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="--kv-cache-dir .* cannot be used"):
        DiskTier(str(tmp_path / "file"), 0, PAGE, lambda: PRINT)


# --- with an engine

START = [(7 * i) % 300 for i in range(41)]


def make_engine(model, folder, **settings):
    chosen = dict(dtype="float32", cpu=True, threads=1, max_model_len=128, page_size=4, kv_cache_dir=str(folder))
    engine = Engine(Settings(model_path=str(model), **chosen | settings))
    if engine.memory.disk is not None:
        until(lambda: engine.memory.disk.disk.ready)
    return engine


def ask(engine, prompt=START, salt="", **params):
    chosen = dict(temperature=0.0, max_tokens=12, ignore_eos=True) | params
    request = Generate("r", prompt, SamplingParams(**chosen), cache_salt=salt)
    assert engine.add(request) == Accepted("r")
    tokens, usage = [], None
    while engine.has_work:
        for output in engine.step():
            tokens += output.token_ids
            usage = output.usage or usage
        engine.scheduler.check()
    return tokens, usage


def test_a_restarted_engine_finds_what_the_last_one_computed_and_says_the_same(tiny, tmp_path):
    alone, _ = ask(make_engine(tiny, ""))
    first = make_engine(tiny, tmp_path)
    assert ask(first)[0] == alone
    first.close()
    second = make_engine(tiny, tmp_path)
    tokens, usage = ask(second)
    assert (tokens, usage.cached_tokens) == (alone, 40)
    stats = second.stats()
    assert (stats.disk_cached_tokens, stats.host_cached_tokens, stats.disk_pages_read) == (40, 0, 10)
    assert ask(second)[1].cached_tokens == 40 and second.stats().disk_pages_read == 10, "now they are in memory"
    # a longer prompt that goes on from the first answer: everything before it is there
    assert ask(make_engine(tiny, tmp_path), START + alone[:9])[1].cached_tokens == 48
    second.close()


def test_other_weights_other_types_and_other_salts_find_nothing(tiny, tmp_path, tmp_path_factory):
    engine = make_engine(tiny, tmp_path)
    ask(engine, salt="a"), engine.close()
    assert len(files(tmp_path)) == 13
    other = make_tiny(tmp_path_factory.mktemp("other"), "qwen3", seed=5)
    for model, settings in ((other, {}), (tiny, {"dtype": "bfloat16"}), (tiny, {"page_size": 8})):
        assert ask(make_engine(model, tmp_path, **settings), salt="a")[1].cached_tokens == 0
    assert ask(make_engine(tiny, tmp_path))[1].cached_tokens == 0
    assert ask(make_engine(tiny, tmp_path), salt="a")[1].cached_tokens == 40


def test_what_was_rounded_otherwise_is_not_found(tmp_path):
    model = make_tiny(tmp_path / "gguf", "qwen3", fmt="gguf", quant="Q4_0")
    folder, settings = tmp_path / "kv", {"dtype": "bfloat16"}
    first = make_engine(model, folder, **settings)
    ask(first), first.close()
    assert ask(make_engine(model, folder, **settings, exact=True))[1].cached_tokens == 0
    assert ask(make_engine(model, folder, **settings, kernels="torch"))[1].cached_tokens == 0
    assert ask(make_engine(model, folder, **settings))[1].cached_tokens == 40


def test_a_flush_empties_the_disk_too(tiny, tmp_path):
    engine = make_engine(tiny, tmp_path)
    ask(engine)
    engine.flush_cache()
    until(lambda: engine.memory.disk.disk.ready)
    assert files(tmp_path) == []
    assert ask(engine)[1].cached_tokens == 0
    engine.close()


def test_damaged_files_change_no_answer(tiny, tmp_path):
    engine = make_engine(tiny, tmp_path)
    alone, _ = ask(engine)
    engine.close()
    for path in files(tmp_path)[::2]:
        data = bytearray(path.read_bytes())
        data[-100] ^= 255
        path.write_bytes(data)
    again = make_engine(tiny, tmp_path)
    assert ask(again)[0] == alone
    assert again.stats().disk_bad_files > 0 and again.stats().disk_writable


def test_sequences_that_start_the_same_wait_for_one_reading(tiny, tmp_path):
    first = make_engine(tiny, tmp_path)
    ask(first), first.close()
    engine = make_engine(tiny, tmp_path)
    for rid in "abc":
        engine.add(Generate(rid, START, SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)))
    while engine.has_work:
        engine.step()
        engine.scheduler.check()
    assert engine.stats().disk_pages_read == 10 and engine.stats().cached_tokens == 120
    engine.close()


def test_without_host_memory_or_prefix_cache_a_folder_is_refused(tiny, tmp_path):
    with pytest.raises(SettingsError, match="--kv-cache-dir needs --host-kv-memory"):
        make_engine(tiny, tmp_path, host_kv_memory=0)
    with pytest.raises(SettingsError, match="--no-prefix-cache"):
        make_engine(tiny, tmp_path, prefix_cache=False)


def test_the_start_says_what_fits_in_every_tier(tiny, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "crane.engine"):
        engine = make_engine(tiny, tmp_path, kv_memory=64 * 2048, host_kv_memory=32 * 2048, kv_cache_size=1 << 30)
    fits = engine.info.kv_capacity
    assert fits["page_bytes"] == 2048 and fits["sequences"] == {"128": 2}
    assert fits["device"] == {"pages": 64, "tokens": 256, "bytes": 64 * 2048}
    assert (fits["host"]["pages"], fits["host"]["tokens"], fits["host"]["bytes"]) == (32, 128, 32 * 2048)
    assert fits["host"]["copy_bytes_per_s"] > 0
    assert fits["disk"] == {"folder": str(tmp_path), "bytes": 1 << 30}
    said = caplog.text
    assert "64 KV pages of 4 tokens (0.1 MB); room for 2 x 128 tokens at once; 32 more in host memory (0.1 MB" in said
    assert f"1.1 GB of files in {tmp_path}" in said
