"""Which implementation computes what: a library made for the GPU where it is installed, then our Triton kernels, then
PyTorch.

A `Kernels` is chosen once, for a device, and handed down from outside: to the precision of layers, the dispatcher of
experts, the loss, the runner. It holds a function for each operation that has more than one implementation; all of an
operation's take and return the same, within the bounds in their docstrings. On a CPU it is always the plain one, which
uses `cpu_kernels`.

What FP8 gains depends on shapes. `Measured` is the table that `leanseek bench kernels` stores of a machine; with it, a
product is made in FP8 only where FP8 was faster there.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from leanseek.config import BadInput
from leanseek.ops import experts, fp8, loss
from leanseek.ops.elementwise import swiglu
from leanseek.ops.fp8 import BLOCK, ROW, Quantised, Tile

Wanted = Literal["auto", "triton", "reference"]
HOPPER = (9, 0)  # the first with FP8 tensor cores and a copy engine
VERSION = 1  # of stored tables


@dataclass(frozen=True)
class Measured:
    """What a machine did: for each product, of M rows, N columns, K summed over, FP8's speed ÷ BF16's."""

    device: str
    gains: tuple[tuple[str, int, int, int, float], ...]  # dense or grouped, M, N, K, gain
    grouped_by_triton: bool  # whether our grouped matmul in BF16 was faster than PyTorch's

    def fp8_pays(self, kind: str, m: int, n: int, k: int) -> bool:
        """By the measured shape that is nearest, in powers of two; FP8 where none was measured."""
        known = [row for row in self.gains if row[0] == kind]
        if not known:
            return True
        wanted = (math.log2(max(m, 1)), math.log2(n), math.log2(k))
        nearest = min(known, key=lambda row: math.dist(wanted, [math.log2(size) for size in row[1:4]]))
        return nearest[4] > 1

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = {
            "version": VERSION,
            "device": self.device,
            "gains": self.gains,
            "grouped_by_triton": self.grouped_by_triton,
        }
        path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Measured":
        """Raises BadInput."""
        try:
            whole = json.loads(path.read_text(encoding="utf-8"))
            if whole["version"] != VERSION:
                raise BadInput(f"{path}: of version {whole['version']!r}: measure again with `leanseek bench kernels`")
            gains = tuple((str(kind), int(m), int(n), int(k), float(gain)) for kind, m, n, k, gain in whole["gains"])
            return cls(str(whole["device"]), gains, bool(whole["grouped_by_triton"]))
        except OSError as error:
            raise BadInput(f"{path}: {error.strerror}: make it with `leanseek bench kernels`") from None
        except (ValueError, KeyError, TypeError):
            raise BadInput(f"{path}: not a table of `leanseek bench kernels`") from None


# ── the operations, plainly ───────────────────────────────────────────────────────────────────────────────────────


def quantised(values: Tensor, tile: Tile, power_of_two: bool = False) -> Quantised:
    """values [..., R, C] in FP8 in such tiles."""
    return fp8.quantised(values, tile, power_of_two)


def quantised_by_expert(values: Tensor, counts: Tensor, power_of_two: bool = False) -> Quantised:
    """Rows [P, C] sorted by expert, in COLUMN tiles that end with the expert, counts [E]: for `grouped_wgrad` alone."""
    return fp8.quantised_by_expert(values, counts, power_of_two)


def quantised_swiglu(gate_up: Tensor, power_of_two: bool = False) -> Quantised:
    """SwiGLU of [M, 2K], gate first → [M, K] in ROW tiles."""
    return fp8.quantised(swiglu(gate_up), ROW, power_of_two)


def matmul(a: Quantised, b: Quantised, dtype: torch.dtype = torch.float32) -> Tensor:
    """a bᵀ in FP8: a [M, K] in ROW tiles, b [N, K] in blocks or ROW tiles → [M, N] in `dtype`."""
    return fp8.matmul(a, b).to(dtype)


def grouped_matmul(x: Quantised, weight: Quantised, counts: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Each expert's rows times its own matrix, in FP8: x [P, K], weight [E, N, K] in blocks → [P, N] in `dtype`."""
    return fp8.grouped_matmul(x, weight, counts).to(dtype)


def grouped_wgrad(grad: Quantised, x: Quantised, counts: Tensor) -> Tensor:
    """The gradient of each expert's matrix: grad [P, N] and x [P, K] by `quantised_by_expert` → FP32 [E, N, K]."""
    return fp8.grouped_wgrad(grad, x, counts)


@dataclass(frozen=True)
class Kernels:
    """Every operation's implementation; the plain ones unless told otherwise."""

    quantised: Callable[..., Quantised] = quantised
    quantised_swiglu: Callable[..., Quantised] = quantised_swiglu
    quantised_by_expert: Callable[..., Quantised] = quantised_by_expert
    matmul: Callable[..., Tensor] = matmul
    grouped_matmul: Callable[..., Tensor] = grouped_matmul
    grouped_wgrad: Callable[[Quantised, Quantised, Tensor], Tensor] = grouped_wgrad
    grouped_linear: Callable[[Tensor, Tensor, Tensor], Tensor] = experts.grouped_linear
    permute: Callable[[Tensor, experts.Layout], Tensor] = experts.permute
    unpermute: Callable[[Tensor, experts.Layout, Tensor], Tensor] = experts.unpermute
    losses_and_error: Callable[..., tuple[Tensor, Tensor]] = loss.losses_and_error
    latent_decode: Callable[..., Tensor] | None = None  # None: the runner attends as it does on a CPU
    measured: Measured | None = None
    told: str = "PyTorch"

    def fp8_pays(self, kind: str, m: int, n: int, k: int) -> bool:
        """Whether a product is worth FP8. Where nothing was measured, what was asked for is done."""
        return self.measured is None or self.measured.fp8_pays(kind, m, n, k)


