"""Eight worker processes that every parallel test shares: a case is a function run on each rank of a gloo group.

How to write a case:

    def sums(rank: int, world: int, value: float) -> float:           # at module level: it is sent by name
        total = torch.tensor(value + rank)
        dist.all_reduce(total)                                        # the default group is there: gloo, `world` ranks
        return total.item()                                           # anything that pickles; tensors as numpy or lists

    def test_sums(pool: Pool) -> None:                                # the fixture of conftest.py
        assert pool.run(4, sums, 1.0) == [10.0] * 4                   # the answers by rank

Inside a case `parallel.mesh.ranks_of(config)` gives the `Ranks` of a configuration. A case that raises on any rank
fails with that rank's traceback; one that takes longer than `seconds` fails with the place at which each rank waits,
and the workers are made anew. Every case has a process group of its own, one thread, and warnings are errors.

Workers are forked from a server that has imported torch once, so eight of them cost one import. Under pytest-xdist all
tests that ask for `pool` go to one process (`--dist loadgroup`, see conftest.py), so there is one pool.
"""

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

WORKERS = 8
GONE = "the process is gone"
GRACE = 3.0  # seconds that the other ranks have to fail too, once one has
PRELOADED = ["torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.distributed.pipelining", "numpy"]


class RanksFailed(AssertionError):
    """A case failed; what each rank said, or where it hung."""


class Pool:
    """Started at the first case, and again after one that hung."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="leanseek-pool-"))
        self.workers: list[tuple[Any, Connection]] = []
        self.cases = 0

    def run(self, world: int, function: Callable[..., Any], *args: Any, seconds: float = 240.0) -> list[Any]:
        """`function(rank, world, *args)` on ranks 0 … world − 1 of a new group; the answers by rank.

        Raises RanksFailed with what every failed rank said, the one first whose failure is its own.
        """
        if not self.workers:
            self._start()
        self.cases += 1
        store = self.folder / f"store-{self.cases}"
        for rank, (_, line) in enumerate(self.workers[:world]):
            line.send((function, args, rank, world, str(store), seconds))
        answers = self._collect(world, time.monotonic() + seconds)
        failed = {rank: said for rank, (fine, said) in answers.items() if not fine}
        if len(answers) < world:
            hung = {rank: self._stack(rank) for rank in range(world) if rank not in answers}
            self.stop()
            failed |= {rank: f"no answer in {seconds:g} seconds; it was at\n{at}" for rank, at in hung.items()}
        if GONE in failed.values():
            self.stop()
        if failed:
            order = sorted(failed, key=lambda rank: ("gloo/transport" in failed[rank], rank))  # lost the others: later
            raise RanksFailed("\n".join(f"── rank {rank} of {world}: {failed[rank]}" for rank in order))
        return [answers[rank][1] for rank in range(world)]

    def stop(self) -> None:
        for process, _ in self.workers:
            process.kill()
        for process, line in self.workers:
            process.join()
            line.close()
        self.workers = []

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        for number in range(WORKERS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, str(self.folder / f"stack-{number}")), daemon=True)
            process.start()
            theirs.close()
            self.workers.append((process, ours))

    def _collect(self, world: int, until: float) -> dict[int, tuple[bool, Any]]:
        """Answers until all ranks have given one, or the time is over; once one failed, only a little longer."""
        answers: dict[int, tuple[bool, Any]] = {}
        lines = {line: rank for rank, (_, line) in enumerate(self.workers[:world])}
        while lines and (left := until - time.monotonic()) > 0:
            for line in wait(list(lines), timeout=left):
                assert isinstance(line, Connection)
                rank = lines.pop(line)
                try:
                    answers[rank] = line.recv()
                except EOFError:
                    answers[rank] = (False, GONE)
                if not answers[rank][0]:
                    until = min(until, time.monotonic() + GRACE)
        return answers

    def _stack(self, rank: int) -> str:
        process, _ = self.workers[rank]
        file = self.folder / f"stack-{rank}"
        file.write_text("")
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.3)
        return file.read_text() or "(it says nothing)"


def _work(line: Connection, stack: str) -> None:
    """A worker: takes cases until its line is closed."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which stops the workers
    warnings.simplefilter("error")
    with open(stack, "a") as file:
        faulthandler.register(signal.SIGUSR1, file, all_threads=False)
        while True:
            try:
                function, args, rank, world, store, seconds = line.recv()
            except EOFError:
                return
            try:
                limit = timedelta(seconds=seconds + 60)  # the pool's own comes first: it can say where each rank waits
                dist.init_process_group(
                    "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=limit
                )
                answer = True, function(rank, world, *args)
                dist.barrier()  # nobody leaves while another still waits for it
            except BaseException:
                answer = False, traceback.format_exc()
            with contextlib.suppress(Exception):
                dist.destroy_process_group()
            gc.collect()  # meshes and FSDP units hold groups in circles, and each group has threads that poll
            line.send(answer)
