"""The ledger: its controls by closed forms and a slow twin, its queue by interruption, its score by hand."""

import io
import json
import math
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import leanseek
from leanseek import checkpoint
from leanseek.bench import controls, ledger, queue, quick, rows, speed
from leanseek.bench.controls import Control, Ordinary, Windows, build, flops_per_token, learning_rate, train
from leanseek.bench.decode import Work, bench_decode
from leanseek.bench.ledger_page import draw, rendered
from leanseek.bench.peer import TheirStep, same_weights
from leanseek.bench.queue import Item, Place, is_done, items, work_through
from leanseek.bench.rows import (
    ORDINARY,
    ROWS,
    Row,
    chosen_rows,
    config_of,
    same_settings,
    settings_of,
    shape,
    steps_of,
)
from leanseek.bench.score import Score, as_json, best_of_each, scores, target_of, tokens_to
from leanseek.bench.track import Track, data_of_track, find_track, fixed_cpu_seconds, split_of
from leanseek.bench.train import REST, Batches, OurStep, kind_of
from leanseek.bench.turns import fastest, in_turn
from leanseek.cli import main
from leanseek.config import BadInput, Config, read_recipe
from leanseek.data.shards import Data, open_data
from leanseek.data.tokenizer import Tokenizer
from leanseek.eval.bpb import bits_per_byte
from leanseek.ops.loss import linear_cross_entropy
from leanseek.plan.count import cache_bytes_per_token, parameters
from leanseek.train.schedule import Kind, knobs
from scripts.removals import HALF, REMOVED, WHOLE, Ran, table
from tests.runs import TEXT, make_run, model_of, tokenizer
from tests.tiny import RECIPE, story

SMALL: dict[str, Any] = {"vocab_size": 320, "layers": 2, "width": 32, "heads": 2, "context": 32}
TOKENS = 12 * 256
ORDINARY_ROW = Row(ORDINARY, "o", TOKENS, (4e-3, 8e-3), Control("ordinary", TOKENS, 4e-3, 256, **SMALL))
BEST_ROW = Row("best-dense", "b", TOKENS, (), Control("best", TOKENS, 1.6e-2, 256, **SMALL))
TINY_ROW = Row("tiny", "t", 2048, (5e-3, 1e-2), recipe=str(RECIPE), overrides=("train.dtype=fp32",))
SMALL_ROWS = (ORDINARY_ROW, BEST_ROW, TINY_ROW)


def write_text(file: Path, documents: int, seed: int) -> None:
    dice = random.Random(seed)
    file.write_text("".join(json.dumps({"text": story(dice)}) + "\n" for _ in range(documents)))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts") / "mini"
    folder.mkdir()
    write_text(folder / "train.jsonl", 200, 0)
    write_text(folder / "val.jsonl", 8, 1)
    return folder


@pytest.fixture(scope="module")
def kept(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A place whose DATA is prepared."""
    out = tmp_path_factory.mktemp("kept")
    place = Place(out, find_track(texts, None, out))
    data_of_track(place.track, out, 320)
    return place


@pytest.fixture(scope="module")
def data(kept: Place) -> Data:
    return open_data(kept.out / kept.track.name / "data-320")


@pytest.fixture
def place(kept: Place, tmp_path: Path) -> Place:
    """A ledger with nothing in it but that DATA."""
    (tmp_path / kept.track.name).mkdir()
    (tmp_path / kept.track.name / "data-320").symlink_to(kept.out / kept.track.name / "data-320")
    return Place(tmp_path, kept.track)


@pytest.fixture
def no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds as if measured, without a process for each."""

    def measured(of: list[Any], rounds: int = 3, steps: int = 12) -> list[list[float]]:
        return [[1e-4 * (i + 1)] * rounds for i in range(len(of))]

    monkeypatch.setattr(queue, "measure_speed", measured)


# ── the controls ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_ordinary_has_the_parameters_of_gpt2_without_biases() -> None:
    layers, width, vocabulary, context = 4, 256, 4096, 256
    expected = vocabulary * width + context * width + layers * (12 * width**2 + 2 * width) + width
    assert shape(ROWS[0])[0] == expected == 4_262_144


def test_flops_of_a_dense_row_are_those_of_its_matmuls() -> None:
    control = Control("ordinary", 1, 1.0, 1, **SMALL)
    model, _ = build(control, "fp32", 0)
    # Every matrix but the positions multiplies, the tied one as the head; the mean query sees (T + 1) / 2 keys.
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() >= 2 and "positions" not in name)
    scores_and_values = 2 * 2 * 32 * (32 + 1) / 2
    assert flops_per_token(control) == 6 * (weights + scores_and_values)
    assert flops_per_token(replace(control, kind="best")) == flops_per_token(control)


