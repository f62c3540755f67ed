"""Codes and scales out of GGUF planes in Triton: what `gguf_linear` and `gguf_dequantize` have in common.

Four-bit codes are turned into numbers by a few lines of PTX on NVIDIA's GPUs, by plain Triton elsewhere and wherever
`tuning.json` has the rule `inline_ptx` say 0: the same bits, more instructions.
"""

import torch

from crane.kernels import lang, tuning
from crane.kernels.lang import constexpr_function, jit, tl

# results and operands of `_fast_codes`
_REGISTERS = tl.constexpr("=r,=r,=r,=r,r,r")


@constexpr_function
def _fast_codes(bits, zero, shift, dtype):
    """PTX that turns four bytes of nibbles into four codes of each of two groups, as bfloat16 or float16.

    shift: place of the first group's bits in the bytes above the nibbles, the second operand if bits > 4.
    Bytes are masked four at a time, then permuted into the mantissa of 128 (or 1024), which is subtracted again
    by a fused multiply and add: sm_80 has no other packed arithmetic on bfloat16.
    """
    if dtype == tl.bfloat16:
        power, one, kind, less = 0x43, 0x3F80, "bf16x2", 0xC300 + zero  # -(128 + zero)
    else:
        power, one, kind, less = 0x64, 0x3C00, "f16x2", 0xE400 + zero  # -(1024 + zero)
    lines = [
        "{ .reg .b32 l, h, t, one, less;", "and.b32 l, $4, 0x0F0F0F0F;", "shr.u32 h, $4, 4;",
        "and.b32 h, h, 0x0F0F0F0F;", f"mov.b32 one, {one * 0x10001:#x};", f"mov.b32 less, {less * 0x10001:#x};",
    ]  # fmt: skip
    for group, register in enumerate("lh"):
        if bits > 4:
            left = 4 - (shift + group * (bits - 4))
            mask = ((1 << (bits - 4)) - 1 << 4) * 0x01010101
            lines += [f"shl.b32 t, $5, {left};" if left >= 0 else f"shr.u32 t, $5, {-left};"]
            lines += [f"and.b32 t, t, {mask:#x};", f"or.b32 {register}, {register}, t;"]
        for half, order in enumerate(("0x4140", "0x4342")):
            out = f"${2 * group + half}"
            lines += [f"prmt.b32 {out}, {register}, {power * 0x01010101:#x}, {order};"]
            lines += [f"fma.rn.{kind} {out}, {out}, one, less;"]
    return " ".join(lines) + " }"


@jit
def codes_of(low, high, shift, DTYPE: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, FAST: tl.constexpr):
    """Two groups of codes as exact numbers of the dtype. low: uint8 nibbles; high: uint8, both groups' bits at `shift`.

    A code in the low bits of a power of two's mantissa is that power plus the code; conversions are slower.
    """
    if FAST:
        PTX: tl.constexpr = _fast_codes(BITS, ZERO, shift, DTYPE)
        if DTYPE == tl.bfloat16:
            return tl.inline_asm_elementwise(PTX, _REGISTERS, [low, high], (tl.bfloat16, tl.bfloat16), True, 4)
        else:
            return tl.inline_asm_elementwise(PTX, _REGISTERS, [low, high], (tl.float16, tl.float16), True, 4)
    first, second = low & 15, low >> 4
    if BITS > 4:
        MASK: tl.constexpr = (1 << (BITS - 4)) - 1
        high = high >> shift
        first |= (high & MASK) << 4
        second |= ((high >> (BITS - 4)) & MASK) << 4
    return _exact(first, DTYPE, ZERO), _exact(second, DTYPE, ZERO)


