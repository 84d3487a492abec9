"""What several tests of kernels share: inputs that are hard on FP8, and distances in FP64."""

import torch
from torch import Tensor

RAGGED = ([3, 0, 130, 64, 0], [0, 0, 5], [1, 1, 1], [0, 129, 0], [0, 0])


def hard(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Outlier channels, rows of every size, a row of zeros, one of equal values, one with values next to nothing."""
    x = torch.randn(rows, columns, generator=generator) * torch.exp2(torch.arange(rows) % 37 - 18.0)[:, None]
    x[:, ::97] *= 2.0**12
    x[0] = 0
    x[rows // 2] = 448.0
    x[rows // 3, : columns // 2] = 1e-40
    return x


def codes_of(x: Tensor) -> Tensor:
    """The bits of FP8 codes, of which NaN has only one kind here."""
    return x.contiguous().view(torch.uint8)


def off(ours: Tensor, exact: Tensor, bound: Tensor | float) -> float:
    """The largest error in units of its bound; infinite where one of the two is NaN and the other is not."""
    if not exact.numel():
        return 0.0
    error = (ours.double() - exact.double()).abs() / torch.as_tensor(bound, dtype=torch.float64).clamp(min=1e-300)
    error[ours.isnan() & exact.isnan()] = 0.0
    return float(error.nan_to_num(nan=float("inf")).max())
