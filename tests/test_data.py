"""Cleaning, prepare, shards and loader: by hand, by slow twins, and by undoing what was done."""

import gzip
import itertools
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import zstandard

from leanseek.config import BadInput, DataConfig, Stage
from leanseek.data import prepare as prepare_module
from leanseek.data import read, workers
from leanseek.data.clean import decode_utf8, mix, repair_utf8
from leanseek.data.duplicates import BANDS, ROWS, SHINGLE, minhash, near_duplicates
from leanseek.data.filters import Filters
from leanseek.data.loader import NO_TARGET, Loader
from leanseek.data.packing import Rows, best_fit, concat, interleave
from leanseek.data.prepare import prepare
from leanseek.data.shards import Data, ShardWriter, open_data, write_manifest
from leanseek.data.tokenizer import FIM_BEGIN, FIM_END, FIM_HOLE, Tokenizer
from leanseek.data.words import WORD, content_hash
from leanseek.data.workers import clean_batch

NOUNS = ["ship", "harbour", "lamp", "river", "baker", "door", "captain", "stone", "letter", "winter", "garden", "road"]
VERBS = ["found", "carried", "forgot", "painted", "followed", "sold", "mended", "watched"]
PLACES = ["by the sea", "at noon", "in the old town", "before dawn", "without a word", "under a grey sky"]


def story(rng: random.Random, sentences: int) -> str:
    """A document of made-up sentences of about eight words."""
    return " ".join(
        f"The {rng.choice(NOUNS)} {rng.choice(VERBS)} {rng.randint(2, 99)} {rng.choice(NOUNS)}s {rng.choice(PLACES)}."
        for _ in range(sentences)
    )


def stories(seed: int, count: int, longest: int = 30) -> list[str]:
    rng = random.Random(seed)
    return [story(rng, rng.randint(3, longest)) for _ in range(count)]


def write_jsonl(file: Path, texts: list[str]) -> str:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(file)


# ── clean ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_random_numbers_are_the_published_splitmix64() -> None:
    # The generator's first output for seed 0 and for seed 1234567, as published with its reference code.
    assert int(mix(0)) == 0xE220A8397B1DCDAF
    assert int(mix(1234567)) == 6457827717110365317
    assert mix(3, np.arange(4)).tolist() == [int(mix(3, i)) for i in range(4)]


def test_valid_utf8_is_untouched() -> None:
    for text in ("plain", "漢字 é 👩 \ufffd \x00", ""):
        assert decode_utf8(text.encode()) == (text, 0)
    assert decode_utf8(b"\xef\xbb\xbfmarked") == ("marked", 0)


def test_up_to_one_percent_of_bad_bytes_is_replaced() -> None:
    good = "é" * 99  # 198 bytes
    text, replaced = decode_utf8(good.encode() + b"\xff" + b"\xc3" + b"a")
    assert (text, replaced) == (good + "\ufffd\ufffda", 2)


def test_more_bad_bytes_are_refused_with_the_offset_of_the_first() -> None:
    with pytest.raises(BadInput, match="byte 198 is the first of 3 "):
        decode_utf8(("é" * 99).encode() + b"\xff\xff\xff")
    with pytest.raises(BadInput, match="byte 3 is the first"):
        decode_utf8("caf\xe9".encode("latin-1"))
    with pytest.raises(BadInput, match="byte 0 is the first"):
        decode_utf8("a long text in ASCII letters only".encode("utf-16"))
    assert repair_utf8(b"\xef\xbb\xbfab\xff") == ("ab\ufffd", 1, 5)


