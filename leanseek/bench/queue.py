"""The ledger's work as a queue: each call does what is missing, each finished item leaves a receipt.

    OUT/TRACK/data-4096/    the text prepared, shared by all rows with this vocabulary
              receipts/     one JSON file per item
              runs/         what an item works in; a killed item goes on from its checkpoint there

Several processes may work on one folder.
"""

import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from leanseek import checkpoint
from leanseek.bench import controls
from leanseek.bench.rows import (
    EVALUATIONS,
    Row,
    config_of,
    control_of,
    same_settings,
    settings_of,
    vocabulary,
)
from leanseek.bench.speed import counting_cpu_seconds, measure_speed
from leanseek.bench.track import Track, data_of_track
from leanseek.checkpoint import write_json
from leanseek.config import BadInput
from leanseek.data.shards import open_data
from leanseek.train.cpu import ready_cpu
from leanseek.train.log import read_metrics
from leanseek.train.pretrain import pretrain

BF16_UNITS = "amx_bf16", "avx512_bf16"  # of x86, as Linux calls them
SEARCH_SHARE = 0.25  # of a full run's tokens
BEYOND = 4  # points that a search may add beyond its grid, while the best rate is the last one


@dataclass(frozen=True)
class Item:
    """One piece of work. `rate` is set for points of a search; a full run takes the best of them."""

    kind: Literal["dtype", "search", "run", "speed"]
    row: Row | None = None
    rate: float | None = None
    seed: int = 0
    rows: tuple[Row, ...] = ()  # whose speed is measured

    @property
    def name(self) -> str:
        if self.row is None:
            return self.kind
        last = {"dtype": "", "search": f"-{self.rate:g}" if self.rate else "", "run": f"-{self.row.full_tokens}"}[
            self.kind
        ]
        return f"{self.row.name}-{self.kind}{last}" + (f"-seed{self.seed}" if self.kind == "run" else "")


@dataclass(frozen=True)
class Place:
    """Where a ledger is kept."""

    out: Path
    track: Track

    def receipt(self, item: Item) -> Path:
        return self.out / self.track.name / "receipts" / f"{item.name}.json"

    def work(self, item: Item) -> Path:
        return self.out / self.track.name / "runs" / item.name

    def read(self, item: Item) -> dict[str, Any] | None:
        path = self.receipt(item)
        return read_json(path) if path.exists() else None

    def receipts(self) -> list[dict[str, Any]]:
        folder = self.out / self.track.name / "receipts"
        return [read_json(path) for path in sorted(folder.glob("*.json"))]

    def speeds(self) -> list[dict[str, Any]]:
        """The receipts of measured speeds, one of each machine, the newest first."""
        found = [receipt for receipt in self.receipts() if receipt["kind"] == "speed"]
        return sorted(found, key=lambda receipt: str(receipt["finished"]), reverse=True)


def items(place: Place, rows: tuple[Row, ...], compared: tuple[Row, ...], seeds: int) -> list[Item]:
    """All work that the rows need, as far as it is known: a search goes on while its best rate is the outermost.

    Speeds are measured in one go for all rows that are to be compared.
    """
    found = [Item("dtype", row) for row in compared if row.control]
    for row in rows:
        found += [Item("search", row, rate) for rate in search_points(place, row)]
    for seed in range(seeds):
        found += [Item("run", row, seed=seed) for row in rows]
    return [*found, Item("speed", rows=compared)]


def search_points(place: Place, row: Row) -> list[float]:
    """The grid, and beyond it in steps of two as long as the best point measured lies at an end."""
    points = sorted(row.rates)
    for _ in range(BEYOND):
        found = searched(place, row)
        if not points or any(point not in found for point in points):
            break
        best = min(points, key=lambda rate: found[rate])
        if best == points[0]:
            points = [points[0] / 2, *points]
        elif best == points[-1]:
            points = [*points, points[-1] * 2]
        else:
            break
    return points


def searched(place: Place, row: Row) -> dict[float, float]:
    """Final bpb by learning rate, of the points that are done."""
    done = {}
    for receipt in place.receipts():
        if receipt["kind"] == "search" and receipt["row"] == row.name and same_settings(row, receipt):
            done[receipt["settings"]["learning_rate"]] = _number(receipt["bpb"])
    return done


def best_rate(place: Place, row: Row) -> float | None:
    """The learning rate to train with: the best of the search, the shipped one where nothing is searched."""
    found, points = searched(place, row), search_points(place, row)
    if not points:
        return row.control.learning_rate if row.control else None
    if any(point not in found for point in points):
        raise BadInput(f"row {row.name}: its learning-rate search is not done yet")
    return min(points, key=lambda rate: found[rate])


