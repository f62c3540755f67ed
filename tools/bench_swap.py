"""What too few pages cost: the prefix cache off and on, more sequences than fit, deterministic requests.

Checks first (every answer is the one the same request got with room enough), then times, prints lines and ends in one
of JSON. Ratios of one run are worth comparing, no more.

    python tools/bench_swap.py MODEL [prefix|pressure|deterministic|exact ...] [--dtype bfloat16] [--room 8]
"""

import argparse
import json
import os
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import msgspec  # noqa: E402  after the line above, which torch reads when it is loaded

from crane.runtime.engine import Engine  # noqa: E402
from crane.runtime.settings import Settings  # noqa: E402
from crane.runtime.types import Generate, Rejected, SamplingParams  # noqa: E402

GREEDY = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True, logprobs=0)
PAGE_SIZE = 16


def make_engine(options, **settings) -> Engine:
    """An engine on the CPU or whatever there is, with the tool's dtype."""
    chosen = dict(dtype=options.dtype, page_size=PAGE_SIZE, max_model_len=2048, max_queue=10_000) | settings
    return Engine(Settings(model_path=options.model, **chosen))


def text(number: int, length: int, vocab: int) -> list[int]:
    """Tokens like no other text's."""
    return [(number * 7919 + place * 31 + place * place) % (vocab - 200) + 100 for place in range(length)]


def run(engine: Engine, requests: list[Generate]) -> dict:
    """All at once: {"ids": {rid: ids}, "logprobs", "tokens_per_s", "first_s": slowest first token, "seconds"}."""
    started_s = time.perf_counter()
    for request in requests:
        answer = engine.add(request)
        if isinstance(answer, Rejected):
            raise SystemExit(f"{request.rid}: {answer.message}")
    ids, logprobs, first = {}, {}, {}
    while engine.has_work:
        for output in engine.step():
            ids.setdefault((output.rid, output.index), []).extend(output.token_ids)
            logprobs.setdefault((output.rid, output.index), []).extend(x.logprob for x in output.logprobs or [])
            first.setdefault((output.rid, output.index), time.perf_counter() - started_s)
    seconds = time.perf_counter() - started_s
    total = sum(map(len, ids.values()))
    return {"ids": ids, "logprobs": logprobs, "seconds": seconds, "tokens_per_s": total / seconds,
            "first_s": max(first.values())}  # fmt: skip


def differing(found: dict, expected: dict) -> tuple[int, float]:
    """How many answers differ, and by how much the log-probabilities of those that do not."""
    bad = sum(found["ids"][key] != ids for key, ids in expected["ids"].items())
    gaps = [abs(a - b) for key, ids in expected["ids"].items() if found["ids"][key] == ids
            for a, b in zip(found["logprobs"][key], expected["logprobs"][key])]  # fmt: skip
    return bad, max(gaps, default=0.0)


def bench_prefix(options) -> dict:
    """8 requests that share a system prompt of 1,000 tokens, which none of them is the first to bring."""
    found = {}
    for name, cache in (("off", False), ("on", True), ("off again", False), ("on again", True)):
        engine = make_engine(options, prefix_cache=cache)
        vocab = engine.info.vocab_size
        start = text(1, 1000, vocab)
        run(engine, [Generate("first", start + [5, 6], msgspec.structs.replace(GREEDY, max_tokens=1))])
        found[name] = run(engine, [Generate(f"r{i}", start + text(i + 2, 3, vocab), GREEDY) for i in range(8)])
    bad, gap = differing(found["on"], found["off"])
    print(f"prefix: {bad} of 8 answers differ with the cache on; log-probabilities by at most {gap:.2g}")
    for name, each in found.items():
        print(f"prefix cache {name:10s} {each['tokens_per_s']:7.1f} tok/s, slowest first token {each['first_s']:.2f} s")
    return {name: {"tokens_per_s": round(each["tokens_per_s"], 1), "first_s": round(each["first_s"], 2)}
            for name, each in found.items()} | {"differing": bad}  # fmt: skip