def exact_jaccard(a: str, b: str) -> float:
    def shingles(text: str) -> set[tuple[str, ...]]:
        words = WORD.findall(text.lower())
        return {tuple(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}

    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


def test_minhash_estimates_the_exact_jaccard() -> None:
    rng = random.Random(0)
    errors = []
    for _ in range(60):
        words = [f"w{rng.randrange(10**6)}" for _ in range(300)]
        changed = words.copy()
        for _ in range(rng.choice([0, 2, 5, 10, 30, 80])):
            changed[rng.randrange(300)] = f"v{rng.randrange(10**6)}"
        a, b = " ".join(words), " ".join(changed)
        errors.append((minhash(a) == minhash(b)).mean() - exact_jaccard(a, b))
    # 112 coin flips each: standard deviation at most 0.5/√112 = 0.047, of the mean of 60 at most 0.0061.
    assert max(map(abs, errors)) < 4.5 * 0.047
    assert abs(np.mean(errors)) < 4 * 0.0061


def test_minhash_looks_at_words_only() -> None:
    assert (minhash("One two, three four five six.") == minhash("one TWO three\nfour -- five six")).all()
    assert (minhash("这是一个很好的例子") != minhash("这是一个很坏的例子")).any()
    assert (minhash("1 + 2 = 3") != minhash("1 - 2 = 3")).any()  # fewer than five words: the text itself
    assert (minhash("...") != minhash("!!!")).all()


def test_minhash_of_a_long_text_is_the_smallest_of_its_parts() -> None:
    words = [f"w{i}" for i in range(9000)]
    parts = [minhash(" ".join(words[a : a + 3000 + SHINGLE - 1])) for a in (0, 3000, 6000)]
    assert (minhash(" ".join(words)) == np.min(parts, axis=0)).all()


def slow_near_duplicates(signatures: np.ndarray, threshold: float) -> list[bool]:
    keep: list[bool] = []
    for i, mine in enumerate(signatures):
        kept = [signatures[j] for j in range(i) if keep[j]]
        shared = [(other.reshape(BANDS, ROWS) == mine.reshape(BANDS, ROWS)).all(axis=1).any() for other in kept]
        keep.append(not any(s and (o == mine).mean() >= threshold for s, o in zip(shared, kept, strict=True)))
    return keep


def test_near_duplicates_against_every_pair() -> None:
    rng = random.Random(1)
    texts = []
    for text in stories(1, 40):
        for changes in (0, 1, 3, 12):
            words = text.split()
            for _ in range(changes):
                words[rng.randrange(len(words))] = f"new{rng.randrange(999)}"
            texts.append(" ".join(words))
    rng.shuffle(texts)
    signatures = np.stack([minhash(text) for text in texts])
    keep = near_duplicates(signatures)
    assert keep.tolist() == slow_near_duplicates(signatures, 0.8)
    assert 40 < keep.sum() < 160
    assert near_duplicates(signatures[keep]).all()


# ── prepare ───────────────────────────────────────────────────────────────────────────────────────────────────────


def texts_of(data: Data, split: str, source: str | None = None) -> list[str]:
    tokenizer = Tokenizer.load(data.tokenizer_folder)
    return [tokenizer.decode(ids.tolist()) for ids, _ in data.documents(split, source)]


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return stories(7, 300)


@pytest.fixture(scope="module")
def data_folder(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    half = write_jsonl(folder / "half.jsonl", corpus[:200])
    other = write_jsonl(folder / "other.jsonl", corpus[200:])
    prepare([half, f"rest={other}"], folder / "D", vocab_size=600, workers=1)
    return folder / "D"


@pytest.fixture(scope="module")
def data(data_folder: Path) -> Data:
    return open_data(data_folder)


@pytest.fixture(scope="module")
def tokenizer(data: Data) -> Tokenizer:
    return Tokenizer.load(data.tokenizer_folder)


def test_every_document_comes_back(corpus: list[str], data: Data) -> None:
    train, validation = texts_of(data, "train"), texts_of(data, "validation")
    assert Counter(train + validation) == Counter(corpus)
    assert [text for text in corpus if text in set(train)] == train  # in the order given
    assert data.sources == ("half", "rest")
    assert set(texts_of(data, "train", "rest")) <= set(corpus[200:])
    for split in ("train", "validation"):
        found = list(data.documents(split))
        counts = data.counts(split)
        assert [size for _, size in found] == [len(text.encode()) for text in texts_of(data, split)]
        assert counts.documents == len(found)
        assert counts.tokens == sum(len(ids) for ids, _ in found)
        assert counts.bytes == sum(size for _, size in found)
        assert all(ids.dtype == np.uint16 for ids, _ in found)
        assert data.report["tokens"][split] == counts.tokens


def test_the_validation_split_follows_content_alone(corpus: list[str], data: Data, tmp_path: Path) -> None:
    expected = {text for text in corpus if int.from_bytes(content_hash(text)[:8], "big") / 2**64 < 0.01}
    assert 0 < len(expected) < 12
    assert set(texts_of(data, "validation")) == expected
    shuffled = random.Random(0).sample(corpus, len(corpus))
    prepare([write_jsonl(tmp_path / "s.jsonl", shuffled)], tmp_path / "D", tokenizer=data.tokenizer_folder)
    assert set(texts_of(open_data(tmp_path / "D"), "validation")) == expected


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_validation_document_whenever_there_are_two(tmp_path: Path, count: int) -> None:
    report = prepare([write_jsonl(tmp_path / "s.jsonl", stories(3, count))], tmp_path / "D")
    assert report.documents == {"train": max(count - 1, 1), "validation": min(count - 1, 1)}


def test_damage_outside_the_text_does_not_shorten_it(tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"Story {n} is told once more, in full."}).encode() for n in range(400)]
    rows[7] = b'{"text": "hi there, \xff friend", "title": "\xff\xff\xff"}'
    file = tmp_path / "d.jsonl"
    file.write_bytes(b"\n".join(rows))
    report = prepare([str(file)], tmp_path / "D", 300)
    assert report.replaced_bytes == 4
    assert (
        sum(report.bytes.values())
        == sum(len(f"Story {n} is told once more, in full.") for n in range(400) if n != 7) + 18
    )


def test_a_single_document_validates_with_its_end(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    lines = [f"Line {n} says that {n * n} is the square of {n}, naïvely.\n" for n in range(200)]
    book.write_text("".join(lines))
    report = prepare([str(book)], tmp_path / "D", 300)
    data = open_data(tmp_path / "D")
    (train,), (validation,) = texts_of(data, "train"), texts_of(data, "validation")
    assert train + validation == book.read_text()
    assert train.endswith("\n")
    assert 0.04 < len(validation) / len(book.read_text()) < 0.07
    assert sum(report.bytes.values()) == book.stat().st_size


def test_duplicates_are_counted_and_removed(tmp_path: Path) -> None:
    first, second, third = stories(11, 3, longest=60)
    near = second.replace("The", "the") + " Amen."  # case does not count, one word of many does little
    texts = [first, second, first, third, near, first, third + " "]
    report = prepare([write_jsonl(tmp_path / "d.jsonl", texts)], tmp_path / "D")
    assert (report.documents_in, report.exact_duplicates, report.near_duplicates) == (7, 2, 2)
    data = open_data(tmp_path / "D")
    assert set(texts_of(data, "train") + texts_of(data, "validation")) == {first, second, third}
    assert "removed 2 exact and 2 near duplicates" in report.lines()


def test_the_number_of_workers_changes_nothing(
    corpus: list[str], data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "READ", 3000)  # many batches
    monkeypatch.setattr("leanseek.data.prepare.READ", 1000)
    monkeypatch.setattr("leanseek.data.prepare.FOR_A_WORKER", 1)
    half = write_jsonl(tmp_path / "half.jsonl", corpus[:200])
    other = write_jsonl(tmp_path / "other.jsonl", corpus[200:])
    report = prepare([half, f"rest={other}"], tmp_path / "D", vocab_size=600, workers=2)
    assert open_data(tmp_path / "D").fingerprint == data.fingerprint
    assert report.bytes_in == sum(Path(file).stat().st_size for file in (half, other))


def test_packed_files_and_folders_read_alike(corpus: list[str], tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in corpus[:20]).encode()
    folder = tmp_path / "mine"
    (folder / "deep").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    frames = [zstandard.compress(part) for part in (lines[:777], lines[777:])]  # two frames, cut within a row
    (folder / "b.jsonl.zst").write_bytes(b"".join(frames))
    (folder / "deep" / "c.txt").write_text(corpus[20], encoding="utf-8")
    (folder / "deep" / "d.py").write_text("print('hello from a script')\n")
    (folder / "deep" / "empty.py").write_text("")
    (folder / "deep" / "e.jsonl.txt").write_text("no rows, just text")
    (folder / "deep" / "latin.txt").write_bytes("garçon déjà".encode("latin-1"))
    (folder / "deep" / "picture.png").write_bytes(b"\x89PNG")
    (folder / ".hidden" / "e.txt").write_text("not to be read")
    report = prepare([str(folder)], tmp_path / "D")
    data = open_data(tmp_path / "D")
    assert data.sources == ("mine",)
    assert set(texts_of(data, "train") + texts_of(data, "validation")) == {
        *corpus[:21],
        "print('hello from a script')\n",
        "no rows, just text",
    }
    assert report.exact_duplicates == 20
    assert report.bad == {"empty": 1, "not UTF-8": 1}
    assert "latin.txt (not UTF-8: byte 3 " in report.first_bad["not UTF-8"]


def test_bad_rows_are_counted_by_kind_with_the_first_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        '{"text": "good one"}',
        "{broken",
        '{"txt": "misspelt"}',
        '{"text": 3}',
        '["text"]',
        '{"text": "  \\n"}',
        "",
        '{"text": "half \\ud800"}',
        "also broken",
        '{"text": "good two", "source": "x"}',
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(rows))
    for size in (1 << 20, 40):  # in one batch, and in many
        monkeypatch.setattr(read, "READ", size)
        report = prepare([str(file)], tmp_path / f"D{size}")
        assert report.bad == {
            "not JSON": 2,
            'no string "text"': 3,
            "empty": 1,
            "half of a surrogate pair": 1,
        }
        assert {kind: place.rpartition(" ")[2] for kind, place in report.first_bad.items()} == {
            "not JSON": "2",
            'no string "text"': "3",
            "empty": "6",
            "half of a surrogate pair": "8",
        }
        assert report.documents_in == 2
        assert sum("left out" in line for line in report.lines()) == 4