def is_done(place: Place, item: Item) -> bool:
    receipt = place.read(item)
    if receipt is None:
        return False
    if item.kind in ("dtype", "speed") and receipt["machine"] != machine():
        return False
    if item.kind == "speed":
        return all(row.name in receipt["rows"] and same_settings(row, receipt["rows"][row.name]) for row in item.rows)
    assert item.row is not None
    if item.kind == "dtype":
        return same_settings(item.row, receipt)
    if not same_settings(item.row, receipt, tokens_of(item)):
        return False
    if item.kind == "search":
        return True
    points, found = search_points(place, item.row), searched(place, item.row)
    searching = any(point not in found for point in points)
    return not searching and receipt["settings"]["learning_rate"] == best_rate(place, item.row)


def tokens_of(item: Item) -> int:
    """A search trains a quarter of the row's own budget, whatever budget its full runs are given."""
    assert item.row is not None
    if item.kind == "run":
        return item.row.full_tokens
    return int(item.row.tokens * SEARCH_SHARE)


def work_through(
    place: Place,
    rows: tuple[Row, ...],
    compared: tuple[Row, ...],
    seeds: int,
    minutes: float | None,
    threads: int | None,
    command: str,
) -> list[Item]:
    """Does what is missing, one item after the other; returns what is still missing. Raises BadInput.

    No item begins after `minutes`. Several processes may work on one folder: an item in work elsewhere is left alone.
    """
    ready_cpu()
    if threads is not None:
        torch.set_num_threads(threads)
    began, elsewhere = time.monotonic(), set[str]()
    while missing := [item for item in items(place, rows, compared, seeds) if not is_done(place, item)]:
        free = [item for item in missing if item.name not in elsewhere]
        if not free or (minutes is not None and time.monotonic() - began > 60 * minutes):
            return missing
        item = free[0]
        if item.kind in ("run", "speed") and any(other.kind in ("search", "dtype") for other in missing):
            ready = [other for other in free if other.kind == "run" and _searched_out(other, missing)]
            if not ready:
                return missing
            item = ready[0]
        try:
            with checkpoint.lock(place.work(item).with_name(f".{item.name}")):
                if is_done(place, item):
                    continue
                say(f"{item.name}: {len(missing)} items to go, {time.monotonic() - began:.0f} s so far")
                do(place, item, command)
        except BadInput as error:
            if "in use by another process" not in str(error):
                raise
            elsewhere.add(item.name)
    return []


def _searched_out(item: Item, missing: list[Item]) -> bool:
    return not any(other.row == item.row and other.kind in ("search", "dtype") for other in missing)


def do(place: Place, item: Item, command: str) -> None:
    """One item to its receipt; an older receipt of other settings is laid aside."""
    began, cpu_began = time.monotonic(), os.times()
    if item.kind == "speed":
        found: dict[str, Any] = {"rows": _speeds(place, item.rows)}
    elif item.kind == "dtype":
        assert item.row is not None
        found = faster_dtype(place, item.row)
    else:
        found = train_row(place, item)
    cpu = os.times()
    spent = {
        "seconds": time.monotonic() - began,
        "cpu_seconds": sum(cpu[:4]) - sum(cpu_began[:4]),
    }
    receipt = {
        "kind": item.kind,
        "row": item.row.name if item.row else None,
        "seed": item.seed,
        "track": place.track.name,
        "command": command,
        "commit": commit(),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **spent,
        **found,
    }
    path = place.receipt(item)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and item.kind != "speed":
        aside = path.parent / "superseded"
        aside.mkdir(exist_ok=True)
        path.rename(aside / f"{path.stem}-{len(list(aside.iterdir()))}.json")
    elif path.exists() and (other := read_json(path)["machine"]) != receipt["machine"]:
        path.rename(path.with_name(f"speed-{_as_file_name(other)}.json"))
        path.with_name(f"speed-{_as_file_name(receipt['machine'])}.json").unlink(missing_ok=True)
    write_json(path, receipt)