@pytest.mark.parametrize("kind", ["ordinary", "best"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_control_begins_at_the_loss_of_knowing_nothing(data: Data, kind: Any, dtype: str) -> None:
    control = Control(kind, TOKENS, 0.0, 256, **SMALL)
    model, optimizers = build(control, dtype, 0)
    ids, targets = Windows(data, 32, 0).batch(kind, 0, 0, 8)
    loss = controls.train_step(model, optimizers, ids, targets, 0.0, control)
    # A zero head is exact; logits of width 32 and weights of 0.02 have a variance of 0.0128, which costs half of it.
    assert loss == pytest.approx(math.log(320), abs=1e-3 if kind == "best" else 0.03)


def test_a_sampled_control_learns_what_a_whole_one_does(data: Data) -> None:
    """With groups of tokens that hardly differ in their logits the gradient is, on average over the turns, the same."""
    control = Control("best", TOKENS, 0.0, 256, **SMALL, sampled=1.0, frequent=64, groups=2)
    windows = Windows(data, 32, 0)
    _, targets = windows.batch("best", 0, 0, 8)
    sampled = controls.sampled_loss(control, windows.stream)
    torch.manual_seed(0)
    hidden = torch.randn(256, 32, dtype=torch.float64)
    weight = (0.02 * torch.randn(320, 32, dtype=torch.float64)).requires_grad_()
    whole = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets.flatten()), weight)[0]
    found = []
    for turn in range(2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("leanseek.ops.sampled.first_turn", lambda _, begin=turn: begin)
            found.append(torch.autograd.grad(sampled(hidden, weight, targets.flatten()), weight)[0])
    assert ((found[0] + found[1]) / 2 - whole).norm() < 5e-3 * whole.norm()
    assert (found[0] - whole).norm() > 1e-2 * whole.norm()
    assert controls.flops_per_token(replace(control, sampled=0.5)) == pytest.approx(
        (controls.flops_per_token(control) + controls.flops_per_token(replace(control, sampled=0.0))) / 2
    )
    assert controls.flops_per_token(replace(control, sampled=0.0)) - controls.flops_per_token(control) == 6 * 128 * 32


def test_the_last_steps_of_a_control_have_the_whole_softmax(data: Data, tmp_path: Path) -> None:
    control = Control("best", 256 * 8, 1e-2, 256, **SMALL, sampled=0.75, frequent=64, groups=2)
    given = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(controls, "train_step", lambda *them: given.append(them[-1]) or 0.0)
        controls.train(control, "fp32", 0, data, tmp_path / "run", 1, scored_tokens=100)
    assert [loss is linear_cross_entropy for loss in given] == [False] * 6 + [True] * 2


def slow_ordinary(model: Ordinary, ids: list[int]) -> Tensor:
    """Hidden states [T, D] of one window: position by position, head by head, in FP64."""
    w = {name: tensor.double() for name, tensor in model.state_dict().items()}
    width = w["lm_head.weight"].shape[1]
    heads = model.blocks[0].heads
    size = width // heads

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * weight

    stream = [w["lm_head.weight"][i] + w["embed_positions.weight"][t] for t, i in enumerate(ids)]
    for n in range(len(model.blocks)):
        b = {name.removeprefix(f"blocks.{n}."): tensor for name, tensor in w.items() if name.startswith(f"blocks.{n}.")}
        qkv = [b["qkv_proj.weight"] @ norm(x, b["attention_norm.weight"]) for x in stream]
        for t in range(len(ids)):
            mixed = []
            for h in range(heads):
                at = slice(h * size, (h + 1) * size)
                q = qkv[t][:width][at]
                logits = torch.stack([q @ qkv[s][width : 2 * width][at] / math.sqrt(size) for s in range(t + 1)])
                p = logits.exp() / logits.exp().sum()
                mixed.append(sum(p[s] * qkv[s][2 * width :][at] for s in range(t + 1)))
            stream[t] = stream[t] + b["o_proj.weight"] @ torch.cat(mixed)
        for t, x in enumerate(stream):
            up = b["up_proj.weight"] @ norm(x, b["mlp_norm.weight"])
            stream[t] = x + b["down_proj.weight"] @ (up * (1 + torch.erf(up / math.sqrt(2))) / 2)
    return torch.stack([norm(x, w["norm.weight"]) for x in stream])


def test_ordinary_against_its_slow_twin() -> None:
    model = Ordinary(Control("ordinary", 1, 1.0, 1, **SMALL), torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # unit-scale activations and uneven norms: a fault would show
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() >= 2 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + (parameter.dim() < 2))
    ids = torch.randint(320, (1, 12), generator=generator)
    hidden = model(ids, torch.arange(12)[None])[0].double()
    # FP32 against FP64 over two layers of unit scale: a few times 2⁻²⁴ per sum of 32 to 128 terms.
    assert torch.allclose(hidden, slow_ordinary(model, ids[0].tolist()), atol=2e-5)


def test_best_cannot_see_ahead() -> None:
    model, _ = build(Control("best", 1, 1.0, 1, **SMALL), "fp32", 0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0.0, 0.2)
    ids = torch.randint(320, (1, 32))
    changed = ids.clone()
    changed[0, 20] = (ids[0, 20] + 1) % 320
    before, after = (model(each, torch.arange(32)[None])[0] for each in (ids, changed))
    assert torch.equal(before[:20], after[:20])
    assert not torch.allclose(before[25], after[25])


def test_the_initialisation_of_ordinary_is_gpt2s() -> None:
    model, _ = build(Control("ordinary", 1, 1.0, 1), "fp32", 0)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            assert parameter.eq(1).all()
            continue
        std = 0.02 / math.sqrt(8) if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
        # 65,536 draws at least: the sample's standard deviation is off by 0.3% in the mean, five times that never.
        assert parameter.std().item() == pytest.approx(std, rel=0.015), name


def test_matrices_decay_and_norms_do_not() -> None:
    _, (adamw,) = build(Control("ordinary", 1, 1.0, 1, **SMALL), "fp32", 0)
    decayed, plain = adamw.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert all(p.dim() >= 2 for p in decayed["params"])
    assert all(p.dim() == 1 for p in plain["params"])
    assert decayed["betas"] == (0.9, 0.95)


@pytest.mark.parametrize("kind", ["ordinary", "best"])
def test_every_parameter_has_one_optimizer(kind: Any) -> None:
    model, optimizers = build(Control(kind, 1, 1.0, 1, **SMALL), "fp32", 0)
    held = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_schedules_at_given_steps() -> None:
    ordinary = Control("ordinary", 1600 * 8192, 1e-3, 8192)
    assert ordinary.steps == 1600
    assert learning_rate(ordinary, 0) == pytest.approx(1e-3 / 101)
    assert learning_rate(ordinary, 100) == pytest.approx(1e-3)
    assert learning_rate(ordinary, 850) == pytest.approx(0.55e-3)  # half of the cosine: between 1 and a tenth
    assert learning_rate(ordinary, 1599) == pytest.approx(1e-4, rel=1e-4)
    best = Control("best", 1000 * 4096, 1e-2, 4096)
    assert learning_rate(best, 0) == learning_rate(best, 600) == 1e-2
    assert learning_rate(best, 800) == pytest.approx(0.5e-2)
    assert learning_rate(best, 999) == pytest.approx(1e-2 / 400)


def test_windows_are_the_text(data: Data) -> None:
    bos = Tokenizer.load(data.tokenizer_folder).bos_id
    windows = Windows(data, 32, bos)
    expected = [token for ids, _ in data.documents("train") for token in (bos, *ids.tolist())]
    assert windows.stream.tolist() == expected
    for kind in ("ordinary", "best"):
        ids, targets = windows.batch(kind, 3, 5, 4)
        assert torch.equal(ids[:, 1:], targets[:, :-1])
        again, _ = windows.batch(kind, 3, 5, 4)
        other, _ = windows.batch(kind, 4, 5, 4)
        assert torch.equal(ids, again)
        assert not torch.equal(ids, other)
    whole = (len(expected) - 1) // 32
    seen = torch.cat([windows.batch("best", 0, step, 1)[0] for step in range(whole)])
    in_order = torch.tensor(expected[: whole * 32]).view(whole, 32)
    assert sorted(seen.tolist()) == sorted(in_order.tolist())  # once each per epoch


@pytest.mark.parametrize("row", [ORDINARY_ROW, BEST_ROW], ids=lambda row: row.name)
def test_killed_and_resumed_is_undisturbed(
    row: Row, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controls, "CHECKPOINT_EVERY", 4)
    assert row.control is not None
    undisturbed = train(row.control, "fp32", 0, data, tmp_path / "a", 3)
    train(row.control, "fp32", 0, data, tmp_path / "b", 3, most_steps=6)  # two steps past its checkpoint
    resumed = train(row.control, "fp32", 0, data, tmp_path / "b", 3)
    assert len(resumed["step_cpu_seconds"]) == 8
    assert resumed["loss"] == undisturbed["loss"]
    assert resumed["curve"] == undisturbed["curve"]
    assert [tokens for tokens, _ in resumed["curve"]] == [TOKENS // 3, 2 * TOKENS // 3, TOKENS]
    assert resumed["curve"][-1][1] < resumed["curve"][0][1]
    newest = checkpoint.newest(tmp_path / "b", pytest.fail)
    assert newest is not None
    assert newest.step == 8


def test_accumulation_changes_nothing(data: Data) -> None:
    control = Control("ordinary", TOKENS, 1e-2, 256, **SMALL)
    ids, targets = Windows(data, 32, 0).batch("ordinary", 0, 0, 8)
    found = []
    for at_once in (8, 2):
        model, optimizers = build(control, "fp32", 0)
        losses = [
            controls.train_step(model, optimizers, ids, targets, 1e-2, replace(control, windows_at_once=at_once))
            for _ in range(3)
        ]
        found.append(losses)
    assert found[0] == pytest.approx(found[1], rel=1e-5)  # FP32 sums in another order
    assert found[0][2] < found[0][0]


def test_the_whole_validation_text_is_scored(data: Data, tmp_path: Path) -> None:
    control = Control("ordinary", 256, 0.0, 256, **SMALL)
    ended = train(control, "fp32", 0, data, tmp_path / "run", 1)
    model, _ = build(control, "fp32", 0)
    bos = Tokenizer.load(data.tokenizer_folder).bos_id
    found = bits_per_byte(model, data.documents("validation"), 32, bos)  # type: ignore[arg-type]
    assert found.bytes == data.counts("validation").bytes
    assert ended["curve"] == [[256, found.bpb]]


# ── tracks ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_files_are_found_by_name() -> None:
    found = {
        "train.txt": ("", "train"),
        "val.jsonl": ("", "val"),
        "validation.jsonl.gz": ("", "val"),
        "easy-train.jsonl.zst": ("easy", "train"),
        "easy-val.jsonl.gz": ("easy", "val"),
        "books-train-003.jsonl.zst": ("books", "train"),
        "tiny-stories_val.txt": ("tiny-stories", "val"),
        "train0.txt": ("", "train"),
        "strain.txt": None,
        "trains.txt": None,
        "interval.txt": None,
        "train.bin": None,
        "easy.txt": None,
    }
    assert {name: split_of(name) for name in found} == found


def test_a_track_is_chosen_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("easy-train.jsonl", "easy-val.jsonl", "hard-train-0.jsonl", "hard-train-1.jsonl", "hard-val.jsonl"):
        write_text(folder / name, 2, 0)
    write_text(folder / "odd-train.jsonl", 2, 0)  # without validation text: no track
    hard = find_track(folder, "hard", tmp_path)
    assert [Path(file).name for file in hard.train] == ["hard-train-0.jsonl", "hard-train-1.jsonl"]
    assert [Path(file).name for file in hard.validation] == ["hard-val.jsonl"]
    with pytest.raises(BadInput, match="several tracks: add --track, one of easy, hard"):
        find_track(folder, None, tmp_path)
    with pytest.raises(BadInput, match=r"did you mean 'hard'.*there are: easy, hard"):
        find_track(folder, "hart", tmp_path)
    write_text(folder / "hard-val.jsonl", 3, 0)
    with pytest.raises(BadInput, match="was begun on other text"):
        find_track(folder, "hard", tmp_path)


def test_the_text_at_hand_is_split_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [f"x = {n}\n" for n in range(300)]

    def written(folder: Path) -> list[str]:
        (folder / "code.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in sources))
        (folder / "prose.jsonl").write_text("")
        return []

    monkeypatch.setattr("leanseek.bench.track.text_at_hand", written)
    track = find_track(None, None, tmp_path)
    train, held_out = (
        [json.loads(line)["text"] for line in Path(file).read_text().splitlines()]
        for file in (*track.train, *track.validation)
    )
    assert track.name == "stdlib"
    assert sorted(train + held_out) == sorted(sources)
    assert 0 < len(held_out) < 30


def test_validation_text_stays_whole(data: Data) -> None:
    assert data.counts("validation").documents == 8
    assert data.counts("train").documents > 100
    assert fixed_cpu_seconds(data) >= 0


# ── rows ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_v3s_schedules_scale_with_the_learning_rate() -> None:
    row = next(row for row in ROWS if row.name == "faithful-v3")
    config = config_of(row, 1_000_000, 1e-3, seed=3)
    assert (config.optimizer.name, config.optimizer.weight_decay) == ("adamw", 0.1)
    assert [piece.value for piece in config.schedule.learning_rate] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4, 3.3e-5])
    assert (config.train.tokens, config.train.seed) == (1_000_000, 3)
    # A ramp from 1,024 to 4,096 over 32,000 tokens takes log(4) / log(1 + 3,072 / 32,000) ≈ 15 steps; the rest is full.
    assert steps_of(config) == pytest.approx(15 + 968_000 / 4096, abs=3)
    assert steps_of(config_of(ROWS[3], 4096 * 100, None, 0)) == 2 * 35 + 65  # a third of it with half the batch


def test_a_users_recipe_is_one_more_row(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text(RECIPE.read_text())
    assert chosen_rows(None) == ROWS  # budgets of their own included
    found = chosen_rows("nano", str(mine), ["mine=4096"])
    assert [row.name for row in found] == ["nano", "mine"]
    assert (found[1].tokens, found[1].full_tokens) == (6144, 4096)
    for arguments, words in (
        ((None, "nano"), "a row 'nano' already"),
        (("nani", None), "no row 'nani' .did you mean 'nano'"),
        ((None, None, ["nano=many"]), "ROW=NUMBER"),
        ((None, None, ["nano=-1"]), "ROW=NUMBER"),
        ((None, None, ["nina=1e6"]), "no row 'nina'"),
    ):
        with pytest.raises(BadInput, match=words):
            chosen_rows(*arguments)


# ── the queue ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_queue_does_what_is_missing_and_only_that(place: Place, no_speed: None) -> None:
    assert work_through(place, SMALL_ROWS, SMALL_ROWS, 1, None, None, "the command") == []
    folder = place.out / place.track.name / "receipts"
    first = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.json")}
    assert {name for name in first if "-run-" in name} == {
        "ordinary-run-3072-seed0.json",
        "best-dense-run-3072-seed0.json",
        "tiny-run-2048-seed0.json",
    }
    receipt = json.loads((folder / "tiny-run-2048-seed0.json").read_text())
    assert set(receipt) >= {
        *("row", "seed", "track", "command", "commit", "machine", "settings", "tokens"),
        *("seconds", "cpu_seconds", "flops", "curve", "bpb"),
    }
    assert receipt["command"] == "the command"
    assert receipt["bpb"] == receipt["curve"][-1][1]
    assert receipt["curve"][-1][0] == receipt["tokens"] == 2048
    (folder / "best-dense-run-3072-seed0.json").unlink()
    work_through(place, (BEST_ROW,), SMALL_ROWS, 1, None, None, "")
    second = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.json")}
    assert {name for name in second if second[name] != first[name]} == {"best-dense-run-3072-seed0.json"}
    target = target_of(place.receipts(), SMALL_ROWS)
    assert [score.row.name for score in scores(place, SMALL_ROWS, target)] == [row.name for row in SMALL_ROWS]


def test_a_row_that_changed_is_another_row(place: Place, no_speed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert BEST_ROW.control is not None
    changed = replace(BEST_ROW, control=replace(BEST_ROW.control, weight_decay=0.2))
    monkeypatch.setattr(queue, "train_row", lambda place, item: result(item, 2.0))
    for row in (BEST_ROW, changed):
        before = [item.name for item in items(place, (row,), (row,), 1) if not is_done(place, item)]
        assert before == ["best-dense-dtype", "best-dense-run-3072-seed0", "speed"]
        assert work_through(place, (row,), (row,), 1, None, None, "") == []
    aside = place.out / place.track.name / "receipts" / "superseded"
    assert sorted(file.name for file in aside.iterdir()) == [
        "best-dense-dtype-0.json",
        "best-dense-run-3072-seed0-1.json",
    ]
    assert is_done(place, Item("run", changed))
    assert not is_done(place, Item("run", BEST_ROW))


def test_recipes_are_compared_by_what_changes_a_weight() -> None:
    receipt = {"settings": settings_of(TINY_ROW, 2048, 5e-3)}
    assert same_settings(TINY_ROW, receipt)
    assert same_settings(TINY_ROW, receipt, 2048)
    assert not same_settings(TINY_ROW, receipt, 4096)
    more_often = replace(TINY_ROW, overrides=(*TINY_ROW.overrides, "train.checkpoint_every=7"))
    assert same_settings(more_often, receipt)
    decayed = replace(TINY_ROW, overrides=(*TINY_ROW.overrides, "optimizer.weight_decay=0.2"))
    assert not same_settings(decayed, receipt)


def test_nothing_begins_after_the_minutes(place: Place, no_speed: None) -> None:
    missing = work_through(place, SMALL_ROWS, SMALL_ROWS, 1, 1e-9, None, "")
    assert len(missing) == len(items(place, SMALL_ROWS, SMALL_ROWS, 1))
    assert not place.receipts()


def test_an_item_in_work_elsewhere_is_left_alone(place: Place, no_speed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    only = (replace(BEST_ROW, name=ORDINARY),)
    monkeypatch.setattr(queue, "train_row", lambda place, item: done.append(item.name) or result(item, 2.0))
    work = place.work(Item("run", only[0], seed=0))
    with checkpoint.lock(work.with_name(f".{work.name}")):
        missing = work_through(place, only, only, 2, None, None, "")
    assert [item.name for item in missing] == ["ordinary-run-3072-seed0"]
    assert done == ["ordinary-run-3072-seed1"]


def result(item: Item, bpb: float, curve: list[list[float]] | None = None) -> dict[str, Any]:
    """What a training item would find."""
    assert item.row is not None
    tokens = queue.tokens_of(item)
    curve = [[tokens, bpb]] if curve is None else curve
    return {
        "settings": settings_of(item.row, tokens, item.rate),
        "dtype": "fp32",
        "tokens": tokens,
        "flops": 1e9,
        "seconds": 1.0,
        "cpu_seconds": 2.0,
        "curve": curve,
        "bpb": curve[-1][1],
    }


@pytest.mark.parametrize(("best", "points"), [(4e-3, 3), (8e-3, 4), (1e-3, 5), (1.0, 7)])
def test_the_search_takes_the_best_and_goes_on_at_its_ends(
    place: Place, no_speed: None, monkeypatch: pytest.MonkeyPatch, best: float, points: int
) -> None:
    row = replace(ORDINARY_ROW, rates=(2e-3, 4e-3, 8e-3))
    trained = {}

    def found(place: Place, item: Item) -> dict[str, Any]:
        rate = item.rate if item.kind == "search" else queue.best_rate(place, row)
        trained[item.name] = rate
        assert queue.tokens_of(item) == (TOKENS // 4 if item.kind == "search" else TOKENS)
        return result(replace(item, rate=rate), math.log2(rate / best) ** 2)

    monkeypatch.setattr(queue, "train_row", found)
    assert work_through(place, (row,), (row,), 1, None, None, "") == []
    searched = [rate for name, rate in trained.items() if "search" in name]
    assert len(searched) == points
    assert trained["ordinary-run-3072-seed0"] == min(searched, key=lambda rate: abs(math.log2(rate / best)))


# ── the score ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_tokens_to_a_target_lie_on_the_line_between_two_validations() -> None:
    curve = [[100, 3.0], [200, 2.0], [300, 2.2], [400, 1.8]]
    assert tokens_to(curve, 2.5) == 150
    assert tokens_to(curve, 2.0) == 200
    assert tokens_to(curve, 1.9) == pytest.approx(375)
    assert tokens_to(curve, 3.5) == 100  # not before the first validation
    assert tokens_to(curve, 1.7) == math.inf
    assert tokens_to([], 1.0) == math.inf


def keep(place: Place, item: Item, **found: Any) -> None:
    path = place.receipt(item)
    path.parent.mkdir(parents=True, exist_ok=True)
    name = item.row.name if item.row else None
    about = {"kind": item.kind, "row": name, "seed": item.seed, "commit": "0" * 40, "finished": "2026-01-01T00:00:00Z"}
    about["machine"] = {"cpu": "X", "cores": 2}
    path.write_text(json.dumps(about | found))


@pytest.fixture
def filled(place: Place) -> Place:
    """A ledger with receipts made up: the control ends at 2.0 in the median; best gets there at 1,000 of 3,072."""
    for seed, bpb in enumerate((1.9, 2.0, 2.1)):
        item = Item("run", ORDINARY_ROW, 4e-3, seed)
        keep(place, item, **result(item, bpb, [[1536, 2.5], [3072, bpb]]))
    for seed, last in enumerate((1.5, 1.0)):
        item = Item("run", BEST_ROW, None, seed)
        keep(place, item, **result(item, 0.0, [[500, 2.0 + (2.0 - last)], [1500, last]]))
    item = Item("run", TINY_ROW, 1e-2, 0)
    keep(place, item, **result(item, 0.0, [[1024, 3.0], [2048, 2.4]]))
    for rate, bpb in ((4e-3, 2.9), (8e-3, 2.95)):
        item = Item("search", ORDINARY_ROW, rate)
        keep(place, item, **result(item, bpb))
    speeds = {
        row.name: {
            "settings": settings_of(row, row.tokens, None),
            "cpu_seconds_per_token": cost,
            "rounds": [cost],
            "dtype": "fp32",
        }
        for row, cost in zip(SMALL_ROWS, (1e-3, 2e-3, 3e-3), strict=True)
    }
    keep(place, Item("speed"), rows=speeds)
    return place


def test_the_score_by_hand(filled: Place) -> None:
    target = target_of(filled.receipts(), SMALL_ROWS)
    assert target == 2.0
    best = best_of_each(scores(filled, SMALL_ROWS, target))
    fixed = best[ORDINARY].fixed_cpu_seconds
    assert best[ORDINARY].tokens == (3072, 3072, 3072)  # by definition, wherever a seed ends
    assert best[ORDINARY].score == pytest.approx(3072 * 1e-3 + fixed)
    assert best["best-dense"].tokens == pytest.approx((1000, 1000))
    assert best["best-dense"].score == pytest.approx(1000 * 2e-3 + fixed)
    assert best["tiny"].score == math.inf
    lines = {line["name"]: line for line in as_json(list(best.values()))}
    assert lines["best-dense / ordinary"]["ratio_median"] == pytest.approx((2 + fixed) / (3.072 + fixed))
    assert lines["tiny / ordinary"]["ratio_median"] is None
    assert lines["best-dense / ordinary"]["n"] == 2
    json.dumps(lines, allow_nan=False)


def test_of_several_budgets_the_cheapest_counts(filled: Place) -> None:
    shorter = replace(BEST_ROW, budget=1024)
    item = Item("run", shorter, None, 0)
    keep(filled, item, **result(item, 0.0, [[512, 2.4], [1024, 1.6]]))
    found = scores(filled, SMALL_ROWS, 2.0)
    assert [score.budget for score in found if score.row.name == "best-dense"] == [1024, 3072]
    assert best_of_each(found)["best-dense"].median_tokens == 768


def test_the_page_and_its_plot(filled: Place, tmp_path: Path) -> None:
    found = scores(filled, SMALL_ROWS, 2.0)
    page = rendered(filled, SMALL_ROWS, found, 2.0)
    for words in ("**2.0000 bits per byte**", "| `ordinary` |", "not reached", "0.004", "**2.9000**", "val.jsonl"):
        assert words in page
    assert str(filled.out) not in page
    tables = [line.count("|") for line in page.splitlines() if line.startswith("| `best-dense`")]
    heads = [line.count("|") for line in page.splitlines() if line.startswith("| row")]
    assert tables == heads
    draw(filled.receipts(), best_of_each(found), 2.0, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_speeds_of_another_machine_are_kept_and_told(
    filled: Place, no_speed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = Item("speed", rows=SMALL_ROWS)
    assert "On each machine" not in rendered(filled, SMALL_ROWS, scores(filled, SMALL_ROWS, 2.0), 2.0)
    (filled.receipt(speed).parent / "speed-run-3072-seed0.json").write_text('{"kind": "run", "row": "speed"}')
    times = iter(range(10))
    monkeypatch.setattr(queue.time, "strftime", lambda *_: f"2026-01-0{next(times) + 2}T00:00:00Z")
    for cpu, done, told in (("Y", False, "YX"), ("Y", True, "YX"), ("Z", False, "ZYX"), ("Y", False, "YZX")):
        monkeypatch.setattr(queue, "machine", lambda cpu=cpu: {"cpu": cpu, "cores": 2})
        assert is_done(filled, speed) == done
        queue.do(filled, speed, "")
        assert [receipt["machine"]["cpu"] for receipt in filled.speeds()] == list(told)
    found = scores(filled, SMALL_ROWS, 2.0)
    assert best_of_each(found)["best-dense"].cpu_seconds_per_token == 2e-4
    page = rendered(filled, SMALL_ROWS, found, 2.0).splitlines()
    assert [line for line in page if line.startswith("| Y, 2 cores, commit") and "`best-dense` | 200.0 |" in line]
    assert f"| X, 2 cores, commit {'0' * 12} | `best-dense` | 2000.0 |" in "".join(line[:70] for line in page)
    speeds = filled.read(speed)
    assert speeds is not None
    speeds["rows"]["best-dense"]["settings"]["layers"] = 7  # those of another row
    assert "best-dense" not in best_of_each(scores(filled, SMALL_ROWS, 2.0, speeds))


# ── quick ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_quick_fails_at_a_tenth_worse(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ledger, "find_track", lambda *_: Track("t", (), (), {}))
    for ratios, code in (([1.09, 1.2, 1.0], 0), ([1.11, 1.11, 0.9], 1), ([1.1], 1), ([math.inf], 1)):
        monkeypatch.setattr(ledger, "quick", lambda *_, r=ratios: quick.comparison("a / b", 1.0, 1.0, r))
        with pytest.raises(SystemExit) as end:
            main(["bench", "ledger", "--quick", "--json"])
        assert end.value.code == code
        said = capsys.readouterr()
        assert ("FAILS" in said.err) == bool(code)
        (row,) = json.loads(said.out)
        assert set(row) == {"name", "ours", "peer", "ratio_median", "ratio_min", "ratio_max", "unit", "n"}


def test_quick_measures_the_cost_of_the_same_quality(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = replace(TINY_ROW, name="nano")
    budgets: dict[str, int] = {}

    def control_ends(control: Control, *_: Any, **__: Any) -> dict[str, Any]:
        budgets["peer"] = control.tokens
        return {"curve": [[control.tokens, 2.0]], "tokens": control.tokens}

    def ours_ends(config: Any, folder: Path, run: Path) -> None:
        budgets["ours"] = config.train.tokens
        (run).mkdir(parents=True)
        lines = [{"tokens": config.train.tokens // 2, "bpb": 2.5}, {"tokens": config.train.tokens, "bpb": 1.5}]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    monkeypatch.setattr(quick, "measure_speed", lambda of, rounds, steps: [[1e-3] * 2, [2e-3] * 2])
    monkeypatch.setattr(quick, "counting_cpu_seconds", lambda row, folder: 2.56)
    monkeypatch.setattr(quick.controls, "train", control_ends)
    monkeypatch.setattr(quick, "pretrain", ours_ends)
    found = quick.quick(place, (BEST_ROW, ours), cpu_seconds=102.4)
    assert budgets == {"peer": 102_400, "ours": 215 * 256}  # 10% more CPU-seconds, less counting, at twice the price
    assert found["ratio_median"] == pytest.approx((2.56 + 0.75 * 215 * 256 * 2e-3) / 102.4)
    assert found["n"] == quick.QUICK_SEEDS


ONE_STAGE = "stages=[{sequence_length=256}]"


def test_mtp_at_rest_costs_nothing() -> None:
    """A recipe's FLOPs per token and its time are those of both ways, weighted by the tokens."""
    late = Row(
        "late",
        "",
        1_000_000,
        recipe="nano",
        overrides=(ONE_STAGE, "schedule.mtp_weight=[{until=0.75,value=0},{until=1,value=0.3}]"),
    )
    never, always = (
        shape(replace(late, overrides=(ONE_STAGE, f"schedule.mtp_weight=[{{until=1,value={weight}}}]")))[1]
        for weight in (0, 0.3)
    )
    bare = shape(replace(late, overrides=(ONE_STAGE, "model.num_nextn_predict_layers=0")))[1]
    assert never == bare < always
    assert shape(late)[1] == pytest.approx(0.75 * never + 0.25 * always)


def test_speed_of_resting_mtp_is_weighted(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    class Here:
        """Instead of a process: a run takes a second, nine with MTP, and twice as long where counts teach."""

        def __init__(self, *_: object, **__: object) -> None: ...

        def __enter__(self) -> "Here":
            return self

        def __exit__(self, *_: object) -> None: ...

        def submit(self, *asked: object) -> "Here":
            self.kind = asked[-1]
            return self

        def result(self) -> float:
            assert isinstance(self.kind, Kind)
            return (9.0 if self.kind.mtp else 1.0) * (2 if self.kind.counted else 1) + 100 * self.kind.stage

    monkeypatch.setattr(speed, "ProcessPoolExecutor", Here)
    late = replace(
        TINY_ROW, overrides=(*TINY_ROW.overrides, "schedule.mtp_weight=[{until=0.75,value=0},{until=1,value=0.3}]")
    )
    assert speed.speed_of(late, data.folder, "fp32") == pytest.approx(0.75 * 1 + 0.25 * 9)
    counts = "counts.order=3", "schedule.count_weight=[{until=0.5,value=1},{until=1,value=0}]"
    taught = replace(late, overrides=(*late.overrides, *counts))
    assert speed.speed_of(taught, data.folder, "fp32") == pytest.approx(0.5 * 2 + 0.25 * 1 + 0.25 * 9)
    staged = replace(
        late, overrides=(*late.overrides, "stages=[{sequence_length=16,share=0.9},{sequence_length=32,share=0.1}]")
    )
    assert speed.speed_of(staged, data.folder, "fp32") == pytest.approx(0.75 * 1 + 0.25 * 9 + 0.1 * 100)
    assert speed.speed_of(BEST_ROW, data.folder, "fp32") == 1.0
    assert BEST_ROW.control is not None
    sampled = replace(BEST_ROW, control=replace(BEST_ROW.control, sampled=0.75))  # as if counts taught
    assert speed.speed_of(sampled, data.folder, "fp32") == pytest.approx(0.75 * 2 + 0.25 * 1)


@pytest.mark.parametrize("sampled", [False, True])
def test_a_short_run_of_a_control_is_sampled_or_not(data: Data, monkeypatch: pytest.MonkeyPatch, sampled: bool) -> None:
    given: list[Control] = []
    ended = {"step_cpu_seconds": [1.0, 2.0]}
    monkeypatch.setattr("leanseek.bench.speed.controls.train", lambda control, *_, **__: given.append(control) or ended)
    assert BEST_ROW.control is not None
    row = replace(BEST_ROW, control=replace(BEST_ROW.control, sampled=0.75))
    assert speed._short_run(row, data.folder, "fp32", 2, Kind(counted=sampled)) == 2.0 / 256
    assert [control.sampled for control in given] == [float(sampled)]


def test_a_kind_of_tokens_is_all_that_its_short_run_has(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    class Seen(Exception):
        pass

    def seen(config: Config, *_: object) -> None:
        raise Seen(config)

    monkeypatch.setattr(speed, "pretrain", seen)
    waking = ("train.zero_outputs=true", "schedule.layers=[{until=0.5,value=1}]", "counts.order=3")
    stages = ("stages=[{sequence_length=16,share=0.5},{sequence_length=32,share=0.5}]",)
    row = replace(TINY_ROW, overrides=(*TINY_ROW.overrides, *waking, *stages))
    for kind in (Kind(0, False, True, 1, 64), Kind(1, True, False, None, 256)):
        with pytest.raises(Seen) as run:
            speed._short_run(row, data.folder, "fp32", 3, kind)
        (config,) = run.value.args
        for tokens in (0, 0.99 * config.train.tokens):
            now = knobs(config.schedule, tokens, config.train.tokens)
            assert (now.mtp_weight > 0, now.count_weight > 0, now.layers, now.batch_tokens) == kind[1:]
        assert [stage.sequence_length for stage in config.stages] == [(16, 32)[kind.stage]]


def test_every_part_can_be_taken_out_of_nano() -> None:
    whole = read_recipe("nano")
    assert [name for name, overrides in REMOVED.items() if read_recipe("nano", overrides) == whole] == [WHOLE, HALF]


def test_what_a_part_is_worth_by_hand() -> None:
    """Halving the tokens costs 0.10, so 0.05 is worth √2 times the tokens; each of them is a fifth cheaper without."""
    seeds = {WHOLE: [Ran(1.60, 1e-4), Ran(1.62, 1e-4)], HALF: [Ran(1.70, 1e-4), Ran(1.72, 1e-4)]}
    last = table(seeds | {"a part": [Ran(1.65, 8e-5), Ran(1.67, 8e-5)]}).splitlines()[-1]
    assert last == "| a part | 1.6500, 1.6700 | +0.0500, +0.0500 | 1.41× | 0.80 | **1.13×** |"


def test_speed_is_measured_in_turn_in_processes_of_their_own(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    monkeypatch.setattr(speed, "speed_of", lambda row, *_: turns.append(row.name) or 1.0)
    speed.measure_speed([(row, data.folder, "fp32") for row in SMALL_ROWS], rounds=2)
    assert turns == ["ordinary", "best-dense", "tiny"] * 2
    monkeypatch.undo()
    for row in (BEST_ROW, TINY_ROW):
        assert 0 < speed.speed_of(row, data.folder, "fp32", steps=5) < 1e-2
    assert not list((data.folder.parent / "runs").glob(".speed*"))


# ── the verb ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_wrong_is_said_in_one_line(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, words in (
        (["--data", str(tmp_path / "gone")], "no such folder"),
        (["--data", str(empty)], "no text files with 'train' and with 'val'"),
        (["--track", "stdlub"], "did you mean 'stdlib'"),
        (["--data", str(texts), "--rows", "ordinar"], "did you mean 'ordinary'"),
        (["--data", str(texts), "--seeds", "0"], "--seeds must be a positive number"),
        (["--data", str(texts), "--minutes", "nan"], "--minutes must be a positive number"),
        (["--data", str(texts), "--threads", "-1"], "--threads must be a positive number"),
        (["--data", str(texts), "--write", str(tmp_path / "page.md")], "has not been run yet"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["bench", "ledger", "--out", str(tmp_path / "out"), *arguments])
        said = capsys.readouterr().err
        assert end.value.code == 2
        assert said.count("leanseek: ") == 1
        assert words in said


def test_the_status_names_every_item(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", str(texts), "--out", str(tmp_path), "--status", "--seeds", "2"]
    with pytest.raises(SystemExit) as end:
        main(["bench", "ledger", *arguments])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 15 + 8 + 1
    assert all(line.endswith("missing") for line in lines)
    assert os.listdir(tmp_path) == ["mini"]


def test_rows_of_the_package_are_whole() -> None:
    for row in ROWS:
        assert shape(row)[1] > 0
        assert rows.vocabulary(row) == (6144 if row.name in (rows.OURS, rows.BEST) else 4096)
        assert len(row.rates) >= 5 or row.name == rows.OURS
    assert isinstance(Score(ROWS[0], None, 1, 1, (1.0,), (1.0,), 1.0, 0.0, 1.0).score, float)


# ── beside transformers ───────────────────────────────────────────────────────────────────────────────────────────


def test_ratios_are_taken_round_by_round() -> None:
    ours, peer = iter([30.0, 10.0, 40.0]), iter([10.0, 10.0, 20.0])
    row = in_turn("x", "tokens/s", lambda: next(ours), lambda: next(peer), 3)
    assert (row.ours, row.peer, row.n) == (30, 10, 3)
    assert (row.ratio_median, row.ratio_min, row.ratio_max) == (2, 1, 3)


def test_the_fastest_that_runs_is_taken() -> None:
    def broken() -> Callable[[], float]:
        raise ValueError("no such kernel here")

    said: list[str] = []
    rates: dict[str, Callable[[], Callable[[], float]]] = {
        "slow": lambda: lambda: 1.0,
        "broken": broken,
        "fast": lambda: lambda: 5.0,
    }
    name, rate = fastest(rates, said.append)
    assert (name, rate()) == ("fast", 5)
    assert "no such kernel here" in said[1]
    with pytest.raises(RuntimeError, match="no candidate"):
        fastest({"broken": broken}, said.append)


def test_both_sides_time_the_same_model() -> None:
    config = read_recipe("bench-20m")
    ours = OurStep(config, torch.float32)
    theirs = TheirStep(config.model, "eager", "fp32")
    biases = sum(router.load.numel() for router in ours.model.routers().values())
    counted = sum(p.numel() for p in ours.model.parameters())
    assert counted == sum(p.numel() for p in theirs.model.parameters()) == 20_009_152
    assert parameters(config.model).total == counted + biases  # which are state, not parameters
    ids = torch.randint(5, 4000, (2, 16))
    for step in (ours, theirs):
        before = {name: p.detach().clone() for name, p in step.model.named_parameters()}
        step(ids)
        assert all(
            not torch.equal(p, before[name]) for name, p in step.model.named_parameters() if "experts" not in name
        )


def test_zipf_batches_go_on_and_come_again() -> None:
    batches = Batches(read_recipe("bench-20m"))
    first = [batches.take() for _ in range(32)]
    assert first[0].shape == (16, 256)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(batches.take(), first[0])


def test_kinds_of_work_hold_every_operation() -> None:
    assert [kind_of(name) for name in ("aten::mm", "aten::copy_", "aten::topk", "_RMSNormBackward")] == [
        "matmul",
        "copy and cast",
        "routing",
        REST,
    ]


def test_decoding_is_timed_on_the_same_weights(tmp_path: Path) -> None:
    said = io.StringIO()
    vocabulary = tokenizer()
    run = make_run(tmp_path / "run", model_of(vocabulary, num_nextn_predict_layers=1), vocabulary)
    console = Console(file=said, width=200)
    rows = bench_decode(run, 2, False, console, Work(prompt=8, new=8, long_prompt=40))
    names = [row.name.partition(":")[0] for row in rows]
    assert names == ["decode batch 1", "decode batch 16", "first token of 40", "drafts, batch 1", "drafts, batch 16"]
    assert all(row.n == 2 and row.ours > 0 and row.peer > 0 and row.ratio_median > 0 for row in rows)
    refused = [line for line in said.getvalue().splitlines() if "does not run" in line]
    assert all("grouped_mm" in line for line in refused)  # which wants rows of 16 bytes
    model = leanseek.load_model(run).eval()
    mega = cache_bytes_per_token(model.config, 4) / 1e3
    assert f"cache of ours: {mega:,.1f} MB for 1,000 tokens" in said.getvalue()
    assert "expected" in said.getvalue()
    ids = torch.tensor([vocabulary.encode(TEXT)[:40]])
    with torch.no_grad():
        ours = model.lm_head(model(ids, torch.arange(40)[None]))
        theirs = same_weights(model, "eager", torch.float32).eval()(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-4)
    with pytest.raises(BadInput, match="context of 48 tokens is too short to be timed"):
        bench_decode(run, 1, False, console)