def test_replaced_bytes_keep_the_size_of_the_text_as_given(tmp_path: Path) -> None:
    raw = b"good words " * 30 + b"\xff bad"
    (tmp_path / "t.txt").write_bytes(raw)
    report = prepare([str(tmp_path / "t.txt")], tmp_path / "D")
    data = open_data(tmp_path / "D")
    assert texts_of(data, "train") == ["good words " * 30 + "\ufffd bad"]
    assert [size for _, size in data.documents("train")] == [len(raw)]
    assert report.replaced_bytes == 1


def test_a_jsonl_file_is_judged_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "READ", 100)
    good = b'{"text": "a row of forty bytes or there"}\n'
    bad = b'{"text": "one \xff"}\n'
    file = tmp_path / "rows.jsonl"
    file.write_bytes(good * 30 + bad)
    assert prepare([str(file)], tmp_path / "D").replaced_bytes == 1
    file.write_bytes(good * 30 + bad * 30)
    with pytest.raises(BadInput, match=rf"rows.jsonl: not UTF-8: byte {len(good) * 30 + 14} is the first of 30 "):
        prepare([str(file)], tmp_path / "E")
    file.write_bytes((good * 30).decode().encode("utf-16"))
    with pytest.raises(BadInput, match=r"rows.jsonl: not UTF-8: byte 0 "):
        prepare([str(file)], tmp_path / "E")
    assert not (tmp_path / "E").exists()


def inputs_that_fail(folder: Path) -> dict[str, tuple[list[str], str]]:
    def file(name: str, content: bytes) -> str:
        (folder / name).write_bytes(content)
        return str(folder / name)

    (folder / "nothing").mkdir()
    row = b'{"text": "hello"}\n' * 100
    return {
        "missing": ([str(folder / "no.txt")], "no.txt: no such file"),
        "empty": ([file("empty.jsonl", b"")], "empty.jsonl: the file is empty"),
        "unknown kind": ([file("x.docx", b"x")], "x.docx: not a kind of file"),
        "folder without text": ([str(folder / "nothing")], "nothing: no .txt"),
        "latin-1": ([file("l.txt", b"caf\xe9")], "l.txt: not UTF-8: byte 3 "),
        "only bad rows": ([file("b.jsonl", b"{\n{\n")], "no document .2 not JSON, first .*b.jsonl line 1"),
        "white space": ([file("w.txt", b" \n")], "no document .1 empty"),
        "cut gzip": ([file("c.jsonl.gz", gzip.compress(row)[:-9])], "c.jsonl.gz: damaged or truncated"),
        "no gzip": ([file("n.txt.gz", b"plain")], "n.txt.gz: damaged or truncated"),
        "cut zstd": ([file("c.jsonl.zst", zstandard.compress(row)[:-5])], "c.jsonl.zst: damaged or truncated"),
        "no zstd": ([file("n.txt.zst", b"plain text")], "n.txt.zst: damaged or truncated"),
        "parquet": ([file("p.parquet", b"PAR1")], r"p.parquet: .*pip install 'leanseek\[data\]'"),
        "hub": (["hf:some/name"], "hf:some/name: .*pip install datasets"),
        "no input": ([], "no document"),
    }


