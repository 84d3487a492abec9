"""Documents out of files: text, JSONL (plain or packed), parquet, folders, hub datasets, and what is wrong in them."""

import gzip
import importlib
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zstandard

from leanseek.config import BadInput
from leanseek.data.clean import ESCAPED, decode_utf8, repair_utf8, too_damaged
from leanseek.data.needles import needle_texts
from leanseek.data.storyworld import MADE, PRETRAINING

SUFFIX = re.compile(r"(\.txt|\.md|\.py|\.rst|\.jsonl|\.parquet)((?<!parquet)(\.gz|\.zst))?$", re.IGNORECASE)
NEEDLES = re.compile(r"needles-(?:([1-9]\d{0,8})-)?([1-9]\d{0,8})")  # characters of a text, at least and at most
READ = 1 << 20  # bytes read, and of rows handed to a worker, at a time
LONGEST_LINE = 16 << 20  # bytes; a longer one is passed over, so that no single record fills the memory
LONGEST_TEXT = 8 << 20  # bytes of a text file that is one document; a longer one is cut into pieces of a megabyte


@dataclass(frozen=True)
class Source:
    """One input: its name in mixtures, and its files, or the name of a hub dataset, or how much of what is made up."""

    name: str
    files: tuple[Path, ...] = ()
    hub: str = ""
    folder: bool = False
    made: str = ""  # which of storyworld.MADE, or needles-A-B
    made_bytes: int = 0

    @property
    def size(self) -> int:
        """Bytes as they lie there, or will be made; 0 for a hub dataset."""
        return self.made_bytes + sum(file.stat().st_size for file in self.files)


@dataclass(frozen=True)
class Batch:
    """Records of one file for one worker.

    `rows`: a whole text file or a piece of one, lines of JSONL, texts (anything, None too), (number, bytes) of what is
    to be made up, or (why, bytes) of what is passed over.
    """

    kind: str  # text, jsonl, rows, made, passed over
    source: int
    where: str
    rows: list[Any]
    first: int = 1  # number of the first row
    offset: int = 0  # of the first row in the file, in bytes
    folder: bool = False


@dataclass
class Records:
    """What is in a batch: texts as UTF-8 with the bytes each had as given, and what was wrong."""

    batch: Batch
    texts: list[bytes] = field(default_factory=list)
    raw_sizes: list[int] = field(default_factory=list)
    bad: dict[str, list[str]] = field(default_factory=dict)  # by kind: where
    size: int = 0
    start: bytes = b""  # the first two bytes, where a UTF-16 mark would be
    replaced: int = 0
    first_replaced: int = -1


@dataclass
class Damage:
    """Undecodable bytes of the JSONL file being read; a file is judged as a whole, when it ends."""

    where: str = ""
    start: bytes = b""
    size: int = 0
    replaced: int = 0
    first: int = -1

    def add(self, done: Records) -> None:
        if done.batch.first == 1:
            self.check()
            self.where, self.start, self.size, self.replaced, self.first = done.batch.where, done.start, 0, 0, -1
        if done.batch.kind == "jsonl":
            self.size += done.size
            self.first = done.first_replaced if self.first < 0 else self.first
            self.replaced += done.replaced

    def check(self) -> None:
        if too_damaged(self.start, self.size, self.replaced):
            raise BadInput(
                f"{self.where}: not UTF-8: byte {self.first} is the first of {self.replaced} that cannot be decoded; "
                "convert it first"
            )


def read_texts(file: Path, warn: Callable[[str], None]) -> Iterator[tuple[str, int]]:
    """The texts of one file as strictly as `prepare` reads them, each with its bytes as given. Raises BadInput."""
    damage = Damage()
    for batch in batches([find_source(str(file))]):
        done = parse(batch)
        damage.add(done)
        for kind, places in done.bad.items():
            warn(f"left out {len(places)} records: {kind}; the first is {places[0]}")
        yield from zip((text.decode() for text in done.texts), done.raw_sizes, strict=True)
    damage.check()


