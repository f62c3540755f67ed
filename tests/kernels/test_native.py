"""The C kernels: built where a compiler is, right in every layout, absent without harm."""

import ctypes
import dataclasses
import json
import os
import re
import threading
import time

import gguf
import numpy as np
import pytest
import torch

from crane.errors import ModelError
from crane.kernels import native, packed, registry
from crane.kernels.activation import silu_mul
from crane.kernels.blocks import BlockWeight, dequantize
from crane.kernels.packed import PackedLinear, Stored, can_pack, is_packable, is_read_by_c, pack
from crane.models.config import load_config
from crane.models.files import Checkpoint, TensorInfo, open_checkpoint
from crane.models.layers import GatedMLP
from crane.models.registry import load_model
from crane.models.weights import Weights
from tests.kernels import test_native_best, test_native_layers, test_native_sampling
from tests.models.paged import PagedRun
from tests.tiny import make_tiny

KINDS = [kind for kind in gguf.GGMLQuantizationType.__members__ if is_packable(kind)]


def random_weight(kind, rows, columns, seed=0):
    """Blocks of random codes whose float16 scales are small and finite."""
    elements, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (rows, columns // elements, nbytes), dtype=np.uint8)
    places = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2),
              "Q6_K": (208,)}.get(kind, (0,))  # fmt: skip
    for place in places:
        scale = random.uniform(0.001, 0.01, blocks.shape[:2]).astype(np.float16)
        blocks[..., place : place + 2] = scale[..., None].view(np.uint8)
    return BlockWeight(kind, torch.from_numpy(blocks.reshape(rows, -1)))


