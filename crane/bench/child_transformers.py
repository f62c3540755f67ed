"""transformers' generate as a benchmark child: `python -m crane.bench.child_transformers MODEL DTYPE`."""

import sys

from crane.bench.cell import answer_by_two_runs


def main() -> None:
    """Load the model, answer cells."""
    import torch
    from transformers import AutoModelForCausalLM

    path, dtype = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0

    @torch.inference_mode()
    def generate(prompts: list[list[int]], tokens: int) -> None:
        ids = torch.tensor(prompts)
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)

    answer_by_two_runs(f"transformers {dtype}", model.config.vocab_size, generate)


if __name__ == "__main__":
    main()
