"""vLLM as a benchmark child, run by the Python it is installed in.

    python -m crane.bench.child_vllm MODEL DTYPE MAX_LEN
"""

import sys

from crane.bench.cell import answer_by_two_runs


def main() -> None:
    """Load the model, answer cells."""
    from vllm import LLM, SamplingParams

    model, dtype, max_len = sys.argv[1:]
    engine = LLM(
        model, dtype=dtype, max_model_len=int(max_len), enforce_eager=True, enable_prefix_caching=False,
        max_num_seqs=64, max_num_batched_tokens=max(2048, int(max_len)),
    )  # fmt: skip

    def generate(prompts: list[list[int]], tokens: int) -> None:
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
        engine.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)

    answer_by_two_runs(f"vllm {dtype}", engine.llm_engine.model_config.get_vocab_size(), generate)


if __name__ == "__main__":
    main()
