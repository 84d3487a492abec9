"""Raw text to a DATA folder: read, clean, remove duplicates, split, learn a tokenizer, tokenise (report §4.1).

The result depends on the texts and their order only, never on the number of workers. Memory holds 63 bytes for each
document; texts and signatures lie on the disk. Killed, the same call goes on after the last phase that was done.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np

from leanseek.config import BadInput, nearest
from leanseek.data.classifier import Classifier
from leanseek.data.duplicates import Forbidden, first_of_equals, near_duplicates
from leanseek.data.encoder import WordEncoder
from leanseek.data.filters import Filters
from leanseek.data.phases import Work
from leanseek.data.read import READ, Damage, Source, batches, find_source, parse, strings_of
from leanseek.data.shards import SPLITS, ShardEntry, ShardWriter, write_manifest
from leanseek.data.spool import SPOOLED, Documents, Spool, of_hash
from leanseek.data.tally import SAMPLE_CHARACTERS, SAMPLES, Report, Step
from leanseek.data.tokenizer import Tokenizer
from leanseek.data.words import content_hash
from leanseek.data.workers import Cleaner, Dropped, Kept, in_order, worker_count

VALIDATION = 0.01  # share of the documents
END_HELD_OUT = 0.05  # share of the bytes, where there is only one document
TOKENIZER_SAMPLE = 50_000_000  # bytes of training text that a tokenizer is learnt from
SHARD_TOKENS = 1 << 25
FOR_A_WORKER = 64 << 20  # bytes of text that are worth learning their words once more


@dataclass(frozen=True)
class Cleaning:
    """What to do to texts beside removing duplicates; nothing unless asked. Validation text that is given is spared.

    Where a source may be named, as in "web=en,de", the rest holds for that source, else for all.
    """

    normalise: bool = False
    languages: Sequence[str] = ()  # [SOURCE=]CODE,…: the languages to keep
    quality: Sequence[str] = ()  # names of sources whose texts must keep the rules of `data.quality`, or "all"
    against: Sequence[str] = ()  # evaluations: INPUTs whose runs of thirteen words nobody may have
    personal: bool = False  # mask e-mail addresses, telephone numbers and keys
    good: Sequence[str] = ()  # INPUTs of examples that a judge of quality learns from, wanted and unwanted
    bad: Sequence[str] = ()
    keep_best: Sequence[str] = ()  # [SOURCE=]SHARE of the bytes that the judge likes best


def prepare(
    inputs: list[str],
    out: Path,
    vocab_size: int = 6144,
    tokenizer: Path | None = None,
    workers: int | None = None,
    progress: bool = False,
    validation: list[str] | None = None,
    cleaning: Cleaning = Cleaning(),
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
    processes = worker_count(sources + held_out, workers)
    filters, judged = _filters(cleaning, sources)
    request = {
        "inputs": [inputs, validation, _state_of(sources + held_out)],
        "tokenizer": given.fingerprint if given else vocab_size,
        "cleaning": [asdict(cleaning), _state_of([find_source(text) for text in _inputs_of(cleaning)])],
    }
    partial = out.absolute().with_name(f".{out.absolute().name}.partial")
    with Work(partial, request, progress) as work:
        try:
            work.report.judge_accuracy = judged
            _all_phases(sources, held_out, filters, cleaning, given, vocab_size, work, processes)
            os.replace(work.folder, out.absolute())
        except BrokenProcessPool:
            work.remove()
            raise BadInput("a worker process was killed, out of memory perhaps; try again with fewer workers") from None
        except (BadInput, OSError):  # a full disk too
            work.remove()
            raise
    return work.report


def _all_phases(
    sources: list[Source],
    held_out: list[Source],
    filters: Filters,
    cleaning: Cleaning,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    work: Work,
    workers: int,
) -> None:
    """Turns the folder of the job into a DATA folder."""
    names = tuple(dict.fromkeys(source.name for source in sources + held_out))
    with Spool(work.folder, new=not work.done("read")) as spool:
        if not work.done("read"):
            with work.phase("read"):
                _read(sources, held_out, names, filters, spool, work, workers)
        if not work.done("deduplicate"):
            with work.phase("deduplicate"):
                documents = _choose(spool, names, cleaning, work.report)
                np.save(work.folder / "documents.npy", _with_validation(documents, spool))
        documents = np.load(work.folder / "documents.npy")
        if tokenizer is None and not work.done("tokenizer"):
            with work.phase("tokenizer"):
                _learn(documents, spool, vocab_size, work.report).save(work.folder / "tokenizer")
        elif tokenizer is not None:
            tokenizer.save(work.folder / "tokenizer")
        tokenizer = Tokenizer.load(work.folder / "tokenizer")
        with work.phase("tokenise", int(documents["size"].sum())):
            entries = _tokenise(documents, names, spool, tokenizer, work, workers)
    if work.report.dropped:
        _write_dropped(work)
    write_manifest(work.folder, entries, tokenizer, work.report.state())
    work.tidy("documents.npy", *SPOOLED)


# ── what is asked ─────────────────────────────────────────────────────────────────────────────────────────────────


def _filters(asked: Cleaning, sources: list[Source]) -> tuple[Filters, float | None]:
    """The filters that were asked for, and how good the judge among them is. Raises BadInput."""
    names = [source.name for source in sources]
    languages = {source: tuple(codes.split(",")) for source, codes in _by_source(asked.languages, names).items()}
    for name in asked.quality:
        if name not in (*names, "all"):
            raise BadInput(f"quality: no source {name!r}{nearest(name, names)}: name one of {', '.join(names)}, or all")
    judge = None
    if asked.good or asked.bad or asked.keep_best:
        if not (asked.good and asked.bad and asked.keep_best):
            raise BadInput("a judge of quality takes good examples, bad ones, and the share to keep: give all three")
        _shares(asked, names)  # looked at before work begins
        judge = Classifier.learn(*(_texts(inputs) for inputs in (asked.good, asked.bad)))
    filters = Filters(
        normalise=asked.normalise,
        languages=languages,
        quality=frozenset("" if name == "all" else name for name in asked.quality),
        forbidden=Forbidden.of(text for name in asked.against for text in strings_of(find_source(name)))
        if asked.against
        else None,
        personal=asked.personal,
        classifier=judge,
    )
    return filters, judge.accuracy if judge else None


def _by_source(values: Sequence[str], names: list[str]) -> dict[str, str]:
    """`SOURCE=VALUE` or `VALUE`, by source; "" for all. Raises BadInput for a source that is not there."""
    found = {}
    for text in values:
        name, _, value = text.rpartition("=")
        if name and name not in names:
            raise BadInput(f"{text}: no source {name!r}{nearest(name, names)}; there are {', '.join(names)}")
        found[name] = value
    return found


def _shares(asked: Cleaning, names: list[str]) -> dict[str, float]:
    """The share of each source to keep, "" for all. Raises BadInput."""
    shares = {}
    for name, text in _by_source(asked.keep_best, names).items():
        try:
            shares[name] = float(text)
        except ValueError:
            shares[name] = 0.0
        if not 0 < shares[name] <= 1:
            raise BadInput(f"the share to keep lies above 0 and up to 1, got {text!r}")
    return shares


def _texts(inputs: Sequence[str]) -> Iterator[str]:
    for batch in batches([find_source(name) for name in inputs]):
        yield from (text.decode() for text in parse(batch).texts)


def _inputs_of(cleaning: Cleaning) -> list[str]:
    return [*cleaning.against, *cleaning.good, *cleaning.bad]


def _state_of(sources: list[Source]) -> list[tuple[str, int, int]]:
    """Names, sizes and times of files: another file under the same name is another request."""
    files = (file for source in sources for file in source.files)
    return [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


# ── the phases ────────────────────────────────────────────────────────────────────────────────────────────────────


def _read(
    sources: list[Source],
    held_out: list[Source],
    names: tuple[str, ...],
    filters: Filters,
    spool: Spool,
    work: Work,
    workers: int,
) -> None:
    """All inputs into the spool, what the filters drop aside; the given validation text first, and whole."""
    report, both, damage = work.report, held_out + sources, Damage()
    steps = [report.step(name) for name in filters.names()]
    jobs = ((batch, both[batch.source].name if batch.source >= len(held_out) else None) for batch in batches(both))
    for cleaned in in_order(workers, partial(Cleaner, filters), jobs):
        records = cleaned.records
        source, validates = both[records.batch.source].name, records.batch.source < len(held_out)
        damage.add(records)
        report.bytes_in += records.size
        report.replaced_bytes += records.replaced
        report.documents_in += len(cleaned.documents)
        for kind, places in records.bad.items():
            report.bad[kind] = report.bad.get(kind, 0) + len(places)
            report.first_bad.setdefault(kind, places[0])
        for kind, n in cleaned.masked.items():
            report.masked[kind] = report.masked.get(kind, 0) + n
        for document in cleaned.documents:
            if not validates:
                _count_through(steps, document)
            if isinstance(document, Dropped):
                report.sample(document.step, document.reason, source, document.text)
            else:
                spool.add(document, names.index(source), validates)
        work.advance(records.size)
    damage.check()
    spool.flush()
    _check_left(spool.documents()["held_out"], bool(held_out), report)


def _count_through(steps: list[Step], document: Kept | Dropped) -> None:
    """Counts a document in every step up to the one that dropped it, if one did."""
    for step in steps:
        if isinstance(document, Dropped) and document.step == step.name:
            step.count(document.size, document.reason)
            break
        step.count(document.size if isinstance(document, Dropped) else len(document.text))


def _check_left(of_validation: np.ndarray, wanted: bool, report: Report) -> None:
    """Raises BadInput where training or validation is left without a document."""
    for what, left in (("input", not of_validation.all()), ("validation input", not wanted or of_validation.any())):
        if not left:
            reasons = [f"{n} {kind}, first {report.first_bad[kind]}" for kind, n in report.bad.items()]
            reasons += [
                f"{n} dropped by {step.name}: {why}" for step in report.steps for why, n in step.reasons.items()
            ]
            copied = [f"{report.leaked} copies of validation text"] if report.leaked else []
            raise BadInput(f"the {what} holds no document ({'; '.join(reasons or copied) or 'nothing to read'})")


def _choose(spool: Spool, names: tuple[str, ...], cleaning: Cleaning, report: Report) -> Documents:
    """The documents that are no copies, not like one before them, and not worse than what is wanted."""
    documents = spool.documents()
    given = documents["held_out"]
    first = first_of_equals(documents["hash"])
    keep = given | (first == np.arange(len(documents)))
    report.exact_duplicates, report.leaked = int((~keep).sum()), int(given[first[~keep]].sum())
    _check_left(given[keep], bool(given.any()), report)

    def dropped(step: str, before: np.ndarray) -> int:
        """Counts what of the training documents `before` is not kept any more."""
        gone, left = documents[before & ~given & ~keep], documents[before & ~given & keep]
        report.step(step).count(int(left["size"].sum()), documents=len(left))
        report.step(step).count(int(gone["size"].sum()), step, documents=len(gone))
        for document in gone[:SAMPLES]:
            report.sample(step, step, names[document["source"]], spool.text(document, 4 * SAMPLE_CHARACTERS))
        return len(gone)

    dropped("exact duplicates", np.ones(len(documents), bool))
    before = keep.copy()
    keep &= near_duplicates(spool.signatures(), among=keep & ~given)
    report.near_duplicates = dropped("near duplicates", before)
    if cleaning.keep_best:
        before = keep.copy()
        for source, share in _shares(cleaning, list(names)).items():
            members = keep & ~given & ((documents["source"] == names.index(source)) if source else True)
            keep[_worst(documents, np.flatnonzero(members), share)] = False
        dropped("judge", before)
    return documents[keep]


def _worst(documents: Documents, members: np.ndarray, share: float) -> np.ndarray:
    """Of the members those that the judge likes least, so that about `share` of their bytes is left, one at least."""
    best_first = members[np.argsort(-documents["score"][members], kind="stable")]
    sizes = documents["size"][best_first].astype(np.int64)
    return best_first[1:][(sizes.cumsum() > share * sizes.sum())[1:]]


def _with_validation(documents: Documents, spool: Spool) -> Documents:
    """The documents with those marked that are held out: by their content alone, about 1%, one at least of two or more.

    Duplicates are gone by now, so none of a held-out document is left in training. A single document, such as a book in
    one file, is cut in two, and its end held out. Where validation text was given, that is it and no more.
    """
    if documents["held_out"].any():
        return documents
    if len(documents) == 1:
        return _end_held_out(documents[0], spool)
    numbers = documents["hash"][:, 0]
    chosen = numbers < np.uint64(VALIDATION * 2**64)
    if not chosen.any() or chosen.all():
        chosen = numbers == numbers.min()
    documents["held_out"] = chosen
    return documents


def _end_held_out(document: np.void, spool: Spool) -> Documents:
    """The only document as two, cut after a line break near the end, the second one held out."""
    text, size = spool.text(document).encode(), int(document["size"])
    end = text.rfind(b"\n", 0, size - int(size * END_HELD_OUT)) + 1
    if end == 0:
        return np.array([document])  # one line: nothing can be held out
    both = np.array([document, document])
    both["start"] += np.array([0, end], np.uint64)
    both["size"] = end, size - end
    # What was replaced is counted where most of it is: in the first part.
    both["raw_size"] = int(document["raw_size"]) - (size - end), size - end
    both["hash"] = [of_hash(content_hash(part.decode())) for part in (text[:end], text[end:])]
    both["held_out"] = False, True
    return both


def _learn(documents: Documents, spool: Spool, vocab_size: int, report: Report) -> Tokenizer:
    """A tokenizer from the training split, or from 50 MB of it chosen by content hash."""
    training = documents[~documents["held_out"]]
    by_hash = np.lexsort(training["hash"].T[::-1])
    within = int(np.searchsorted(training["size"][by_hash].cumsum(), TOKENIZER_SAMPLE, side="right"))
    chosen = training[np.sort(by_hash[: max(within, 1)])]
    report.tokenizer_sample_bytes = min(int(chosen["size"].sum()), TOKENIZER_SAMPLE)
    return Tokenizer.train((spool.text(document, TOKENIZER_SAMPLE) for document in chosen), vocab_size)


def _tokenise(
    documents: Documents, names: tuple[str, ...], spool: Spool, tokenizer: Tokenizer, work: Work, workers: int
) -> list[ShardEntry]:
    report, folder = work.report, work.folder / "shards"
    shutil.rmtree(folder, ignore_errors=True)  # of one that was killed
    folder.mkdir()
    entries: list[ShardEntry] = []
    plan = [  # which documents, a megabyte at a time
        (split, number, batch)
        for split, members in zip(SPLITS, (~documents["held_out"], documents["held_out"]), strict=True)
        for number in range(len(names))
        for batch in _batches(documents, np.flatnonzero(members & (documents["source"] == number)))
    ]
    workers = min(workers, 1 + int(documents["size"].sum()) // FOR_A_WORKER)
    texts = ([spool.text(document) for document in documents[batch]] for _, _, batch in plan)
    encoded = in_order(workers, partial(WordEncoder.load, work.folder / "tokenizer"), texts)
    for (split, number), group in groupby(zip(plan, encoded, strict=True), key=lambda each: each[0][:2]):
        with ShardWriter(folder, split, names[number], number, tokenizer.vocab_size, SHARD_TOKENS) as writer:
            for (_, _, batch), ids_of_each in group:
                for raw_size, ids in zip(documents["raw_size"][batch], ids_of_each, strict=True):
                    writer.add(ids, int(raw_size))
                work.advance(int(documents["size"][batch].sum()))
        entries += writer.entries
    for split in SPLITS:
        of_split = [entry for entry in entries if entry.split == split]
        report.documents[split] = sum(entry.documents for entry in of_split)
        report.bytes[split] = sum(entry.bytes for entry in of_split)
        report.tokens[split] = sum(entry.tokens for entry in of_split)
    report.vocab_size = tokenizer.vocab_size
    report.bytes_per_token = _rate(entries)
    for name in names:
        if of_source := [entry for entry in entries if entry.source == name]:
            report.bytes_per_token_by_source[name] = _rate(of_source)
    return entries


def _batches(documents: Documents, chosen: np.ndarray) -> list[np.ndarray]:
    """Chosen documents, by their indices, cut wherever another megabyte of the spool begins."""
    return np.split(chosen, np.flatnonzero(np.diff(documents["start"][chosen] // READ)) + 1) if len(chosen) else []


def _rate(entries: list[ShardEntry]) -> float:
    return sum(entry.bytes for entry in entries) / max(sum(entry.tokens for entry in entries), 1)


def _write_dropped(work: Work) -> None:
    """Samples of what was dropped, for people to look at."""
    rows = [json.dumps(sample, ensure_ascii=False) for sample in work.report.dropped]
    (work.folder / "dropped.jsonl").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
