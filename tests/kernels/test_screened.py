"""The best columns by a 4-bit screen: those of all logits, whatever weights and x are, and rarely all of the weight."""

import ctypes
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import crane
from crane.kernels import native
from crane.kernels.packed import _NEVER, PackedLinear, PackedWeight, pack
from crane.models.config import load_config
from crane.models.files import open_checkpoint
from crane.models.registry import load_model
from crane.models.tokenizer import load_tokenizer
from crane.runtime.engine import Engine
from crane.runtime.sampler import Sampler
from crane.runtime.sequence import Sequence
from crane.runtime.settings import Settings
from crane.runtime.types import Generate, SamplingParams
from tests.models.paged import PagedRun

VOCAB, COLUMNS, KNOWN = 6007, 512, 5990


def packed_weight(values, kind="Q8_0"):
    """values: float32 [rows, columns]; quantised by `gguf` where it can, else (Q6_K) by random codes."""
    if kind == "Q6_K":
        blocks = np.random.default_rng(0).integers(0, 256, (len(values), values.shape[1] // 256, 210), dtype=np.uint8)
        blocks[..., 208:] = np.full((*blocks.shape[:2], 1), 0.001, np.float16).view(np.uint8)
        blocks = blocks.reshape(len(values), -1)
    else:
        blocks = gguf.quantize(values.numpy(), gguf.GGMLQuantizationType[kind])
    return pack(kind, *values.shape, [torch.from_numpy(blocks)])


def gaussian(rows=VOCAB, columns=COLUMNS, seed=0):
    return torch.randn(rows, columns, generator=torch.manual_seed(seed))


def logits(weight, x):
    """What crane computes from integers, however many rows there are: float32 [len(x), rows of the weight]."""
    out = torch.empty(len(x), weight.shape[0])
    native.library().crane_linear(
        ctypes.byref(weight.struct), x.data_ptr(), len(x), native.DTYPES[x.dtype], out.data_ptr(), out.shape[1], 0
    )
    return out


def screened(weight, seed=1):
    """A product with that weight that always multiplies integers and has a screen."""
    linear = PackedLinear([weight])
    weight.struct.amx_rows = _NEVER
    linear.add_screen(seed)
    return linear


def check(weight, x, columns=None, seed=1):
    """Screens x a row and several rows at a time; asserts that the first of the largest logits is found. Returns the
    product."""
    linear, columns = screened(weight, seed), columns or weight.shape[0]
    expected = torch.from_numpy(logits(weight, x)[:, :columns].numpy().argmax(1))
    for count in (1, 2, 3, 8):
        for start in range(0, len(x) - count + 1, count):
            some = slice(start, start + count)
            assert torch.equal(linear.best(x[some], columns), expected[some])
    return linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K"])
def test_the_best_columns_are_those_of_all_logits(c_kernels, kind, dtype):
    weight = packed_weight(gaussian(), kind)
    rows = weight.rows(torch.arange(0, KNOWN, 250), torch.float32)  # each x prefers one row, some of them barely
    x = rows / rows.norm(dim=1, keepdim=True) * torch.linspace(3, 20, len(rows))[:, None]
    x = (x + gaussian(len(rows), seed=1)).to(dtype)
    linear = check(weight, x, KNOWN)
    screen = linear.screen
    assert screen.num_screened > screen.num_whole > 0, "both ways have to be seen"
    assert screen.num_blocks < 12 * screen.num_screened  # of 94
    assert linear.screened.endswith(f" of the layer, {screen.num_whole} all of it")


def test_of_equal_columns_the_first_is_found(c_kernels):
    values = gaussian(2048)
    values[1024:] = values[:1024]
    values[7] = values[1031] = values[70] = values[2040]
    x = (values[[1, 40, 70, 1023]] * 5).bfloat16()
    assert [int(one) for one in screened(packed_weight(values)).best(x, 2048)] == [1, 40, 7, 1023]


@pytest.mark.parametrize("seed", range(5))
def test_weights_that_other_roundings_would_all_get_wrong_the_same_way_are_no_trap(c_kernels, seed):
    """To the nearest, all of the best row's codes would be rounded down, and those of the next best, on average, up."""
    random, values = torch.manual_seed(9), torch.zeros(2048, COLUMNS // 32, 32)
    values[:, :, 0] = 127  # so that a code is a code; a step of the screen is 18.1 of them
    values[:, :, 1] = -127
    values[777, :, 2:30] = 9
    for row in (5, 900, 1500):
        for group in values[row]:
            group[2 + torch.randperm(28, generator=random)[:14]] = 17
    x = torch.ones(3, COLUMNS)
    x[1].view(-1, 32)[:, 2:30] = 100
    x[2].view(-1, 32)[:, 2:30] = 100 + torch.rand(28, generator=random)
    weight = packed_weight(values.flatten(1) / 127)
    linear = check(weight, x, seed=seed)
    assert linear.screen.num_whole == 0 and linear.best(x[:1], 2048) == 777
    x[:, 5] = torch.tensor([1e4, -1e4, 300])  # one huge component
    check(weight, x, seed=seed)


def test_zeros_outliers_and_numbers_that_are_none_change_nothing(c_kernels):
    values = gaussian(2048)
    values[100:400] = 0
    values[50] *= 1e4
    values[60, 3] = 3e6  # its scale is infinite in float16
    values[61, 3] = 1e-7  # scales below float16's ordinary numbers
    values[61, 4:] = 0
    values[70, :64] *= 1e-6
    weight = packed_weight(values)
    linear, plain, x = screened(weight), PackedLinear([weight]), gaussian(10, seed=4)
    x[1] = 0
    x[2] = torch.nan
    x[3, 5] = torch.inf
    x[4] *= 1e30
    x[5] *= 1e-30
    x[6, 9] = 1e6
    for row in x:
        assert linear.best(row[None], 2048) == plain.best(row[None], 2048)
    check(packed_weight(gaussian(2048).clamp(max=-1e-3)), -gaussian(8, seed=2).abs())


def test_the_screen_is_right_on_average_and_within_what_its_bound_says(c_kernels):
    weight, x = packed_weight(gaussian(64)), gaussian(1, seed=5)
    exact = weight.rows(torch.arange(64), torch.float32)
    errors, bounds = [], []
    for seed in range(300):
        linear = screened(weight, seed)
        made = PackedWeight(linear.screen_panels, linear.screen.weight).rows(torch.arange(64), torch.float32)
        # a step of the screen: what its codes differ by in a group of 32
        step = made.view(64, -1, 32).sort(2).values.diff(dim=2)
        step = step.masked_fill(step < 1e-6, torch.inf).amin(2)
        assert ((made - exact).abs().view(64, -1, 32) <= 1.001 * step[..., None]).all(), "a neighbour, never another"
        errors.append(((made - exact) @ x[0]).double())
        bounds.append((step**2 @ x.view(-1, 32).square().sum(1)).sqrt().double() / 2)
    z = torch.stack(errors) / torch.stack(bounds)
    assert z.mean(0).abs().max() < 5 / 300**0.5 and z.abs().max() < 6
    assert 0.5 < z.square().mean() < 1, "the bound is for coins; these are fairer"


def test_flat_logits_are_computed_whole_and_the_screen_is_left_for_ever_longer(c_kernels):
    weight = packed_weight(gaussian(2048))
    linear, flat = screened(weight), (gaussian(1, seed=6) * 1e-3).bfloat16()
    for _ in range(40):
        assert linear.best(flat, 2048) == logits(weight, flat).argmax()
    screen = linear.screen  # tried the 1st, 3rd, 7th, 15th and 31st time
    assert (screen.num_screened, screen.num_whole, screen.last_wait) == (0, 40, 31)
    peak = (weight.rows(torch.tensor([5]), torch.float32) * 9).bfloat16()
    for _ in range(40):
        assert linear.best(peak, 2048) == 5
    assert screen.num_screened > 0 and screen.last_wait == 0


def test_structures_are_as_large_as_in_c():
    assert ctypes.sizeof(native.Screen) == 56 + 3 * 8 + 2 * 4


def test_only_weights_of_many_bits_are_screened(c_kernels):
    weights = [pack("Q4_0", 32, 64, [torch.zeros(32, 36, dtype=torch.uint8)])]
    if native.has_amx():
        weights += [pack("BF16", 32, 64, [torch.zeros(32, 64, dtype=torch.bfloat16)])]
    for weight in weights:
        linear = PackedLinear([weight])
        linear.add_screen()
        assert linear.screen is linear.screened is None and linear.best(torch.zeros(1, 64).bfloat16(), 32) == 0


@pytest.mark.parametrize("name", ["smollm2", "qwen_coder"])
def test_a_real_model_finds_the_best_token_of_every_position(c_kernels, request, name):
    checkpoint = open_checkpoint(request.getfixturevalue(name))
    model = load_model(checkpoint, load_config(checkpoint), "cpu", torch.bfloat16, exact=False)
    weight, tokenizer = model.head.linear.parts[0], load_tokenizer(checkpoint)
    text = (Path(crane.__file__).parent / "runtime" / "settings.py").read_text()
    hidden = []
    model.logits = lambda found: hidden.append(found) or torch.zeros(len(found), 1)
    run = PagedRun(model, 64, 32, torch.bfloat16)
    tokens = tokenizer.encode(text)[:2000]
    for part in range(4):
        run.step([(part, tokens[part * 500 : part * 500 + 500])])
    x, linear, sampler = torch.cat(hidden), screened(weight), Sampler(weight.shape[0], torch.device("cpu"))
    sampled = [SamplingParams(temperature=0.0, repetition_penalty=1.05), SamplingParams(temperature=0.0),
               SamplingParams(temperature=0.0, presence_penalty=1.0, logit_bias={11: 20.0, 785: -5.0})]  # fmt: skip
    for start in range(0, len(x), 8):
        some = x[start : start + 8].contiguous()
        assert torch.equal(linear.best(some, weight.shape[0]), logits(weight, some).argmax(1))
    for start in range(0, len(x), 8):  # as if each position's text were a prompt with penalties
        some, rows = x[start : start + 8].contiguous(), range(start, min(start + 8, len(x)))
        sequences = [Sequence(Generate("r", tokens[row // 500 * 500 : row + 1], sampled[row % 3]), 0, 1, frozenset())
                     for row in rows]  # fmt: skip
        best = linear.best(some, weight.shape[0], native.Changes().hold(sampler.changes(sequences, [()] * 8, None)))
        assert torch.equal(best, sampler.launch(logits(weight, some), sequences, {}, [()] * 8).ids)
    if name == "qwen_coder":
        assert linear.screen.num_whole < 0.1 * linear.screen.num_screened
        assert linear.screen.num_blocks < 0.1 * linear.screen.num_screened * weight.shape[0] / 64


def test_an_engine_answers_the_same_without_and_says_what_the_screen_spared(qwen_coder):
    answers = {}
    for wanted in (True, False):
        engine = Engine(Settings(model_path=str(qwen_coder), cpu=True, threads=2, max_model_len=128, max_concurrent=4,
                                 screen=wanted, dtype="bfloat16"))  # fmt: skip
        for place in range(3):
            sampling = SamplingParams(temperature=0.0, max_tokens=20 + 10 * place, ignore_eos=True,
                                      repetition_penalty=1 + place / 20, frequency_penalty=place / 2)  # fmt: skip
            engine.add(Generate(f"r{place}", list(range(750 + place, 760)), sampling))
        found = answers[wanted] = {}
        while engine.has_work:
            for output in engine.step():
                found.setdefault(output.rid, []).extend(output.token_ids)
        state = engine.stats().kernels["screen"]
        spared = r"\d+ steps computed \d\.\d% of the layer, \d all of it"
        assert re.fullmatch(spared if wanted else "not used", state)
    assert answers[True] == answers[False]
