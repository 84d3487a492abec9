"""Safetensors files, read and written one tensor at a time: memory holds a tensor, never a file.

A file is eight bytes that give the length of a header, the header in JSON (name → dtype, shape, place), and the bytes
of the tensors. Nothing in it can run code. A folder of several files has an index, `model.safetensors.index.json`.
"""

import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from leanseek.config import BadInput

INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_LIMIT = 100 << 20  # bytes, as the format has it
COPY = 64 << 20  # bytes handed to the disk at a time


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Stored:
    """A tensor in a file; its bytes are still there."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, part: int = 0, parts: int = 1) -> Tensor:
        """The tensor, or as a matrix one of the equal parts that its rows fall into when leading dims are joined."""
        shape = self.shape if parts == 1 else (math.prod(self.shape[:-1]) // parts, self.shape[-1])
        size = self.nbytes // parts
        return self._bytes(part * size, size).view(self.dtype).view(shape)

    def rows(self, first: int, count: int) -> Tensor:
        """The slices first … first + count − 1 of the first dim."""
        size = self.nbytes // self.shape[0] if self.shape[0] else 0
        return self._bytes(first * size, count * size).view(self.dtype).view(count, *self.shape[1:])

    def _bytes(self, first: int, size: int) -> Tensor:
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset + first)
            content = torch.empty(size, dtype=torch.uint8)
            done = 0
            while done < size:  # a call may give less than is asked for
                got = file.readinto(content[done:].numpy().data)
                if not got:
                    raise BadInput(f"{self.file}: ends early: it was shortened while it was read")
                done += got
        return content

    def same_bits(self, other: "Stored") -> bool:
        """Whether two tensors agree in dtype, shape and every bit; they are compared piece by piece."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        with self.file.open("rb") as mine, other.file.open("rb") as theirs:
            mine.seek(self.offset)
            theirs.seek(other.offset)
            sizes = [min(COPY, self.nbytes - first) for first in range(0, self.nbytes, COPY)]
            return all(mine.read(size) == theirs.read(size) for size in sizes)


