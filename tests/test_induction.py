"""The start that looks things up: what it does before any training, and that it needs each of its parts."""

import pytest
import torch
from torch import Tensor

from leanseek.config import BadInput, Config, read_recipe
from leanseek.model import induction
from leanseek.model.induction import begin_with_induction
from leanseek.model.transformer import Transformer

PERIOD, REPEATS = 24, 4


def begun(*overrides: str) -> tuple[Config, Transformer]:
    config = read_recipe("demo", ("train.induction=true", "model.num_hidden_layers=3", *overrides))
    model, generator = Transformer(config.model), torch.Generator().manual_seed(0)
    model.initialise(config.train.init_std, generator)
    begin_with_induction(model, config.train.init_std, generator)
    return config, model.eval()


def repeated() -> Tensor:
    """Random ids [8, T], the same row again and again."""
    row = torch.randint(5, 4000, (8, PERIOD), generator=torch.Generator().manual_seed(1))
    return row.repeat(1, REPEATS)


@torch.no_grad()
def share_foretold(model: Transformer) -> float:
    """How often the likeliest next id is the right one, from the second time on."""
    assert model.lm_head is not None
    ids = repeated()
    logits = model.lm_head(model(ids, torch.arange(ids.shape[1]).expand_as(ids)))
    return (logits[:, PERIOD:-1].argmax(dim=-1) == ids[:, PERIOD + 1 :]).float().mean().item()


@pytest.mark.parametrize(
    "overrides",
    [(), ("model.q_lora_rank=none",), ("model.qk_nope_head_dim=64",)],
    ids=["demo", "no latent query", "N=64"],
)
def test_what_was_said_once_is_foretold_without_any_training(overrides: tuple[str, ...]) -> None:
    _, model = begun(*overrides)
    assert share_foretold(model) > 0.9


def test_a_random_start_foretells_nothing() -> None:
    config, model = begun()
    model.initialise(config.train.init_std, torch.Generator().manual_seed(0))
    assert share_foretold(model) < 0.02


@pytest.mark.parametrize("part", ["SHARPNESS", "MATCH", "SAID"])
def test_every_part_of_the_circuit_is_needed(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(induction, part, 0.0)
    assert share_foretold(begun()[1]) < 0.3


@torch.no_grad()
def test_the_first_head_looks_at_the_position_before() -> None:
    _, model = begun()
    seen: list[tuple[Tensor, Tensor]] = []
    layer = model.layers["0"].self_attn
    direct = layer.direct

    def watched(q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | None) -> Tensor:
        seen.append((q_rope[:, :, 0], k_rope))
        return direct(q_nope, q_rope, latent, k_rope, mask)

    layer.direct = watched
    ids = repeated()
    model(ids, torch.arange(ids.shape[1]).expand_as(ids))
    q, k = seen[0]
    scores = (q @ k.mT * layer.scale).tril().masked_fill(torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool(), -1e9)
    looked_at = scores.argmax(dim=-1)[:, 1:]
    assert (looked_at == torch.arange(ids.shape[1] - 1)).float().mean() > 0.98


def test_the_rest_of_the_model_begins_as_ever() -> None:
    config, model = begun()
    plain = Transformer(config.model)
    plain.initialise(config.train.init_std, torch.Generator().manual_seed(0))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, plain.get_parameter(name))}
    parts = ("self_attn.kv_a_proj_with_mqa", "self_attn.q_a_proj", "self_attn.q_b_proj", "self_attn.kv_b_proj")
    expected = {f"layers.{i}.{part}.weight" for i in (0, 1) for part in (*parts, "self_attn.o_proj")}
    assert changed == expected | {"embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.num_hidden_layers=1", "two layers"),
        ("model.hidden_size=96", "hidden_size of at least"),
        ("model.q_lora_rank=16", "q_lora_rank of at least 32"),
    ],
)
def test_a_model_without_room_for_it_is_refused(override: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        read_recipe("demo", ("train.induction=true", "model.first_k_dense_replace=0", override))
