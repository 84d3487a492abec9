"""What texts go through before training: rules, languages, evaluations, personal data, the judge; and odd inputs."""

import gzip
import json
import random
import string
from pathlib import Path

import numpy as np
import pytest

from leanseek.config import BadInput
from leanseek.data import read
from leanseek.data.classifier import Classifier
from leanseek.data.clean import normalise
from leanseek.data.duplicates import Forbidden, first_of_equals
from leanseek.data.filters import Filters, judge, language_of
from leanseek.data.personal import mask
from leanseek.data.prepare import Cleaning, prepare
from leanseek.data.quality import complaint
from leanseek.data.shards import open_data
from leanseek.data.storyworld import MADE, PRETRAINING
from leanseek.data.tokenizer import Tokenizer
from leanseek.data.words import WordHashes, Words

PROSE = next(text for text in MADE["storyworld"](PRETRAINING, 3, 20_000) if len(text.split()) > 150)


def words(text: str) -> Words:
    return Words(text, WordHashes())


def random_words(count: int, seed: int = 0, letters: int = 5) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(string.ascii_lowercase, k=letters)) for _ in range(count)]


def write(file: Path, texts: list[str]) -> str:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(file)


# ── the steps, each by itself ─────────────────────────────────────────────────────────────────────────────────────


def test_normalise_keeps_what_is_seen() -> None:
    assert normalise("e\u0301\r\nb\rc\x00\u200bd\tf") == "é\nb\ncd\tf"
    assert normalise(PROSE) == PROSE


def test_prose_keeps_every_rule() -> None:
    assert complaint(words(PROSE), "en") is None
    assert complaint(words("这是一个很好的例子。" + "".join(chr(0x4E00 + i * 37) for i in range(200)))) is None