def open_folder(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder of safetensors files, by name; other files are not looked at.

    Raises BadInput for a missing or damaged file, and for an index that does not tell what the files hold.
    """
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder of weights")
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if not indices:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise BadInput(f"{folder}: there is no safetensors file in it")
        return _joined((file, _header(file)) for file in files)
    try:
        file_of: dict[str, str] = json.loads(indices[0].read_bytes())["weight_map"]
        names = sorted(set(file_of.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(f"{indices[0]}: damaged: not an index of safetensors files") from None
    headers = {}
    for name in names:
        if Path(name).name != name:
            raise BadInput(f"{indices[0]}: names a file outside its folder: {name}")
        if not (folder / name).is_file():
            raise BadInput(f"{folder / name}: missing: the index expects tensors there")
        headers[name] = _header(folder / name)
    tensors = _joined((folder / name, header) for name, header in headers.items())
    for tensor, name in file_of.items():
        if tensor not in headers[name]:
            raise BadInput(f"{folder / name}: the index expects {tensor} in it, and it is not there")
    for tensor in tensors:
        if tensor not in file_of:
            raise BadInput(f"{tensors[tensor].file}: holds {tensor}, which the index does not name")
    return tensors


def _joined(files: Iterable[tuple[Path, dict[str, Stored]]]) -> dict[str, Stored]:
    tensors: dict[str, Stored] = {}
    for file, header in files:
        if twice := tensors.keys() & header.keys():
            raise BadInput(f"{file}: {min(twice)} is in {tensors[min(twice)].file.name} too")
        tensors |= header
    return tensors


def _header(path: Path) -> dict[str, Stored]:
    """The tensors of one file, each within it and none over another. Raises BadInput."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_LIMIT):
            raise BadInput(f"{path}: not readable as safetensors: truncated, or another kind of file")
        content = file.read(length)
    try:
        header: dict[str, dict[str, Any]] = json.loads(content)
        header.pop("__metadata__", None)
        tensors, places = {}, []
        for name, entry in header.items():
            first, after = entry["data_offsets"]
            shape = tuple(int(width) for width in entry["shape"])
            if entry["dtype"] not in DTYPES:
                raise BadInput(f"{path}: {name} has dtype {entry['dtype']}, which is not read here")
            tensors[name] = Stored(path, DTYPES[entry["dtype"]], shape, 8 + length + first)
            places.append((first, after, name))
            if min(shape, default=0) < 0 or after - first != tensors[name].nbytes:
                raise BadInput(f"{path}: {name} is not as large as its shape says")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(f"{path}: not readable as safetensors: its header is damaged") from None
    end = 0
    for first, after, name in sorted(places):
        if first != end:
            raise BadInput(f"{path}: {name} lies over another tensor, or behind a gap")
        end = after
    if 8 + length + end != size:
        raise BadInput(f"{path}: truncated: {size} bytes, {8 + length + end} expected")
    return tensors


# ── writing ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: the bytes of `pieces`, each called when its turn comes, are in a row its own."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Sequence[Callable[[], Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def write(self, file: BinaryIO, advance: Callable[[int], None]) -> None:
        written = 0
        for read in self.pieces:
            piece = read()
            assert piece.dtype == self.dtype, self.name
            content = piece.contiguous().view(-1).view(torch.uint8).numpy().data
            for first in range(0, len(content), COPY):
                file.write(content[first : first + COPY])
            written += len(content)
            advance(len(content))
        assert written == self.nbytes, self.name


def write_folder(
    folder: Path, tensors: Sequence[Planned], file_bytes: int, advance: Callable[[int], None] = lambda _: None
) -> None:
    """Write tensors in their order into files of at most `file_bytes`, or of one tensor, and then the index.

    A file has a name that starts with a dot until it is whole; those that are whole already are left as they are, so
    that the same call goes on where it was stopped. `advance` is told of every byte. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files: list[list[Planned]] = []
    room = 0
    for tensor in tensors:
        if tensor.nbytes > room:
            files.append([])
            room = file_bytes
        files[-1].append(tensor)
        room -= tensor.nbytes
    file_of = {}
    for number, content in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        file_of.update({tensor.name: name for tensor in content})
        _write_file(folder / name, content, advance)
    for file in folder.glob("*.safetensors"):
        if file.name not in file_of.values():  # of an attempt with another division
            file.unlink()
    total = sum(tensor.nbytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(path: Path, tensors: list[Planned], advance: Callable[[int], None]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        place = [end, end + tensor.nbytes]
        header[tensor.name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight, whatever reads them
    start = len(text).to_bytes(8, "little") + text
    if path.is_file() and path.stat().st_size == len(start) + end:
        with path.open("rb") as file:
            if file.read(len(start)) == start:
                advance(end)
                return
    writing = path.with_name(f".writing-{path.name}")
    with writing.open("wb") as file:
        file.write(start)
        for tensor in tensors:
            tensor.write(file, advance)
        file.flush()
        os.fsync(file.fileno())
    writing.replace(path)


@contextmanager
def staged(target: Path, fingerprint: str, needed: int) -> Iterator[Path]:
    """A folder to write in that gets the name `target` when the block ends well; `needed` bytes will go there.

    Whatever is stopped in between goes on with the same `fingerprint` of source and wishes; where the block finds bad
    input, nothing stays. Raises BadInput when `target` has something in it, or the disk has no room.
    """
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise BadInput(f"{target}: not an empty folder: take a new one")
    target.parent.mkdir(parents=True, exist_ok=True)
    writing = target.with_name(f".writing-{target.name}")
    mark = writing / ".source"
    if writing.is_dir() and not (mark.is_file() and mark.read_text(encoding="utf-8") == fingerprint):
        shutil.rmtree(writing)
    writing.mkdir(exist_ok=True)
    mark.write_text(fingerprint, encoding="utf-8")
    with mark.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"{target}: is being written by another process: wait for it or take another") from None
        try:
            free = shutil.disk_usage(writing).free + sum(f.stat().st_size for f in writing.rglob("*") if f.is_file())
            if needed > free:
                raise BadInput(
                    f"{target}: needs {needed / 1e9:,.2f} GB, and the disk has {free / 1e9:,.2f} GB left: make room"
                )
            yield writing
        except BadInput:
            shutil.rmtree(writing, ignore_errors=True)
            raise
        mark.unlink()
        if target.is_dir():
            target.rmdir()
        writing.rename(target)
