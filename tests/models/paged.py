"""Running a model over pages without the engine: what the tests of models share."""

import random

import torch

from crane.models.config import load_config
from crane.models.context import ForwardContext
from crane.models.files import open_checkpoint
from crane.models.registry import load_model


def load(path, dtype=torch.float32):
    """The model at `path` on the CPU."""
    checkpoint = open_checkpoint(path)
    return load_model(checkpoint, load_config(checkpoint), "cpu", dtype)


class PagedRun:
    """Sequences over one pool of pages, handed out in random order; unused memory is NaN."""

    def __init__(self, model, num_pages, page_size=4, dtype=torch.float32):
        config = model.config
        self.model, self.page_size = model, page_size
        shape = (num_pages, config.num_layers, 2, page_size, config.num_kv_heads, config.head_dim)
        self.kv = torch.full(shape, float("nan"), dtype=dtype)
        self.free = random.Random(0).sample(range(num_pages), num_pages)
        self.pages = {}
        self.computed = {}

    def step(self, rows):
        """Compute rows of (sequence name, new token ids) in one step.

        Returns logits of every new token, one [num_new, vocab_size] a row.
        """
        page_size = self.page_size
        positions, slots, lens, contexts = [], [], [], []
        for name, tokens in rows:
            pages = self.pages.setdefault(name, [])
            start = self.computed.get(name, 0)
            self.computed[name] = end = start + len(tokens)
            while len(pages) * page_size < end:
                pages.append(self.free.pop())
            positions += range(start, end)
            for at in range(start, end):
                slots.append(pages[at // page_size] * page_size + at % page_size)
            lens.append(len(tokens))
            contexts.append(end)
        widest = max(len(self.pages[name]) for name, _ in rows)
        table = [self.pages[name] + [0] * (widest - len(self.pages[name])) for name, _ in rows]
        ctx = ForwardContext(
            positions=torch.tensor(positions),
            slots=torch.tensor(slots),
            query_lens=lens,
            query_starts=[sum(lens[:row]) for row in range(len(lens))],
            context_lens=contexts,
            page_table=torch.tensor(table),
            kv=self.kv,
            page_size=page_size,
        )
        with torch.inference_mode():
            hidden = self.model(torch.tensor([token for _, tokens in rows for token in tokens]), ctx)
            return self.model.logits(hidden).split(lens)

    def drop(self, name):
        """End a sequence; its pages go to whoever asks next."""
        self.free += self.pages.pop(name)
        del self.computed[name]