BROKEN = {
    "fewer than 50 words": " ".join(random_words(49)),
    "words too short or too long": " ".join(random_words(60, letters=11)),
    "many hash signs or ellipses": " ".join(f"{word} #" for word in random_words(60)),
    "nearly all lines are bullets": "\n".join(f"- {word} goes" for word in random_words(60)),
    "many lines end with an ellipsis": "\n".join(f"{word} and so …" for word in random_words(60))
    + " ".join(random_words(700, 1)),
    "many words without a letter": " ".join([*random_words(79), *map(str, range(100, 121))]),
    "hardly one of the commonest words": " ".join(random_words(60)),
    "repeated lines": "\n".join([*random_words(60, 9), *["once more with feeling"] * 40]),
    "repeated paragraphs": "\n".join(random_words(100, 10)) + "\n\nand again" * 2,
    "one run of 2 words over and over": " ".join(
        word for i, pad in enumerate(random_words(60)) for word in ("again", "again" + str(i % 1), pad)
    ).replace("again again0", "splendid weather"),
    "runs of 5 words again and again": " ".join(
        [*random_words(10, 1), "filler", *random_words(10, 1), *random_words(60, 2), *random_words(10, 1)]
    ),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_every_rule_has_a_text_that_breaks_it(rule: str) -> None:
    language = "en" if rule == "hardly one of the commonest words" else None
    assert complaint(words(BROKEN[rule]), language) == rule


def test_a_repeated_run_is_measured_by_its_letters() -> None:
    # 20 of 121 words stand again: 16.5% of the letters; 18 of 119 in runs of five: 15.1%; 17 of 118: 14.4%.
    for repeated, broken in ((18, True), (17, False)):
        text = " ".join([*random_words(100, 1), "x" * 5, *random_words(repeated, 1)])
        assert (complaint(words(text)) == "runs of 5 words again and again") == broken


def test_languages_are_told_apart() -> None:
    assert language_of(PROSE) == "en"
    assert (
        language_of("Der Müller ging am Abend noch einmal durch das Dorf, denn er hatte sein Pferd vergessen.") == "de"
    )
    assert language_of("昨天晚上我们一起去看了一场电影，大家都觉得很有意思。") == "zh"


def test_thirteen_words_in_a_row_are_one_too_many() -> None:
    question = random_words(20, 5)
    forbidden = Forbidden.of([" ".join(question), "too short to say"])
    assert len(forbidden.runs) == 8
    for shared, caught in ((13, True), (12, False)):
        document = " ".join([*random_words(30, 6), *question[3 : 3 + shared], *random_words(30, 7)])
        assert forbidden.stand_in(words(document.upper() + "!")) == caught
    assert not Forbidden(np.empty(0, np.uint64)).stand_in(words(PROSE))


@pytest.mark.parametrize(
    ("text", "masked", "found"),
    [
        ("write to ann.lee+x@mail.example.org, please", "write to [e-mail], please", {"e-mail": 1}),
        ("call +44 20 7946 0958 or (212) 555-0134.", "call [phone] or [phone].", {"phone": 2}),
        ("in 1984 we had 1,000,000 + 25 = 1000025 of 3.14159", None, {}),
        ("dates 2024-11-24 and 192.168.0.1, +1 or +12 3", None, {}),
        ("id AKIAABCDEFGHIJKLMNOP here", "id [key] here", {"key": 1}),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----!", "[key]!", {"key": 1}),
        ("a@b and @name and x@y.", None, {}),
    ],
)
def test_personal_data(text: str, masked: str | None, found: dict[str, int]) -> None:
    assert mask(text) == (text if masked is None else masked, found)


def test_the_judge_learns_two_kinds_apart_and_ranks() -> None:
    good = list(MADE["storyworld"](PRETRAINING, 5, 60_000))[:60]
    bad = [" ".join(random_words(80, seed)) + " buy now" for seed in range(60)]
    learnt = Classifier.learn(good, bad)
    assert learnt.accuracy == 1.0
    fresh = list(MADE["storyworld"](PRETRAINING, 6, 20_000))[:10]
    worse = [" ".join(random_words(80, seed)) + " buy now" for seed in range(900, 910)]
    scores = [learnt.score(words(text)) for text in fresh + worse]
    assert min(scores[:10]) > max(scores[10:])
    # The mean of both halves lies between: it ranks and does not only tell.
    mixed = learnt.score(words(" ".join([fresh[0], worse[0]])))
    assert scores[10] < mixed < scores[0]
    assert Classifier.learn(good, bad).weights.tobytes() == learnt.weights.tobytes()
    # Labels that mean nothing teach nothing.
    shuffled = random.Random(0).sample(good, 60)
    assert Classifier.learn(shuffled[:30], shuffled[30:]).accuracy < 0.9
    with pytest.raises(BadInput, match="3 bad examples are too few"):
        Classifier.learn(good, bad[:3])


def test_first_of_equals_against_a_dictionary() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 3, (200, 4)).astype(np.uint64)
    seen: dict[bytes, int] = {}
    assert first_of_equals(hashes).tolist() == [seen.setdefault(row.tobytes(), i) for i, row in enumerate(hashes)]


def test_the_steps_come_in_order_and_only_when_asked() -> None:
    text = "e\u0301 " + BROKEN["hardly one of the commonest words"] + " a.b@mail.example.org"
    assert judge(text, "web", Filters(), WordHashes()).words.text == text
    everything = Filters(
        normalise=True,
        languages={"": ("en",), "other": ("zh",)},
        quality=frozenset({"web"}),
        forbidden=Forbidden.of([text]),
        personal=True,
    )
    assert everything.names() == ["language", "quality", "evaluation text"]
    assert judge(PROSE, "other", everything, WordHashes()).dropped_by == "language"
    assert judge(BROKEN["repeated lines"] + PROSE, "web", everything, WordHashes()).dropped_by == "quality"
    assert judge(PROSE + " " + text, "web", everything, WordHashes()).dropped_by == "evaluation text"
    kept = judge(PROSE + " e\u0301 a.b@mail.example.org", "web", everything, WordHashes())
    assert kept.dropped_by is None
    assert kept.words.text == PROSE + " é [e-mail]"
    assert kept.masked == {"e-mail": 1}


# ── all of it ─────────────────────────────────────────────────────────────────────────────────────────────────────


def texts_of(folder: Path, split: str = "train") -> list[str]:
    data = open_data(folder)
    tokenizer = Tokenizer.load(data.tokenizer_folder)
    return [tokenizer.decode(ids.tolist()) for ids, _ in data.documents(split)]