@jit
def _exact(code, DTYPE: tl.constexpr, ZERO: tl.constexpr):
    """Codes 0..63, `ZERO` subtracted."""
    if DTYPE == tl.bfloat16:
        return (code.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True) - (128.0 + ZERO)
    elif DTYPE == tl.float16:
        return (code.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - (1024.0 + ZERO)
    else:
        return code.to(DTYPE) - ZERO


@jit
def _half(words, place: tl.constexpr):
    """The float16 in the low (0) or high (1) half of each word, as float32."""
    return (words >> (16 * place)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@jit
def _byte(words, place: tl.constexpr, SIGNED: tl.constexpr):
    """Byte `place` of each word, as float32."""
    if SIGNED:
        return ((words << (24 - 8 * place)) >> 24).to(tl.float32)
    else:
        return ((words >> (8 * place)) & 255).to(tl.float32)


@jit
def scale_of(words, more, run: tl.constexpr, NESTED: tl.constexpr, OFFSET: tl.constexpr):
    """float32 scale of a step's run; of its first 16 codes where it has two. more: words of the block, if NESTED."""
    if not NESTED:
        return _half(words, run)
    elif OFFSET:
        return _byte(words, run, False) * _half(more, 0)
    else:
        return _byte(words, 2 * run, True) * _half(more, 0)


@jit
def second_of(words, more, run: tl.constexpr, NESTED: tl.constexpr, OFFSET: tl.constexpr):
    """float32: the offset of a step's run, if OFFSET; else the scale of its last 16 codes, where it has two."""
    if OFFSET and NESTED:
        return -(_byte(words, 2 + run, False) * _half(more, 1))
    elif OFFSET:
        return _half(more, run)
    else:
        return _byte(words, 2 * run + 1, True) * _half(more, 0)


@jit
def step_of(codes_ptr, high_ptr, scales_ptr, more_ptr, turn, place: tl.constexpr, more, high, n, known, num_columns,
            DTYPE: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, NESTED: tl.constexpr, OFFSET: tl.constexpr,
            UNROLL: tl.constexpr, FAST: tl.constexpr):
    """A step of the rows n that are known: the `place`-th of the UNROLL steps of a round.

    Returns (words, more, high, front, back): scales, int32 [rows] each, high bits, and both runs of codes as numbers of
    the dtype, [rows, 32]. more, high: what the round's step before returned; anything for the first.
    """
    HIGH_STEPS: tl.constexpr = 4 // (BITS - 4) if BITS > 4 and BITS < 8 else 1  # steps whose high bits share a byte
    step = turn * UNROLL + place
    tile = n[:, None] * 32 + tl.arange(0, 32)[None, :]
    plane = num_columns.to(tl.int64) * 32
    words = tl.load(scales_ptr + step * num_columns + n, mask=known, other=0)
    if NESTED:
        if place == 0:
            more = tl.load(more_ptr + turn * UNROLL // 4 * num_columns + n, mask=known, other=0)
    elif OFFSET:
        more = tl.load(more_ptr + step * num_columns + n, mask=known, other=0)
    else:
        more = words
    if BITS == 8:
        at = codes_ptr + (2 * step).to(tl.int64) * plane + tile
        front = tl.load(at, mask=known[:, None], other=0).to(DTYPE)
        back = tl.load(at + plane, mask=known[:, None], other=0).to(DTYPE)
    else:
        if BITS > 4 and place % HIGH_STEPS == 0:
            high_at = high_ptr + (step // HIGH_STEPS).to(tl.int64) * plane + tile
            high = tl.load(high_at, mask=known[:, None], other=0)
        codes = tl.load(codes_ptr + step.to(tl.int64) * plane + tile, mask=known[:, None], other=0)
        if BITS == 4:
            front, back = codes_of(codes, codes, 0, DTYPE, BITS, ZERO, FAST)
        elif UNROLL % HIGH_STEPS == 0:
            front, back = codes_of(codes, high, place % HIGH_STEPS * (2 * (BITS - 4)), DTYPE, BITS, ZERO, FAST)
        else:
            shifts = (step % HIGH_STEPS * (2 * (BITS - 4))).to(tl.uint8)
            front, back = codes_of(codes, high, shifts, DTYPE, BITS, ZERO, False)
    return words, more, high, front, back


def uses_ptx(kind: str, dtype: torch.dtype) -> bool:
    """Whether codes of a kind of block become numbers of the dtype by PTX on this GPU."""
    known = lang.arch() >= 80 and dtype != torch.float32 and kind != "Q8_0"
    return known and bool(tuning.pick("inline_ptx", kind=kind, dtype=str(dtype)[6:])["PTX"])