def find_source(text: str) -> Source:
    """An input as it was given, NAME=INPUT or INPUT, looked at but not read. Raises BadInput."""
    name, equals, rest = text.partition("=")
    if not equals or not name or Path(text).exists():
        name, rest = "", text
    if rest.startswith("hf:"):
        hub = rest.removeprefix("hf:")
        return Source(name or hub.rpartition("/")[2], hub=hub)
    made, colon, size = rest.partition(":")
    if colon and (made in MADE or NEEDLES.fullmatch(made)):
        return Source(name or made, made=made, made_bytes=_size(size, rest))
    path = Path(rest)
    if path.is_dir():
        files = tuple(
            file
            for file in sorted(path.rglob("*"), key=lambda file: file.relative_to(path).parts)
            if SUFFIX.search(file.name)
            and file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        if not files:
            raise BadInput(f"{path}: no .txt, .md, .py, .rst, .jsonl (.gz, .zst) or .parquet file in this folder")
        return Source(name or path.resolve().name, files, folder=True)
    if not path.exists():
        raise BadInput(f"{path}: no such file or folder")
    if not SUFFIX.search(path.name):
        raise BadInput(f"{path}: not a kind of file that is read: .txt, .md, .py, .rst, .jsonl (.gz, .zst), .parquet")
    if path.stat().st_size == 0:
        raise BadInput(f"{path}: the file is empty")
    return Source(name or SUFFIX.sub("", path.name), (path,))


def _made(name: str, number: int, size: int) -> Iterator[str]:
    """Batch `number` of what is made up under this name."""
    if needles := NEEDLES.fullmatch(name):
        longest = int(needles[2])
        return needle_texts(PRETRAINING, number, size, int(needles[1]) if needles[1] else longest / 8, longest)
    return MADE[name](PRETRAINING, number, size)


def strings_of(source: Source) -> Iterator[str]:
    """Every text in every record of files, whatever it is called there: evaluations name theirs as they like."""
    for batch in batches([source]):
        if batch.kind == "jsonl":
            for row in batch.rows:
                try:
                    yield from _strings(json.loads(repair_utf8(row)[0] or "null"))
                except (ValueError, RecursionError):
                    yield repair_utf8(row)[0]
        else:
            yield from (text.decode() for text in parse(batch).texts)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _size(text: str, where: str) -> int:
    """Bytes as 5000000, 5e6 or 5MB. Raises BadInput."""
    units = {"KB": 1e3, "MB": 1e6, "GB": 1e9}
    factor = units.get(text[-2:].upper(), 1.0)
    try:
        size = float(text[:-2] if factor > 1 else text) * factor
    except ValueError:
        size = 0.0
    if not 1 <= size < 1e15:
        made = where.partition(":")[0]
        raise BadInput(f"{where}: say how many bytes are to be made up, for example {made}:20MB")
    return int(size)


def batches(sources: list[Source]) -> Iterator[Batch]:
    """All records of all sources, in order. Raises BadInput for a file that cannot be unpacked."""
    for number, source in enumerate(sources):
        if source.hub:
            yield from _hub_batches(number, source.hub)
        for batch in range(-(-source.made_bytes // READ)):
            size = min(READ, source.made_bytes - batch * READ)
            yield Batch("made", number, source.made, [(batch, size)], batch + 1)
        for file in source.files:
            try:
                yield from _batches_of(number, file, source.folder)
            except BadInput as error:
                if not source.folder:
                    raise
                yield Batch("passed over", number, str(file), [(str(error).removeprefix(f"{file}: "), 0)], 0)


def _batches_of(source: int, file: Path, folder: bool) -> Iterator[Batch]:
    match SUFFIX.search(file.name)[1].lower():  # type: ignore[index]
        case ".parquet":
            yield from _parquet_batches(source, file)
        case ".jsonl":
            yield from _line_batches(source, file)
        case _:
            yield from _text_batches(source, file, folder)


def _text_batches(source: int, file: Path, folder: bool) -> Iterator[Batch]:
    held, offset, cut = b"", 0, False
    for chunk in _chunks(file):
        held += chunk
        cut = cut or len(held) > LONGEST_TEXT
        while cut and len(held) > READ:
            end = held.rfind(b"\n", 0, READ) + 1 or READ
            while held[end] & 0xC0 == 0x80:  # in the middle of a character
                end -= 1
            yield Batch("text", source, str(file), [held[:end]], 1, offset, folder)
            held, offset = held[end:], offset + end
    if held or not offset:
        yield Batch("text", source, str(file), [held], 1, offset, folder)


def _line_batches(source: int, file: Path) -> Iterator[Batch]:
    first, offset = 1, 0  # of the line that is being read
    held: list[bytes] = []  # what there is of it, and how long it is: beyond the limit it is only measured
    size = 0
    for chunk in _chunks(file):
        head, newline, tail = chunk.partition(b"\n")
        held.append(head)
        size += len(head)
        if size > LONGEST_LINE:
            held.clear()
        if not newline:
            continue
        if size > LONGEST_LINE:
            yield _too_long(source, file, size, first)
            first, offset, lines = first + 1, offset + size + 1, tail
        else:
            lines = b"".join(held) + newline + tail
        whole, newline, rest = lines.rpartition(b"\n")
        if newline:
            rows = whole.split(b"\n")
            yield Batch("jsonl", source, str(file), rows, first, offset)
            first, offset = first + len(rows), offset + len(whole) + 1
        held, size = [rest], len(rest)
    if size > LONGEST_LINE:
        yield _too_long(source, file, size, first)
    elif size:
        yield Batch("jsonl", source, str(file), [b"".join(held)], first, offset)


def _too_long(source: int, file: Path, size: int, line: int) -> Batch:
    return Batch("passed over", source, str(file), [(f"line longer than {LONGEST_LINE >> 20} MiB", size + 1)], line)


def _chunks(file: Path) -> Iterator[bytes]:
    """The unpacked bytes of a file, about a megabyte at a time."""
    try:
        if file.name.lower().endswith(".zst"):
            yield from _unpack_zstd(file)
            return
        packed = file.name.lower().endswith(".gz")
        with gzip.open(file, "rb") if packed else open(file, "rb") as stream:
            while chunk := stream.read(READ):
                yield chunk
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise BadInput(f"{file}: damaged or truncated archive ({error})") from None


def _unpack_zstd(file: Path) -> Iterator[bytes]:
    # Frame by frame by hand: the library's stream reader takes a truncated frame for the end of the file.
    unpacker = None
    with open(file, "rb") as stream:
        while packed := stream.read(READ // 4):
            while packed:
                unpacker = unpacker or zstandard.ZstdDecompressor().decompressobj()
                yield unpacker.decompress(packed)
                packed = unpacker.unused_data
                if unpacker.eof:
                    unpacker = None
    if unpacker is not None:
        raise EOFError("the last frame is not complete")


def _parquet_batches(source: int, file: Path) -> Iterator[Batch]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise BadInput(f"{file}: reading parquet needs pyarrow: pip install 'leanseek[data]'") from None
    try:
        table = parquet.ParquetFile(file)
        if "text" not in table.schema_arrow.names:
            raise BadInput(f"{file}: no column 'text', it has {', '.join(table.schema_arrow.names)}")
        first = 1
        for rows in table.iter_batches(batch_size=1024, columns=["text"]):
            texts = rows.column(0).to_pylist()
            yield Batch("rows", source, str(file), texts, first)
            first += len(texts)
    except ValueError as error:  # ArrowInvalid is one
        raise BadInput(f"{file}: not a parquet file ({error})") from None


def _hub_batches(source: int, name: str) -> Iterator[Batch]:
    try:
        hub = importlib.import_module("datasets")
    except ImportError:
        raise BadInput(f"hf:{name}: reading from the hub needs datasets: pip install datasets") from None
    try:
        rows = iter(hub.load_dataset(name, split="train", streaming=True))
        first, texts = 1, []
        for row in rows:
            texts.append(row.get("text"))
            if len(texts) == 256:
                yield Batch("rows", source, f"hf:{name}", texts, first)
                first, texts = first + len(texts), []
        yield Batch("rows", source, f"hf:{name}", texts, first)
    except (OSError, ValueError) as error:
        raise BadInput(f"hf:{name}: cannot be read: {str(error).splitlines()[0]}") from None


def parse(batch: Batch) -> Records:
    """Records to texts; a pure function. Raises BadInput for a named text file that is not UTF-8."""
    done = Records(batch)
    offset = batch.offset
    rows = batch.rows
    if batch.kind == "made":
        rows = [text for number, size in rows for text in _made(batch.where, number, size)]
    for number, row in enumerate(rows, batch.first):
        where = batch.where if batch.kind == "text" or number == 0 else f"{batch.where} line {number}"
        if batch.kind == "passed over":
            why, size = row
            done.bad.setdefault(why, []).append(where)
            done.size += size
            continue
        text, replaced = row, 0
        if batch.kind == "text":
            done.size += len(row)
            try:
                text, replaced = decode_utf8(row, batch.offset)
            except BadInput as error:
                if not batch.folder:
                    raise BadInput(f"{batch.where}: {error}") from None
                done.bad.setdefault("not UTF-8", []).append(f"{where} ({error})")
                continue
        elif batch.kind == "jsonl":
            done.start = done.start or row[:2]
            line, replaced, first = repair_utf8(row)
            if replaced and done.first_replaced < 0:
                done.first_replaced = offset + first
            done.size += len(row) + 1
            offset += len(row) + 1
            if not line.strip():
                continue
            try:
                parsed = json.loads(line)
                text = parsed.get("text") if isinstance(parsed, dict) else None
            except (ValueError, RecursionError):
                done.replaced += replaced
                done.bad.setdefault("not JSON", []).append(where)
                continue
        done.replaced += replaced
        if replaced and batch.kind == "jsonl":  # from here on those in the text itself, not elsewhere in its line
            damaged = json.loads(row.decode("utf-8", errors="surrogateescape").removeprefix("\ufeff"))
            replaced = len(ESCAPED.findall(str(damaged.get("text"))))
        kind, encoded = _judge(text)
        if kind:
            done.bad.setdefault(kind, []).append(where)
            continue
        done.texts.append(encoded)
        done.raw_sizes.append(len(encoded) - 2 * replaced)  # U+FFFD takes three bytes, what was given took one
        if batch.kind in ("rows", "made"):
            done.size += len(encoded)
    done.batch = Batch(batch.kind, batch.source, batch.where, [], batch.first, batch.offset, batch.folder)
    return done


def _judge(text: Any) -> tuple[str, bytes]:
    if not isinstance(text, str):
        return 'no string "text"', b""
    if not text.strip():
        return "empty", b""
    try:
        return "", text.encode()
    except UnicodeEncodeError:
        return "half of a surrogate pair", b""
