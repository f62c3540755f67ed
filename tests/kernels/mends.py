"""Three faults of Triton's interpreter (3.6), mended.

It keeps a bfloat16 as its 16 bits in a uint16 and computes on those as if they were the number: wrong results, no
error. Here every operation on such values sees float32 and gives its result rounded back, which is what GPUs do. Loads,
stores and moves keep to the bits.

Rounding up to float8 it loses the carry into the exponent. And it makes bounds of loops from arrays of one element,
which NumPy no longer takes for numbers.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
_OPERATIONS = ("binary_op", "unary_op", "ternary_op", "create_fma", "create_rsqrt", "create_erf", "create_fabs")


def _is_bfloat16(value) -> bool:
    return isinstance(value, Handle) and value.dtype.scalar == tl.bfloat16


def _widen(value):
    if not _is_bfloat16(value):
        return value
    return Handle((value.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _narrow(handle: Handle) -> Handle:
    """float32 to bfloat16: to the nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(handle.data, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    rounded = np.where(np.isnan(handle.data), np.uint16(0x7FC0), rounded)
    return Handle(rounded.reshape(handle.data.shape), tl.bfloat16)


def _in_float32(operation):
    def run(builder, *args):
        if not any(map(_is_bfloat16, args)):
            return operation(builder, *args)
        result = operation(builder, *map(_widen, args))
        # comparisons give truth values, a select of integers gives integers
        return _narrow(result) if result.data.dtype == np.float32 else result

    return run


def _dot(operation):
    def run(builder, a, b, accumulator, *rest):
        return operation(builder, _widen(a), _widen(b), accumulator, *rest)

    return run


def _cast(operation):
    def run(builder, source, to):
        if _is_bfloat16(source) and to.scalar != tl.bfloat16:
            return operation(builder, _widen(source), to)
        if to.scalar == tl.bfloat16 and source.dtype.scalar != tl.bfloat16:
            return _narrow(operation(builder, source, tl.float32) if source.dtype.scalar != tl.float32 else source)
        return operation(builder, source, to)

    return run


def _round_to_float8(operation):
    def run(builder, source, to, rounding_mode):
        if source.dtype.scalar != tl.float32 or to.scalar != tl.float8e4nv:
            return operation(builder, source, to, rounding_mode)
        codes = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.float8_e4m3fn).view(torch.uint8)
        return Handle(codes.numpy().reshape(source.data.shape), to.scalar)

    return run


def _retyped(handle: Handle):
    kind, shape = handle.dtype.scalar, list(handle.data.shape)
    return tl.core.tensor(handle, tl.block_type(kind, shape) if shape and handle.data.size > 1 else kind)


def _reduction(apply):
    def run(self, values):
        if not isinstance(values, tuple):
            return run(self, (values,))[0]
        narrow = [_is_bfloat16(value.handle) for value in values]
        if not any(narrow):
            return apply(self, values)
        results = apply(self, tuple(_retyped(_widen(value.handle)) for value in values))
        return tuple(_retyped(_narrow(result.handle)) if low and result.handle.data.dtype == np.float32 else result
                     for result, low in zip(results, narrow, strict=True))

    return run


def _indexable(patch):
    def run(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    return run


def install() -> None:
    """Mend the interpreter of this process. Once is enough."""
    builder = interpreter.InterpreterBuilder
    for name in _OPERATIONS:
        setattr(builder, name, _in_float32(getattr(builder, name)))
    builder.create_dot = _dot(builder.create_dot)
    builder.cast_impl = _cast(builder.cast_impl)
    builder.create_fp_to_fp = _round_to_float8(builder.create_fp_to_fp)
    builder.get_bf16 = lambda self, value: _narrow(Handle(np.array([value], np.float32), tl.float32))
    interpreter.ReduceScanOpInterface.apply = _reduction(interpreter.ReduceScanOpInterface.apply)
    interpreter._patch_lang_tensor = _indexable(interpreter._patch_lang_tensor)
