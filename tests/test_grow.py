"""One dial: what a recipe becomes with more FLOPs, or fewer, and that it costs them."""

import json
import math
from pathlib import Path

import pytest

from leanseek.config import BadInput, Config, parse, read_recipe, to_toml
from leanseek.plan.count import parameters
from leanseek.train.grow import grown, mean_flops_per_token, run_flops
from leanseek.train.pretrain import pretrain
from tests.tiny import RECIPE, make_data

CAN_GROW = ("nano", "demo", "mix", "bench-20m", "small")
TIMES = (1 / 30, 1 / 4, 1, 4, 30, 1e3, 5e4, 1e7)


@pytest.mark.parametrize("name", CAN_GROW)
def test_a_recipe_with_its_own_flops_is_itself(name: str) -> None:
    recipe = read_recipe(name)
    again = grown(recipe, run_flops(recipe))
    assert abs(again.train.tokens - recipe.train.tokens) <= 1  # a fraction of a token is cut off
    same = again.train.model_copy(update={"tokens": recipe.train.tokens})
    assert again.model_copy(update={"description": recipe.description, "train": same}) == recipe


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("name", CAN_GROW)
def test_what_is_grown_is_a_recipe_that_costs_what_was_asked(name: str, times: float) -> None:
    recipe = read_recipe(name)
    flops = times * run_flops(recipe)
    config = grown(recipe, flops)
    assert parse(to_toml(config), "grown") == config  # every section valid
    assert run_flops(config) == pytest.approx(flops, rel=1e-3)
    for batch in config.schedule.batch_tokens:
        assert all(batch.value % stage.sequence_length == 0 for stage in config.stages)
    assert config.stages[-1].sequence_length <= config.model.max_position_embeddings


def test_more_flops_make_nothing_smaller_and_no_rate_higher() -> None:
    nano = read_recipe("nano")
    sizes, rates = [], []
    for times in TIMES:
        config = grown(nano, times * run_flops(nano))
        sizes.append(
            (
                parameters(config.model).total,
                config.model.num_hidden_layers,
                config.train.tokens,
                config.schedule.batch_tokens[-1].value,
                config.stages[-1].sequence_length,
                config.train.mtp_length or 0,
                *(piece.value for piece in config.schedule.layers),
            )
        )
        rates.append((config.schedule.learning_rate[0].value, config.train.init_std))
    for column in zip(*sizes, strict=True):
        assert list(column) == sorted(column)
        assert column[-1] > column[0]
    for column in zip(*rates, strict=True):
        assert list(column) == sorted(column, reverse=True)
        assert column[-1] < column[0]


def test_the_rules_in_figures() -> None:
    """64 times nano's FLOPs, worked out by hand: 64^0.18 = 2.11 is 4.2, so 4 heads and twice the width."""
    nano = read_recipe("nano")
    config = grown(nano, 64 * run_flops(nano))
    assert (config.model.hidden_size, config.model.num_attention_heads, config.model.kv_lora_rank) == (256, 4, 128)
    assert config.model.num_hidden_layers == 5  # 3 · 2^0.8 = 5.2
    assert [piece.value for piece in config.schedule.batch_tokens] == [8192, 16384]  # 64^(1/3)
    assert [stage.sequence_length for stage in config.stages] == [128, 512]  # 64^(1/6)
    assert config.schedule.learning_rate[1].value == pytest.approx(1.6e-2 / math.sqrt(2))
    assert config.train.init_std == pytest.approx(0.03 / math.sqrt(2))
    fast = config.optimizer.embedding_rate * config.schedule.learning_rate[1].value
    assert fast == pytest.approx(20 * 1.6e-2)  # what is looked up keeps its rate
    assert config.train.micro_batch * config.stages[-1].sequence_length == 64 * 256  # memory
    released = grown(read_recipe("nano", ["model.num_key_value_heads=2"]), 64 * run_flops(nano)).model
    assert released.num_key_value_heads == released.num_attention_heads == 4  # released files repeat the head count
    evaluations = [it.train.tokens / it.schedule.batch_tokens[-1].value / it.train.eval_every for it in (nano, config)]
    assert evaluations[1] == pytest.approx(evaluations[0], rel=0.01)  # as many, whatever the length
    widths = [grown(nano, times * run_flops(nano)).model.hidden_size for times in (1 / 50, 1 / 4, 4, 9, 10)]
    assert widths == [64, 128, 128, 128, 192]  # 2 · 10^0.18 = 3.03 heads


def test_a_runs_flops_are_those_of_its_receipt(tmp_path: Path) -> None:
    waking = ("train.zero_outputs=true", "schedule.layers=[{until=0.5,value=1}]", "train.tokens=8192")
    late = ("schedule.mtp_weight=[{until=0.75,value=0},{until=1,value=0.1}]",)
    stages = ("stages=[{sequence_length=16,share=0.5},{sequence_length=32,share=0.5}]",)
    config = read_recipe(str(RECIPE), (*waking, *late, *stages))
    receipt = pretrain(config, make_data(tmp_path), tmp_path / "run")
    assert receipt["flops"] == pytest.approx(run_flops(config), rel=0.02)  # a knob changes between two steps
    assert receipt["flops"] != pytest.approx(config.train.tokens * mean_flops_per_token(read_recipe(str(RECIPE))), 0.1)


@pytest.mark.parametrize(
    ("recipe", "flops", "why"),
    [
        *(("nano", flops, "positive") for flops in (0, -1e9, math.nan, math.inf)),
        ("nano", 1e7, "less than one batch"),
        ("v3", 1e24, "counts tokens"),
    ],
)
def test_what_cannot_grow(recipe: str, flops: float, why: str) -> None:
    with pytest.raises(BadInput, match=why):
        grown(read_recipe(recipe), flops)


def test_the_dial_at_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from leanseek.cli import _recipe, main

    def call(*arguments: object) -> str:
        with pytest.raises(SystemExit) as end:
            main([str(each) for each in arguments])
        said = capsys.readouterr()
        assert end.value.code == 0, said.err
        return said.out

    recipe = read_recipe(str(RECIPE))
    flops = run_flops(recipe) / 10
    ask = ("pretrain", RECIPE, "--data", make_data(tmp_path), "--out", tmp_path / "run", "--flops", flops)
    call(*ask, "train.seed=5", "train.init_std=0.01")
    ran: Config = read_recipe(str(tmp_path / "run" / "config.toml"))
    assert (ran.train.seed, ran.train.init_std) == (5, 0.01)  # laid over what was grown
    assert ran.train.tokens == grown(recipe, flops).train.tokens
    receipt = json.loads((tmp_path / "run" / "receipt.json").read_text())
    assert receipt["flops"] == pytest.approx(flops, rel=0.25)  # the last step goes beyond the budget
    call(*ask, "train.seed=5", "train.init_std=0.01")  # the same command again: nothing left to do
    many = _recipe("nano", ["model.vocab_size = 32768"], 1e15)
    assert run_flops(many) == pytest.approx(1e15, rel=1e-3)  # what the ids cost is left out of the tokens
    assert parse(call("recipes", "nano", "--flops", 1e15), "printed") == grown(read_recipe("nano"), 1e15)
