"""The texts that the ledger is kept on: a track is training text and validation text, and the DATA made of them.

A folder holds tracks as files with `train` and `val` in their names; what stands before is the track's name, as in
`easy-train.jsonl.zst` and `easy-val.jsonl.gz`. Two tracks need no files: `stdlib`, the Python sources of this machine,
and `storyworld`, generated text.
"""

import fcntl
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from leanseek.config import BadInput, nearest
from leanseek.data.at_hand import text_at_hand
from leanseek.data.prepare import prepare
from leanseek.data.read import SUFFIX
from leanseek.data.shards import Data, open_data

WITHOUT_FILES = ("stdlib", "storyworld")
SPLIT = re.compile(r"(?P<track>.*?)(?:^|(?<=[\W_]))(?P<split>train|val)(?:ing|id|idation)?(?:[\W_\d]|$)", re.IGNORECASE)
HELD_OUT = 0.03  # share of the Python sources that is validation text, by hash
# Batches of generated stories, a megabyte each at most: those to train on, and those to score, of other numbers.
STORY_BATCHES = range(12), range(1_000_000, 1_000_001)
STORY_BYTES = 1_000_000


@dataclass(frozen=True)
class Track:
    """`train` and `validation` are inputs for `prepare`; `sha256` is by file name."""

    name: str
    train: tuple[str, ...]
    validation: tuple[str, ...]
    sha256: dict[str, str]


def find_track(data: Path | None, name: str | None, out: Path) -> Track:
    """The track of a name in a folder, or one that needs no files, whose text is then written below `out`.

    What a folder `out / name` was begun with stays its text. Raises BadInput.
    """
    if data is None:
        name = "stdlib" if name is None else name
        if name not in WITHOUT_FILES:
            known = f"{nearest(name, list(WITHOUT_FILES))}; without --data there are: {', '.join(WITHOUT_FILES)}"
            raise BadInput(f"no track {name!r}{known}")
        train, validation = _written(name, out / name / "text")
    else:
        name, train, validation = _in_folder(data, name)
    sums = {file.name: _sha256(file) for file in (*train, *validation)}
    track = Track(name, tuple(map(str, train)), tuple(map(str, validation)), sums)
    remembered = out / name / "track.json"
    if remembered.exists():
        if json.loads(remembered.read_text(encoding="utf-8"))["sha256"] != sums:
            raise BadInput(f"{out / name} was begun on other text: take another --out")
    else:
        remembered.parent.mkdir(parents=True, exist_ok=True)
        remembered.write_text(json.dumps(asdict(track), indent=1) + "\n", encoding="utf-8")
    return track


def split_of(file: str) -> tuple[str, str] | None:
    """Track and split of a file by its name: easy-val.jsonl.gz → ("easy", "val"), train.txt → ("", "train")."""
    match = SPLIT.match(SUFFIX.sub("", file)) if SUFFIX.search(file) else None
    return (match["track"].strip("-_. "), match["split"].lower()) if match else None


def data_of_track(track: Track, out: Path, vocab_size: int) -> Path:
    """The DATA folder of a track for a vocabulary, made unless it is there or another process makes it."""
    folder = out / track.name / f"data-{vocab_size}"
    if not (folder / "manifest.json").exists():
        with folder.with_name(f".{folder.name}.lock").open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if not (folder / "manifest.json").exists():
                prepare(list(track.train), folder, vocab_size, validation=list(track.validation))
    return folder


def fixed_cpu_seconds(data: Data) -> float:
    """What learning the tokenizer and tokenising the text took, of all processors."""
    report: dict[str, Any] = data.report
    return float(report["cpu_seconds"]["tokenizer"] + report["cpu_seconds"]["tokenise"])


def prepared(track: Track, out: Path, vocab_size: int) -> Data | None:
    """The open DATA of a vocabulary if it has been made."""
    folder = out / track.name / f"data-{vocab_size}"
    return open_data(folder, verify=False) if (folder / "manifest.json").exists() else None


def _in_folder(folder: Path, name: str | None) -> tuple[str, list[Path], list[Path]]:
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder: give --data a folder with train* and val* text")
    found: dict[str, dict[str, list[Path]]] = defaultdict(lambda: {"train": [], "val": []})
    for file in sorted(folder.iterdir()):
        if file.is_file() and (of := split_of(file.name)):
            found[of[0]][of[1]].append(file)
    whole = {track: splits for track, splits in found.items() if splits["train"] and splits["val"]}
    if not whole:
        raise BadInput(f"{folder}: no text files with 'train' and with 'val' in their names, such as train.jsonl")
    names = sorted(track or folder.resolve().name for track in whole)
    if name is None and len(whole) > 1:
        raise BadInput(f"{folder} holds several tracks: add --track, one of {', '.join(names)}")
    chosen = next(iter(whole)) if name is None else name if name in whole else ""
    if chosen not in whole or name not in (None, chosen, folder.resolve().name):
        raise BadInput(f"{folder}: no track {name!r}{nearest(name or '', names)}; there are: {', '.join(names)}")
    return chosen or folder.resolve().name, whole[chosen]["train"], whole[chosen]["val"]


def _written(name: str, folder: Path) -> tuple[list[Path], list[Path]]:
    """The text of a track that needs no files, as two files, written unless they are there."""
    train, validation = folder / f"{name}-train.jsonl", folder / f"{name}-val.jsonl"
    if not (train.exists() and validation.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        if name == "storyworld":
            from leanseek.data import storyworld  # large, and needed here only

            for file, numbers in zip((train, validation), STORY_BATCHES, strict=True):
                batches = (storyworld.documents(storyworld.PRETRAINING, n, STORY_BYTES) for n in numbers)
                _write(file, chain.from_iterable(batches))
        else:
            text_at_hand(folder)
            # The docstrings beside them would tell of the sources that are held out.
            lines = (folder / "code.jsonl").read_text(encoding="utf-8").split("\n")
            sources = [json.loads(line)["text"] for line in lines if line]
            for unneeded in ("code.jsonl", "prose.jsonl"):
                (folder / unneeded).unlink()
            _write(train, (text for text in sources if not _held_out(text)))
            _write(validation, (text for text in sources if _held_out(text)))
    return [train], [validation]


def _write(file: Path, texts: Iterable[str]) -> None:
    writing = file.with_name(f".{file.name}")
    with writing.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    writing.replace(file)


def _held_out(text: str) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") < HELD_OUT * 2**32


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
