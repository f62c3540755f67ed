"""What happens between the q/k/v projection and attention: bias, head norm, rotation, and K/V into their slots.

    x = qkv + bias;   q, k = rope(norm(x)) or norm(rope(x)) or rope(x);   page slots <- k, v

with `rms_norm` over a head and `rope` as in their own files. One launch on a GPU, with float32 throughout.
"""

import torch
from torch import Tensor

from crane.kernels import native
from crane.kernels.lang import FLOATS, has_fp8, jit, next_power_of_2, tl
from crane.kernels.norm import rms_norm
from crane.kernels.pages import slot_index, write_kv
from crane.kernels.registry import Case, kernel
from crane.kernels.rope import rope, rope_tables

# Heads of a token that one program computes.
_BLOCK_HEADS = 8
_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0


def _qkv_post_torch(qkv: Tensor, kv: Tensor, layer: int, index: Tensor, cos: Tensor, sin: Tensor, num_heads: int, *,
                    norm_weight: Tensor | None = None, norm_first: bool = True, eps: float = 0.0,
                    bias: Tensor | None = None, kv_scales: Tensor | None = None,
                    skips: bool = False, keep_kv: bool = True) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """q, k and v as attention takes them; k and v are written to their slots, too.

    qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], q then k then v; its contents are lost.
    kv: [num_pages, num_layers, 2, page_size, num_kv_heads, head_dim], of qkv's type or float8_e4m3fn.
    index: int64 [num_tokens] from `pages.slot_index`, no slot twice; with `skips` some may be negative: not written.
    cos, sin: float32 [num_tokens, 1, head_dim] from `rope_tables`.
    norm_weight: [num_heads + num_kv_heads, head_dim], a row for each head of q and k, or None; norm_first: norm, then
    rope, or the other way round. bias: [(num_heads + 2 * num_kv_heads) * head_dim].
    kv_scales: float32 [num_layers, 2], what keys and values are divided by before they are written.
    Returns q [num_tokens, num_heads, head_dim], k and v [num_tokens, num_kv_heads, head_dim], perhaps views of qkv;
    None for k and v without `keep_kv`.
    """
    _, _, _, _, kv_heads, head_dim = kv.shape
    if bias is not None:
        qkv = qkv + bias
    qk, v = qkv.view(qkv.shape[0], -1, head_dim).split((num_heads + kv_heads, kv_heads), dim=1)
    if norm_weight is not None and norm_first:
        qk = rms_norm(qk, norm_weight, eps)
    qk = rope(qk, cos, sin)
    if norm_weight is not None and not norm_first:
        qk = rms_norm(qk, norm_weight, eps)
    q, k = qk.split((num_heads, kv_heads), dim=1)
    stored_k, stored_v = k, v
    if kv_scales is not None:
        stored_k, stored_v = k / kv_scales[layer, 0], v / kv_scales[layer, 1]
    if kv.dtype == _FP8:
        kv = kv.view(torch.uint8)  # which can be indexed everywhere
        stored_k, stored_v = (
            each.clamp(-_FP8_MAX, _FP8_MAX).to(_FP8).view(torch.uint8) for each in (stored_k, stored_v)
        )
    if skips:
        kept = index >= 0
        index, stored_k, stored_v = index[kept], stored_k[kept], stored_v[kept]
    write_kv(kv, layer, index, stored_k, stored_v)
    return (q, k, v) if keep_kv else (q, None, None)


def _qkv_post_c(qkv: Tensor, kv: Tensor, layer: int, index: Tensor, cos: Tensor, sin: Tensor, num_heads: int, *,
                norm_weight: Tensor | None = None, norm_first: bool = True, eps: float = 0.0,
                bias: Tensor | None = None, kv_scales: Tensor | None = None,
                skips: bool = False, keep_kv: bool = True) -> tuple[Tensor, Tensor | None, Tensor | None]:
    kv_heads, head_dim = kv.shape[4:]
    given = (qkv, kv, cos, sin) if norm_weight is None else (qkv, kv, cos, sin, norm_weight)
    if (
        bias is not None or kv_scales is not None or skips or head_dim > native.MAX_HEAD_DIM
        or qkv.dtype not in native.DTYPES or kv.dtype != qkv.dtype or not all(each.is_contiguous() for each in given)
        or (norm_weight is not None and norm_weight.dtype != qkv.dtype)
    ):  # fmt: skip
        return NotImplemented
    page_size = kv.shape[3]
    native.library().crane_qkv_post(
        qkv.data_ptr(), kv.data_ptr(), cos.data_ptr(), sin.data_ptr(),
        None if norm_weight is None else norm_weight.data_ptr(), index.data_ptr(), qkv.shape[0], num_heads, kv_heads,
        head_dim, 2 * layer * page_size, page_size, eps, norm_first, native.DTYPES[qkv.dtype],
    )  # fmt: skip
    q, k, v = qkv.view(len(qkv), -1, head_dim).split((num_heads, kv_heads, kv_heads), dim=1)
    return (q, k, v) if keep_kv else (q, None, None)


