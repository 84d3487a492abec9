"""Documents on the disk while they are prepared: a record of 63 bytes each in memory, whatever they hold.

FOLDER/texts         their UTF-8, one after the other, as it will be trained on
       signatures    uint32 [D, 112]
       documents     DOCUMENT [D]
"""

import os
from pathlib import Path
from typing import IO, Self

import numpy as np

from leanseek.data.duplicates import PERMUTATIONS
from leanseek.data.workers import Kept

SPOOLED = ("texts", "documents", "signatures")
DOCUMENT = np.dtype(
    [
        ("start", "<u8"),  # of its text
        ("size", "<u8"),
        ("raw_size", "<u8"),  # bytes as it was given
        ("source", "<u2"),
        ("held_out", "?"),  # of an input that was given for validation
        ("score", "<f4"),  # of quality
        ("hash", "<u8", (4,)),  # SHA-256 of its text
    ]
)
Documents = np.ndarray  # DOCUMENT [D]


def of_hash(digest: bytes) -> np.ndarray:
    """A SHA-256 as four numbers whose order is that of its bytes: uint64 [4]."""
    return np.frombuffer(digest, ">u8").astype(np.uint64)


class Spool:
    """Written once, from the beginning; then read in any order. Use as a context manager."""

    def __init__(self, folder: Path, new: bool) -> None:
        self.folder = folder
        self._texts, self._documents, self._signatures = (
            (folder / name).open("w+b" if new else "r+b") for name in SPOOLED
        )
        self._end = 0

    def add(self, document: Kept, source: int, held_out: bool) -> None:
        size, content = len(document.text), tuple(of_hash(document.content))
        record = (self._end, size, document.raw_size, source, held_out, document.score, content)
        self._texts.write(document.text)
        self._documents.write(np.array(record, DOCUMENT).tobytes())
        self._signatures.write(document.signature.tobytes())
        self._end += size

    def flush(self) -> None:
        for file in (self._texts, self._documents, self._signatures):
            file.flush()

    def documents(self) -> Documents:
        return np.fromfile(self.folder / "documents", DOCUMENT)

    def signatures(self) -> "SignatureFile":
        return SignatureFile(self._signatures)

    def text(self, document: np.void, most: int | None = None) -> str:
        """A document's text, or its first `most` bytes."""
        size = int(document["size"])
        raw = os.pread(self._texts.fileno(), size if most is None else min(size, most), int(document["start"]))
        return raw.decode(errors="ignore")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._texts, self._documents, self._signatures):
            file.close()


class SignatureFile:
    """`duplicates.Signatures` that are read where they are asked."""

    WIDTH = 4 * PERMUTATIONS

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def __len__(self) -> int:
        return os.fstat(self._file.fileno()).st_size // self.WIDTH

    def __getitem__(self, which: slice | np.ndarray, /) -> np.ndarray:
        if isinstance(which, slice):
            first, after, _ = which.indices(len(self))
            return self._read(first, after - first)
        return np.concatenate([self._read(int(i), 1) for i in which])

    def _read(self, first: int, count: int) -> np.ndarray:
        raw = os.pread(self._file.fileno(), count * self.WIDTH, first * self.WIDTH)
        return np.frombuffer(raw, np.uint32).reshape(count, PERMUTATIONS)
