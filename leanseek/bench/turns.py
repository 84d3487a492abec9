"""Two things measured in turn in one process, A B A B, so that whatever else the machine does meets both."""

import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import floor, log10
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

Rate = Callable[[], float]  # does a piece of work, returns its units per second


@dataclass(frozen=True)
class Row:
    """ours and peer are medians; the ratio, ours ÷ peer, is taken round by round."""

    name: str
    ours: float
    peer: float
    ratio_median: float
    ratio_min: float
    ratio_max: float
    unit: str
    n: int


def in_turn(name: str, unit: str, ours: Rate, peer: Rate, rounds: int) -> Row:
    """`rounds` times one after the other; both are warm already."""
    pairs = []
    for _ in range(rounds):
        gc.collect()  # a cycle that one leaves must not be swept on the other's time
        pairs.append((ours(), peer()))
    ratios = [a / b for a, b in pairs]
    return Row(
        name,
        median(a for a, _ in pairs),
        median(b for _, b in pairs),
        median(ratios),
        min(ratios),
        max(ratios),
        unit,
        rounds,
    )


def fastest(candidates: dict[str, Callable[[], Rate]], say: Callable[[str], None]) -> tuple[str, Rate]:
    """Builds each candidate, lets it warm up and work once; the name and the rate of the best. One that fails is told.

    Raises RuntimeError when none works.
    """
    best: tuple[str, float, Rate] | None = None
    for name, build in candidates.items():
        begun = time.perf_counter()
        try:
            rate = build()
            speed = rate()
        except Exception as error:  # another tool's variant that does not run here is no result of ours
            say(f"  {name:<28} does not run: {str(error).splitlines()[0][:80] if str(error) else type(error).__name__}")
            continue
        say(f"  {name:<28} {speed:>9,.0f}   ({time.perf_counter() - begun:.0f} s with its start)")
        if best is None or speed > best[1]:
            best = (name, speed, rate)
        gc.collect()
    if best is None:
        raise RuntimeError("no candidate runs on this machine")
    return best[0], best[2]


def read_bandwidth(size: int) -> float:
    """Bytes per second at which this process reads `size` bytes of weights, as matrix · vector does; best of a few."""
    matrix = torch.ones(max(size // 4096 // 4, 1), 4096)
    vector = torch.ones(4096)
    seconds = []
    for _ in range(7):
        begun = time.perf_counter()
        torch.mv(matrix, vector)
        seconds.append(time.perf_counter() - begun)
    return matrix.nbytes / min(seconds)


def show(console: Console, rows: list[Row], peer: str) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for head in ("", "ours", peer, "ratio", "from", "to", "n"):
        table.add_column(head, justify="left" if head in ("", peer) and not head else "right")
    for row in rows:
        table.add_row(
            f"{row.name} [{row.unit}]".replace("[", r"\["),
            _three_digits(row.ours),
            _three_digits(row.peer),
            f"{row.ratio_median:.2f}",
            f"{row.ratio_min:.2f}",
            f"{row.ratio_max:.2f}",
            str(row.n),
        )
    console.print(table)


def _three_digits(rate: float) -> str:
    """At least the whole number, and as many digits behind it as make three."""
    return f"{rate:,.{max(0, 2 - floor(log10(rate)))}f}" if 0 < rate < 100 else f"{rate:,.0f}"


def report(bench: Callable[[Console], list[Row]], as_json: bool) -> None:
    """Runs a measurement; what it says meanwhile goes to stderr when stdout is for the JSON."""
    rows = bench(Console(stderr=as_json, highlight=False, soft_wrap=True))
    if as_json:
        print(json.dumps([asdict(row) for row in rows]))
