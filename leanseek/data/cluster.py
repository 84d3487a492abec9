"""The same cleaning as steps of datatrove, which runs them on this machine, under Slurm or on Ray.

    first    a reader · Clean · Sign · a writer     each task its own files
    second   Match                                  one task, when the first are done
    third    a reader of what was written · Keep · Shard
    then     collect(), which makes of the shards a DATA folder

What a document goes through is `data.filters` and `data.duplicates`, as in `data.prepare`. Which of two copies stays is
decided by the order of the documents, which is that of the tasks. A task that was killed is run again by datatrove.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from leanseek.data.duplicates import PERMUTATIONS, first_of_equals, near_duplicates, signature
from leanseek.data.encoder import WordEncoder
from leanseek.data.filters import Filters, judge
from leanseek.data.prepare import SHARD_TOKENS, VALIDATION
from leanseek.data.shards import SPLITS, ShardEntry, ShardWriter, write_manifest
from leanseek.data.spool import of_hash
from leanseek.data.tally import Report, Step
from leanseek.data.tokenizer import Tokenizer
from leanseek.data.words import WordHashes, Words, content_hash


class Clean(PipelineStep):
    """Takes the texts of a source through the filters; what was dropped and why is in datatrove's statistics."""

    type, name = "🔻 - FILTER", "LeanSeek clean"

    def __init__(self, source: str, filters: Filters) -> None:
        super().__init__()
        self.source, self.filters = source, filters

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        hashes = WordHashes()
        for document in data:
            raw_size = len(document.text.encode())
            judged = judge(document.text, self.source, self.filters, hashes)
            if judged.dropped_by is not None:
                self.stat_update("dropped", f"dropped_by_{judged.dropped_by}: {judged.reason}")
                continue
            document.text = judged.words.text
            document.metadata |= {"source": self.source, "raw_size": raw_size, "score": judged.score}
            self.stat_update("forwarded")
            yield document


class Sign(PipelineStep):
    """Notes the hash and the MinHash signature of each document that passes, in files of its task."""

    type, name = "🫂 - DEDUP", "LeanSeek sign"

    def __init__(self, folder: Path | str) -> None:
        super().__init__()
        self.folder = Path(folder)

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        self.folder.mkdir(parents=True, exist_ok=True)
        words = WordHashes()
        with ExitStack() as files:
            hashes, signatures = (
                files.enter_context(open(self.folder / f"{rank:05d}.{kind}", "wb")) for kind in ("hashes", "signatures")
            )
            for document in data:
                hashes.write(of_hash(content_hash(document.text)).tobytes())
                signatures.write(signature(Words(document.text, words)).tobytes())
                yield document


class Match(PipelineStep):
    """Decides, alone, which documents of all tasks stay: 40 bytes for each in memory, their signatures on the disk."""

    type, name = "🫂 - DEDUP", "LeanSeek match"

    def __init__(self, folder: Path | str) -> None:
        super().__init__()
        self.folder = Path(folder)

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        assert world_size == 1, "Match is for one task"
        parts = sorted(self.folder.glob("*.hashes"))
        hashes = [np.fromfile(part, np.uint64).reshape(-1, 4) for part in parts]
        every = np.concatenate(hashes)
        keep = first_of_equals(every) == np.arange(len(every))
        self.stat_update("exact duplicates", value=int((~keep).sum()))
        near = near_duplicates(SignatureFiles([part.with_suffix(".signatures") for part in parts]), among=keep)
        self.stat_update("near duplicates", value=int((~near).sum()))
        ends = np.cumsum([len(part) for part in hashes])
        for part, mine in zip(parts, np.split(keep & near, ends[:-1]), strict=True):
            np.save(part.with_suffix(".npy"), mine)
        yield from ()


class Keep(PipelineStep):
    """Lets those documents through that `Match` decided to keep; the tasks must read what they wrote."""

    type, name = "🔻 - FILTER", "LeanSeek keep"

    def __init__(self, folder: Path | str) -> None:
        super().__init__()
        self.folder = Path(folder)

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for document, keep in zip(data, np.load(self.folder / f"{rank:05d}.npy"), strict=True):
            self.stat_update("forwarded" if keep else "dropped")
            if keep:
                yield document


class Shard(PipelineStep):
    """Tokenises into shards of a DATA folder, about 1% of the documents into the validation split, by their content."""

    type, name = "🔢 - TOKENIZER", "LeanSeek shard"
    BATCH = 256  # documents

    def __init__(self, out: Path | str, tokenizer: Path | str) -> None:
        super().__init__()
        self.out, self.tokenizer = Path(out), Path(tokenizer)

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        encode = WordEncoder.load(self.tokenizer)
        (self.out / "shards").mkdir(parents=True, exist_ok=True)
        writers: dict[tuple[str, str], ShardWriter] = {}
        with ExitStack() as open_ones:
            for batch in _batches(data, self.BATCH):
                for document, ids in zip(batch, encode([one.text for one in batch]), strict=True):
                    chance = int.from_bytes(content_hash(document.text)[:8], "big") / 2**64
                    key = SPLITS[chance < VALIDATION], document.metadata["source"]
                    if key not in writers:
                        split, source = key
                        writer = ShardWriter(
                            self.out / "shards", split, source, rank, encode.tokenizer.vocab_size, SHARD_TOKENS
                        )
                        writers[key] = open_ones.enter_context(writer)
                    writers[key].add(ids, document.metadata["raw_size"])
                    self.stat_update("tokens", value=len(ids))
        entries = [asdict(entry) for writer in writers.values() for entry in writer.entries]
        (self.out / "shards" / f"{rank:05d}.json").write_text(json.dumps(entries))
        yield from ()


class SignatureFiles:
    """`duplicates.Signatures` in several files, one behind the other."""

    def __init__(self, files: list[Path]) -> None:
        self._files = [
            np.memmap(file, np.uint32, "r").reshape(-1, PERMUTATIONS) for file in files if file.stat().st_size
        ]
        self._ends = np.cumsum([0, *map(len, self._files)])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, which: slice | np.ndarray, /) -> np.ndarray:
        numbers = np.arange(*which.indices(len(self))) if isinstance(which, slice) else which
        file = np.searchsorted(self._ends, numbers, side="right") - 1
        return np.stack([self._files[f][i] for f, i in zip(file, numbers - self._ends[file], strict=True)])


def collect(out: Path, tokenizer: Path, steps: list[Step] | None = None) -> None:
    """The manifest over the shards that all tasks wrote: `out` is a DATA folder then. `steps` go into its report."""
    learnt = Tokenizer.load(tokenizer)
    learnt.save(out / "tokenizer")
    parts = sorted((out / "shards").glob("*.json"))
    entries = [ShardEntry(**entry) for part in parts for entry in json.loads(part.read_text())]
    entries.sort(key=lambda entry: SPLITS.index(entry.split))  # stable: tasks stay in their order
    report = Report(steps=steps or [], vocab_size=learnt.vocab_size)
    for split in SPLITS:
        mine = [entry for entry in entries if entry.split == split]
        report.documents[split] = sum(entry.documents for entry in mine)
        report.tokens[split] = sum(entry.tokens for entry in mine)
        report.bytes[split] = sum(entry.bytes for entry in mine)
    write_manifest(out, entries, learnt, report.state())
    for part in parts:
        part.unlink()


def _batches(data: DocumentsPipeline, size: int) -> Iterator[list[Document]]:
    batch: list[Any] = []
    for document in data:
        batch.append(document)
        if len(batch) == size:
            yield batch
            batch = []
    yield batch