def test_every_document_is_accounted_for(tmp_path: Path) -> None:
    good = [text for text in MADE["storyworld"](PRETRAINING, 7, 80_000) if len(text.split()) > 60][:60]
    leaked = "The answer of the examination is " + " ".join(random_words(20, 8))
    web = write(tmp_path / "web.jsonl", [*good[:40], *BROKEN.values(), good[3], good[5] + " leaked: " + leaked])
    code = write(tmp_path / "code.jsonl", [BROKEN["repeated lines"], *good[40:]])
    exam = tmp_path / "exam.jsonl"
    exam.write_text(json.dumps({"question": {"text": leaked}, "choices": ["a", 3, None]}) + "\n")
    for workers in (1, 2):
        report = prepare(
            [web, code],
            tmp_path / str(workers),
            vocab_size=600,
            workers=workers,
            validation=[write(tmp_path / "val.jsonl", [leaked, "x y"])],
            cleaning=Cleaning(quality=["web"], against=[str(exam)], personal=True),
        )
    assert open_data(tmp_path / "1").fingerprint == open_data(tmp_path / "2").fingerprint
    steps = {step.name: step for step in report.steps}
    assert list(steps) == ["quality", "evaluation text", "exact duplicates", "near duplicates"]
    given = 40 + len(BROKEN) + 2 + 21
    assert (steps["quality"].documents_in, steps["quality"].documents_out) == (given, given - len(BROKEN) + 1)
    assert sum(steps["quality"].reasons.values()) == len(BROKEN) - 1  # nothing is asked of English here
    assert steps["evaluation text"].reasons == {"thirteen words in a row": 1}
    assert report.exact_duplicates == 1
    for before, after in zip(report.steps, report.steps[1:], strict=False):
        assert (before.documents_out, before.bytes_out) == (after.documents_in, after.bytes_in)
    assert report.steps[-1].documents_out == report.documents["train"] == len(texts_of(tmp_path / "1"))
    assert texts_of(tmp_path / "1", "validation") == [leaked, "x y"]  # spared, though rules and evaluation forbid it
    assert BROKEN["repeated lines"] in texts_of(tmp_path / "1")  # of the source that nothing is asked of
    samples = [json.loads(line) for line in (tmp_path / "1" / "dropped.jsonl").read_text().splitlines()]
    assert {(s["step"], s["where"]) for s in samples} == {
        ("quality", "web"),
        ("evaluation text", "web"),
        ("exact duplicates", "web"),
    }
    lines = "\n".join(report.lines())
    assert f"quality: {given:,} documents" in lines
    assert "thirteen words in a row 1" in lines


def test_the_best_share_is_kept(tmp_path: Path) -> None:
    good = [text for text in MADE["storyworld"](PRETRAINING, 8, 120_000) if len(text.split()) > 60]
    poor = [" ".join(random_words(120, seed)) + " buy now" for seed in range(100)]
    seeds = [write(tmp_path / "good.jsonl", good[:40]), write(tmp_path / "bad.jsonl", poor[:40])]
    mixed = write(
        tmp_path / "web.jsonl", [text for pair in zip(good[40:80], poor[40:80], strict=True) for text in pair]
    )
    report = prepare(
        [mixed],
        tmp_path / "D",
        vocab_size=600,
        workers=1,
        cleaning=Cleaning(good=seeds[:1], bad=seeds[1:], keep_best=["0.4"]),
    )
    kept = texts_of(tmp_path / "D") + texts_of(tmp_path / "D", "validation")
    assert report.judge_accuracy == 1.0
    assert set(kept) <= set(good)
    size = sum(map(len, kept)) / sum(map(len, good[40:80] + poor[40:80]))
    assert 0.35 < size <= 0.4
    assert report.steps[-1].name == "judge"