def bench_pressure(options) -> dict:
    """1, 2, 4 and 8 times more sequences than the pages hold, swapped and recomputed, against room for all."""
    length, result = 48, {}
    params = msgspec.structs.replace(GREEDY, max_tokens=96)  # answers outgrow what prompts need to start
    pages = options.room * -(-(length + params.max_tokens) // PAGE_SIZE)
    roomy = make_engine(options, prefix_cache=False, max_concurrent=options.room, max_model_len=256, kv_memory=0.08)
    size, vocab = roomy.info.kv_capacity["page_bytes"], roomy.info.vocab_size
    for times in options.times:
        requests = [Generate(f"r{i}", text(i, length, vocab), params) for i in range(options.room * times)]
        whole = run(roomy, requests)
        for policy in ("swap", "recompute", "swap", "recompute"):
            # twice as many may run as fit, and all take turns: that is what pages are short for
            engine = make_engine(options, prefix_cache=False, max_concurrent=2 * options.room, max_model_len=256,
                                 decode_tokens_per_seq=8, kv_memory=pages * size, preemption=policy,
                                 host_kv_memory=pages * size * 8 if policy == "swap" else 0)  # fmt: skip
            found = run(engine, requests)
            bad, gap = differing(found, whole)
            stats = engine.stats()
            ratio = found["tokens_per_s"] / whole["tokens_per_s"]
            speed = found["tokens_per_s"]
            print(f"{times} x {options.room} sequences, {policy:9s}: {speed:7.1f} tok/s, {ratio:.2f} of "
                  f"{whole['tokens_per_s']:.1f} with room; slowest first token {found['first_s']:.1f} s; "
                  f"{stats.preemptions} times out of pages, {stats.swaps} swapped; {bad} answers differ, {gap:.2g}")
            result.setdefault(f"{times}x", []).append(
                {"policy": policy, "tokens_per_s": round(found["tokens_per_s"], 1), "ratio": round(ratio, 3),
                 "preemptions": stats.preemptions, "swaps": stats.swaps, "differing": bad})  # fmt: skip
    return result


def bench_deterministic(options) -> dict:
    """8 requests, each or none deterministic; and whether their bits depend on the others."""
    engine = make_engine(options, prefix_cache=False, max_model_len=512)
    vocab, result = engine.info.vocab_size, {}
    fixed = msgspec.structs.replace(GREEDY, deterministic=True)
    prompts = [text(i, 150 + 9 * i, vocab) for i in range(8)]
    noise = [Generate(f"n{i}", text(50 + i, 40 + 30 * i, vocab), GREEDY) for i in range(12)]
    for name, params in (("plain", GREEDY), ("deterministic", fixed)):
        requests = [Generate(f"r{i}", prompt, params) for i, prompt in enumerate(prompts)]
        single = {"ids": {}, "logprobs": {}}
        for request in requests:
            one = run(engine, [request])
            single["ids"] |= one["ids"]
            single["logprobs"] |= one["logprobs"]
        crowd = run(engine, requests + noise)
        bad, gap = differing(crowd, single)
        bits = sum(crowd["logprobs"][key] == single["logprobs"][key] for key in single["logprobs"])
        print(f"{name}: in company {bad} of 8 answers differ from those alone, {bits} of 8 are equal in every bit of "
              f"their log-probabilities, others by up to {gap:.2g}")  # fmt: skip
        result[name] = {"differing": bad, "equal_bits": bits, "gap": gap}
    for number in (1, 2, 8):
        for name, params in (("plain", GREEDY), ("deterministic", fixed)) * 2:
            timed = run(engine, [Generate(f"r{i}", p, params) for i, p in enumerate(prompts[:number])])
            print(f"{number} x {name}: {timed['tokens_per_s']:.1f} tok/s")
            result[name].setdefault(f"tokens_per_s of {number}", []).append(round(timed["tokens_per_s"], 1))
    return result


def bench_exact(options) -> dict:
    """64 mixed requests with pages for `--room` of them: every answer the one it gets alone, in float32."""
    base = dict(dtype="float32", max_model_len=512)
    roomy = make_engine(options, prefix_cache=False, kv_memory=0.1, max_concurrent=4, **base)
    vocab, size = roomy.info.vocab_size, roomy.info.kv_capacity["page_bytes"]
    start = text(0, 120, vocab)
    kinds = [
        dict(temperature=0.0, max_tokens=16, ignore_eos=True),
        dict(temperature=1.0, top_k=40, seed=3, max_tokens=20, ignore_eos=True),
        dict(temperature=0.8, top_p=0.9, seed=4, repetition_penalty=1.1, max_tokens=12, n=2, ignore_eos=True),
        dict(temperature=0.0, max_tokens=14, deterministic=True, ignore_eos=True),
    ]
    requests = [
        Generate(f"r{i}", (start[: 40 + 20 * (i % 5)] if i % 2 else []) + text(i + 1, 10 + 3 * (i % 7), vocab),
                 SamplingParams(logprobs=0, **kinds[i % 4])) for i in range(options.requests)
    ]  # fmt: skip
    expected = {"ids": {}, "logprobs": {}}
    for request in requests:
        one = run(roomy, [request])
        expected["ids"] |= one["ids"]
        expected["logprobs"] |= one["logprobs"]
    pages = options.room * 9  # the mean prompt and answer
    engine = make_engine(options, kv_memory=pages * size, host_kv_memory=3 * pages * size, max_concurrent=16,
                         decode_tokens_per_seq=4, **base | {"max_model_len": 256})  # fmt: skip
    found = run(engine, requests)
    bad, gap = differing(found, expected)
    stats = engine.stats()
    engine.scheduler.check()
    print(f"{len(expected['ids'])} answers to {options.requests} requests in {pages} pages: {bad} differ, "
          f"log-probabilities by at most {gap:.2g}; {stats.preemptions} times out of pages, {stats.swaps} swapped, "
          f"{stats.cached_tokens} tokens found, {stats.host_cached_tokens} of them in host memory")  # fmt: skip
    return {"answers": len(expected["ids"]), "differing": bad, "gap": gap, "preemptions": stats.preemptions,
            "swaps": stats.swaps, "free_pages": stats.free_pages == pages}  # fmt: skip


BENCHES = {"prefix": bench_prefix, "pressure": bench_pressure, "deterministic": bench_deterministic,
           "exact": bench_exact}  # fmt: skip


def main() -> int:
    """Run what is named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("benches", nargs="*", choices=[[], *BENCHES], metavar="bench")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--room", type=int, default=8, help="how many sequences the pages hold")
    parser.add_argument("--times", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--requests", type=int, default=64)
    options = parser.parse_args()
    result = {name: BENCHES[name](options) for name in options.benches or BENCHES}
    print(json.dumps({"model": os.path.basename(options.model), "dtype": options.dtype, **result}))
    wrong = [name for name, each in result.items() if each.get("differing") and name == "exact"]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
