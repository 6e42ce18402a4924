"""Number formats that NumPy lacks, and the types of PTX."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]
TYPES: dict[str, type[np.generic]] = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16,
    "bf16": np.uint16, "f16": np.float16, "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64, "pred": np.bool_, "bf16x2": np.uint32,
    "f16x2": np.uint32, "tf32": np.uint32,
}  # fmt: skip
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def from_bfloat16(bits: Array) -> NDArray[np.float32]:
    """bfloat16 patterns as float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(x: Array) -> NDArray[np.uint16]:
    """float32 rounded to nearest even; NaN keeps being one."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def to_tf32(bits: Array) -> NDArray[np.uint32]:
    """float32 patterns rounded to ten bits of mantissa, halves away from zero (cvt.rna)."""
    return (bits.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)


def of_matrix(bits: Array, kind: str) -> NDArray[np.float64]:
    """Elements of a tensor-core operand: what the format keeps of them, in float64."""
    if kind == "tf32":
        return (bits.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float64)
    if kind == "bf16":
        return from_bfloat16(bits).astype(np.float64)
    raise ValueError(f"no tensor core takes {kind} here")


def flushed(x: Array) -> Array:
    """Subnormal numbers as zeros of the same sign (.ftz)."""
    tiny = np.finfo(np.float32).tiny
    return np.where(np.abs(x) < tiny, np.copysign(np.float32(0), x), x)


def immediate(word: str, dtype: type[np.generic]) -> np.generic:
    """A literal in the type of its instruction."""
    size = np.dtype(dtype).itemsize
    if word.startswith(("0f", "0d")):
        bits, width = int(word[2:], 16), 4 if word[1] == "f" else 8
        value = np.array([bits], dtype=BITS[width])
        return value.view(np.float32 if width == 4 else np.float64)[0] if dtype == np.float64 else value.view(dtype)[0]
    return np.array([int(word.rstrip("U"), 0) & ((1 << 8 * size) - 1)], dtype=BITS[size]).view(dtype)[0]
