"""Device functions that keep relative precision where float32 would cancel or overflow."""

import triton
import triton.language as tl


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, relative error 3e-7: the rounding of u = 1 + x cancels in log(u) * x / (u - 1)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def softplus(s):
    """log(1 + exp(s))."""
    return tl.maximum(s, 0.0) + log1p(tl.exp(-tl.abs(s)))


@triton.jit
def sigmoid(s):
    """The logistic function; neither end overflows, and a small result keeps its relative precision."""
    z = tl.exp(-tl.abs(s))
    return tl.where(s >= 0, 1.0, z) / (1.0 + z)


@triton.jit
def one_plus_product(a, b):
    """(1 + a)(1 + b) - 1: associative, and small a and b survive beside the 1."""
    return a + b + a * b


@triton.jit
def rank_key(s, number):
    """A unique int64 that orders by descending s, then by ascending number below 2^32, when sorted descending."""
    bits = (s + 0.0).to(tl.int32, bitcast=True)  # -0.0 becomes 0.0
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - number.to(tl.int64))


@triton.jit
def add_weighted_rows(acc, p, rows, PRECISION: tl.constexpr):
    """Add p @ rows, p in float32; beside bfloat16 rows p is two bfloat16 numbers, but one at "tf32"."""
    if rows.dtype == tl.bfloat16:
        high = p.to(tl.bfloat16)
        acc = tl.dot(high, rows, acc)
        if PRECISION != "tf32":
            acc = tl.dot((p - high.to(tl.float32)).to(tl.bfloat16), rows, acc)
        return acc
    # float16 would lose slopes below 6e-8; its rows are exact in TF32
    return tl.dot(p, rows.to(tl.float32), acc, input_precision=PRECISION)