def test_bad_inputs_get_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    for name, (inputs, error) in inputs_that_fail(tmp_path).items():
        with pytest.raises(BadInput, match=error) as caught:
            prepare(inputs, tmp_path / "D")
        assert "\n" not in str(caught.value), name
        assert not (tmp_path / "D").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_refusal_in_a_worker_is_as_clear(tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_bytes(b"caf\xe9")
    with pytest.raises(BadInput, match=r"^\S*l.txt: not UTF-8: byte 3 is the first of 1 that cannot be decoded; con"):
        prepare([str(tmp_path / "l.txt")], tmp_path / "D", workers=2)
    assert os.listdir(tmp_path) == ["l.txt"]


def die(job: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_do", die)
    file = write_jsonl(tmp_path / "s.jsonl", stories(5, 5))
    with pytest.raises(BadInput, match="a worker process was killed"):
        prepare([file], tmp_path / "D", workers=2)
    assert os.listdir(tmp_path) == ["s.jsonl"]


def test_other_bad_arguments(tmp_path: Path) -> None:
    good = write_jsonl(tmp_path / "g.jsonl", ["some text"])
    with pytest.raises(BadInput, match="too small"):
        prepare([good], tmp_path / "D", vocab_size=100)
    with pytest.raises(BadInput, match=r"nowhere: .*tokenizer"):
        prepare([good], tmp_path / "D", tokenizer=tmp_path / "nowhere")
    with pytest.raises(BadInput, match="workers"):
        prepare([good], tmp_path / "D", workers=0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "work").write_text("precious")
    for out in (tmp_path / "full", tmp_path / "g.jsonl"):
        with pytest.raises(BadInput, match="exists already"):
            prepare([good], out)
    assert (tmp_path / "full" / "work").read_text() == "precious"
    (tmp_path / "vacant").mkdir()
    prepare([good], tmp_path / "vacant")
    assert open_data(tmp_path / "vacant").counts("train").documents == 1


def test_rows_of_parquet_and_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[Any] = ["first row", None, "third row"]

    class ParquetFile:
        schema_arrow = SimpleNamespace(names=["text", "id"])

        def __init__(self, path: Path) -> None:
            assert path.name == "p.parquet"

        def iter_batches(self, batch_size: int, columns: list[str]) -> Any:
            assert columns == ["text"]
            for part in (texts[:2], texts[2:]):
                yield SimpleNamespace(column=lambda _, part=part: SimpleNamespace(to_pylist=lambda: part))

    def load_dataset(name: str, split: str, streaming: bool) -> Any:
        assert (name, split, streaming) == ("some/name", "train", True)
        return [{"text": text} for text in texts]

    for module, name, value in (
        ("pyarrow.parquet", "ParquetFile", ParquetFile),
        ("datasets", "load_dataset", load_dataset),
    ):
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
        setattr(sys.modules[module], name, value)
    monkeypatch.setitem(sys.modules, "pyarrow", ModuleType("pyarrow"))
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    for i, source in enumerate((str(tmp_path / "p.parquet"), "hf:some/name")):
        report = prepare([source], tmp_path / str(i), workers=1)
        assert report.bad == {'no string "text"': 1}
        assert report.first_bad['no string "text"'].endswith("line 2")
        assert report.documents_in == 2
        assert open_data(tmp_path / str(i)).sources == (("p", "name")[i],)


KILLED = """
import os, signal, sys
from pathlib import Path
from leanseek.data import prepare
def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)
prepare.write_manifest = die
prepare.prepare([sys.argv[1]], Path(sys.argv[2]))
"""


def test_a_killed_prepare_leaves_no_half_folder(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "s.jsonl", stories(5, 5))
    run = subprocess.run([sys.executable, "-c", KILLED, file, str(tmp_path / "D")], capture_output=True, check=False)
    assert run.returncode == -signal.SIGKILL
    assert not (tmp_path / "D").exists()
    assert [path.name for path in tmp_path.glob(".*")] == [".D.partial"]
    prepare([file], tmp_path / "D")
    assert open_data(tmp_path / "D").counts("train").documents == 4
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_clears_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_module, "write_manifest", fail)
    file = write_jsonl(tmp_path / "s.jsonl", stories(5, 5))
    with pytest.raises(OSError, match="No space"):
        prepare([file], tmp_path / "D")
    assert os.listdir(tmp_path) == ["s.jsonl"]


@pytest.mark.parametrize("stage", ["_read", "_choose", "_learn", "_tokenise", "write_manifest"])
def test_an_interrupted_prepare_goes_on_where_it_was(
    corpus: list[str], tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_jsonl(tmp_path / "s.jsonl", corpus[:100])
    whole = prepare([file], tmp_path / "whole", vocab_size=400)
    calls = Counter[str]()

    def watch(name: str, fails: bool) -> None:
        real = getattr(prepare_module, name)

        def call(*arguments: Any) -> Any:
            calls[name] += 1
            result = real(*arguments)  # it is cut off at its very end, before anything is noted
            if fails and calls[name] == 1:
                raise KeyboardInterrupt
            return result

        monkeypatch.setattr(prepare_module, name, call)

    stages = ["_read", "_choose", "_learn", "_tokenise", "write_manifest"]
    for name in stages:
        watch(name, fails=name == stage)
    with pytest.raises(KeyboardInterrupt):
        prepare([file], tmp_path / "D", vocab_size=400)
    assert not (tmp_path / "D").exists()
    report = prepare([file], tmp_path / "D", vocab_size=400)
    before, after = stages[: stages.index(stage)], stages[stages.index(stage) + 1 :]
    redone = {stage, "_tokenise"} if stage == "write_manifest" else {stage}
    assert {name for name in stages if calls[name] == 2} == redone
    assert all(calls[name] == 1 for name in before + after if name not in redone)
    assert open_data(tmp_path / "D").fingerprint == open_data(tmp_path / "whole").fingerprint
    assert (report.documents, report.tokens) == (whole.documents, whole.tokens)
    assert ("goes on after" in capsys.readouterr().err) == (stage != "_read")
    assert sorted(os.listdir(tmp_path / "D")) == ["manifest.json", "shards", "tokenizer"]


def test_another_request_does_not_go_on(corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_jsonl(tmp_path / "s.jsonl", corpus[:100])
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_learn", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare([file], tmp_path / "D", vocab_size=400)
    write_jsonl(tmp_path / "s.jsonl", corpus[:50])
    assert prepare([file], tmp_path / "D", vocab_size=400).documents_in == 50


def interrupt(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_progress_bars_and_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_jsonl(tmp_path / "s.jsonl", stories(5, 5))
    prepare([file], tmp_path / "D", progress=True)
    bars = capsys.readouterr()
    prepare([file], tmp_path / "E")
    plain = capsys.readouterr()
    assert bars.out == plain.out == ""
    assert "tokenise" in bars.err
    assert [line.partition(":")[0] for line in plain.err.splitlines()] == [
        "read",
        "deduplicate",
        "tokenizer",
        "tokenise",
    ]


def test_the_tokenizer_sees_no_more_than_its_sample(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    train = Tokenizer.train
    monkeypatch.setattr(Tokenizer, "train", lambda texts, size: train(seen.extend(texts) or seen, size))
    file = write_jsonl(tmp_path / "s.jsonl", corpus)
    prepare([file], tmp_path / "all", workers=1)
    assert seen == texts_of(open_data(tmp_path / "all"), "train")  # and no validation text
    seen.clear()
    monkeypatch.setattr(prepare_module, "TOKENIZER_SAMPLE", 5000)
    report = prepare([file], tmp_path / "some", workers=1)
    assert 3000 < sum(len(text.encode()) for text in seen) == report.tokenizer_sample_bytes <= 5000
    seen.clear()
    monkeypatch.setattr(prepare_module, "TOKENIZER_SAMPLE", 10)
    report = prepare([file], tmp_path / "little", workers=1)
    assert [len(text) for text in seen] == [10]
    assert report.tokenizer_sample_bytes == 10


def test_clean_batch_is_pure() -> None:
    batch = read.Batch("rows", 0, "w", ["one text", "one text", None])
    first, again = (clean_batch(batch, "w", Filters()).documents for _ in range(2))
    assert [(a.content, a.signature.tobytes()) for a in first] == [(b.content, b.signature.tobytes()) for b in again]
    assert len(first) == 2


# ── shards ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_shards_are_split_by_size_and_read_as_one(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, tokenizer.vocab_size, rng.integers(1, 30)) for _ in range(50)]
    (tmp_path / "shards").mkdir()
    with ShardWriter(tmp_path / "shards", "train", "a/b ü", 0, tokenizer.vocab_size, shard_tokens=100) as writer:
        for ids in documents:
            writer.add(ids, 3 * len(ids))
    tokenizer.save(tmp_path / "tokenizer")
    write_manifest(tmp_path, writer.entries, tokenizer, {})
    data = open_data(tmp_path)
    assert len(data.shards) > 5
    found = list(data.documents("train", "a/b ü"))
    assert all((ids == expected).all() for (ids, _), expected in zip(found, documents, strict=True))
    assert [size for _, size in found] == [3 * len(ids) for ids in documents]
    assert all(100 <= shard.entry.tokens < 130 for shard in data.shards[:-1])


def test_the_fingerprint_is_of_the_content(data: Data, data_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    subprocess.run(["cp", "-r", data_folder, copy], check=True)
    assert open_data(copy).fingerprint == data.fingerprint
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["report"]["seconds"] = {}
    manifest["shards"][0]["source"] = "renamed"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert open_data(copy).fingerprint != data.fingerprint


def test_damaged_folders_are_refused_by_name(data_folder: Path, tmp_path: Path) -> None:
    def damaged(name: str) -> Path:
        subprocess.run(["cp", "-r", data_folder, tmp_path / name], check=True)
        return tmp_path / name

    def manifest(folder: Path, **change: object) -> None:
        tree = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(tree | change))

    shard = "train-00-half-0000"
    flipped, cut, missing, no_docs, cut_docs = (damaged(name) for name in ("flip", "cut", "gone", "docs", "cutdocs"))
    raw = bytearray((flipped / f"shards/{shard}.bin").read_bytes())
    raw[len(raw) // 2] ^= 1
    (flipped / f"shards/{shard}.bin").write_bytes(raw)
    (cut / f"shards/{shard}.bin").write_bytes(raw[:-2])
    (missing / f"shards/{shard}.bin").unlink()
    (no_docs / f"shards/{shard}.docs.npy").unlink()
    (cut_docs / f"shards/{shard}.docs.npy").write_bytes(b"\x93NUMPY")
    newer, other, half = damaged("newer"), damaged("other"), damaged("half")
    manifest(newer, version=2)
    (other / "manifest.json").write_text('{"format": "something"}')
    (half / "manifest.json").write_text('{"format":')
    strange = damaged("strange")
    Tokenizer.train(["other text"], 300).save(strange / "tokenizer")

    for folder, error in (
        (flipped, f"{shard}.bin: corrupted"),
        (cut, f"{shard}.bin: .*truncated"),
        (missing, f"{shard}.bin: .*missing"),
        (no_docs, f"{shard}.docs.npy: .*missing"),
        (cut_docs, f"{shard}.docs.npy: corrupted"),
        (newer, "manifest.json: version 2"),
        (other, "manifest.json: corrupted"),
        (half, "manifest.json: corrupted"),
        (strange, "tokenizer: not the tokenizer"),
        (tmp_path / "nowhere", "nowhere: not a DATA folder"),
    ):
        with pytest.raises(BadInput, match=error):
            open_data(folder)
    assert open_data(flipped, verify=False).counts("train").documents


def test_an_unknown_source_is_refused_with_the_nearest(data: Data) -> None:
    with pytest.raises(BadInput, match=r"no source 'hafl' .did you mean 'half'"):
        data.counts("train", "hafl")


# ── packing ───────────────────────────────────────────────────────────────────────────────────────────────────────


def predicted(rows: Rows) -> Counter[tuple[int, int]]:
    """(document, position) of every token that some row predicts."""
    found: Counter[tuple[int, int]] = Counter()
    for document, start, length in zip(rows.document.tolist(), rows.start.tolist(), rows.length.tolist(), strict=True):
        found.update((document, at) for at in range(start + 1, start + length))
    return found


@pytest.mark.parametrize("pack", [best_fit, concat])
@pytest.mark.parametrize("capacity", [3, 8, 33])
def test_every_token_is_predicted_exactly_once(pack: Any, capacity: int) -> None:
    rng = np.random.default_rng(capacity)
    for count in (1, 2, 60):
        lengths = rng.integers(3, 5 * capacity, count)
        documents = rng.permutation(1000)[:count]
        rows = pack(documents, lengths, capacity)
        expected = {
            (document, at)
            for document, length in zip(documents.tolist(), lengths.tolist(), strict=True)
            for at in range(1, length)
        }
        assert predicted(rows) == Counter(expected)
        sizes = np.add.reduceat(rows.length, rows.first[:-1])
        assert sizes.max() <= capacity
        assert (np.diff(rows.first) > 0).all()


def slow_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Fill of every row, by trying all of them."""
    pieces = []
    for length in lengths:
        while length > capacity:
            pieces.append(capacity)
            length -= capacity - 1
        pieces.append(length)
    rows: list[int] = []
    for piece in sorted(pieces, reverse=True):
        fitting = [row for row in range(len(rows)) if rows[row] + piece <= capacity]
        if fitting:
            rows[max(fitting, key=lambda row: rows[row])] += piece
        else:
            rows.append(piece)
    return sorted(rows)


def test_best_fit_fills_as_the_slow_twin() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        lengths = rng.integers(2, 90, 80)
        rows = best_fit(np.arange(80), lengths, 33)
        fills = np.add.reduceat(rows.length, rows.first[:-1])
        assert sorted(fills.tolist()) == slow_best_fit(lengths.tolist(), 33)


def test_concat_is_one_stream() -> None:
    lengths = np.random.default_rng(0).integers(3, 40, 30)
    rows = concat(np.arange(30), lengths, 17)
    stream = [(document, at) for document, length in enumerate(lengths) for at in range(length)]
    for row in range(len(rows)):
        tokens = [
            (int(rows.document[p]), int(rows.start[p]) + i)
            for p in range(rows.first[row], rows.first[row + 1])
            for i in range(rows.length[p])
        ]
        window = stream[row * 16 : row * 16 + 17]
        assert tokens == (window[:-1] if len(window) == 17 and window[-1][1] == 0 else window)


def test_many_short_documents_leave_next_to_no_space() -> None:
    lengths = np.random.default_rng(0).integers(2, 60, 200_000)
    rows = best_fit(np.arange(200_000), lengths, 257)
    assert rows.length.sum() / len(rows) / 257 > 0.999


# ── loader ────────────────────────────────────────────────────────────────────────────────────────────────────────

ONE = (Stage(sequence_length=32),)


def make(data: Data, tokenizer: Tokenizer, stages: tuple[Stage, ...] = ONE, **options: Any) -> Loader:
    packing, fim_rate = options.pop("packing", "best_fit"), options.pop("fim_rate", 0.0)
    config = DataConfig(packing=packing, fim_rate=fim_rate)
    return Loader(data, stages, options.pop("tokens", 64_000), options.pop("seed", 0), config, tokenizer)


def documents_with_ends(data: Data, tokenizer: Tokenizer) -> list[list[int]]:
    return [[tokenizer.bos_id, *ids.tolist(), tokenizer.eos_id] for ids, _ in data.documents("train")]


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_an_epoch_has_every_target_once(data: Data, tokenizer: Tokenizer, packing: str) -> None:
    loader = make(data, tokenizer, packing=packing)
    batch = loader.batch(0, 0, len(loader.rows(0, None)))
    given = batch.targets != NO_TARGET
    expected = Counter(token for document in documents_with_ends(data, tokenizer) for token in document[1:])
    assert Counter(batch.targets[given].tolist()) == expected
    # A target is the token that stands next, and pairs are pairs of a document.
    assert (batch.ids[:, 1:][given[:, :-1]] == batch.targets[:, :-1][given[:, :-1]]).all()
    pairs = Counter(pair for doc in documents_with_ends(data, tokenizer) for pair in itertools.pairwise(doc))
    assert Counter(zip(batch.ids[given].tolist(), batch.targets[given].tolist(), strict=True)) == pairs
    assert not (batch.targets == tokenizer.bos_id).any()
    assert not (batch.targets == tokenizer.pad_id).any()
    padding = batch.ids == tokenizer.pad_id
    assert (batch.targets[padding] == NO_TARGET).all()
    assert batch.ids.dtype == batch.targets.dtype == np.int64
    assert batch.ids.shape == batch.targets.shape == (len(loader.rows(0, None)), 32)


def test_rows_hold_whole_short_documents(data: Data, tokenizer: Tokenizer) -> None:
    loader = make(data, tokenizer, (Stage(sequence_length=2048),))
    rows = loader.rows(0, None)
    longest = max(map(len, documents_with_ends(data, tokenizer)))
    assert longest <= 2049
    assert (rows.start == 0).all()
    assert len(rows.document) == data.counts("train").documents


def test_an_epoch_follows_another_in_a_new_order(data: Data, tokenizer: Tokenizer) -> None:
    loader = make(data, tokenizer)
    n = len(loader.rows(0, None))
    first, second = (loader.batch(0, epoch * n, n).ids for epoch in (0, 1))
    assert (first != second).any()
    assert sorted(map(tuple, first.tolist())) == sorted(map(tuple, second.tolist()))
    assert loader.epochs(0, n) == {"": 1.0}
    other = make(data, tokenizer, seed=1).batch(0, 0, n).ids
    assert (first != other).any()


@pytest.mark.parametrize("options", [{}, {"packing": "concat"}, {"fim_rate": 0.5}])
def test_a_batch_is_a_pure_function(data: Data, tokenizer: Tokenizer, data_folder: Path, options: Any) -> None:
    stages = (
        Stage(sequence_length=32, share=0.5),
        Stage(sequence_length=16, share=0.5, mixture={"half": 1, "rest": 2}),
    )
    loader = make(data, tokenizer, stages, **options)
    wanted = [(stage, sample) for stage in (0, 1) for sample in (0, 7, 500, 1993)]
    straight = {key: loader.batch(*key, 8) for key in wanted}
    fresh = make(open_data(data_folder), tokenizer, stages, **options)
    for key in reversed(wanted):  # resumed anywhere, in any order, in another process's loader
        assert (fresh.batch(*key, 8).ids == straight[key].ids).all()
        assert (fresh.batch(*key, 8).targets == straight[key].targets).all()
    stage, sample = wanted[-1]
    ones = np.concatenate([fresh.batch(stage, sample + i, 1).ids for i in range(8)])
    assert (ones == straight[stage, sample].ids).all()


@pytest.mark.parametrize("count", [1, 5, 8])
def test_the_ranks_share_one_order(data: Data, tokenizer: Tokenizer, count: int) -> None:
    loader = make(data, tokenizer)
    whole = loader.batch(0, 11, count)
    for ranks in (1, 2, 3, 8):
        parts = [loader.batch(0, 11, count, rank, ranks) for rank in range(ranks)]
        assert (np.concatenate([part.ids for part in parts]) == whole.ids).all()
        assert (np.concatenate([part.targets for part in parts]) == whole.targets).all()
        sizes = [len(part.ids) for part in parts]
        assert max(sizes) - min(sizes) <= 1


def test_the_budget_is_divided_by_shares(data: Data, tokenizer: Tokenizer) -> None:
    stages = tuple(Stage(sequence_length=length, share=share) for length, share in ((32, 0.7), (64, 0.1), (16, 0.2)))
    loader = make(data, tokenizer, stages, tokens=100_000)
    assert [loader.samples(i) for i in range(3)] == [70_000 // 32, 10_000 // 64, 20_000 // 16]


@pytest.mark.parametrize(
    "weights", [[1.0], [0.7, 0.3], [0.5, 0.25, 0.15, 0.1], [1, 2, 3, 4, 5, 6], [0.9, 0.02, 0.02, 0.03, 0.03], [1, 0, 1]]
)
def test_mixtures_keep_every_prefix_within_one(weights: list[float]) -> None:
    source, before, quotas = interleave(weights, 5000)
    length = len(source)
    turns = source[np.arange(1000) % length]
    counts = (turns[:, None] == np.arange(len(weights))).cumsum(axis=0)
    ideal = np.arange(1, 1001)[:, None] * (np.array(weights) / sum(weights))
    assert np.abs(counts - ideal).max() < 1
    assert quotas == np.bincount(source, minlength=len(weights)).tolist()
    assert all(before[n] == (source[:n] == source[n]).sum() for n in range(length))


def test_a_mixture_draws_from_its_sources(data: Data, tokenizer: Tokenizer) -> None:
    loader = make(data, tokenizer, (Stage(sequence_length=32, mixture={"rest": 3, "half": 1}),))
    taken = [loader._locate(0, sample) for sample in range(4000)]
    for n in (1, 10, 999, 4000):
        assert abs(sum(source == "rest" for source, _ in taken[:n]) - 0.75 * n) < 1
    for name in ("rest", "half"):
        rows = len(loader.rows(0, name))
        mine = [row for source, row in taken if source == name]
        for epoch in range(len(mine) // rows):
            assert sorted(mine[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    rest = len(loader.rows(0, "rest"))
    assert loader.epochs(0, 4000)["rest"] == 3000 / rest
    for sample, (source, row) in enumerate(taken[:8]):
        alone = make(data, tokenizer, (Stage(sequence_length=32, mixture={source: 1}),))
        of_source = {tuple(ids) for ids in alone.batch(0, 0, len(alone.rows(0, source))).ids.tolist()}
        assert tuple(loader.batch(0, sample, 1).ids[0].tolist()) in of_source, row


def test_an_unknown_source_in_a_mixture_is_refused(data: Data, tokenizer: Tokenizer) -> None:
    for weight in (1.0, 0.0):
        with pytest.raises(BadInput, match=r"no source 'rset' .did you mean 'rest'"):
            make(data, tokenizer, (Stage(sequence_length=32, mixture={"rset": weight, "half": 1}),))


def test_fim_can_be_undone(data: Data, tokenizer: Tokenizer) -> None:
    loader = make(data, tokenizer, (Stage(sequence_length=4096),), fim_rate=0.4)
    begin, hole, end = (tokenizer.special[name] for name in (FIM_BEGIN, FIM_HOLE, FIM_END))
    rows, turned = loader.rows(0, None), 0
    originals = [tokenizer.decode(ids.tolist()) for ids, _ in data.documents("train")]
    middles = []
    for document, length in zip(rows.document.tolist(), rows.length.tolist(), strict=True):
        tokens = loader._tokens(0, document, 0, length).tolist()
        assert (tokens[0], tokens[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        if begin not in tokens:
            assert tokenizer.decode(tokens[1:-1]) == originals[document]
            continue
        turned += 1
        assert tokens[1] == begin
        at_hole, at_end = tokens.index(hole), tokens.index(end)
        prefix, suffix, middle = (
            tokenizer.decode(part)
            for part in (tokens[2:at_hole], tokens[at_hole + 1 : at_end], tokens[at_end + 1 : -1])
        )
        assert prefix + middle + suffix == originals[document]
        middles.append(len(middle) / len(originals[document]))
    chance = 0.4 * len(originals)
    assert abs(turned - chance) < 4 * (chance * 0.6) ** 0.5  # four standard deviations of the binomial
    assert abs(np.mean(middles) - 1 / 3) < 4 * (1 / 18 / turned) ** 0.5  # distance of two uniform points


def test_fim_cut_into_pieces_is_still_whole(data: Data, tokenizer: Tokenizer) -> None:
    loader = make(data, tokenizer, fim_rate=1.0)
    rows = loader.rows(0, None)
    batch = loader.batch(0, 0, len(rows))
    expected: Counter[int] = Counter()
    for document in range(data.counts("train").documents):
        expected.update(loader._fim_document(0, document).tolist()[1:])
    assert Counter(batch.targets[batch.targets != NO_TARGET].tolist()) == expected
    assert expected[tokenizer.special[FIM_HOLE]] == data.counts("train").documents
    plain, again = make(data, tokenizer), make(data, tokenizer, fim_rate=0.0)
    assert (plain.batch(0, 0, 4).ids == again.batch(0, 0, 4).ids).all()


def test_little_data_makes_one_padded_row(tmp_path: Path) -> None:
    prepare([write_jsonl(tmp_path / "s.jsonl", ["one short text"])], tmp_path / "D")
    data = open_data(tmp_path / "D")
    tokenizer = Tokenizer.load(data.tokenizer_folder)
    for packing in ("best_fit", "concat"):
        loader = make(data, tokenizer, packing=packing)
        batch = loader.batch(0, 0, 3)
        ids = [tokenizer.bos_id, *tokenizer.encode("one short text"), tokenizer.eos_id]
        assert batch.ids.tolist() == [ids + [tokenizer.pad_id] * (32 - len(ids))] * 3
        assert batch.targets.tolist() == [ids[1:] + [NO_TARGET] * (33 - len(ids))] * 3


def test_no_text_at_all_is_refused(data: Data, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    write_manifest(tmp_path, [], tokenizer, {})
    with pytest.raises(BadInput, match="no training text"):
        make(open_data(tmp_path), tokenizer)


def test_another_tokenizer_is_refused(data: Data) -> None:
    with pytest.raises(BadInput, match="another tokenizer"):
        make(data, Tokenizer.train(["other words"], 300))


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    with ShardWriter(tmp_path / "shards", "train", "s", 0, 70_000, 10) as writer:
        writer.add([69_999, 1], 4)
    assert np.fromfile(tmp_path / writer.entries[0].file, "<u4").tolist() == [69_999, 1]


# ── given validation text ─────────────────────────────────────────────────────────────────────────────────────────


def test_given_validation_text_stays_whole_and_in_order(corpus: list[str], tmp_path: Path) -> None:
    held_out = [corpus[3], corpus[1], corpus[3], corpus[1] + " More.", corpus[5]]  # duplicates, near and exact, too
    train = write_jsonl(tmp_path / "train.jsonl", corpus)
    val = write_jsonl(tmp_path / "val.jsonl", held_out)
    report = prepare([train], tmp_path / "D", vocab_size=600, workers=1, validation=[val])
    data = open_data(tmp_path / "D")
    assert texts_of(data, "validation") == held_out
    assert texts_of(data, "train") == [text for text in corpus if text not in held_out]  # and nothing else held out
    assert (report.leaked, report.exact_duplicates, report.near_duplicates) == (3, 3, 0)
    assert any("3 of them copies of validation text" in line for line in report.lines())
    assert data.sources == ("train", "val")
    with pytest.raises(BadInput, match="no training text of source 'val'"):
        Loader(
            data,
            (Stage(sequence_length=16, mixture={"val": 1.0}),),
            160,
            0,
            DataConfig(),
            Tokenizer.load(data.tokenizer_folder),
        )


def test_the_tokenizer_does_not_learn_from_given_validation_text(corpus: list[str], tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", corpus[:100])
    for name, held_out in (("a", corpus[200:210]), ("b", corpus[210:220])):
        val = write_jsonl(tmp_path / f"{name}.jsonl", held_out)
        prepare([train], tmp_path / f"D{name}", vocab_size=600, workers=1, validation=[val])
    a, b = (open_data(tmp_path / f"D{name}") for name in "ab")
    assert a.tokenizer_fingerprint == b.tokenizer_fingerprint
    assert a.shards[0].entry.sha256 == b.shards[0].entry.sha256


def test_workers_change_nothing_about_given_validation_text(corpus: list[str], tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", corpus)
    val = write_jsonl(tmp_path / "val.jsonl", corpus[:7])
    for n in (1, 2):
        prepare([train], tmp_path / f"D{n}", vocab_size=600, workers=n, validation=[val])
    assert open_data(tmp_path / "D1").fingerprint == open_data(tmp_path / "D2").fingerprint


def test_training_or_validation_without_a_document_is_refused(corpus: list[str], tmp_path: Path) -> None:
    full = write_jsonl(tmp_path / "full.jsonl", corpus[:5])
    blank = write_jsonl(tmp_path / "blank.jsonl", ["", " "])
    copies = write_jsonl(tmp_path / "copies.jsonl", corpus[:3])
    for train, val, words in (
        (full, blank, "the validation input holds no document .2 empty"),
        (blank, full, "the input holds no document .2 empty"),
        (copies, full, "the input holds no document .3 copies of validation text"),
    ):
        with pytest.raises(BadInput, match=words):
            prepare([train], tmp_path / "D", workers=1, validation=[val])
    assert not (tmp_path / "D").exists()


def test_processor_time_is_told_by_phase(corpus: list[str], tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", corpus)
    report = prepare([train], tmp_path / "D", vocab_size=600, workers=2)
    assert report.cpu_seconds.keys() == report.seconds.keys() == {"read", "deduplicate", "tokenizer", "tokenise"}
    assert report.cpu_seconds["read"] > 0.1  # two workers start and import in it
    assert open_data(tmp_path / "D").report["cpu_seconds"] == report.cpu_seconds


# ── stories as an input ───────────────────────────────────────────────────────────────────────────────────────────


def test_stories_are_made_up_to_the_bytes_asked_for_by_any_number_of_workers(tmp_path: Path) -> None:
    reports = [prepare(["storyworld:1.2MB"], tmp_path / str(n), workers=n) for n in (1, 2)]
    assert open_data(tmp_path / "1").fingerprint == open_data(tmp_path / "2").fingerprint
    assert 1_200_000 <= reports[0].bytes_in < 1_220_000
    assert open_data(tmp_path / "1").sources == ("storyworld",)


def test_vignettes_are_an_input_of_their_own_and_hardly_alike(tmp_path: Path) -> None:
    report = prepare(["storyworld:200KB", "vignettes:200KB"], tmp_path / "D", validation=["storyworld:20KB"])
    data = open_data(tmp_path / "D")
    assert data.sources == ("storyworld", "vignettes")
    assert report.near_duplicates < 0.05 * sum(report.documents.values())
    assert report.leaked > 0  # the validation stories begin the training ones, and are taken out there


@pytest.mark.parametrize("size", ["", "lots", "-5", "0", "nan", "inf", "5XB"])
def test_a_size_of_stories_that_is_none(size: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="storyworld:20MB"):
        prepare([f"storyworld:{size}"], tmp_path / "data")
    assert not (tmp_path / "data").exists()
