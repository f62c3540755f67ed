"""Real models, greedy in float32, against transformers on the same dequantised weights."""

import gc

import pytest
import torch

from crane.models.files import open_checkpoint
from crane.models.tokenizer import load_tokenizer
from tests.models.paged import PagedRun, load

NUM_TOKENS = 24
QUESTIONS = ["Why is the sky blue?", "Write a Python function that adds two numbers.", "Hi"]


def prompt_ids(path):
    tokenizer = load_tokenizer(open_checkpoint(path))
    texts = [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in QUESTIONS]
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert all(len(ids) < 30 for ids in prompts), "special tokens were cut to pieces"
    return prompts


def their_model(path):
    """transformers' model with the weights that its own GGUF reader makes of the file."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, assign=True, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    assert not missing or config.tie_word_embeddings
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def greedy_together(model, prompts):
    """The same of ours: all prompts prefilled in one step, then decoded as one batch."""
    run = PagedRun(model, num_pages=16, page_size=16)
    new, chosen, scores = prompts, [[] for _ in prompts], [[] for _ in prompts]
    for _ in range(NUM_TOKENS):
        for row, logits in enumerate(run.step(list(enumerate(new)))):
            scores[row].append(logits[-1])
            chosen[row].append(int(logits[-1].argmax()))
        new = [ids[-1:] for ids in chosen]
    return [(ids, torch.stack(rows)) for ids, rows in zip(chosen, scores)]


@pytest.mark.parametrize("name", ["smollm2", "qwen_coder"])
def test_greedy_ids_of_a_real_model_equal_those_of_transformers(name, request):
    """Each id we choose is the one transformers finds best after the ids before it: so by
    induction both choose the same, and transformers needs one pass instead of one a token."""
    path = request.getfixturevalue(name)
    prompts = prompt_ids(path)
    answers = greedy_together(load(path), prompts)
    gc.collect()
    model = their_model(path)
    for prompt, (ids, ours) in zip(prompts, answers):
        with torch.inference_mode():
            theirs = model(torch.tensor([prompt + ids[:-1]])).logits[0, len(prompt) - 1 :]
        assert ids == theirs.argmax(-1).tolist()
        error = (ours - theirs).abs().max() / theirs.abs().max()
        assert error <= 1e-4, f"off by {error:.2e} of the largest logit"
