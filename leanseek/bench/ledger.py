"""The ledger: every recipe priced in what it costs to reach one fixed quality, against controls trained beside it."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from leanseek.bench.queue import Place, say, status, work_through
from leanseek.bench.quick import WORSE, passes, quick
from leanseek.bench.rows import (
    ORDINARY,
    ROWS,
    Row,
    chosen_rows,
)
from leanseek.bench.score import (
    as_json,
    best_of_each,
    scores,
    target_of,
)
from leanseek.bench.track import find_track
from leanseek.config import BadInput


def open_place(data: Path | None, track: str | None, out: Path) -> Place:
    return Place(out, find_track(data, track, out))


@dataclass(frozen=True)
class Request:
    """What `leanseek bench ledger` was asked."""

    data: Path | None = None
    track: str | None = None
    out: Path = Path("runs/ledger")
    rows: str | None = None
    recipe: str | None = None
    seeds: int = 1
    tokens: tuple[str, ...] = ()
    minutes: float | None = None
    threads: int | None = None
    status: bool = False
    write: Path | None = None
    quick: bool = False
    as_json: bool = False


def main(asked: Request, rows: tuple[Row, ...] = ROWS) -> bool:
    """Does what was asked and prints it; False only when `--quick` finds ours too dear. Raises BadInput."""
    for name, number in (("seeds", asked.seeds), ("minutes", asked.minutes), ("threads", asked.threads)):
        if number is not None and not 0 < number < math.inf:
            raise BadInput(f"--{name} must be a positive number, got {number}")
    chosen, compared = (chosen_rows(names, asked.recipe, asked.tokens, rows) for names in (asked.rows, None))
    place = open_place(asked.data, asked.track, asked.out)
    if asked.quick:
        if asked.threads is not None:
            torch.set_num_threads(asked.threads)
        result = quick(place, rows)
        line = "not reached" if result["ratio_median"] is None else f"{result['ratio_median']:.3f}"
        verdict = "passes" if passes(result) else f"FAILS: {WORSE - 1:.0%} worse or more"
        say(f"cost of {result['name']} to the same bpb: {line} (median of {result['n']} seeds): {verdict}")
        if asked.as_json:
            print(json.dumps([result]))
        return passes(result)
    if asked.status:
        print("\n".join(status(place, chosen, compared, asked.seeds)))
        return True
    if asked.write is None and not asked.as_json:
        missing = work_through(place, chosen, compared, asked.seeds, asked.minutes, asked.threads, _command(asked))
        if missing:
            say(f"{len(missing)} items are missing, {missing[0].name} first: the same command goes on")
    target = target_of(place.receipts(), rows)
    found = scores(place, chosen, target)
    if asked.as_json:
        print(json.dumps(as_json(found)))
    elif asked.write is not None:
        from leanseek.bench.ledger_page import write_page

        if target is None:
            raise BadInput(f"{place.out}: the row {ORDINARY!r} has not been run yet, and it sets the target")
        write_page(place, chosen, target, asked.write)
    else:
        for score in best_of_each(found).values():
            print(f"{score.row.name:<16} {score.score:>12,.0f} CPU-seconds, {score.median_tokens:,.0f} tokens")
    return True


def _command(asked: Request) -> str:
    """The command that the receipts name, without the folders of this machine."""
    data = " --data DIR" if asked.data else ""
    parts = [f"--track {asked.track}"] if asked.track else []
    parts += [f"--recipe {Path(asked.recipe).name}"] if asked.recipe else []
    parts += [f"--tokens {text}" for text in asked.tokens]
    return " ".join([f"leanseek bench ledger{data}", *parts, f"--seeds {asked.seeds}"])
