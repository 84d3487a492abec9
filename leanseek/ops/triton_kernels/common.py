"""What all Triton kernels here share: sizes, the FP8 rounding, and what a launch must know of the machine."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

SIDE = 128  # values along K that share a scale; V3's promotion interval too (report §3.3.2)
H100_PROCESSORS = 132

triton.knobs.language.default_fp_fusion = True  # as up to Triton 3.9; later the default is off

# Triton's interpreter on a CPU casts to FP8 wrongly where rounding carries into the exponent, so there the values are
# rounded by hand before the cast. A GPU's own conversion is right and costs nothing.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def to_e4m3(x):
    """FP32 within ±448 to the nearest E4M3 value, ties to even; NaN stays NaN."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)  # 3 bits of mantissa
        small = (tl.abs(x) + 24576.0) - 24576.0  # 1.5 · 2^14: there FP32 lies 2^-9 apart, as E4M3 does below 2^-6
        rounded = tl.where(tl.abs(x) < 0.015625, small, normal).to(tl.int32, bitcast=True) | (bits & -0x80000000)
        code = rounded.to(tl.float32, bitcast=True).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        return tl.where(x != x, 0x7F, code).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return x.to(tl.float8e4nv)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def processors(device: torch.device) -> int:
    """Streaming multiprocessors; an H100's where there is no GPU to ask."""
    if device.type != "cuda":
        return H100_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def described(x: Tensor, block: list[int]) -> Any:
    """A descriptor by which blocks of x are fetched by the GPU's own copy engine; outside of x it reads zeros."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(aligned(x), block)


def aligned(x: Tensor) -> Tensor:
    """x [..., D], or a copy, with rows in one piece that begin at multiples of 16 bytes, as the engine wants them."""
    strided = all(stride * x.itemsize % 16 == 0 for stride in x.stride()[:-1])
    if x.stride(-1) == 1 and strided and x.data_ptr() % 16 == 0:
        return x
    width = cdiv(x.shape[-1] * x.itemsize, 16) * 16 // x.itemsize
    return torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)[..., : x.shape[-1]].copy_(x)
