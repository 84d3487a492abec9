"""Rows cut over ranks, matrices cut over ranks: what they compute is what one process computes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from leanseek.config import Config, read_recipe
from leanseek.hub import export_release, import_release
from leanseek.model.transformer import Transformer
from leanseek.ops.loss import linear_cross_entropy
from leanseek.parallel.context import Context, cut_rows
from leanseek.parallel.tensor import cut_matrices, joined
from leanseek.serve.llm import LLM
from leanseek.serve.sampling import Sampling
from tests.pool import Pool, ranks_of
from tests.runs import make_run, tokenizer
from tests.runs import model_of as served_model
from tests.tiny import RECIPE

LENGTH = 32


def config_of(*overrides: str) -> Config:
    return read_recipe(str(RECIPE), ("train.dtype=fp32", "train.device=cpu", *overrides))


def model_of(config: Config) -> Transformer:
    """Unit-scale activations, random norms and non-zero biases, in FP64: at initialisation almost any fault passes."""
    model = Transformer(config.model, torch.float64).double()
    generator = torch.Generator().manual_seed(5)
    model.initialise(0.2, generator)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" in name:
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("bias"):
                tensor.uniform_(-0.1, 0.1, generator=generator)
    return model.train()


def rows_of(config: Config) -> Tensor:
    return torch.randint(config.model.vocab_size, (3, LENGTH + 1), generator=torch.Generator().manual_seed(6))


def learn(model: Transformer, rows: Tensor, context: Context | None) -> dict[str, Any]:
    """Loss sums, gradients, loads and balance losses of a batch, or of this rank's share of it."""
    ids, targets = rows[:, :-1], rows[:, 1:]
    positions = torch.arange(LENGTH).expand_as(ids)
    for router in model.routers().values():
        router.balance_weight = torch.tensor(0.3, dtype=torch.float64)
    depths = range(1, len(model.mtp) + 1)
    if context is None:
        hidden = model(ids, positions)
        further = model.predict_further(hidden, ids, positions)
    else:
        where = context.take(positions)
        hidden = model(context.take(ids), where, cache=[context] * len(model.layers))
        further = model.predict_further(hidden, [context.take(ids[:, k:]) for k in depths], where, cache=context)
    losses = []
    for k, state in enumerate([hidden, *further]):
        wanted = targets[:, k:] if context is None else context.take(targets[:, k:])
        losses.append(linear_cross_entropy(state.flatten(0, 1), model.lm_head.weight, wanted.flatten()))  # type: ignore[union-attr]
    torch.stack(losses).sum().backward()
    return {
        "losses": torch.stack(losses).detach().numpy(),
        "balance": [router.balance_loss.numpy() for router in model.routers().values()],
        "loads": [router.load.numpy() for router in model.routers().values()],
        "gradients": {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None},
    }


OVERRIDES = ("model.num_nextn_predict_layers=2", "model.num_attention_heads=4")


def in_context(rank: int, world: int) -> dict[str, Any]:
    config = config_of(*OVERRIDES)
    group = dist.group.WORLD
    assert group is not None
    return learn(cut_rows(model_of(config), group), rows_of(config), Context(LENGTH, group))


def test_context(pool: Pool) -> None:
    config = config_of(*OVERRIDES)
    whole = learn(model_of(config), rows_of(config), None)
    for world in (2, 4):
        found = pool.run(world, in_context)
        total = lambda pick: sum(pick(each) for each in found)  # noqa: E731, B023
        assert abs(total(lambda f: f["losses"]) - whole["losses"]).max() < 1e-10
        for i, load in enumerate(whole["loads"]):
            assert (total(lambda f, i=i: f["loads"][i]) == load).all()
            assert abs(total(lambda f, i=i: f["balance"][i]) - whole["balance"][i]).max() < 1e-12
        for name, gradient in whole["gradients"].items():
            assert abs(total(lambda f, n=name: f["gradients"][n]) - gradient).max() < 1e-9 * max(
                1, abs(gradient).max()
            ), name


def in_tensor(rank: int, world: int) -> dict[str, Any]:
    config = config_of(*OVERRIDES)
    group = dist.group.WORLD
    assert group is not None
    return learn(cut_matrices(model_of(config), group), rows_of(config), None)


def test_tensor(pool: Pool) -> None:
    config = config_of(*OVERRIDES)
    whole = learn(model_of(config), rows_of(config), None)
    for world in (2, 4):
        found = pool.run(world, in_tensor)
        for f in found:
            assert abs(f["losses"] - whole["losses"]).max() < 1e-10
            for i, load in enumerate(whole["loads"]):
                assert (f["loads"][i] == load).all()
                assert abs(f["balance"][i] - whole["balance"][i]).max() < 1e-12
        for name, gradient in whole["gradients"].items():
            ours = joined(name, [torch.from_numpy(f["gradients"][name]) for f in found]).numpy()
            assert abs(ours - gradient).max() < 1e-9 * max(1, abs(gradient).max()), name


# ── serving on several ranks ──────────────────────────────────────────────────────────────────────────────────────

PROMPTS = ["A small fox", "Later the rain came, and the fox slept", "the"]


def says(rank: int, world: int, run: str) -> list[list[int]]:
    ranks = ranks_of(config_of(f"mesh.tp={world}", "model.num_attention_heads=4"))
    llm = LLM.load(run, dtype=torch.float64, ranks=ranks)
    assert llm.model.layers["0"].self_attn.heads == 4 // world
    drawn = llm.generate_many(PROMPTS, Sampling(temperature=0.7, max_tokens=20, seed=3))
    return [completion.token_ids for completion in drawn]


@pytest.mark.parametrize("resting", ["fp32", "fp8"])
def test_ranks_with_shares_of_the_weights_say_what_one_process_says(pool: Pool, tmp_path: Path, resting: str) -> None:
    vocabulary = tokenizer()
    run = make_run(
        tmp_path / "run", served_model(vocabulary, num_attention_heads=4, num_nextn_predict_layers=1), vocabulary
    )
    if resting == "fp8":
        export_release(run, tmp_path / "released", "fp8")
        import_release(tmp_path / "released", run := tmp_path / "imported")
    llm = LLM.load(run, dtype=torch.float64)
    alone = [c.token_ids for c in llm.generate_many(PROMPTS, Sampling(temperature=0.7, max_tokens=20, seed=3))]
    assert len({tuple(tokens) for tokens in alone}) == len(PROMPTS)
    for world in (2, 4):
        assert pool.run(world, says, str(run)) == [alone] * world
