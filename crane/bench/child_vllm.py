"""vLLM as a benchmark child, run by the Python it is installed in.

    python -m crane.bench.child_vllm MODEL DTYPE MAX_LEN
"""

import sys
import time

from crane.bench.cell import Cell, Timing, answer, prompts


def main() -> None:
    """Load the model, answer cells. vLLM tells no step times: a cell runs twice, once without its later tokens."""
    from vllm import LLM, SamplingParams

    model, dtype, max_len = sys.argv[1:]
    engine = LLM(
        model, dtype=dtype, max_model_len=int(max_len), enforce_eager=True, enable_prefix_caching=False,
        max_num_seqs=64, max_num_batched_tokens=max(2048, int(max_len)),
    )  # fmt: skip
    vocab_size = engine.llm_engine.model_config.get_vocab_size()
    num_asked = 0

    def run(cell: Cell, tokens: int) -> float:
        nonlocal num_asked
        num_asked += 1
        batch = [{"prompt_token_ids": ids} for ids in prompts(cell, vocab_size, num_asked)]
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        engine.generate(batch, params, use_tqdm=False)
        return time.perf_counter() - started

    def measure(cell: Cell) -> Timing:
        prefill_s = run(cell, 1)
        return Timing(prefill_s, run(cell, 1 + cell.tokens) - prefill_s, cell.batch * cell.tokens)

    answer(f"vllm {dtype}", measure)


if __name__ == "__main__":
    main()