@jit
def _halves(base_ptr, HALF: tl.constexpr, at, inside):
    """Both halves of some heads, in float32. at: where the first half's elements are."""
    first = tl.load(base_ptr + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(base_ptr + at + HALF, mask=inside, other=0.0).to(tl.float32)
    return first, second


@jit
def _normalise(first, second, weight_ptr, at, inside, eps, HALF: tl.constexpr):
    mean = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF)
    scale = tl.rsqrt(mean + eps)[:, None]
    weight_1, weight_2 = _halves(weight_ptr, HALF, at, inside)
    return first * scale * weight_1, second * scale * weight_2


@jit(do_not_specialize=["layer"])
def _qkv_post_kernel(qkv_ptr, kv_ptr, index_ptr, cos_ptr, sin_ptr, weight_ptr, bias_ptr, scales_ptr, layer, stride, eps,
                     HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
                     NORM: tl.constexpr, BIAS: tl.constexpr, SCALED: tl.constexpr, LARGEST: tl.constexpr,
                     KEEP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Grid: (tokens, blocks of BLOCK heads). NORM: 0 none, 1 before the rotation, 2 after it. LARGEST: what the pages'
    type can hold. KEEP: whether k and v are written back, too. BLOCK_D: a power of two from D / 2."""
    token = tl.program_id(0).to(tl.int64)
    HALF: tl.constexpr = D // 2
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_D)
    at = head[:, None] * D + column[None, :]
    inside = (head < HEADS + 2 * KV_HEADS)[:, None] & (column < HALF)[None, :]
    turned = (head < HEADS + KV_HEADS)[:, None] & inside  # q and k
    first, second = _halves(qkv_ptr + token * stride, HALF, at, inside)
    if BIAS:
        bias_1, bias_2 = _halves(bias_ptr, HALF, at, inside)
        first += bias_1
        second += bias_2
    new_1, new_2 = first, second
    if NORM == 1:
        new_1, new_2 = _normalise(new_1, new_2, weight_ptr, at, turned, eps, HALF)
    cos = tl.load(cos_ptr + token * D + column, mask=column < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + token * D + HALF + column, mask=column < HALF, other=0.0)[None, :]
    new_1, new_2 = new_1 * cos - new_2 * sin, new_2 * cos + new_1 * sin
    if NORM == 2:
        new_1, new_2 = _normalise(new_1, new_2, weight_ptr, at, turned, eps, HALF)
    new_1 = tl.where(turned, new_1, first)
    new_2 = tl.where(turned, new_2, second)
    changed = inside if KEEP else (head < HEADS)[:, None] & inside
    out_ptr = qkv_ptr + token * stride
    tl.store(out_ptr + at, new_1.to(qkv_ptr.dtype.element_ty), mask=changed)
    tl.store(out_ptr + at + HALF, new_2.to(qkv_ptr.dtype.element_ty), mask=changed)
    slot = tl.load(index_ptr + token)
    if slot < 0:
        return
    side = (head - HEADS) // KV_HEADS
    stored = inside & (head >= HEADS)[:, None]
    vector = slot + (layer * 2 + side) * PAGE  # of all token vectors in the pages
    at = (vector * KV_HEADS + (head - HEADS) % KV_HEADS)[:, None] * D + column[None, :]
    if SCALED:
        scale = tl.load(scales_ptr + layer * 2 + side, mask=head >= HEADS, other=1.0)[:, None]
        new_1 /= scale
        new_2 /= scale
    if LARGEST > 0:
        new_1 = tl.clamp(new_1, -LARGEST, LARGEST)
        new_2 = tl.clamp(new_2, -LARGEST, LARGEST)
    tl.store(kv_ptr + at, new_1.to(kv_ptr.dtype.element_ty), mask=stored)
    tl.store(kv_ptr + at + HALF, new_2.to(kv_ptr.dtype.element_ty), mask=stored)


def _qkv_post_triton(qkv: Tensor, kv: Tensor, layer: int, index: Tensor, cos: Tensor, sin: Tensor, num_heads: int, *,
                     norm_weight: Tensor | None = None, norm_first: bool = True, eps: float = 0.0,
                     bias: Tensor | None = None, kv_scales: Tensor | None = None,
                     skips: bool = False, keep_kv: bool = True) -> tuple[Tensor, Tensor | None, Tensor | None]:
    _, _, _, page_size, kv_heads, head_dim = kv.shape
    blocks = -(-(num_heads + 2 * kv_heads) // _BLOCK_HEADS)
    _qkv_post_kernel[(qkv.shape[0], blocks)](
        qkv, kv, index, cos, sin, norm_weight, bias, kv_scales, layer, qkv.stride(0), eps,
        HEADS=num_heads, KV_HEADS=kv_heads, D=head_dim, PAGE=page_size,
        NORM=0 if norm_weight is None else 1 if norm_first else 2, BIAS=bias is not None,
        SCALED=kv_scales is not None, LARGEST=_FP8_MAX if kv.dtype == _FP8 else 0.0,
        KEEP=keep_kv, BLOCK=_BLOCK_HEADS, BLOCK_D=next_power_of_2(head_dim // 2), num_warps=4,
    )  # fmt: skip
    q, k, v = qkv.unflatten(1, (-1, head_dim)).split((num_heads, kv_heads, kv_heads), dim=1)
    return (q, k, v) if keep_kv else (q, None, None)


def _why_not(qkv: Tensor, kv: Tensor, layer: int, index: Tensor, cos: Tensor, sin: Tensor, num_heads: int, *,
             norm_weight: Tensor | None = None, **options) -> str | None:
    if qkv.dtype not in FLOATS or kv.dtype not in (qkv.dtype, _FP8):
        return f"{qkv.dtype} with pages of {kv.dtype} are not number types it knows"
    if kv.dtype == _FP8 and not has_fp8():
        return "this GPU does not convert float8_e4m3fn"
    if qkv.stride(1) != 1 or not (kv.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()):
        return "rows are not contiguous"
    if norm_weight is not None and not norm_weight.is_contiguous():
        return "the norm's weight is not contiguous"
    return None


def _case(tokens: int, heads: int, kv_heads: int, head_dim: int, *, norm: str = "", bias: bool = False,
          skips: bool = False, keep: bool = True, kv_dtype: torch.dtype | None = None, page_size: int = 16,
          layers: int = 3, gap: int = 0):
    def make(device: str, dtype: torch.dtype) -> dict:
        width = (heads + 2 * kv_heads) * head_dim
        pages = -(-tokens // page_size) + 1
        kv = torch.empty(pages, layers, 2, page_size, kv_heads, head_dim, device=device, dtype=kv_dtype or dtype)
        slots = torch.randperm(pages * page_size, device=device)[:tokens]
        if skips:
            slots[::2] = -1
        cos, sin = rope_tables(torch.randn(tokens, head_dim // 2, device=device) * 9)
        return {
            "qkv": torch.randn(tokens, width + gap, device=device).to(dtype)[:, :width],
            "kv": kv.fill_(float("nan")), "layer": 1, "index": slot_index(slots, kv), "cos": cos, "sin": sin,
            "num_heads": heads, "norm_first": norm == "first", "eps": 1e-6, "skips": skips, "keep_kv": keep,
            "norm_weight": torch.randn(heads + kv_heads, head_dim, device=device).to(dtype) if norm else None,
            "bias": torch.randn(width, device=device).to(dtype) if bias else None,
            "kv_scales": torch.tensor([[1.0, 1.0], [0.5, 0.25], [1.0, 1.0]], device=device) if kv_dtype else None,
        }  # fmt: skip

    return make


def _model(heads: int, kv_heads: int, head_dim: int = 128, **options):
    return _case(256, heads, kv_heads, head_dim, page_size=64, keep=False, **options)


def _traffic(qkv: Tensor, kv: Tensor, **other) -> tuple[int, int]:
    stored = qkv.shape[0] * 2 * kv.shape[4] * kv.shape[5]
    return 2 * qkv.numel() * qkv.element_size() - stored * (qkv.element_size() - kv.element_size()), 8 * qkv.numel()


def _elements(function: str, constants: dict) -> int:
    return constants["BLOCK"] * constants["D"]


_BF16 = (torch.bfloat16,)

qkv_post = kernel(
    "qkv_post", reference=_qkv_post_torch, triton=_qkv_post_triton, why_not=_why_not, traffic=_traffic,
    elements=_elements, scratch=("qkv",), in_c=_qkv_post_c,
    cases=(
        Case("llama", _case(5, 4, 2, 64)),
        Case("Qwen2", _case(5, 7, 1, 64, bias=True, page_size=4)),
        Case("Qwen2, pages only", _case(5, 7, 1, 64, bias=True, page_size=4, keep=False)),
        Case("Qwen3", _case(5, 4, 2, 128, norm="first", gap=64)),
        Case("Hunyuan", _case(5, 4, 4, 64, norm="last")),
        Case("everything, head_dim 80", _case(9, 3, 3, 80, norm="first", bias=True, page_size=2)),
        Case("head_dim 96, tokens without a slot", _case(6, 2, 1, 96, norm="last", skips=True)),
        Case("fp8 pages", _case(6, 4, 2, 64, norm="first", kv_dtype=_FP8), tolerance=0.07),
        Case("Qwen3-0.6B", _model(16, 8, norm="first"), _BF16, True),
        Case("Qwen2.5-7B", _model(28, 4, bias=True), (torch.bfloat16, torch.float16), True),
        Case("Hunyuan-7B, fp8 pages", _model(32, 8, norm="last", kv_dtype=_FP8), _BF16, True),
        Case("SmolLM2-135M", _model(9, 3, 64), (torch.bfloat16, torch.float32), True),
    ),
)  # fmt: skip
