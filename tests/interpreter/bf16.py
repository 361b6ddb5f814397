"""Make Triton's interpreter (3.6 to 3.7) compute bf16, and index loops with NumPy 2.4 and later.

The interpreter keeps a bf16 tensor as uint16 bit patterns and then computes on those integers. Here every builder
method that computes unpacks such operands to float32, and packs a bf16 result again, rounding to nearest even.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def unpack(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def pack(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float32)
    bits = np.ascontiguousarray(values).view(np.uint32).reshape(values.shape)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def _is_bf16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _values(handle) -> np.ndarray:
    return unpack(handle.data) if _is_bf16(handle) else handle.data


def _handle(values: np.ndarray, dtype):
    return interpreter.TensorHandle(pack(values) if dtype == tl.bfloat16 else values, dtype)


def install() -> None:
    builder = interpreter.InterpreterBuilder
    dot, cast, binary, unary = builder.create_dot, builder.cast_impl, builder.binary_op, builder.unary_op

    def create_dot(self, a, b, acc, *rest):
        if not (_is_bf16(a) or _is_bf16(b)):
            return dot(self, a, b, acc, *rest)
        return _handle((_values(a) @ _values(b) + acc.data).astype(acc.data.dtype), acc.dtype.scalar)

    def cast_impl(self, source, target):
        from_, to = source.dtype.scalar, target.scalar
        if from_ == to or tl.bfloat16 not in (from_, to):
            return cast(self, source, target)
        if to == tl.bfloat16:
            return _handle(source.data.astype(np.float32), to)
        return interpreter.TensorHandle(_values(source).astype(interpreter._get_np_dtype(target)), to)

    def binary_op(self, left, right, op):
        if not _is_bf16(left):
            return binary(self, left, right, op)
        result = op(_values(left), _values(right))
        return _handle(result, tl.int1 if result.dtype == np.bool_ else tl.bfloat16)

    def unary_op(self, argument, op):
        if not _is_bf16(argument):
            return unary(self, argument, op)
        return _handle(op(_values(argument)), tl.bfloat16)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    builder.binary_op, builder.unary_op = binary_op, unary_op
    builder.get_bf16 = lambda self, value: _handle(np.array([value], np.float32), tl.bfloat16)

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, *scope):
        patch(tensor, *scope)

        def index(self) -> int:  # a loop bound is a one-element array, which int() no longer takes
            return int(np.asarray(self.handle.data).reshape(-1)[0])

        if scope:
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index

    interpreter._patch_lang_tensor = patch_lang_tensor