def pack_blocks(weight):
    """The weight in panels, in two pieces."""
    return pack(weight.kind, *weight.shape, weight.data.split(32 * (weight.shape[0] // 64) or weight.shape[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_are_the_blocks_values_with_scales_in_float16(c_kernels, kind):
    weight = random_weight(kind, 200, 512)
    ids = torch.tensor([0, 17, 199, 16, 0])
    expected = dequantize(weight)[ids]
    found = pack_blocks(weight).rows(ids, torch.float32)
    if kind.endswith("_K") or kind == "IQ4_XS":  # their scales are products, which float16 rounds to 11 bits
        assert (found - expected).abs().max() <= 2e-3 * expected.abs().max()
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", [*filter(is_read_by_c, KINDS), "BF16"])
def test_rows_packed_from_a_file_are_those_packed_from_memory(c_kernels, tmp_path, kind):
    if not can_pack(kind, (200, 512), torch.bfloat16):
        pytest.skip("needs AMX")
    data = torch.randn(200, 512).bfloat16() if kind == "BF16" else random_weight(kind, 200, 512).data
    stored = data.view(torch.uint8).numpy().tobytes()
    (tmp_path / "weights").write_bytes(bytes(7) + stored + bytes(7))
    with open(tmp_path / "weights", "rb") as file:
        row = len(stored) // 200
        pieces = [Stored(tmp_path, file.fileno(), 7 + start * row, count, row) for start, count in ((0, 48), (48, 152))]
        found = pack(kind, 200, 512, pieces)
    assert torch.equal(found.panels, pack(kind, 200, 512, [data]).panels)


def test_a_file_that_cannot_be_read_to_the_end_is_an_error_while_it_is_packed(c_kernels, tmp_path):
    (tmp_path / "weights").write_bytes(bytes(40 * 34))
    with open(tmp_path / "weights", "rb") as file, pytest.raises(OSError, match="became shorter"):
        pack("Q8_0", 48, 32, [Stored(tmp_path, file.fileno(), 0, 48, 34)])
    descriptor = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(IsADirectoryError):
        pack("Q8_0", 48, 32, [Stored(tmp_path, descriptor, 0, 48, 34)])
    os.close(descriptor)
    checkpoint = open_checkpoint(make_tiny(tmp_path, "qwen3", fmt="gguf"))
    info = TensorInfo("some.weight", "Q8_0", (48, 32), tmp_path / "weights", 0, 48 * 34)
    cut = Checkpoint(checkpoint.path, "gguf", checkpoint.metadata, {info.name: info})
    weights = Weights(cut, load_config(checkpoint), device="cpu", dtype=torch.float32, exact=False)
    with pytest.raises(ModelError, match="weights: cannot be read: the file became shorter"):
        weights.packed([info.name], [info.shape])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3, 15, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_product_with_blocks_is_off_by_its_rounding_only(c_kernels, kind, rows, dtype):
    weight = random_weight(kind, 136, 512)
    torch.manual_seed(0)
    x, bias = torch.randn(rows, 512).to(dtype), torch.randn(136)
    exact = x.double() @ dequantize(weight).double().T + bias
    found = PackedLinear([pack_blocks(weight)], bias)(x, torch.float32)
    assert (found - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("amx_rows", [0, 1])
def test_every_number_of_rows_and_any_last_panel_are_right(c_kernels, kind, amx_rows):
    """amx_rows 1 is AMX where the processor has it. x holds integers with a largest of 127, which 8 bits keep."""
    for features in (5, 77):
        weight = random_weight(kind, features, 256)
        struct = pack_blocks(weight).struct
        struct.amx_rows = amx_rows
        values = pack_blocks(weight).rows(torch.arange(features), torch.float32).double()
        x = torch.randint(-127, 128, (40, 256), generator=torch.manual_seed(features))
        x[:, ::32] = 127
        x[3, 32:64] = 0
        exact = x.double() @ values.T
        for rows in (*range(1, 20), 24, 31, 32, 33, 40):
            out = torch.full((rows + 1, features + 3), 7.0)
            given = x[:rows].bfloat16()
            c_kernels.crane_linear(
                ctypes.addressof(struct), given.data_ptr(), rows, 1, out.data_ptr(), features + 3, 0
            )
            error = (out[:rows, :features] - exact[:rows]).norm() / exact[:rows].norm()
            assert error < (1e-5 if amx_rows == 0 or not native.has_amx() else 1e-2)
            assert (out[rows] == 7).all() and (out[:, features:] == 7).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_best_token_is_the_first_with_the_largest_logit_across_slices(c_kernels, dtype):
    data = random_weight("Q8_0", 2600, 64).data
    data[1300:] = data[:1300]  # every best one has an equal in another slice
    linear = PackedLinear([pack("Q8_0", 2600, 64, [data])], torch.linspace(0, 0.1, 1300).repeat(2))
    x = torch.randn(300, 64, generator=torch.manual_seed(0)).to(dtype)
    x[1] = 0
    for rows, columns in ((1, 2600), (7, 2595), (300, 2600), (300, 1290), (33, 1)):
        expected = linear(x[:rows], torch.float32)[:, :columns].numpy().argmax(1)
        assert linear.best(x[:rows], columns).tolist() == expected.tolist()
    linear.best(x * torch.nan, 2600)  # gives anything, but ends


def test_a_logit_that_is_no_number_is_never_the_best_and_hides_no_other(c_kernels):
    bias = torch.linspace(0, 0.1, 2600)
    bias[torch.randperm(2600, generator=torch.manual_seed(2))[:1300]] = torch.nan
    linear = PackedLinear([pack("Q8_0", 2600, 64, [random_weight("Q8_0", 2600, 64).data])], bias)
    x = torch.randn(20, 64, generator=torch.manual_seed(1))
    expected = linear(x, torch.float32).nan_to_num(-torch.inf).argmax(1)
    assert linear.best(x, 2600).tolist() == expected.tolist()


def test_without_avx512_products_and_draws_are_the_same(tmp_path, monkeypatch):
    flags = [flag.replace("=native", "=haswell").replace("-O3", "-O1") for flag in native._FLAGS]
    monkeypatch.setattr(native, "_FLAGS", flags)
    monkeypatch.setattr(native, "_library", None)
    library = native.load(tmp_path, 2)
    if library is None:
        pytest.skip(f"no C kernels here: {native.reason()}")
    assert not native.has_amx()
    for kind in ("Q4_1", "Q5_0", "Q6_K", "Q8_0"):
        test_every_number_of_rows_and_any_last_panel_are_right(library, kind, 0)
        test_a_paired_weight_gates_to_the_bits_of_gate_and_up_computed_one_after_the_other(library, kind)
    test_native_layers.test_the_gate_holds_at_the_ends_of_the_range()
    test_native_sampling.check_cases()
    test_native_sampling.test_whole_vocabularies_are_drawn_from_as_defined("flat")
    test_native_best.test_they_are_those_of_all_logits_after_the_same_changes(1)
    test_native_best.test_a_screen_finds_them_whatever_way_logits_are_changed(8)


def test_weights_share_huge_pages(c_kernels):
    first, second = (pack_blocks(random_weight("Q8_0", 32, 64)).panels for _ in range(2))
    assert second.data_ptr() - first.data_ptr() == first.numel() and first.data_ptr() % 64 == 0
    assert packed._allocate(packed._ROOM_BYTES + 1).numel() == packed._ROOM_BYTES + 1


@pytest.mark.parametrize("rows", [1, 16, 17, 70])
def test_a_product_with_a_bfloat16_matrix_rounds_nothing(c_kernels, rows):
    if not can_pack("BF16", (40, 96), torch.bfloat16):
        pytest.skip("needs AMX")
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, 96).bfloat16(), torch.randn(40, 96).bfloat16(), torch.randn(40)
    packed = pack("BF16", 40, 96, [weight])
    assert torch.equal(packed.rows(torch.arange(40), torch.bfloat16), weight)
    found = PackedLinear([packed], bias)(x, torch.float32)
    torch.testing.assert_close(found.double(), x.double() @ weight.double().T + bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, "BF16"])
def test_a_row_has_the_same_bits_among_few_rows_and_many_on_amx(c_kernels, kind):
    """1,280 columns are several blocks, of which the last is short, and 512 such rows too many for a core's cache."""
    if not native.has_amx():
        pytest.skip("needs AMX")
    torch.manual_seed(0)
    x, bias = torch.randn(600, 1280).bfloat16(), torch.randn(77)
    matrix = torch.randn(77, 1280).bfloat16() if kind == "BF16" else random_weight(kind, 77, 1280)
    weight = pack("BF16", 77, 1280, [matrix]) if kind == "BF16" else pack_blocks(matrix)
    weight.struct.bias, weight.struct.amx_rows = bias.data_ptr(), 1

    def product(rows, dtype):
        out = torch.full((len(rows) + 1, 80), 7, dtype=dtype)
        given = (rows.data_ptr(), len(rows), 1, out.data_ptr(), 80, native.DTYPES[dtype])
        c_kernels.crane_linear(ctypes.addressof(weight.struct), *given)
        assert (out[-1] == 7).all() and (out[:, 77:] == 7).all()
        return out[:-1, :77]

    for dtype in (torch.bfloat16, torch.float32):
        few = torch.cat([product(rows, dtype) for rows in x.split(32)])
        for count in (33, 48, 49, 64, 130, 512, 600):
            assert torch.equal(product(x[:count], dtype), few[:count])
    exact = x.double() @ weight.rows(torch.arange(77), torch.float32).double().T + bias
    assert (few - exact).norm() < (1e-5 if kind == "BF16" else 5e-3) * exact.norm()


def test_sums_that_are_too_many_for_the_caches_are_those_of_few_rows(c_kernels):
    if not native.has_amx():
        pytest.skip("needs AMX")
    linear = PackedLinear([pack("BF16", 4224, 64, [torch.randn(4224, 64).bfloat16()])], torch.randn(4224))
    x = torch.randn(520, 64).bfloat16()
    assert torch.equal(linear(x), torch.cat([linear(rows) for rows in x.split(32)]))


def test_parts_of_different_types_lie_side_by_side(c_kernels):
    parts = [random_weight("Q5_0", 48, 64), random_weight("Q8_0", 16, 64, seed=1)]
    x = torch.randn(20, 64)
    whole = torch.cat([dequantize(part) for part in parts])
    found = PackedLinear([pack_blocks(part) for part in parts])(x)
    assert found.shape == (20, 64)
    assert (found - x @ whole.T).norm() < 0.01 * (x @ whole.T).norm()


@pytest.mark.parametrize("kind", [*KINDS, "BF16"])
def test_a_paired_weight_gates_to_the_bits_of_gate_and_up_computed_one_after_the_other(c_kernels, kind):
    for half, dtype in ((16, torch.bfloat16), (80, torch.bfloat16), (96, torch.float32)):
        if not can_pack(kind, (2 * half, 512), dtype):
            continue
        data = torch.randn(2 * half, 512).bfloat16() if kind == "BF16" else random_weight(kind, 2 * half, 512).data
        bias, ids = torch.randn(2 * half), torch.arange(2 * half)
        plain, paired = (pack(kind, 2 * half, 512, data.split(half), paired) for paired in (False, True))
        assert torch.equal(plain.rows(ids, dtype), paired.rows(ids, dtype))
        plain, paired = PackedLinear([plain], bias), PackedLinear([paired], bias)
        x = torch.randn(600, 512, generator=torch.manual_seed(half)).to(dtype)
        for rows in (*range(1, 9), 15, 16, 17, 32, 33, 70, 600):
            expected = plain(x[:rows])
            assert torch.equal(paired(x[:rows]), expected)
            assert torch.equal(paired.gated(x[:rows]), silu_mul(expected))


@pytest.mark.parametrize("kinds, inner, paired", [
    (("Q5_0", "Q5_0"), 96, True), (("Q8_0", "Q5_0"), 96, False), (("Q8_0", "Q8_0"), 40, False),
    (("F32", "F32"), 96, True),
])  # fmt: skip
@pytest.mark.parametrize("rows", [1, 9, 40])
def test_an_mlp_is_its_formula_be_gate_and_up_one_weight_or_two(c_kernels, tmp_path, kinds, inner, paired, rows):
    checkpoint = open_checkpoint(make_tiny(tmp_path, "qwen2", fmt="gguf"))
    config = dataclasses.replace(load_config(checkpoint), hidden_size=64, intermediate_size=inner)
    infos, values = {}, []
    with open(tmp_path / "weights", "wb") as file:
        for name, kind, shape in zip(("gate", "up", "down"), (*kinds, "F32"), ((inner, 64), (inner, 64), (64, inner))):
            blocks = torch.randn(shape) / 4 if kind == "F32" else random_weight(kind, *shape, seed=len(infos))
            values.append((blocks if kind == "F32" else dequantize(blocks)).double())
            data = (blocks if kind == "F32" else blocks.data).numpy().tobytes()
            stored = f"blk.0.ffn_{name}.weight"
            infos[stored] = TensorInfo(stored, kind, shape, tmp_path / "weights", file.tell(), len(data))
            file.write(data)
    files = Checkpoint(checkpoint.path, "gguf", checkpoint.metadata, infos)
    mlp = GatedMLP(Weights(files, config, device="cpu", dtype=torch.bfloat16, exact=False), config, 0)
    if isinstance(mlp.gate_up, PackedLinear):  # plain tensors need AMX
        assert mlp.gate_up.is_paired == paired
    x = torch.randn(rows, 64).bfloat16()
    gate, up, down = (each.T for each in values)
    expected = (torch.nn.functional.silu(x.double() @ gate) * (x.double() @ up)) @ down
    for found in (mlp(x), apart(mlp, x)):
        assert found.dtype == torch.bfloat16 and (found - expected).norm() < 0.02 * expected.norm()


def apart(mlp, x):
    with registry.force("torch", "silu_mul"):
        return mlp(x)


def test_threads_that_multiply_at_the_same_time_get_their_own_results(c_kernels):
    weight = random_weight("Q8_0", 512, 256)
    linear = PackedLinear([pack_blocks(weight)])
    inputs = [torch.randn(3, 256) for _ in range(4)]
    expected, wrong = [linear(x) for x in inputs], []

    def work(x, result):
        for _ in range(200):
            if not torch.equal(linear(x), result):
                wrong.append(x)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_threads_that_are_held_compute_for_all_and_sleep_once_they_are_let_go(c_kernels):
    linear, x = PackedLinear([pack_blocks(random_weight("Q8_0", 512, 256))]), torch.randn(3, 256)
    expected, found = linear(x), []
    for _ in range(2):  # the first time must not leave them held
        with pytest.raises(KeyError), native.held(True):
            other = threading.Thread(target=lambda: found.append(linear(x)))
            other.start()
            found.append(linear(x))
            other.join()
            raise KeyError
    assert all(torch.equal(each, expected) for each in found) and len(found) == 4
    time.sleep(0.1)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "hunyuan"])
