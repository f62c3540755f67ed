"""crane's engine as a benchmark child: `python -m crane.bench.child_crane SETTINGS_JSON`."""

import json
import sys
import time

from crane.bench.cell import Cell, Timing, answer, prompts
from crane.errors import CraneError
from crane.runtime.server import load_engine
from crane.runtime.settings import Settings
from crane.runtime.types import Generate, Rejected, SamplingParams


def main() -> None:
    """Load the model that the settings name, check it, answer cells."""
    try:
        engine = load_engine(Settings(**json.loads(sys.argv[1])))
    except CraneError as error:
        sys.exit(str(error))
    num_asked = 0

    def add(rid: str, ids: list[int], **params) -> None:
        taken = engine.add(Generate(rid, ids, SamplingParams(temperature=0.0, ignore_eos=True, **params)))
        if isinstance(taken, Rejected):
            sys.exit(f"bench: crane refuses a prompt of {len(ids)} tokens: {taken.message}")

    def compute(cell: Cell, max_tokens: int) -> float:
        """Seconds until the last of the cell's prompts has its first token."""
        waiting = {f"{num_asked}-{place}-{max_tokens}" for place in range(cell.batch)}
        for rid, ids in zip(sorted(waiting), prompts(cell, engine.info.vocab_size, num_asked), strict=True):
            add(rid, ids, max_tokens=max_tokens)
        started = time.perf_counter()
        while waiting:
            waiting -= {output.rid for output in engine.step()}
        return time.perf_counter() - started

    def measure(cell: Cell) -> Timing:
        nonlocal num_asked
        if num_asked == 1:  # not before the first one, which says when the first token comes
            while engine.prepare():  # as a server is when it has been idle for a moment
                pass
            check(engine, add)
        num_asked += 1
        prefill_s = compute(cell, 1)  # as with the peers nobody decodes while others' prompts are computed
        # again, mostly from the prefix cache; who starts first decodes at once: tokens enough that nobody ends
        compute(cell, engine.info.max_model_len - cell.context)
        started, decoded = time.perf_counter(), 0
        while decoded < cell.batch * cell.tokens:
            decoded += sum(len(output.token_ids) for output in engine.step())
        timing = Timing(prefill_s, time.perf_counter() - started, decoded)
        engine.abort(None)
        return timing

    answer(f"crane {engine.info.dtype}", measure)


def check(engine, add) -> None:
    """What decoding chooses, computing the same tokens as one prompt must choose too, up to rounding.

    Ends the process with a message when it does not: then there is nothing worth timing.
    """
    # short: the logits of a whole prompt are memory that what is measured does not need
    prompt = prompts(Cell(1, 12, 8), engine.info.vocab_size, 0)[0]
    add("check", prompt, max_tokens=8)
    chosen = [token for output in _finish(engine) for token in output.token_ids]
    add("again", prompt + chosen, max_tokens=1, logprobs=1, prompt_logprobs=True)
    entries = next(o.prompt_logprobs for o in _finish(engine) if o.prompt_logprobs)[len(prompt) :]
    behind = max(entry.top_logprobs[0] - entry.logprob for entry in entries)
    if behind > (1e-3 if engine.info.dtype == "float32" else 0.5):  # bfloat16 over some dozen layers: hundredths
        sys.exit(f"bench: check failed: a decoded token is {behind:.2f} nats less likely than the best")


def _finish(engine) -> list:
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    return outputs


if __name__ == "__main__":
    main()
