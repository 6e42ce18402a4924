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
def exp(x, FTZ: tl.constexpr):
    """The exponential. FTZ: by two instructions of CUDA, what is below the smallest normal number as 0; else it is five."""
    if FTZ:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * 1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp(x)


@triton.jit
def sigmoid_of(s, z, FTZ: tl.constexpr):
    """The logistic function of s from z = exp(-|s|). FTZ: by CUDA's reciprocal, good to one unit in the last place."""
    numerator = tl.where(s >= 0, 1.0, z)
    if FTZ:
        # the divisor is between 1 and 2: the cases that division looks at do not occur
        return numerator * tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + z], dtype=tl.float32, is_pure=True, pack=1
        )
    return numerator / (1.0 + z)


@triton.jit
def add_weighted_rows(acc, p, rows, PRECISION: tl.constexpr):
    """Add p @ rows, p in float32; beside bfloat16 rows p is two bfloat16 numbers, but one at "tf32"."""
    if rows.dtype == tl.bfloat16:
        if PRECISION == "tf32":
            return tl.dot(p.to(tl.bfloat16), rows, acc)
        # cut, not rounded: one instruction for three, and what is left is exact in float32
        high = (p.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        acc = tl.dot(high.to(tl.bfloat16), rows, acc)
        return tl.dot((p - high).to(tl.bfloat16), rows, acc)
    # float16 would lose slopes below 6e-8; its rows are exact in TF32
    return tl.dot(p, rows.to(tl.float32), acc, input_precision=PRECISION)