def test_a_quantised_model_scores_as_its_dequantised_self_does(c_kernels, tmp_path, arch):
    path = make_tiny(tmp_path, arch, fmt="gguf", quant="Q8_0")
    checkpoint = open_checkpoint(path)
    config = load_config(checkpoint)
    tokens = list(range(5, 25))

    def scores(dtype, exact):
        model = load_model(checkpoint, config, "cpu", dtype, exact=exact)
        run = PagedRun(model, num_pages=16, dtype=dtype)
        prompt, last = run.step([("a", tokens)])[0], run.step([("a", [7])])[0]
        return torch.cat((prompt, last)).log_softmax(-1)

    exact = scores(torch.float32, True)
    assert (scores(torch.float32, False) - exact).abs().mean() < 0.02 * exact.std()
    assert (scores(torch.bfloat16, False) - exact).abs().mean() < 0.05 * exact.std()


def test_without_a_compiler_the_reason_is_given_and_torch_computes(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(native, "_library", None)
    for _ in range(2):
        assert native.load(tmp_path, 2) is None
    assert "no C compiler" in native.reason()
    assert len([line for line in caplog.messages if "no C compiler" in line]) == 1
    assert not can_pack("Q8_0", (16, 32), torch.float32)


@pytest.mark.parametrize("script, words", [
    ("echo 'x.c:1: error: unknown vector' >&2; exit 1", "unknown vector"),
    ("for last; do :; done; while [ $# -gt 1 ]; do [ $1 = -o ] && echo junk > $2; shift; done", "does not load|failed"),
])  # fmt: skip
def test_a_build_that_fails_or_does_not_work_is_not_used(tmp_path, monkeypatch, script, words):
    compiler = tmp_path / "cc"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(native, "_library", None)
    monkeypatch.setattr(native.shutil, "which", lambda name: str(compiler))
    assert native.load(tmp_path / "cache", 2) is None
    assert re.search(words, native.reason())
    assert not list((tmp_path / "cache" / "kernels").iterdir())


def test_a_forked_child_computes_alone(c_kernels):
    weight = random_weight("Q4_0", 512, 256)
    linear, x = PackedLinear([pack_blocks(weight)]), torch.randn(2, 256)
    expected = linear(x)
    out = torch.empty(2, 512)
    child = os.fork()
    if child == 0:
        try:
            address, _ = linear._plan[0]
            c_kernels.crane_linear(address, x.data_ptr(), 2, 0, out.data_ptr(), 512, 0)
        finally:  # whatever happens, the child must not go on with the tests
            os._exit(0 if torch.equal(out, expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_what_was_measured_is_kept_and_a_broken_note_is_measured_again(c_kernels, tmp_path, monkeypatch):
    monkeypatch.setattr(native, "_notes", tmp_path / "notes.json")
    assert native.measured("rows", lambda: 7) == 7
    assert native.measured("rows", lambda: 8) == 7
    (tmp_path / "notes.json").write_text("{")
    assert native.measured("rows", lambda: 9) == 9
    assert [path.name for path in tmp_path.iterdir()] == ["notes.json"]


def test_rows_for_amx_are_measured_once_for_each_kind_and_shape(c_kernels, tmp_path, monkeypatch):
    if not native.has_amx():
        pytest.skip("needs AMX")
    monkeypatch.setattr(native, "_notes", tmp_path / "notes.json")
    weights = [random_weight("Q8_0", 640, 512), random_weight("Q8_0", 500, 480), random_weight("Q4_0", 512, 2048)]
    for _ in range(2):
        found = [PackedLinear([pack_blocks(weight)]).parts[0].struct.amx_rows for weight in weights]
        assert found[0] == found[1] and set(found) <= {*packed._AMX_ROWS, packed._NEVER}
    notes = json.loads((tmp_path / "notes.json").read_text())
    assert notes == {"amx_rows 8.1.0 512x512": found[0], "amx_rows 4.1.0 512x2048": found[2]}
    monkeypatch.setattr(packed, "_measure_amx_rows", lambda *_: pytest.fail("measured again"))
    PackedLinear([pack_blocks(weights[0])])


def test_structures_are_as_large_as_in_c():
    assert ctypes.sizeof(native.Weight) == 56
