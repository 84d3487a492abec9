"""Phases of a long job, one after the other: timed, shown, and not done twice when the job is killed and begun again.

WORK/state.json     what was asked for, the phases that are done, and the report so far
"""

import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import Progress, TaskID

from leanseek.config import BadInput
from leanseek.data.tally import Report


class Work:
    """The folder of a job and how far it got. A folder that was begun for another request is emptied."""

    def __init__(self, folder: Path, request: dict[str, Any], bars: bool) -> None:
        self.folder, self.report = folder, Report()
        self._request, self._done = request, list[str]()
        self._bars = Progress(*Progress.get_default_columns(), console=Console(stderr=True)) if bars else None
        self._task = TaskID(0)
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise BadInput(f"{folder}: another prepare is at work there: wait for it or take another --out") from None
        try:
            state = json.loads((folder / "state.json").read_text())
            if state["request"] == json.loads(json.dumps(request)):
                self.report, self._done = Report.of(state["report"]), state["done"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # nothing was done, or it cannot be read: from the beginning
        if self._done:
            self._say(f"goes on after: {', '.join(self._done)}")
        else:
            self.empty()

    def done(self, name: str) -> bool:
        return name in self._done

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[None]:
        """Times what is done in it and notes that it is done; what it wrote must be flushed by then."""
        began, cpu_began = time.perf_counter(), _cpu_seconds()
        if self._bars:
            self._bars.start()
            self._task = self._bars.add_task(name, total=total)
        try:
            yield
        finally:
            if self._bars:
                self._bars.stop()
        seconds = self.report.seconds[name] = round(time.perf_counter() - began, 2)
        self.report.cpu_seconds[name] = round(_cpu_seconds() - cpu_began, 2)
        if self._bars:
            self._bars.update(self._task, total=1, completed=1)
        else:
            self._say(f"{name}: {seconds:.1f} s")
        self._done.append(name)
        state = {"request": self._request, "done": self._done, "report": self.report.state()}
        partial = self.folder / ".state.json"
        partial.write_text(json.dumps(state))
        os.replace(partial, self.folder / "state.json")

    def advance(self, amount: int) -> None:
        if self._bars:
            self._bars.advance(self._task, amount)

    def empty(self) -> None:
        """Forgets everything but that somebody is at work here."""
        for entry in self.folder.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != ".lock":
                entry.unlink()

    def tidy(self, *further: str) -> None:
        """Takes away what only the work needed: the folder is ready."""
        for name in ("state.json", *further, ".lock"):
            (self.folder / name).unlink()

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _say(self, line: str) -> None:
        print(line, file=sys.stderr)


def _cpu_seconds() -> float:
    """Of all processors, user and system, workers that have ended included."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
