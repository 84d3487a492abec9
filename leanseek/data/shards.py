"""The DATA folder: checksummed, memory-mapped token shards of documents, and the tokenizer that wrote them.

DATA/manifest.json             version, tokenizer fingerprint, token type, every shard with its SHA-256, the report
DATA/tokenizer/                as transformers reads it
DATA/shards/NAME.bin           token ids of document after document, without BOS and EOS, little-endian
DATA/shards/NAME.docs.npy      int64 [2, D+1]: where documents start, in tokens and in bytes of the text as given
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from leanseek.config import BadInput, nearest
from leanseek.data.tokenizer import Tokenizer, token_dtype

FORMAT, VERSION = "leanseek-data", 1
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class ShardEntry:
    """One shard as the manifest lists it; `bytes` counts the text as given, not the file."""

    file: str
    source: str
    split: str
    tokens: int
    documents: int
    bytes: int
    sha256: str
    docs_sha256: str


@dataclass(frozen=True)
class Shard:
    """A shard laid open: ids [tokens], starts and byte_starts [D+1]."""

    entry: ShardEntry
    ids: np.ndarray
    starts: np.ndarray
    byte_starts: np.ndarray


@dataclass(frozen=True)
class Counts:
    documents: int
    tokens: int  # without BOS and EOS
    bytes: int


class ShardWriter:
    """Documents of one source and split into shards of about `shard_tokens`. Use as a context manager."""

    def __init__(self, folder: Path, split: str, source: str, number: int, vocab_size: int, shard_tokens: int) -> None:
        readable = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in source)[:40]
        self.folder, self.split, self.source = folder, split, source
        self.stem = f"{split}-{number:02d}-{readable}"
        self.dtype, self.shard_tokens = token_dtype(vocab_size), shard_tokens
        self.entries: list[ShardEntry] = []
        self._starts, self._byte_starts = [0], [0]
        self._pending: list[np.ndarray] = []

    def add(self, ids: list[int] | np.ndarray, raw_bytes: int) -> None:
        self._pending.append(np.asarray(ids, self.dtype))
        self._starts.append(self._starts[-1] + len(ids))
        self._byte_starts.append(self._byte_starts[-1] + raw_bytes)
        if self._starts[-1] >= self.shard_tokens:
            self._close_shard()

    def _close_shard(self) -> None:
        if not self._pending:
            return
        tokens_file = self.folder / f"{self.stem}-{len(self.entries):04d}.bin"
        docs_file = tokens_file.with_suffix(".docs.npy")
        with open(tokens_file, "wb") as file:
            file.writelines(ids.data for ids in self._pending)
        np.save(docs_file, np.array([self._starts, self._byte_starts], "<i8"))
        self.entries.append(
            ShardEntry(
                file=f"shards/{tokens_file.name}",
                source=self.source,
                split=self.split,
                tokens=self._starts[-1],
                documents=len(self._pending),
                bytes=self._byte_starts[-1],
                sha256=_sha256(tokens_file),
                docs_sha256=_sha256(docs_file),
            )
        )
        self._starts, self._byte_starts, self._pending = [0], [0], []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._close_shard()


def write_manifest(folder: Path, entries: list[ShardEntry], tokenizer: Tokenizer, report: dict[str, Any]) -> None:
    """The manifest, written last: a folder without one is no DATA folder."""
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "shards": [asdict(entry) for entry in entries],
        "report": report,
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8")


class Data:
    """An open DATA folder. Made by `open_data`, which has checked it."""

    def __init__(self, folder: Path, manifest: dict[str, Any], shards: tuple[Shard, ...]) -> None:
        self.folder, self.shards = folder, shards
        self.report: dict[str, Any] = manifest["report"]
        self.vocab_size: int = manifest["vocab_size"]
        self.tokenizer_fingerprint: str = manifest["tokenizer"]
        self.tokenizer_folder = folder / "tokenizer"
        content = {key: value for key, value in manifest.items() if key != "report"}  # the report tells times
        self.fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources, in the order of the manifest."""
        return tuple(dict.fromkeys(shard.entry.source for shard in self.shards))

    def select(self, split: str, source: str | None = None) -> tuple[Shard, ...]:
        """The shards of a split, of one source or of all. Raises BadInput for a source that is not there."""
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}")
        if source is not None and source not in self.sources:
            there = ", ".join(self.sources)
            raise BadInput(f"{self.folder}: no source {source!r}{nearest(source, list(self.sources))}; it has {there}")
        return tuple(
            shard for shard in self.shards if shard.entry.split == split and source in (None, shard.entry.source)
        )

    def documents(self, split: str, source: str | None = None) -> Iterator[tuple[np.ndarray, int]]:
        """Every document of a split: its ids [n], memory-mapped, and the UTF-8 bytes of its text as given."""
        for shard in self.select(split, source):
            sizes = np.diff(shard.byte_starts)
            for i, raw_bytes in enumerate(sizes):
                yield shard.ids[shard.starts[i] : shard.starts[i + 1]], int(raw_bytes)

    def counts(self, split: str, source: str | None = None) -> Counts:
        """Documents, tokens and bytes of a split."""
        entries = [shard.entry for shard in self.select(split, source)]
        return Counts(
            sum(entry.documents for entry in entries),
            sum(entry.tokens for entry in entries),
            sum(entry.bytes for entry in entries),
        )


def open_data(folder: Path | str, verify: bool = True) -> Data:
    """Open a DATA folder after checking version, tokenizer, sizes and, with `verify`, every checksum.

    Raises BadInput that names the file at fault.
    """
    folder = Path(folder)
    file = folder / "manifest.json"
    if not file.is_file():
        raise BadInput(f"{folder}: not a DATA folder, manifest.json is missing; make one with `leanseek prepare`")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT or not isinstance(manifest["version"], int):
            raise KeyError("format")
        if manifest["version"] != VERSION:
            raise BadInput(
                f"{file}: version {manifest['version']}, this LeanSeek reads version {VERSION}; prepare the data again"
            )
        dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        entries = [ShardEntry(**entry) for entry in manifest["shards"]]
        fingerprint = manifest["tokenizer"]
        if missing := {"vocab_size", "report"} - manifest.keys():
            raise KeyError(min(missing))
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{file}: corrupted ({error}); prepare the data again") from None
    tokenizer = Tokenizer.load(folder / "tokenizer")
    if tokenizer.fingerprint != fingerprint:
        raise BadInput(f"{folder}/tokenizer: not the tokenizer that wrote these shards; prepare the data again")
    return Data(folder, manifest, tuple(_open_shard(folder, entry, dtype, verify) for entry in entries))


def _open_shard(folder: Path, entry: ShardEntry, dtype: np.dtype, verify: bool) -> Shard:
    tokens_file = folder / entry.file
    docs_file = tokens_file.with_suffix(".docs.npy")
    for file, sha256 in ((tokens_file, entry.sha256), (docs_file, entry.docs_sha256)):
        if not file.is_file():
            raise BadInput(f"{file}: the shard is missing; prepare the data again")
        if file is tokens_file and file.stat().st_size != entry.tokens * dtype.itemsize:
            raise BadInput(
                f"{file}: {file.stat().st_size} bytes instead of {entry.tokens * dtype.itemsize}, truncated?"
            )
        if verify and _sha256(file) != sha256:
            raise BadInput(f"{file}: corrupted, its checksum is not the manifest's; prepare the data again")
    try:
        starts, byte_starts = np.load(docs_file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise BadInput(f"{docs_file}: corrupted ({error}); prepare the data again") from None
    return Shard(entry, np.memmap(tokens_file, dtype, mode="r"), starts, byte_starts)


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
