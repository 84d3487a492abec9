"""Raw text to a DATA folder: read, clean, remove duplicates, split, learn a tokenizer, tokenise (report §4.1).

The result depends on the texts and their order only, never on the number of workers.
"""

import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import IO, Self

import numpy as np
from rich.console import Console
from rich.progress import Progress, TaskID

from leanseek.config import BadInput
from leanseek.data.clean import WordHashes, content_hash, minhash, near_duplicates
from leanseek.data.read import READ, Batch, Damage, Records, Source, batches, find_source, parse
from leanseek.data.shards import ShardEntry, ShardWriter, write_manifest
from leanseek.data.tokenizer import Tokenizer

ALONE = 8 << 20  # bytes of input below which starting workers costs more than they save
VALIDATION = 0.01  # share of the documents
END_HELD_OUT = 0.05  # share of the bytes, where there is only one document
TOKENIZER_SAMPLE = 50_000_000  # bytes of training text that a tokenizer is learnt from
SHARD_TOKENS = 1 << 25


@dataclass
class Report:
    """What `prepare` did. `bad` and `first_bad` are by kind of record: how many, and where the first one is."""

    bytes_in: int = 0  # of the inputs, unpacked
    documents_in: int = 0  # records that hold a text
    bad: dict[str, int] = field(default_factory=dict)
    first_bad: dict[str, str] = field(default_factory=dict)
    replaced_bytes: int = 0
    exact_duplicates: int = 0
    near_duplicates: int = 0
    leaked: int = 0  # of the exact duplicates, training documents that stand in the given validation text
    documents: dict[str, int] = field(default_factory=dict)  # kept, by split; so are the two below
    bytes: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    vocab_size: int = 0
    bytes_per_token: float = 0.0
    tokenizer_sample_bytes: int = 0  # 0: the tokenizer was given
    seconds: dict[str, float] = field(default_factory=dict)  # by phase, as are those of all processors together
    cpu_seconds: dict[str, float] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """For people: a few plain lines."""
        out = [f"read {self.documents_in:,} documents, {self.bytes_in / 1e6:,.1f} MB"]
        out += [f"left out {n:,} records: {kind}; the first is {self.first_bad[kind]}" for kind, n in self.bad.items()]
        if self.replaced_bytes:
            out.append(f"replaced {self.replaced_bytes:,} bytes that are no UTF-8")
        leaked = f", {self.leaked:,} of them copies of validation text" if self.leaked else ""
        out.append(f"removed {self.exact_duplicates:,} exact{leaked} and {self.near_duplicates:,} near duplicates")
        if self.tokenizer_sample_bytes:
            out.append(f"learnt the tokenizer from {self.tokenizer_sample_bytes / 1e6:,.1f} MB of the training text")
        for split, documents in self.documents.items():
            out.append(f"{split}: {documents:,} documents, {self.tokens[split]:,} tokens")
        out.append(f"{self.vocab_size:,} ids, {self.bytes_per_token:.2f} bytes per token")
        return [*out, f"{sum(self.seconds.values()):.1f} s"]