def train_row(place: Place, item: Item) -> dict[str, Any]:
    """A point of a search or a full run: settings, tokens, flops, curve and final bpb."""
    row = item.row
    assert row is not None
    tokens = tokens_of(item)
    rate = item.rate if item.kind == "search" else best_rate(place, row)
    folder = data_of_track(place.track, place.out, vocabulary(row))
    run = place.work(item)
    marked = {"settings": settings_of(row, tokens, rate), "seed": item.seed}
    _begin(run, marked)
    evaluations = EVALUATIONS if item.kind == "run" else 1
    if row.control:
        dtype = (place.read(Item("dtype", row)) or {"dtype": "fp32"})["dtype"]
        control = control_of(row, tokens, rate)
        ended = controls.train(control, dtype, item.seed, open_data(folder), run / "run", evaluations)
        curve, flops = ended["curve"], ended["tokens"] * controls.flops_per_token(control)
    else:
        config = config_of(row, tokens, rate, item.seed, evaluations)
        ended = pretrain(config, folder, run / "run")
        if ended["ended"] != "complete":
            raise KeyboardInterrupt
        dtype = checkpoint.read_run(run / "run").train.dtype
        curve, flops = [[line["tokens"], line["bpb"]] for line in read_metrics(run / "run")[1]], ended["flops"]
    shutil.rmtree(run / "run" / "checkpoints", ignore_errors=True)  # the curve is what counts; weights take space
    return marked | {
        "dtype": dtype,
        "tokens": ended["tokens"],
        "flops": flops,
        "seconds": ended["seconds"],
        "cpu_seconds": ended["cpu_seconds"],
        "curve": curve,
        "bpb": curve[-1][1],
    }


def _begin(run: Path, marked: dict[str, Any]) -> None:
    """The working folder of an item, emptied when it was begun with other settings."""
    file = run / "item.json"
    if run.exists() and (not file.exists() or read_json(file) != marked):
        shutil.rmtree(run)
    run.mkdir(parents=True, exist_ok=True)
    write_json(file, marked)


def faster_dtype(place: Place, row: Row) -> dict[str, Any]:
    """Tokens per CPU-second of a control in BF16 and FP32, a few steps in turn each, and the faster one."""
    folder = data_of_track(place.track, place.out, vocabulary(row))
    dtypes = ("bf16", "fp32")
    measured = measure_speed([(row, folder, dtype) for dtype in dtypes], rounds=2, steps=6)
    speeds = {dtype: 1 / median(rounds) for dtype, rounds in zip(dtypes, measured, strict=True)}
    return {
        "settings": settings_of(row, row.tokens, None),
        "dtype": max(speeds, key=lambda dtype: speeds[dtype]),
        "tokens_per_cpu_second": speeds,
    }


def _speeds(place: Place, rows: tuple[Row, ...]) -> dict[str, Any]:
    """The speed of each row as a receipt keeps it."""
    folders = [data_of_track(place.track, place.out, vocabulary(row)) for row in rows]
    dtypes = [(place.read(Item("dtype", row)) or {"dtype": "auto"})["dtype"] for row in rows]
    measured = measure_speed(list(zip(rows, folders, dtypes, strict=True)))
    return {
        row.name: {
            "settings": settings_of(row, row.tokens, None),
            "dtype": dtype,
            "cpu_seconds_per_token": median(rounds),
            "rounds": rounds,
            "counting_cpu_seconds": counting_cpu_seconds(row, folder),
        }
        for row, folder, dtype, rounds in zip(rows, folders, dtypes, measured, strict=True)
    }


def status(place: Place, rows: tuple[Row, ...], compared: tuple[Row, ...], seeds: int) -> list[str]:
    """A line per item: done with what result, or missing."""
    lines = []
    for item in items(place, rows, compared, seeds):
        receipt = place.read(item)
        done = is_done(place, item)
        what = "missing"
        if receipt and done:
            what = f"bpb {receipt['bpb']:.4f}" if "bpb" in receipt else receipt.get("dtype", "done")
            what += f", {receipt['seconds'] / 60:.1f} minutes, {receipt['cpu_seconds'] / 60:.1f} CPU-minutes"
        elif receipt:
            what = "missing; there is a receipt of other settings"
        lines.append(f"{item.name:<40} {what}")
    return lines


def commit() -> str:
    """The commit of the checkout this runs from, else the version of the package."""
    where = Path(__file__).parent
    asked = subprocess.run(["git", "-C", str(where), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return asked.stdout.strip() if asked.returncode == 0 else version("leanseek")


def _as_file_name(of: dict[str, Any]) -> str:
    return re.sub(r"\W+", "-", f"{of['cpu']} {of['cores']}").lower()


def machine() -> dict[str, Any]:
    """The processor's name, with the best unit it has for BF16, and how many cores of it there are."""
    name, units = platform.processor() or platform.machine(), ""
    described = Path("/proc/cpuinfo")
    if described.exists():
        told = dict(re.findall(r"^(model name|flags)\s*: (.*)$", described.read_text(), re.MULTILINE))
        name = told.get("model name", name).strip()
        units = next((unit for unit in BF16_UNITS if unit in told.get("flags", "").split()), "")
    return {"cpu": f"{name} ({units})" if units else name, "cores": os.cpu_count()}


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_bytes())
    return content


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _number(value: float | None) -> float:
    return math.inf if value is None or math.isnan(value) else value