@pytest.mark.parametrize(
    ("cleaning", "complains"),
    [
        (Cleaning(quality=["wbe"]), r"quality: no source 'wbe' \(did you mean 'web'\?\)"),
        (Cleaning(languages=["wbe=en"]), "no source 'wbe'"),
        (Cleaning(keep_best=["0.5"]), "give all three"),
        (Cleaning(good=["web.jsonl"], bad=["web.jsonl"], keep_best=["1.5"]), "above 0 and up to 1, got '1.5'"),
        (Cleaning(good=["web.jsonl"], bad=["web.jsonl"], keep_best=["half"]), "got 'half'"),
        (Cleaning(good=["web.jsonl"], bad=["web.jsonl"], keep_best=["0.5"]), "2 bad examples are too few"),
        (Cleaning(against=["nowhere.jsonl"]), "nowhere.jsonl: no such file"),
        (Cleaning(languages=["zh"]), "holds no document .2 dropped by language: en"),
        (Cleaning(quality=["all"], languages=["en"]), "holds no document .2 dropped by quality: fewer than 50 words"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    cleaning: Cleaning, complains: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("web.jsonl"), ["A short text in English, about the weather and the sea.", "And another of the kind."])
    with pytest.raises(BadInput, match=complains) as caught:
        prepare(["web.jsonl"], Path("D"), workers=1, cleaning=cleaning)
    assert "\n" not in str(caught.value)
    assert not Path("D").exists()
    assert not list(tmp_path.glob(".*"))


# ── odd inputs ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_line_that_is_too_long_is_counted_and_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "LONGEST_LINE", 3000)
    monkeypatch.setattr(read, "READ", 1000)
    short = [f"line {i}: " + " ".join(random_words(60, i)) for i in range(6)]
    long = "x" * 5000
    expected = {0: [2], 2: [0, 3], 5: [6]}
    for places in expected.values():
        texts = list(short)
        for place in places:
            texts.insert(place, long)
        file = tmp_path / "d.jsonl"
        write(file, texts)
        for ending in ("\n", ""):
            file.write_text(file.read_text().rstrip("\n") + ending)
            batches = [read.parse(batch) for batch in read.batches([read.find_source(str(file))])]
            assert [text.decode() for done in batches for text in done.texts] == short
            bad = [where for done in batches for kind in done.bad for where in done.bad[kind]]
            assert bad == [f"{file} line {place + 1}" for place in places]
            assert abs(sum(done.size for done in batches) - file.stat().st_size) <= 1


def test_a_text_that_is_too_long_is_cut_between_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "LONGEST_TEXT", 3000)
    monkeypatch.setattr(read, "READ", 1000)
    for name, text in {
        "lines": "".join(f"Zeile {i}, naïvement dite.\n" for i in range(400)),
        "one line": "né" * 4000,
        "short": "né" * 900,
    }.items():
        file = tmp_path / f"{name}.txt"
        file.write_text(text, encoding="utf-8")
        parts = [part for batch in read.batches([read.find_source(str(file))]) for part in read.parse(batch).texts]
        assert b"".join(parts).decode() == text
        assert (len(parts) > 1) == (name != "short")
        assert all(len(part) <= 1000 for part in parts) or name == "short"
        assert name != "lines" or all(part.endswith(b"\n") for part in parts)


def test_a_damaged_archive_in_a_folder_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder / "a.jsonl", [PROSE])
    whole = gzip.compress(b"".join(json.dumps({"text": PROSE + f" No {i}."}).encode() + b"\n" for i in range(2000)))
    (folder / "b.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "c.txt.gz").write_bytes(b"no archive")
    report = prepare([str(folder)], tmp_path / "D", vocab_size=400, workers=1)
    assert len(report.bad) == 2
    assert set(report.first_bad.values()) == {str(folder / "b.jsonl.gz"), str(folder / "c.txt.gz")}
    assert all("damaged or truncated archive" in kind for kind in report.bad)
    with pytest.raises(BadInput, match=r"b\.jsonl\.gz: damaged or truncated archive"):
        prepare([str(folder / "b.jsonl.gz")], tmp_path / "E", workers=1)


def test_one_repeated_token_is_text_like_any_other_unless_quality_is_asked(tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", ["blah " * 200_000, PROSE])
    report = prepare([file], tmp_path / "D", vocab_size=300, workers=1)
    assert sum(report.documents.values()) == 2
    report = prepare([file], tmp_path / "E", vocab_size=300, workers=1, cleaning=Cleaning(quality=["all"]))
    assert report.steps[0].reasons == {"one run of 2 words over and over": 1}