def prepare(
    inputs: list[str],
    out: Path,
    vocab_size: int = 4096,
    tokenizer: Path | None = None,
    workers: int | None = None,
    progress: bool = False,
    validation: list[str] | None = None,
) -> Report:
    """Write the DATA folder `out` from files, folders and `hf:` names, each optionally as NAME=INPUT.

    A tokenizer of `vocab_size` ids is learnt from at most 50 MB of the training split, unless a folder with one is
    given. Inputs given as `validation` become that split whole and in order, duplicates and all; nothing of the others
    is held out then, and what stands in both is taken out of training. With `progress` bars are drawn on stderr,
    without it a line per phase. Everything is written to a folder beside it and renamed at the end: `out` is whole or
    absent. Raises BadInput.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out}: exists already; choose another --out or remove it")
    sources = [find_source(text) for text in inputs]  # every input is looked at before work begins
    held_out = [find_source(text) for text in validation or ()]
    given = Tokenizer.load(tokenizer) if tokenizer else None
    report = Report()
    partial = out.absolute().with_name(f".{out.absolute().name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    (partial / "shards").mkdir(parents=True)
    try:
        with _Phases(report, progress) as phase, open(partial / "spool", "w+b") as spool:
            phase("read")
            documents = _read(sources, held_out, spool, report, _worker_count(sources + held_out, workers), phase)
            phase("deduplicate")
            documents = _deduplicate(documents, report)
            documents, in_validation = _validation(documents, spool)
            if given is None:
                phase("tokenizer")
                given = _learn(documents, in_validation, spool, vocab_size, report)
            given.save(partial / "tokenizer")
            phase("tokenise", int(documents.sizes.sum()))
            entries = _tokenise(documents, in_validation, spool, given, partial / "shards", report, phase)
        (partial / "spool").unlink()
        write_manifest(partial, entries, given, asdict(report))
        os.replace(partial, out.absolute())
    except BrokenProcessPool:
        shutil.rmtree(partial, ignore_errors=True)
        raise BadInput("a worker process was killed, out of memory perhaps; try again with fewer workers") from None
    except BaseException:  # Ctrl-C and a full disk too
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return report


# ── cleaning, in the workers ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Cleaned:
    """What a worker makes of a batch: its records, and of each text the hash and the MinHash signature."""

    records: Records
    hashes: list[bytes]
    signatures: list[np.ndarray]


def clean_batch(batch: Batch) -> Cleaned:
    """A pure function. Raises BadInput for a named text file that is not UTF-8."""
    records, words = parse(batch), WordHashes()
    texts = [text.decode() for text in records.texts]
    return Cleaned(records, [content_hash(text) for text in texts], [minhash(text, words) for text in texts])


def _start_worker() -> None:
    # Ctrl-C is the parent's to answer, and a worker whose parent was killed goes too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _map_in_order(workers: int, items: Iterable[Batch]) -> Iterator[Cleaned]:
    """Clean batches on `workers` processes, results in order, a few batches in flight."""
    if workers == 1:
        yield from map(clean_batch, items)
        return
    context = multiprocessing.get_context("spawn")  # forking a process with threads is not safe
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    flying: deque[Future[Cleaned]] = deque()
    try:
        for item in items:
            flying.append(pool.submit(clean_batch, item))
            if len(flying) > 4 * workers:
                yield flying.popleft().result()
        while flying:
            yield flying.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _worker_count(sources: list[Source], workers: int | None) -> int:
    if workers is None:
        small = sum(source.size for source in sources) < ALONE and not any(source.hub for source in sources)
        workers = 1 if small else len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if workers is not None and workers < 1:
        raise BadInput(f"workers must be at least 1, got {workers}")
    return workers or 1


# ── the phases ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Documents:
    """Texts in the spool, in the order of the inputs: all arrays [D], hashes bytes, signatures [D, 112] uint32."""

    starts: np.ndarray
    sizes: np.ndarray
    raw_sizes: np.ndarray
    sources: np.ndarray  # number of the source's name in `names`
    held_out: np.ndarray  # bool: of an input given for validation
    hashes: list[bytes]
    signatures: np.ndarray
    names: tuple[str, ...]

    def text(self, spool: IO[bytes], i: int, most: int | None = None) -> str:
        """Document i, or its first `most` bytes."""
        spool.seek(self.starts[i])
        size = int(self.sizes[i])
        return spool.read(size if most is None else min(size, most)).decode(errors="ignore")

    def select(self, keep: np.ndarray) -> "Documents":
        return Documents(
            self.starts[keep],
            self.sizes[keep],
            self.raw_sizes[keep],
            self.sources[keep],
            self.held_out[keep],
            [self.hashes[i] for i in np.flatnonzero(keep)],
            self.signatures[keep],
            self.names,
        )


def _read(
    sources: list[Source], held_out: list[Source], spool: IO[bytes], report: Report, workers: int, phase: "_Phases"
) -> Documents:
    """All inputs into the spool, the given validation text first and whole; of the others no exact duplicates."""
    names = tuple(dict.fromkeys(source.name for source in sources + held_out))
    sizes, raw_sizes, numbers, hashes, signatures, validates = [], [], [], [], [], []
    seen: dict[bytes, bool] = {}  # content hash: whether it is validation text
    damage = Damage()
    for cleaned in _map_in_order(workers, batches(held_out + sources)):
        done = cleaned.records
        of_validation = done.batch.source < len(held_out)
        damage.add(done)
        report.bytes_in += done.size
        report.replaced_bytes += done.replaced
        for kind, places in done.bad.items():
            report.bad[kind] = report.bad.get(kind, 0) + len(places)
            report.first_bad.setdefault(kind, places[0])
        report.documents_in += len(done.texts)
        for i, digest in enumerate(cleaned.hashes):
            if digest in seen and not of_validation:
                report.exact_duplicates += 1
                report.leaked += seen[digest]
                continue
            seen[digest] = of_validation
            spool.write(done.texts[i])
            sizes.append(len(done.texts[i]))
            raw_sizes.append(done.raw_sizes[i])
            numbers.append(names.index((held_out + sources)[done.batch.source].name))
            hashes.append(digest)
            signatures.append(cleaned.signatures[i])
            validates.append(of_validation)
        phase.advance(done.size)
    damage.check()
    for what, kept in (("input", not all(validates)), ("validation input", not held_out or any(validates))):
        if not kept:
            why = "; ".join(f"{n} {kind}, first {report.first_bad[kind]}" for kind, n in report.bad.items())
            copied = f"{report.leaked} copies of validation text" if report.leaked else "nothing to read"
            raise BadInput(f"the {what} holds no document ({why or copied})")
    ends = np.cumsum(sizes)
    return Documents(
        ends - sizes,
        np.array(sizes),
        np.array(raw_sizes),
        np.array(numbers),
        np.array(validates),
        hashes,
        np.stack(signatures),
        names,
    )


def _deduplicate(documents: Documents, report: Report) -> Documents:
    keep = documents.held_out.copy()
    keep[~keep] = near_duplicates(documents.signatures[~keep])
    report.near_duplicates = int((~keep).sum())
    return documents.select(keep)


def _validation(documents: Documents, spool: IO[bytes]) -> tuple[Documents, np.ndarray]:
    """Which documents are held out [D] bool: by their content alone, about 1% of them, one at least of two or more.

    Duplicates are gone by now, so none of a held-out document is left in training. A single document, such as a book in
    one file, is cut in two, and its end held out. Where validation text was given, that is it and no more.
    """
    if documents.held_out.any():
        return documents, documents.held_out
    if len(documents.sizes) == 1:
        return _end_held_out(documents, spool)
    numbers = np.array([int.from_bytes(digest[:8], "big") for digest in documents.hashes], np.uint64)
    chosen = numbers < np.uint64(VALIDATION * 2**64)
    if not chosen.any() or chosen.all():
        chosen = numbers == numbers.min()
    return documents, chosen


def _end_held_out(documents: Documents, spool: IO[bytes]) -> tuple[Documents, np.ndarray]:
    """The only document as two, cut after a line break near the end, the second one held out."""
    size = int(documents.sizes[0])
    spool.seek(0)
    text = spool.read(size)
    end = text.rfind(b"\n", 0, size - int(size * END_HELD_OUT)) + 1
    if end == 0:
        return documents, np.zeros(1, bool)  # one line: nothing can be held out
    sizes = np.array([end, size - end])
    replaced = documents.sizes[0] - documents.raw_sizes[0]  # counted where most of them are: in the first part
    both = Documents(
        np.array([0, end]),
        sizes,
        sizes - np.array([replaced, 0]),
        documents.sources.repeat(2),
        documents.held_out.repeat(2),
        [content_hash(part.decode()) for part in (text[:end], text[end:])],
        documents.signatures.repeat(2, axis=0),
        documents.names,
    )
    return both, np.array([False, True])


def _learn(
    documents: Documents, in_validation: np.ndarray, spool: IO[bytes], vocab_size: int, report: Report
) -> Tokenizer:
    """A tokenizer from the training split, or from 50 MB of it chosen by content hash."""
    by_hash = sorted(np.flatnonzero(~in_validation).tolist(), key=lambda i: documents.hashes[i])
    ends = np.cumsum(documents.sizes[by_hash])
    within = int(np.searchsorted(ends, TOKENIZER_SAMPLE, side="right"))
    chosen = sorted(by_hash[: max(within, 1)])
    report.tokenizer_sample_bytes = min(int(documents.sizes[chosen].sum()), TOKENIZER_SAMPLE)
    return Tokenizer.train((documents.text(spool, i, TOKENIZER_SAMPLE) for i in chosen), vocab_size)


def _tokenise(
    documents: Documents,
    in_validation: np.ndarray,
    spool: IO[bytes],
    tokenizer: Tokenizer,
    folder: Path,
    report: Report,
    phase: "_Phases",
) -> list[ShardEntry]:
    entries: list[ShardEntry] = []
    for split, members in (("train", ~in_validation), ("validation", in_validation)):
        for number, name in enumerate(documents.names):
            chosen = np.flatnonzero(members & (documents.sources == number))
            with ShardWriter(folder, split, name, number, tokenizer.vocab_size, SHARD_TOKENS) as writer:
                # Batches of about four megabytes keep all processors busy and little in memory.
                for _, group in groupby(chosen.tolist(), key=lambda i: documents.starts[i] // (4 * READ)):
                    batch = list(group)
                    encoded = tokenizer.encode_batch([documents.text(spool, i) for i in batch])
                    for i, ids in zip(batch, encoded, strict=True):
                        writer.add(ids, int(documents.raw_sizes[i]))
                    phase.advance(int(documents.sizes[batch].sum()))
            entries += writer.entries
        of_split = [entry for entry in entries if entry.split == split]
        report.documents[split] = sum(entry.documents for entry in of_split)
        report.bytes[split] = sum(entry.bytes for entry in of_split)
        report.tokens[split] = sum(entry.tokens for entry in of_split)
    report.vocab_size = tokenizer.vocab_size
    report.bytes_per_token = sum(report.bytes.values()) / sum(report.tokens.values())
    return entries


class _Phases:
    """One phase after the other, timed into the report, shown as bars or as plain lines on stderr."""

    def __init__(self, report: Report, bars: bool) -> None:
        self.report, self.name, self.began, self.cpu_began = report, "", 0.0, 0.0
        self.bars = Progress(*Progress.get_default_columns(), console=Console(stderr=True)) if bars else None
        self.task = TaskID(0)

    def __call__(self, name: str, total: int | None = None) -> None:
        self.end()
        self.name, self.began, self.cpu_began = name, time.perf_counter(), _cpu_seconds()
        if self.bars:
            self.task = self.bars.add_task(name, total=total)

    def advance(self, amount: int) -> None:
        if self.bars:
            self.bars.advance(self.task, amount)

    def end(self) -> None:
        if not self.name:
            return
        seconds = self.report.seconds[self.name] = round(time.perf_counter() - self.began, 2)
        self.report.cpu_seconds[self.name] = round(_cpu_seconds() - self.cpu_began, 2)
        if self.bars:
            self.bars.update(self.task, total=1, completed=1)
        else:
            print(f"{self.name}: {seconds:.1f} s", file=sys.stderr)

    def __enter__(self) -> Self:
        if self.bars:
            self.bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.end()
        if self.bars:
            self.bars.stop()


def _cpu_seconds() -> float:
    """Of all processors, user and system, workers that have ended included."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
