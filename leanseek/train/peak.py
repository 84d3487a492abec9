"""What the machine can do at best: the matmul rate that a run's share of peak is measured against."""

import time
from statistics import median

import torch

LONG_ENOUGH = 1.0  # seconds


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int, rounds: int = 5) -> float:
    """FLOP/s of a square matmul [size, size]: median of a few rounds after a warm-up, fewer where they are slow."""
    x = torch.randn(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        (x @ x)[0, 0].item()  # reading a value waits for the device
        seconds.append(time.perf_counter() - begun)
        if len(seconds) > 1 and sum(seconds) > LONG_ENOUGH:
            break
    return 2 * size**3 / median(seconds[1:])


def faster_dtype(device: torch.device) -> str:
    """`bf16` where it multiplies matrices clearly faster than FP32 does, else `fp32`: many CPUs emulate it."""
    size = 256 if device.type == "cpu" else 4096
    bf16, fp32 = (matmul_peak(device, dtype, size) for dtype in (torch.bfloat16, torch.float32))
    return "bf16" if bf16 > 1.3 * fp32 else "fp32"
