"""Rotary positions on interleaved pairs, and YaRN with V3's mscale (report §2.1.1, §4.3).

R rotary width (qk_rope_head_dim) · B batch · T tokens.
"""

import math

import torch
from torch import Tensor

from leanseek.config import ModelConfig


def rope_frequencies(config: ModelConfig) -> list[float]:
    """Angle per position of each of the R/2 pairs, in radians; YaRN divides the slow ones by its factor."""
    width, base, yarn = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    plain = [base ** (-2 * j / width) for j in range(width // 2)]
    if yarn is None:
        return plain

    def turns_at(rotations: float) -> float:
        """The pair that makes this many full turns within the original context."""
        return (
            width * math.log(yarn.original_max_position_embeddings / (2 * math.pi * rotations)) / (2 * math.log(base))
        )

    low = max(math.floor(turns_at(yarn.beta_fast)), 0)
    high = min(math.ceil(turns_at(yarn.beta_slow)), width - 1)
    ramp = [min(max((j - low) / max(high - low, 0.001), 0.0), 1.0) for j in range(width // 2)]
    return [f * (1 - r) + f / yarn.factor * r for f, r in zip(plain, ramp, strict=True)]


def rotary(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """positions [B, T] → cos and sin, each [B, T, R/2] in FP32."""
    frequencies = torch.tensor(rope_frequencies(config), dtype=torch.float32, device=positions.device)
    angles = positions[..., None].float() * frequencies
    stretch = 1.0
    if config.rope_scaling is not None:  # 1 in every release, where mscale and mscale_all_dim agree
        yarn = config.rope_scaling
        stretch = _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)
    return angles.cos() * stretch, angles.sin() * stretch


def softmax_scale(config: ModelConfig) -> float:
    """qk_head_dim^-½, times mscale² under YaRN: the exponent two is V3's, one factor each for query and key."""
    scale = config.qk_head_dim**-0.5
    if config.rope_scaling is not None and config.rope_scaling.mscale_all_dim:
        scale *= _mscale(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) ** 2
    return scale


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
