"""Broken inputs at random, for moments; `tools/fuzz_parsers.py` does it for longer and guided by coverage."""

import contextlib
import json
import os
import random
import time

import pytest

from tests.fuzzing import CORPUS, TARGETS, seeds

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0.7"))  # of CPU time for each target
LIMIT_S = 15.0  # of CPU time for one input; a template may take ten
BYTES = [0, 1, 0x7F, 0x80, 0xFF, *b'"{}[]:,\\ \n0123456789-e.tfn%<>|']
VALUES = [None, True, False, 0, 1, -1, 0.5, 1e308, float("nan"), 2**63, 2**70, 10**400, "", "a", "\ud800", "1", [], [1],
          [None], ["a"], [[]], [{}], {}, {"a": 1}, {"content": 5}, {"a": {}}, {"1": "a"}, "x" * 3000]  # fmt: skip
WORDS = [b"null", b"true", b"-1", b"1e999", b"NaN", b"18446744073709551616", b'""', b"{}", b"[]", b'{"a": [[[1]]]}',
         b"\xff\xff\xff\xff\xff\xff\xff\xff", b"\x00" * 8, b"\\ud800", "\u2028é".encode(), b"9" * 400,
         b"[" * 300]  # fmt: skip


def changed(rng: random.Random, value, depth: int = 0):
    """A JSON value with one of its parts replaced, renamed or left out."""
    if not isinstance(value, dict | list) or not value or (depth and rng.random() < 0.25):
        return rng.choice(VALUES)
    if isinstance(value, list):
        at = rng.randrange(min(len(value), 20))
        return [*value[:at], changed(rng, value[at], depth + 1), *value[at + 1 :]]
    name = rng.choice(list(value))
    rest = {each: value[each] for each in value if each != name}
    how = rng.random()
    return rest if how < 0.1 else {**rest, rng.choice(list(value)): value[name]} if how < 0.15 else \
        {**rest, name: changed(rng, value[name], depth + 1)}


def broken(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """`data` with a few of its bytes changed, as headers and JSON break."""
    if data[:1] == b"{" and rng.random() < 0.6 and len(data) < 20_000:
        with contextlib.suppress(ValueError, RecursionError):
            text = json.dumps(changed(rng, json.loads(data)), ensure_ascii=rng.random() < 0.9)
            return text.encode("utf-8", "replace")
    raw = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at = rng.randrange(len(raw) + 1)
        if rng.random() < 0.6:  # what comes first decides most
            at = min(at, rng.randrange(600))
        how = rng.randrange(7)
        if how == 0 and raw:
            raw[min(at, len(raw) - 1)] = rng.choice(BYTES)
        elif how == 1 and raw:
            raw[min(at, len(raw) - 1)] ^= 1 << rng.randrange(8)
        elif how == 2:
            raw[at : at + rng.randrange(12)] = rng.choice(WORDS)
        elif how == 3:
            del raw[at : at + rng.choice((1, 4, 8, 60))]
        elif how == 4:
            raw[at:at] = raw[max(at - rng.randrange(80), 0) : at]
        elif how == 5:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            raw[at:at] = other[start : start + rng.randrange(60)]
        else:
            del raw[at:]
    return bytes(raw)


@pytest.mark.parametrize("name", TARGETS)
def test_broken_input_is_refused_in_our_own_words_and_soon(name):
    target, known = TARGETS[name], seeds(name)
    for data in known:
        target(data)
    rng, end = random.Random(f"{name} {SECONDS}"), time.process_time() + SECONDS
    count = slowest = 0
    while time.process_time() < end:
        data, began = broken(rng, rng.choice(known), known), time.process_time()
        try:
            target(data)
        except Exception as error:
            raise AssertionError(f"input {count}, to keep in {CORPUS / name}: {data[:2000]!r}") from error
        count, slowest = count + 1, max(slowest, time.process_time() - began)
    print(f"{name}: {count} inputs, the slowest {slowest:.2f} s")
    assert count and slowest < LIMIT_S
