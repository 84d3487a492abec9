"""Who keeps the others waiting: a collective that hangs is named, with the ranks not in it; a slow rank is found.

PyTorch keeps a record of the collectives that a process has entered, its flight recorder, on gloo as on NCCL. A thread
on each rank reads the newest ones there and tells the others through the process group's store, with where the program
is. When one has waited too long, the ranks that are in it can so say who is not, and what that one does instead. Ending
the run is left to PyTorch's own timeout, which comes a little later, and starting it again to torchrun.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d
from torch.autograd.profiler import profile
from torch.distributed.distributed_c10d import _get_default_store, _resolve_process_group

REPORT_AT = 0.8  # of the time after which PyTorch gives up
RECORDED = "512"  # collectives that the flight recorder remembers
SLOW = 1.25  # times the median of the ranks' own seconds, above which a rank is called slow


def record_collectives() -> None:
    """Turns the flight recorder on; before the process group is made."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", RECORDED)


# ── collectives that hang ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Where:
    """What a rank does: the newest collective it entered in each group, the one it waits in, the line it is at."""

    told: float  # when it said so, in seconds since 1970
    entered: dict[str, int]  # by group, the number of the newest
    line: str
    waits: str | None = None  # "all_reduce of [1000]"; None: it is at work
    group: str = ""  # empty for a message between two pipeline ranks, which gloo does not record
    number: int = 0
    since: float = 0.0


@contextmanager
def watching(timeout: float, say: Callable[[str], None]) -> Iterator[None]:
    """For as long as the block runs, says in one line which collective hangs, and for which ranks it waits.

    `timeout` is the process group's, in seconds.
    """
    ended = threading.Event()
    arguments = (timeout, say, threading.main_thread().ident, ended)
    thread = threading.Thread(target=_watch, args=arguments, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _watch(timeout: float, say: Callable[[str], None], main: int, ended: threading.Event) -> None:
    store, rank = dist.PrefixStore("watch", _get_default_store()), dist.get_rank()
    here, said = None, ("", 0, 0.0)
    while not ended.wait(min(timeout / 10, 10.0)):
        try:
            here = _where(main, here)
            store.set(str(rank), json.dumps(asdict(here)))
            this = (here.group, here.number, here.since)
            if here.waits is None or here.told - here.since < timeout * REPORT_AT or this == said:
                continue
            said = this
            members = list(range(dist.get_world_size()))
            if here.group:
                members = dist.get_process_group_ranks(_resolve_process_group(here.group))  # type: ignore[arg-type]
            found = {r: Where(**json.loads(store.get(str(r)))) for r in members if store.check([str(r)])}
            if line := report(rank, found, members):
                say(line)
        except dist.DistError:  # the store went with the process that kept it; what waits fails by itself
            return


def report(rank: int, found: dict[int, Where], members: list[int]) -> str | None:
    """What a rank says of that which it waits in; None where a lower rank waits there too, and says it."""
    here = found[rank]
    if here.group:
        inside = [r for r in members if r in found and found[r].entered.get(here.group, 0) >= here.number]
    else:
        inside = [r for r in members if r in found and found[r].waits is not None and not found[r].group]
    if min(inside) != rank:
        return None
    missing = [f"rank {r}, which {_instead(found.get(r), here)}" for r in members if r not in inside]
    waited = f"{here.waits} hangs for {here.told - here.since:.0f} s, entered by {_ranks(inside)} at {here.line}"
    return f"{waited}; it waits for {', and '.join(missing) or 'none of them: the network may be cut'}"


def _instead(other: Where | None, here: Where) -> str:
    if other is None:
        return "never said anything"
    silent = here.told - other.told
    if silent > (here.told - here.since) / 2:
        return f"has been silent for {silent:.0f} s and was at {other.line}"
    return f"waits in {other.waits}, at {other.line}" if other.waits is not None else f"is at {other.line}"


def _where(main: int, before: Where | None) -> Where:
    """What this process does, `before` what it did when last asked."""
    entries: list[dict[str, Any]] = json.loads(c10d._dump_fr_trace_json()).get("entries", [])  # type: ignore[attr-defined]
    entered = {entry["process_group"][0]: entry["collective_seq_id"] for entry in entries}
    stack = traceback.extract_stack(sys._current_frames().get(main))
    ours = [frame for frame in stack if "torch" not in Path(frame.filename).parts] or stack[-1:]
    now, line = time.time(), "".join(f"{frame.filename}:{frame.lineno} ({frame.name})" for frame in ours[-1:])
    open_ones = [entry for entry in entries if not entry["retired"]]
    if open_ones:
        first = open_ones[0]
        sizes = " and ".join(str(size) for size in first["input_sizes"] or first["output_sizes"])
        waits = f"{first['profiling_name'].rpartition(':')[2]} of {sizes}"
        group, number = first["process_group"][0], first["collective_seq_id"]
        return Where(now, entered, line, waits, group, number, first["time_created_ns"] / 1e9)
    if not stack or "distributed" not in Path(stack[-1].filename).parts:
        return Where(now, entered, line)
    waits = f"{stack[-1].name} ({stack[-1].filename}:{stack[-1].lineno})"
    stands = before is not None and (before.waits, before.line, before.entered) == (waits, line, entered)
    return Where(now, entered, line, waits, since=before.since if stands and before is not None else now)


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


# ── ranks that are slow ───────────────────────────────────────────────────────────────────────────────────────────


class Waits:
    """Seconds that a block took, and those of them that it waited in collectives, by PyTorch's profiler.

        with Waits() as waits:
            train_step(…)
        waits.own

    It costs about a second: for one step in hundreds.
    """

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        # What runs on a GPU only kineto sees; on a CPU the older one does too, and prints nothing.
        self.profile = profile(use_device="cuda" if cuda else None, use_kineto=cuda)
        self.kind = "nccl" if cuda else "gloo:"
        self.seconds = self.own = 0.0

    def __enter__(self) -> "Waits":
        self.profile.__enter__()
        self.begun = time.monotonic()
        return self

    def __exit__(self, *raised: Any) -> None:
        self.seconds = time.monotonic() - self.begun
        self.profile.__exit__(*raised)
        inside = [e for e in self.profile.function_events or [] if e.name.startswith(self.kind)]
        spans = sorted((e.time_range.start / 1e6, e.time_range.end / 1e6) for e in inside)
        self.own = max(self.seconds - covered(spans), 0.0)


def covered(spans: list[tuple[float, float]]) -> float:
    """The length of a union of spans, in order of their starts: collectives overlap."""
    total, until = 0.0, float("-inf")
    for start, end in spans:
        total += max(end - max(start, until), 0.0)
        until = max(until, end)
    return total


def slowest(own: list[float]) -> str | None:
    """What to say of the ranks' own seconds in a step, by rank: the slowest, where it stands out."""
    median, most = sorted(own)[(len(own) - 1) // 2], max(own)
    if most <= SLOW * median:
        return None
    return f"rank {own.index(most)} is slow: {most:.2f} s of a step are its own work, the median is {median:.2f} s"
