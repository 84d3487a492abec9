"""The cheapest layout that fits: every mesh, schedule, micro-batch, recompute policy that the cluster can take."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from leanseek.config import BadInput, ModelConfig
from leanseek.plan.estimate import Estimate, Stack, estimate
from leanseek.plan.hardware import Hardware
from leanseek.plan.layout import RECOMPUTE, Layout, Precision, wrong_with
from leanseek.plan.memory import why_not


@dataclass(frozen=True)
class Rejected:
    layout: Layout
    why: str


@dataclass(frozen=True)
class Found:
    best: list[Estimate]  # cheapest first
    rejected: list[Rejected]  # what does not fit, nearest first
    tried: int


def _powers(most: int) -> list[int]:
    return [1 << i for i in range(most.bit_length()) if 1 << i <= most]


Way = tuple[str, int, Literal["states", "all"], bool]  # schedule, chunks, shards, overlaps
ALONE: tuple[Way, ...] = (("1F1B", 1, "states", False), ("1F1B", 1, "all", False))
PIPELINED: tuple[Way, ...] = (
    ("1F1B", 1, "states", False),
    ("Interleaved1F1B", 2, "states", True),
    ("ZB1P", 1, "states", False),
    ("DualPipe", 1, "states", True),
    ("DualPipeV", 1, "states", True),
)


def layouts(
    model: ModelConfig, hardware: Hardware, gpus: int, batch: int, length: int, precision: Precision, muon: bool = False
) -> Iterator[Layout]:
    """Every layout worth trying, without recomputation. Powers of two; tp stays inside a domain of fast links."""
    low = precision == "fp8"
    base = Layout(
        gpus, batch=batch, length=length, precision=precision, dispatch_bytes=1 if low else 2,
        moment_bytes=2 if low else 4, muon=muon,
    )  # fmt: skip
    pps = [pp for pp in _powers(min(gpus, 32)) if gpus % pp == 0]
    tps = [tp for tp in _powers(min(hardware.domain, 8)) if gpus % tp == 0]
    for pp, tp, micro in itertools.product(pps, tps, (1, 2)):
        for ep in _powers(min(gpus // pp, model.n_routed_experts)):
            ways = PIPELINED if pp > 1 else ALONE if gpus > 1 else ALONE[:1]
            for schedule, chunks, shards, overlaps in ways:
                layout = replace(
                    base, pp=pp, tp=tp, ep=ep, micro_batch=micro, schedule=schedule, chunks=chunks, shards=shards,
                    overlaps=overlaps and ep > 1,
                )  # fmt: skip
                if wrong_with(layout, model) is None:
                    yield layout


def thriftiest(model: ModelConfig, layout: Layout, hardware: Hardware) -> tuple[Layout, str | None]:
    """The layout with as little recomputation as fits, and what does not fit with the most of it."""
    why = None
    for recompute in RECOMPUTE:  # each is slower than the one before
        layout = replace(layout, recompute=recompute)
        why = why_not(model, layout, hardware)
        if why is None:
            break
    return layout, why


def search(
    model: ModelConfig, hardware: Hardware, gpus: int, batch: int, length: int, precisions: Sequence[Precision],
    stack: Stack, keep: int = 5, muon: bool = False,
) -> Found:  # fmt: skip
    """Raises BadInput when nothing fits, naming the smallest cluster that would do."""
    fitting: list[Estimate] = []
    rejected: list[Rejected] = []
    for precision in precisions:
        for each in layouts(model, hardware, gpus, batch, length, precision, muon):
            layout, why = thriftiest(model, each, hardware)
            if why is None:
                fitting.append(estimate(model, layout, hardware, stack))
            else:
                rejected.append(Rejected(layout, why))
    rejected.sort(key=lambda each: wanted(each.why))
    if not fitting:
        raise BadInput(_nowhere(model, hardware, gpus, batch, length, precisions, rejected))
    fitting.sort(key=lambda each: -each.tokens_per_second)
    return Found(fitting[:keep], rejected[:keep], len(fitting) + len(rejected))


def wanted(why: str) -> float:
    """GB that a layout which does not fit would want."""
    return float(why.split(" wants ")[1].split(" ")[0])


def fits_somewhere(
    model: ModelConfig, hardware: Hardware, gpus: int, batch: int, length: int, precisions: Sequence[Precision]
) -> bool:
    tries = (each for precision in precisions for each in layouts(model, hardware, gpus, batch, length, precision))
    return any(thriftiest(model, layout, hardware)[1] is None for layout in tries)


def smallest_cluster(
    model: ModelConfig, hardware: Hardware, batch: int, length: int, precisions: Sequence[Precision], above: int = 0
) -> int | None:
    """The least power of two of devices that the model fits on, or None up to 2¹⁷; the batch grows where it must."""
    for gpus in _powers(1 << 17):
        if gpus > above and fits_somewhere(model, hardware, gpus, -(-batch // gpus) * gpus, length, precisions):
            return gpus
    return None


def _nowhere(
    model: ModelConfig, hardware: Hardware, gpus: int, batch: int, length: int, precisions: Sequence[Precision],
    rejected: list[Rejected],
) -> str:  # fmt: skip
    where = f"{gpus} × {hardware.name}"
    if not rejected:
        return (
            f"{where}: no mesh divides a batch of {batch} sequences of {length} tokens: take another number of devices"
        )
    nearest = rejected[0]
    enough = smallest_cluster(model, hardware, batch, length, precisions, above=gpus)
    advice = f"the smallest cluster that it fits on is {enough}" if enough else "no cluster of it is large enough"
    return f"{where}: the recipe fits in no layout; nearest {nearest.layout.named()}: {nearest.why}; {advice}"
