"""`bench kernels`: what the machine can do at best, each kernel's share of it, and which products FP8 makes faster.

Every row is measured in turn with its peer: a ceiling that is measured here too, or, on a GPU, PyTorch's BF16 on the
same shape. On a CPU the kernels are the plain ones. On a GPU from Hopper on they are those that `ops/backend.py`
chooses, each checked against the plain one on the device before it is timed; what FP8 gains is stored for
`train.kernel_table`.
"""

from pathlib import Path

import torch
from rich.console import Console

from leanseek.bench.turns import Row, in_turn, show
from leanseek.bench.workload import BY_TRITON, LARGE, SMALL, TINY, Case, Shapes, Work, cases, ceilings
from leanseek.ops.backend import PLAIN, Measured, kernels_for
from leanseek.train.cpu import ready_cpu

# Distance over all elements, relative to their norm, beyond which a result is wrong. Rounding to BF16 makes 2^-9, and
# the short sums of a tensor core in FP8 less than that again; a wrong scale makes more than 2^-3.
TOLERANCE = 2.0**-6


def bench_kernels(rounds: int, quick: bool, out: Path, console: Console, shapes: Shapes | None = None) -> list[Row]:
    """A row for each ceiling, against itself, which shows how steady the machine is; then one or more per operation.

    Raises RuntimeError where a kernel's result is wrong on this device.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        ready_cpu()
    torch.manual_seed(0)
    kernels = kernels_for(device)
    fast = kernels is not PLAIN
    whose = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    console.print(f"{whose}; kernels: {kernels.told}")
    best = ceilings(device, quick)
    rows = [_row(Case(name, work, name), best, rounds) for name, work in best.items()]
    gains = []
    for case in cases(device, kernels, shapes or (LARGE if fast else TINY if quick else SMALL)):
        if fast:
            _check(case, console)
        rows.append(_row(case, best, rounds))
        if case.product is not None:
            gains.append((*case.product, rows[-1].ratio_median))
    show(console, rows, "peer")
    if fast:
        by_triton = next(row for row in rows if row.name.startswith(BY_TRITON))
        Measured(whose, tuple(gains), by_triton.ratio_median > 1).write(out)
        console.print(f"what FP8 gains is in {out}: give it to training as train.kernel_table={out}")
    return rows


def _row(case: Case, best: dict[str, Work], rounds: int) -> Row:
    peer = best[case.against] if isinstance(case.against, str) else case.against
    name = case.against if isinstance(case.against, str) else case.peer
    case.ours.rate(), peer.rate()
    return in_turn(f"{case.name} ÷ {name}", case.ours.unit, case.ours.rate, peer.rate, rounds)


def _check(case: Case, console: Console) -> None:
    if case.result is None or case.twin is None:
        return
    ours, twin = case.result().float(), case.twin().float()
    error = float((ours - twin).norm() / twin.norm())
    if not error <= TOLERANCE:
        raise RuntimeError(f"{case.name}: its result is off from the plain implementation's by {error:.1e} of its size")
    console.print(f"  {case.name}: off from the plain implementation by {error:.1e}")
