"""transformers' generate as a benchmark child: `python -m crane.bench.child_transformers MODEL DTYPE`."""

import sys
import time

from crane.bench.cell import Cell, Timing, answer, prompts


def main() -> None:
    """Load the model, answer cells: `generate` with and without the later tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    path, dtype = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    num_asked = 0

    @torch.inference_mode()
    def run(cell: Cell, tokens: int) -> float:
        nonlocal num_asked
        num_asked += 1
        ids = torch.tensor(prompts(cell, model.config.vocab_size, num_asked))
        started = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
        return time.perf_counter() - started

    def measure(cell: Cell) -> Timing:
        prefill_s = run(cell, 1)
        return Timing(prefill_s, run(cell, 1 + cell.tokens) - prefill_s, cell.batch * cell.tokens)

    answer(f"transformers {dtype}", measure)


if __name__ == "__main__":
    main()
