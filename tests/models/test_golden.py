"""Real models, greedy in float32, against transformers on the same dequantised weights."""

import gc

import pytest
import torch

from tests.models.paged import PagedRun, load

NUM_TOKENS = 24
EOS = {"<|im_end|>"}


def chat(question):
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


PROMPTS = [chat("Why is the sky blue?"), chat("Write a Python function that adds two numbers.")]


def oracle(path):
    """Prompt ids, transformers' greedy continuations and its logits of every chosen token."""
    transformers = pytest.importorskip("transformers")
    names = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**names)
    model = transformers.AutoModelForCausalLM.from_pretrained(**names, dtype=torch.float32)
    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in PROMPTS]
    outputs = []
    for ids in prompts:
        with torch.inference_mode():
            out = model.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64), do_sample=False,
                max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS, repetition_penalty=1.0,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        outputs.append((out.sequences[0, len(ids) :].tolist(), torch.cat(out.logits)))
    del model
    gc.collect()
    return prompts, outputs


def greedy_together(model, prompts, forbidden):
    """All prompts prefilled in one step, then decoded as one batch."""
    run = PagedRun(model, num_pages=40, page_size=16)
    rows = list(enumerate(prompts))
    chosen = [[] for _ in prompts]
    scores = [[] for _ in prompts]
    for _ in range(NUM_TOKENS):
        for (name, _), logits in zip(rows, run.step(rows)):
            scores[name].append(logits[-1])
            allowed = logits[-1].clone()
            allowed[forbidden] = float("-inf")
            chosen[name].append(int(allowed.argmax()))
        rows = [(name, ids[-1:]) for name, ids in enumerate(chosen)]
    return chosen, [torch.stack(rows) for rows in scores]
