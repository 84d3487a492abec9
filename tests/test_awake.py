"""Layers that sleep at first: a smaller model until they wake, and the same model when they do."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from leanseek.bench.rows import Row, shape
from leanseek.config import BadInput, Config, read_recipe
from leanseek.model.transformer import Transformer
from leanseek.plan.count import flops_per_token
from leanseek.train.optim import build_optimizers
from leanseek.train.pretrain import pretrain
from leanseek.train.schedule import Kind, Knobs, kinds_of_tokens, knobs
from leanseek.train.step import StepResult, train_step
from tests.test_pretrain import tensors_of
from tests.tiny import RECIPE, make_data

NOW = Knobs(learning_rate=0.01, batch_tokens=64, bias_speed=0.01, mtp_weight=0.0)
ASLEEP = (
    *("train.dtype=fp32", "train.eval_every=1000", "train.checkpoint_every=1000", "train.tokens=4096"),
    *("train.zero_outputs=true", "model.num_hidden_layers=3"),
    "schedule.layers=[{until=0.25,value=1},{until=0.5,value=2}]",
)


def config_of(*overrides: str) -> Config:
    return read_recipe(str(RECIPE), (*ASLEEP, *overrides))


def model_of(config: Config, zero_outputs: bool = False) -> Transformer:
    model = Transformer(config.model, torch.float64)
    model.initialise(0.3, torch.Generator().manual_seed(0), zero_outputs=zero_outputs)
    return model.double()


def shorter(model: Transformer, config: Config, layers: int) -> Transformer:
    """The model's first layers as a model of their own."""
    own = Transformer(config.model.model_copy(update={"num_hidden_layers": layers, "num_nextn_predict_layers": 0}))
    own.double().dtype = torch.float64
    known = model.state_dict()
    own.load_state_dict({name: known[name].clone() for name in own.state_dict()})
    return own


def rows_of(config: Config, seed: int = 0) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, config.model.vocab_size, (4, 17), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize("awake", [1, 2])
def test_a_model_half_asleep_is_a_smaller_one(awake: int) -> None:
    config = config_of()
    model, (ids, _) = model_of(config), rows_of(config)
    places = torch.arange(16).expand_as(ids)
    whole = model(ids, places)
    model.awake = awake
    half = model(ids, places)
    assert not torch.allclose(half, whole)
    torch.testing.assert_close(half, shorter(model, config, awake)(ids, places), rtol=0, atol=0)


def test_a_layer_that_wakes_is_silent_at_first() -> None:
    config = config_of()
    model, (ids, _) = model_of(config, zero_outputs=True), rows_of(config)
    assert model.embed_tokens is not None
    places = torch.arange(16).expand_as(ids)
    whole = model(ids, places)
    model.awake = 1
    torch.testing.assert_close(model(ids, places), whole, rtol=0, atol=0)


def test_what_sleeps_stays_and_what_is_awake_learns_as_if_alone() -> None:
    """Weights, routing biases and losses, to the bit; then all layers wake, and learn."""
    config = config_of("model.num_nextn_predict_layers=0")
    model = model_of(config)
    alone = shorter(model, config, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    told: list[list[StepResult]] = []
    for learner, awake in ((model, 2), (alone, None)):
        optimizers = build_optimizers(learner, config.optimizer)
        now = replace(NOW, layers=awake)
        told.append([train_step(learner, optimizers, *rows_of(config, seed), now, config) for seed in range(3)])
        if learner is model:
            after = {name: value.clone() for name, value in model.state_dict().items()}
            train_step(model, optimizers, *rows_of(config, 3), NOW, config)
    assert told[0] == told[1]
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0)
    for name in before.keys() - alone.state_dict().keys():
        assert name.startswith("layers.2.")
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0)
        assert not torch.equal(model.state_dict()[name], before[name]), name


def test_a_run_goes_on_to_the_same_bits_across_a_waking_and_is_billed_for_what_was_awake(tmp_path: Path) -> None:
    data = make_data(tmp_path)
    config = config_of()
    whole = pretrain(config, data, tmp_path / "whole")
    for limit in (2, 5, 1000):
        pretrain(config_of(f"train.max_steps={limit}"), data, tmp_path / "cut")
    weights, again = (tensors_of(tmp_path / name) for name in ("whole", "cut"))
    assert [name for name in weights if not torch.equal(weights[name], again[name])] == []

    length, flops = config.stages[0].sequence_length, 0.0
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    steps, seen, counts = [row for row in rows if "loss" in row], 0, set()
    for row in steps:
        taken = row["tokens"] - seen
        now = knobs(config.schedule, seen + taken / 2, config.train.tokens)
        counts.add(now.layers)
        flops += taken * flops_per_token(config.model, length, mtp=now.mtp_weight > 0, awake=now.layers)
        seen = row["tokens"]
    assert counts == {1, 2, None}
    assert whole["flops"] == pytest.approx(flops, rel=1e-9)
    two = config.model.model_copy(update={"num_hidden_layers": 2})
    assert flops_per_token(config.model, length, awake=2) == flops_per_token(two, length)
    assert flops_per_token(two, length, awake=3) == flops_per_token(two, length)  # there are no more


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("schedule.layers=[{until=0.5,value=2},{until=0.7,value=1}]",), "never fall"),
        (("schedule.layers=[{until=0.5,value=0}]",), "whole numbers from 1"),
        (("schedule.layers=[{until=0.5,value=1.5}]",), "whole numbers from 1"),
        (("schedule.layers=[{until=0.5,value=1},{until=0.7,value=3,shape='linear'}]",), "held until the next"),
        (("schedule.layers=[{until=0.5,value=1},{until=0.5,value=3}]",), "layers: `until` must grow"),
        (("train.zero_outputs=false",), "must be silent"),
        (("mesh.pp=2",), "mesh.pp=1"),
    ],
)
def test_what_cannot_sleep_is_refused(asked: tuple[str, ...], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        config_of(*asked)


def test_tokens_are_weighed_by_how_many_layers_are_awake_and_by_their_batch() -> None:
    config = config_of(
        "schedule.mtp_weight=[{until=1.0,value=0}]",
        "schedule.batch_tokens=[{until=0.1,value=256,start=64,shape='linear'},{until=1.0,value=512}]",
    )
    wanted = {
        Kind(layers=1, batch=256): 0.1,
        Kind(layers=1, batch=512): 0.15,
        Kind(layers=2, batch=512): 0.25,
        Kind(batch=512): 0.5,
    }
    assert kinds_of_tokens(config) == pytest.approx(wanted, abs=2e-3)


def test_the_ledger_counts_the_flops_of_what_is_awake() -> None:
    row = Row("tiny", "", 4096, recipe=str(RECIPE), overrides=ASLEEP)
    model, length = config_of().model, config_of().stages[0].sequence_length
    one, two, three = (flops_per_token(model, length, awake=awake) for awake in (1, 2, 3))
    assert shape(row)[1] == pytest.approx(0.25 * one + 0.25 * two + 0.5 * three)
