"""The sampler against penalties, bias, masks and log-probabilities written out token by token in float64."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crane.runtime.sampler import Sampler
from crane.runtime.sequence import Sequence
from crane.runtime.types import Generate, SamplingParams

VOCAB, PADDED = 40, 48
IDS = st.integers(0, VOCAB - 1)


@st.composite
def rows(draw):
    """(sequence, mask or None, tokens ahead) of a row that is drawn greedily, so that one answer is right."""
    choose = st.sampled_from
    sampling = SamplingParams(
        temperature=0.0, repetition_penalty=draw(choose([1.0, 1.3, 0.7])), min_tokens=draw(choose([0, 3, 9])),
        frequency_penalty=draw(choose([0.0, 0.4, -0.4])), presence_penalty=draw(choose([0.0, 0.5])),
        logit_bias=draw(st.dictionaries(IDS, st.sampled_from([-3.0, -100.0, 2.5, 5.0]), max_size=6)),
        logprobs=draw(choose([None, 0, 3, 100])), logprob_ids=tuple(draw(st.lists(IDS, max_size=3))),
    )  # fmt: skip
    request = Generate("r", draw(st.lists(IDS, min_size=1, max_size=12)), sampling)
    sequence = Sequence(request, 0, 0, frozenset({1, 2}))
    sequence.token_ids += draw(st.lists(IDS, max_size=6))
    allowed = draw(st.none() | st.sets(IDS, min_size=1))
    return sequence, allowed, draw(st.lists(IDS, max_size=3))


def expected(logits, sequence, allowed, ahead):
    """The changed logits, by the definitions in `SamplingParams` and `Changes`."""
    p, x = sequence.sampling, logits.copy()
    tokens = sequence.token_ids + ahead
    output = tokens[sequence.num_prompt :]
    for token_id in set(tokens):
        x[token_id] = x[token_id] / p.repetition_penalty if x[token_id] > 0 else x[token_id] * p.repetition_penalty
        x[token_id] -= p.frequency_penalty * output.count(token_id) + p.presence_penalty * (token_id in output)
    for token_id, bias in p.logit_bias.items():
        x[token_id] += bias
    if allowed is not None:
        x[[token_id for token_id in range(VOCAB) if token_id not in allowed]] = -math.inf
    elif len(output) < p.min_tokens:
        x[list(sequence.stop_ids)] = -math.inf
    return x


def bits(allowed):
    words = np.zeros((VOCAB + 1 + 31) // 32, np.uint32)
    for token_id in allowed:
        words[token_id // 32] |= np.uint32(1 << (token_id % 32))
    return words


@settings(max_examples=60)
@given(st.lists(rows(), min_size=1, max_size=4), st.integers(0, 2**32))
def test_a_row_is_changed_as_its_request_says_and_its_log_probabilities_are_raw(batch, seed):
    logits = torch.randn(len(batch), PADDED, generator=torch.Generator().manual_seed(seed)) * 3
    logits[:, VOCAB:] = 50.0  # the model's padding
    exact = logits[:, :VOCAB].double().numpy()
    raw = torch.log_softmax(logits[:, :VOCAB].double(), 1)
    sampler = Sampler(VOCAB, torch.device("cpu"))
    masks = {row: bits(allowed) for row, (_, allowed, _) in enumerate(batch) if allowed is not None}
    sequences, _, ahead = zip(*batch, strict=True)
    ids, found = sampler.launch(logits, list(sequences), masks, list(ahead)).fetch().read()
    for row, (sequence, allowed, ahead) in enumerate(batch):
        x, p, entry = expected(exact[row], sequence, allowed, ahead), sequence.sampling, found[row]
        assert x[ids[row]] >= x.max() - 1e-5
        if p.logprobs is None:
            assert entry is None
            continue
        best = raw[row].sort(descending=True)
        count = min(p.logprobs, VOCAB)
        assert entry.top_ids == best.indices[:count].tolist()
        assert entry.top_logprobs == pytest.approx(best.values[:count].tolist(), abs=1e-5)
        assert entry.logprob == pytest.approx(raw[row, ids[row]].item(), abs=1e-5)
        assert entry.ids_logprobs == pytest.approx(raw[row, list(p.logprob_ids)].tolist(), abs=1e-5)


def test_what_a_sequence_has_said_counts_as_it_grows():
    sampler, rng = Sampler(VOCAB, torch.device("cpu")), random.Random(3)
    sampling = SamplingParams(temperature=0.0, repetition_penalty=1.2, frequency_penalty=0.9)
    sequence = Sequence(Generate("r", [3, 4, 4], sampling), 0, 0, frozenset())
    logits = torch.tensor([[rng.gauss(0, 2) for _ in range(VOCAB)]])
    said = []
    for _ in range(40):
        exact = expected(logits[0].double().numpy(), sequence, None, [])
        said.append(sampler.launch(logits.clone(), [sequence], {}, [()]).read()[0][0])
        assert exact[said[-1]] >= exact.max() - 1e-5
        sequence.token_ids.append(said[-1])
    assert len(set(said)) > 5