PLAIN = Kernels()


# ── the choice ────────────────────────────────────────────────────────────────────────────────────────────────────


def kernels_for(device: torch.device, wanted: Wanted = "auto", measured: Measured | None = None) -> Kernels:
    """The best that is installed for a device, or what is wanted. `told` says in a line what was chosen.

    Raises BadInput where `triton` is wanted and cannot be had.
    """
    lacks = _what_triton_lacks(device)
    if wanted == "triton" and lacks:
        raise BadInput(f"kernels = 'triton': {lacks}")
    if wanted == "reference" or lacks:
        return PLAIN
    ours = _triton(measured)
    return ours if wanted == "triton" else _with_libraries(ours, torch.cuda.get_device_capability(device))


def _what_triton_lacks(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it runs on {device.type!r}, and Triton on a GPU"
    if torch.cuda.get_device_capability(device) < HOPPER:
        return "this GPU is older than Hopper"
    if find_spec("triton") is None:
        return "it is not installed: pip install 'leanseek[gpu]'"
    return None


def _triton(measured: Measured | None) -> Kernels:
    package = "leanseek.ops.triton_kernels."  # imported here, for a CPU does without
    quantise, products, rows, grouped, losses, decode = (
        import_module(package + name) for name in ("quantise", "fp8_matmul", "experts", "grouped", "loss", "decode")
    )
    kernels = Kernels(
        quantised=quantise.quantised,
        quantised_swiglu=quantise.quantised_swiglu,
        quantised_by_expert=quantise.quantised_by_expert,
        matmul=products.matmul,
        grouped_matmul=products.grouped_matmul,
        grouped_wgrad=products.grouped_wgrad,
        permute=rows.permute,
        unpermute=rows.unpermute,
        losses_and_error=losses.losses_and_error,
        latent_decode=decode.latent_decode,
        measured=measured,
        told="Triton",
    )
    # PyTorch's own grouped matmul is CUTLASS's: ours takes its place where it was measured to be faster.
    faster = measured is not None and measured.grouped_by_triton
    return replace(kernels, grouped_linear=grouped.grouped_linear) if faster else kernels


def _with_libraries(ours: Kernels, capability: tuple[int, int]) -> Kernels:
    """DeepGEMM for dense FP8, FlashMLA for decoding, each for the cases that it is made for and ours for the others."""
    if capability != HOPPER:  # on later ones both want other layouts
        return ours
    best, told = ours, [ours.told]
    if find_spec("deep_gemm") is not None:
        best, told = replace(best, matmul=_DeepGEMM(ours.matmul)), [*told, "DeepGEMM for dense FP8"]
    if find_spec("flash_mla") is not None and ours.latent_decode is not None:
        best = replace(best, latent_decode=_FlashMLA(ours.latent_decode))
        told.append("FlashMLA for decoding")
    return replace(best, told=", ".join(told))


class _DeepGEMM:
    """Weights in blocks, BF16 out, dims that are whole blocks; else as before."""

    def __init__(self, other: Callable[..., Tensor]) -> None:
        self.library: Any = import_module("deep_gemm")
        self.other = other

    def __call__(self, a: Quantised, b: Quantised, dtype: torch.dtype = torch.float32) -> Tensor:
        n, k = b.codes.shape
        if b.tile != BLOCK or dtype != torch.bfloat16 or n % 128 or k % 128 or not a.codes.shape[0]:
            return self.other(a, b, dtype)
        out = torch.empty(a.codes.shape[0], n, dtype=dtype, device=a.codes.device)
        codes, scales = b.codes.contiguous(), b.scales.contiguous()
        self.library.fp8_gemm_nt((a.codes, a.scales), (codes, scales), out)
        return out


class _FlashMLA:
    """One new token of each row, V3's widths, BF16, pages of 64; else as before."""

    def __init__(self, other: Callable[..., Tensor]) -> None:
        self.library: Any = import_module("flash_mla")
        self.other = other

    def __call__(
        self, q: Tensor, kept: Tensor, table: Tensor, limits: Tensor, heads: int, latent: int, size: int, scale: float,
        longest: int,
    ) -> Tensor:  # fmt: skip
        if limits.shape[1] != 1 or (latent, q.shape[2], size) != (512, 576, 64) or q.dtype != torch.bfloat16:
            return self.other(q, kept, table, limits, heads, latent, size, scale, longest)
        lengths = limits[:, 0].int()
        plan = self.library.get_mla_metadata(lengths, heads, 1)
        out, _ = self.library.flash_mla_with_kvcache(
            q[:, None], kept.view(-1, size, 1, q.shape[2]), table.int(), lengths, latent, *plan, softmax_scale=scale
        )
        return out[:, 0]
