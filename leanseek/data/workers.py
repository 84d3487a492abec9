"""A pool of processes that clean or tokenise text, results in the order of the inputs."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from leanseek.config import BadInput
from leanseek.data.duplicates import signature
from leanseek.data.filters import Filters, Judged, judge
from leanseek.data.read import Batch, Records, Source, parse
from leanseek.data.words import WordHashes, content_hash

Job = TypeVar("Job")
Result = TypeVar("Result")

ALONE = 8 << 20  # bytes of input below which starting workers costs more than they save


@dataclass(frozen=True)
class Kept:
    """A text that came through: as it will be trained on, with what duplicates are known by."""

    text: bytes
    raw_size: int  # bytes as it was given
    score: float
    content: bytes  # SHA-256
    signature: np.ndarray  # [112]


@dataclass(frozen=True)
class Dropped:
    size: int  # bytes of the text
    step: str
    reason: str
    text: str  # its beginning


@dataclass(frozen=True)
class Cleaned:
    """What a worker makes of a batch; its records come back without their texts."""

    records: Records
    documents: list[Kept | Dropped]
    masked: dict[str, int]


class Cleaner:
    """`clean_batch` with the filters that were asked for; validation text, whose source is None, is taken as it is."""

    def __init__(self, filters: Filters) -> None:
        self.filters = filters

    def __call__(self, job: tuple[Batch, str | None]) -> Cleaned:
        batch, source = job
        return clean_batch(batch, source or "", self.filters if source else Filters())


def clean_batch(batch: Batch, source: str, filters: Filters) -> Cleaned:
    """A pure function. Raises BadInput for a named text file that is not UTF-8."""
    records, hashes, masked = parse(batch), WordHashes(), dict[str, int]()
    documents: list[Kept | Dropped] = []
    for text, raw_size in zip(records.texts, records.raw_sizes, strict=True):
        judged = judge(text.decode(), source, filters, hashes)
        documents.append(_outcome(judged, raw_size))
        for kind, n in judged.masked.items():
            masked[kind] = masked.get(kind, 0) + n
    records.texts.clear()
    return Cleaned(records, documents, masked)


def _outcome(judged: Judged, raw_size: int) -> Kept | Dropped:
    text = judged.words.text
    if judged.dropped_by is not None:
        return Dropped(len(text.encode()), judged.dropped_by, judged.reason, text[:1000])
    return Kept(text.encode(), raw_size, judged.score, content_hash(text), signature(judged.words))


def in_order(workers: int, start: Callable[[], Callable[[Job], Result]], jobs: Iterable[Job]) -> Iterator[Result]:
    """Each job done by what `start` makes in each of so many processes, a few jobs in flight.

    Raises what a job raises, and BrokenProcessPool where a process was killed.
    """
    if workers == 1:
        yield from map(start(), jobs)
        return
    context = multiprocessing.get_context("spawn")  # forking a process with threads is not safe
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(start,))
    flying: deque[Future[Result]] = deque()
    try:
        for job in jobs:
            flying.append(pool.submit(_do, job))
            if len(flying) > 4 * workers:
                yield flying.popleft().result()
        while flying:
            yield flying.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


_start: Callable[[], Callable[[Any], Any]]  # in a worker: what it was started with, and what that made
_work: Callable[[Any], Any] | None = None


def _do(job: Job) -> Any:
    global _work
    if _work is None:
        _work = _start()
    return _work(job)


def _begin(start: Callable[[], Callable[[Any], Any]]) -> None:
    global _start
    _start = start
    os.environ["RAYON_NUM_THREADS"] = "1"  # the tokenizers library's: there is a process for each processor already
    # Ctrl-C is the parent's to answer, and a worker whose parent was killed goes too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def worker_count(sources: list[Source], workers: int | None) -> int:
    """As many as asked for, else one for each processor where the inputs are worth it. Raises BadInput."""
    if workers is None:
        small = sum(source.size for source in sources) < ALONE and not any(source.hub for source in sources)
        workers = 1 if small else len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if workers is not None and workers < 1:
        raise BadInput(f"workers must be at least 1, got {workers}")
    return workers or 1
