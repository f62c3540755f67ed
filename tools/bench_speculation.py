"""Time answers with and without guessed tokens: `python tools/bench_speculation.py MODEL`.

One engine; a request says whether its tokens are guessed. Tasks: rewriting a program with
one name changed, alone and with a prediction of the answer, and a task with nothing to copy. Every task runs in
alternation, off and on; greedy texts must be the same wherever the arithmetic is float32 (bfloat16: it says how far).
Prints one JSON object as its last line.
"""

import argparse
import json
import statistics
import sys
import time

import msgspec

from crane.llm import LLM
from crane.runtime.types import Generate, SamplingParams

CODE = '''class Inventory:
    """Items on shelves, by name."""

    def __init__(self, capacity):
        self.capacity = capacity
        self.items = {}

    def add(self, name, count=1):
        if self.total() + count > self.capacity:
            raise ValueError(f"no room for {count} more of {name}")
        self.items[name] = self.items.get(name, 0) + count
        return self.items[name]

    def remove(self, name, count=1):
        if self.items.get(name, 0) < count:
            raise KeyError(f"there are not {count} of {name}")
        self.items[name] -= count
        if self.items[name] == 0:
            del self.items[name]

    def total(self):
        return sum(self.items.values())

    def report(self):
        lines = [f"{name}: {count}" for name, count in sorted(self.items.items())]
        return "\\n".join(lines)
'''
COPY = f"Rename the class Inventory to Warehouse and change nothing else. Give the whole program.\n```python\n{CODE}```"
FREE = "Write a short story about a crane that learns to fly at night. Use your own words and do not repeat yourself."
# name -> (question, prediction, rows)
TASKS = {
    "rename, 1 at a time": (COPY, None, 1),
    "rename, with prediction": (COPY, "```python\n" + CODE.replace("Inventory", "Warehouse") + "```", 1),
    "rename, 8 at a time": (COPY, None, 8),
    "story, 1 at a time": (FREE, None, 1),
    "story, 8 at a time": (FREE, None, 8),
}


def once(llm: LLM, question: str, prediction: str | None, rows: int, params: SamplingParams) -> dict:
    """Seconds, tokens and counters of `rows` equal requests; the texts' ids."""
    engine = llm.engine
    rendered = llm.chat_template.render([{"role": "user", "content": question}])
    prompt = llm.tokenizer.encode(rendered, add_special_tokens=False)
    guess = llm.tokenizer.encode(prediction, add_special_tokens=False) if prediction and params.num_draft_tokens else []
    engine.flush_cache()
    before = msgspec.to_builtins(engine.stats())
    for row in range(rows):
        seeded = msgspec.structs.replace(params, seed=row)
        engine.add(Generate(f"r{row}", prompt, seeded, prediction_ids=guess))
    tokens: dict[str, list[int]] = {f"r{row}": [] for row in range(rows)}
    first_s = None
    while engine.has_work:
        for output in engine.step():
            tokens[output.rid] += output.token_ids
        if first_s is None and all(tokens.values()):
            first_s, given = time.perf_counter(), sum(map(len, tokens.values()))
    seconds = time.perf_counter() - first_s
    after = msgspec.to_builtins(engine.stats())
    count = {name: after[name] - before[name] for name in ("steps", "drafts", "drafted_tokens", "accepted_tokens")}
    rate = (sum(map(len, tokens.values())) - given) / seconds
    return {"tokens": list(tokens.values()), "tokens_per_s": rate, **count}


def compare(llm: LLM, task: str, rounds: int, max_tokens: int, temperature: float, num_drafts: int) -> dict:
    """One row of the table: medians over alternating rounds."""
    question, prediction, rows = TASKS[task]
    params = SamplingParams(temperature=temperature, max_tokens=max_tokens, num_draft_tokens=0)
    guessed = msgspec.structs.replace(params, num_draft_tokens=num_drafts)
    off, on = [], []
    for _ in range(rounds):
        off.append(once(llm, question, prediction, rows, params))
        on.append(once(llm, question, prediction, rows, guessed))
    pairs = list(zip(off[-1]["tokens"], on[-1]["tokens"]))
    if llm.engine.info.dtype == "float32" and any(a != b for a, b in pairs):
        raise SystemExit(f"{task}: float32 tokens with guesses differ from those without")
    same = statistics.mean(next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), len(a)) for a, b in pairs)
    ratios = [b["tokens_per_s"] / a["tokens_per_s"] for a, b in zip(off, on)]
    last = on[-1]
    return {
        "task": task,
        "off_tokens_per_s": round(statistics.median(r["tokens_per_s"] for r in off), 2),
        "on_tokens_per_s": round(statistics.median(r["tokens_per_s"] for r in on), 2),
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(r, 2) for r in ratios],
        "tokens": sum(map(len, last["tokens"])),
        "same_tokens": round(same),
        "steps_off": off[-1]["steps"],
        "steps_on": last["steps"],
        "drafted": last["drafted_tokens"],
        "accepted": last["accepted_tokens"],
        "acceptance_length": round(1 + last["accepted_tokens"] / last["drafts"], 2) if last["drafts"] else None,
    }


def main() -> int:
    """The command. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tasks", default=",".join(map(str, range(len(TASKS)))), help="numbers of the tasks to run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--num-draft-tokens", type=int, default=8)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    llm = LLM(options.model, dtype=options.dtype, cpu=True, max_model_len=4096, kv_memory=1 << 29)
    rows = []
    for number in options.tasks.split(","):
        row = compare(llm, list(TASKS)[int(number)], options.rounds, options.max_tokens, options.temperature,
                      options.num_draft_tokens)  # fmt: skip
        print(json.dumps(row), flush=True)
        rows.append(row)
    print(json.dumps({"benchmark": "speculation", "dtype": llm.engine.info.dtype, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
