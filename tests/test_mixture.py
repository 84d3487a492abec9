"""Mixtures, repeat limits and split tokens: closed forms, and what a run then really reads."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from leanseek.config import BadInput, DataConfig, Stage
from leanseek.data.loader import Loader
from leanseek.data.mixture import shares, within
from leanseek.data.prepare import prepare
from leanseek.data.shards import Data, open_data
from leanseek.data.split import JOINED, Splitter
from leanseek.data.tokenizer import Tokenizer


def test_temperature_lies_between_size_and_equality() -> None:
    tokens = {"en": 8_000, "zh": 1_000}
    assert shares({"en": 1, "zh": 1}, tokens, 1) == pytest.approx({"en": 8 / 9, "zh": 1 / 9})
    assert shares({"en": 1, "zh": 1}, tokens, 3) == pytest.approx({"en": 2 / 3, "zh": 1 / 3})  # cube roots: 20 and 10
    assert shares({"en": 1, "zh": 1}, tokens, 1e9) == pytest.approx({"en": 0.5, "zh": 0.5})
    assert shares({"en": 1, "zh": 0, "x": 3}, tokens | {"x": 8_000}, 1) == pytest.approx({"en": 0.25, "x": 0.75})


def test_a_limit_hands_the_rest_on_in_proportion() -> None:
    wanted = within({"a": 0.5, "b": 0.3, "c": 0.2}, 1000, {"a": 100, "b": math.inf, "c": math.inf})
    assert wanted == pytest.approx({"a": 0.1, "b": 0.54, "c": 0.36})
    # What is handed on may fill another one.
    wanted = within({"a": 0.5, "b": 0.3, "c": 0.2}, 1000, {"a": 100, "b": 400, "c": math.inf})
    assert wanted == pytest.approx({"a": 0.1, "b": 0.4, "c": 0.5})
    assert within({"a": 0.5, "b": 0.5}, 1000, {"a": 500, "b": 500}) == pytest.approx({"a": 0.5, "b": 0.5})
    with pytest.raises(BadInput, match=r"1,000 tokens are asked for, and within data\.most_epochs 900 are left"):
        within({"a": 0.5, "b": 0.5}, 1000, {"a": 500, "b": 400})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("mixture")
    for name, count in (("small", 40), ("large", 320)):
        rows = [
            {"text": f"({name} {i}): the {i * i}th of them.\n\nIt ends; so.\nAnd {i % 7} again!\n"}
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare([str(folder / f"{name}.jsonl") for name in ("small", "large")], folder / "D", vocab_size=500, workers=1)
    return open_data(folder / "D")


def made(data: Data, stages: tuple[Stage, ...], tokens: int, **options: Any) -> Loader:
    tokenizer = Tokenizer.load(data.tokenizer_folder)
    return Loader(data, stages, tokens, 0, DataConfig(**options), tokenizer)


def read_by_source(loader: Loader, stage: int) -> dict[str, float]:
    return dict(loader.epochs(stage, loader.samples(stage)).items())


def test_a_stage_reads_by_temperature(data: Data) -> None:
    counts = {name: data.counts("train", name) for name in data.sources}
    n = {name: count.tokens + 2 * count.documents for name, count in counts.items()}  # BOS and EOS are read too
    for temperature in (1.0, 2.0):
        loader = made(data, (Stage(sequence_length=128, temperature=temperature),), 80_000)
        epochs = read_by_source(loader, 0)
        rows = {name: epochs[name] * len(loader.rows(0, name)) for name in n}
        wanted = (n["large"] / n["small"]) ** (1 / temperature)
        assert abs(rows["small"] - 625 / (wanted + 1)) < 1  # of 625 rows


def test_no_source_is_read_more_often_than_allowed_over_all_stages(data: Data) -> None:
    stages = (
        Stage(sequence_length=128, share=0.5, mixture={"small": 1, "large": 1}),
        Stage(sequence_length=128, share=0.5, mixture={"small": 1, "large": 1}),
    )
    total = 2 * data.counts("train").tokens
    options = {"packing": "concat"}  # without padding: rows are tokens
    free, limited = made(data, stages, total, **options), made(data, stages, total, most_epochs=3.0, **options)

    def rows_read(loader: Loader, source: str) -> float:
        epochs = [loader.epochs(stage, loader.samples(stage)).get(source, 0.0) for stage in (0, 1)]
        return sum(epochs) * len(loader.rows(0, source))

    count = data.counts("train", "small")
    most = 3 * (count.tokens + 2 * count.documents) / 128
    assert rows_read(free, "small") > 2 * most
    assert most - 1 < rows_read(limited, "small") <= most + 1
    assert rows_read(limited, "large") + rows_read(limited, "small") == pytest.approx(2 * limited.samples(0))
    with pytest.raises(BadInput, match="most_epochs"):
        made(data, stages, 4 * data.counts("train").tokens, most_epochs=3.0)
    with pytest.raises(BadInput, match="most_epochs"):
        made(data, (Stage(sequence_length=128),), 4 * data.counts("train").tokens, most_epochs=3.0)


def test_mixtures_as_written_are_left_alone(data: Data) -> None:
    stage = Stage(sequence_length=128, mixture={"small": 1 / 3, "large": 2})
    assert made(data, (stage,), 2_000)._mixtures == made(data, (stage,), 2_000, most_epochs=50.0)._mixtures
    assert made(data, (stage,), 2_000)._mixtures == ({"small": 1 / 3, "large": 2},)
    assert made(data, (Stage(sequence_length=128),), 2_000)._mixtures == ({None: 1.0},)


# ── split tokens ──────────────────────────────────────────────────────────────────────────────────────────────────


def text_of(loader: Loader) -> Counter[str]:
    """The documents of an epoch, as text, each in a row of its own or behind others."""
    found: Counter[str] = Counter()
    for sample in range(len(loader.rows(0, None))):
        batch = loader.batch(0, sample, 1)
        row = np.append(batch.ids[0], batch.targets[0, -1:])
        for begin in np.flatnonzero(row == loader.tokenizer.bos_id):
            length = np.flatnonzero(row[begin:] == loader.tokenizer.eos_id)[0]
            found[loader.tokenizer.decode(row[begin + 1 : begin + length].tolist())] += 1
    return found


def test_splitting_changes_tokens_and_no_text(data: Data) -> None:
    stage, total = Stage(sequence_length=256), 60_000
    whole, split = made(data, (stage,), total), made(data, (stage,), total, split_rate=0.4)
    assert text_of(split) == text_of(whole)
    assert sum(text_of(split).values()) == data.counts("train").documents

    def joined(loader: Loader, rows: int) -> int:
        ids = np.concatenate([loader.batch(0, sample, 1).ids[0] for sample in range(rows)])
        return sum(JOINED.fullmatch(loader.tokenizer.token_bytes(int(i))) is not None for i in ids)

    before, after = (joined(loader, len(loader.rows(0, None))) for loader in (whole, split))
    assert before > 500
    assert abs(after / before - 0.6) < 4 * math.sqrt(0.24 / before)
    assert split.batch(0, 3, 1).ids.tolist() == made(data, (stage,), total, split_rate=0.4).batch(0, 3, 1).ids.tolist()


def test_every_joined_token_comes_apart_between_punctuation_and_line_break(data: Data) -> None:
    tokenizer = Tokenizer.load(data.tokenizer_folder)
    all_of_them = np.arange(tokenizer.vocab_size)
    everywhere = Splitter(tokenizer, 1.0)
    places = everywhere.places(all_of_them)
    assert len(places) >= 3
    for place in places:
        apart = everywhere.split(all_of_them[place : place + 1], np.zeros(1, np.uint64)).tolist()
        assert b"".join(map(tokenizer.token_bytes, apart)) == tokenizer.token_bytes(int(place))
        assert len(apart) > 1
        assert not any(JOINED.fullmatch(tokenizer.token_bytes(part)) for part in apart)
    unmoved = Splitter(tokenizer, 0.0).split(all_of_them, np.zeros(len(all_of_them), np.uint64))
    assert unmoved.tolist() == all_of_them.tolist()


def test_options_out_of_range_are_refused(tmp_path: Path) -> None:
    for options in ({"split_rate": 1.5}, {"most_epochs": 0}, {"split_rate": -0.1}):
        with pytest.raises(ValueError, match=r"split_rate|most_epochs"):
            DataConfig(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="temperature"):
        Stage(sequence_length=8, temperature=0.5)
