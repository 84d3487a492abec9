"""The router, its balance and its bookkeeping against the report's equations, written out."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from leanseek.config import ModelConfig
from leanseek.model.moe import MoE, Router, max_violation, sequence_balance_loss, updated_bias
from tests.oracle import distance, fill, ours, sample, tiny
from tests.twin import choose

CONFIGS: dict[str, dict[str, object]] = {
    "V3": {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 5},
    "one group": {"n_routed_experts": 16, "num_experts_per_tok": 4},
    "one open group": {"n_routed_experts": 12, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 6},
    "raw weights": {"n_group": 2, "topk_group": 1, "norm_topk_prob": False},
    "softmax with bias": {"n_group": 2, "topk_group": 2, "scoring_func": "softmax"},
    "greedy": {"topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False, "n_group": 4},
    "group-limited": {
        "topk_method": "group_limited_greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 16.0,
    },
}


def router_of(config: ModelConfig, dtype: torch.dtype = torch.float64, mean: float = -0.9) -> Any:
    """Random weights, and biases that make most scores negative."""
    router = Router(config).to(dtype)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        router.weight.normal_(0, config.hidden_size**-0.5, generator=generator)
        if router.e_score_correction_bias is not None:
            router.e_score_correction_bias.normal_(mean, 0.3, generator=generator)
    return router


def inputs(batch: int = 3, tokens: int = 20, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, tokens, 32, dtype=dtype, generator=torch.Generator().manual_seed(7))


def by_hand(router: Any, x: Tensor) -> tuple[list[list[int]], list[list[float]], list[list[float]]]:
    """Experts, weights and scores of every token, by a loop."""
    logits = F.linear(x.flatten(0, 1), router.weight)
    scores = (logits.sigmoid() if router.config.scoring_func == "sigmoid" else logits.softmax(-1)).tolist()
    bias = router.e_score_correction_bias
    found = [choose(row, [0.0] * len(row) if bias is None else bias.tolist(), router.config) for row in scores]
    return [experts for experts, _ in found], [weights for _, weights in found], scores


# ── choice and weights ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", CONFIGS)
def test_router_equals_a_loop(name: str) -> None:
    config = tiny(**CONFIGS[name])
    router, x = router_of(config), inputs()
    experts, weights = router(x)
    expected_experts, expected_weights, scores = by_hand(router, x)
    assert experts.tolist() == expected_experts
    assert torch.allclose(weights, torch.tensor(expected_weights, dtype=torch.float64), rtol=1e-13)
    assert all(len(set(row)) == config.num_experts_per_tok for row in expected_experts)
    if config.topk_method != "greedy":
        size = config.n_routed_experts // config.n_group
        assert all(len({i // size for i in row}) <= config.topk_group for row in expected_experts)
    if config.norm_topk_prob:
        assert torch.allclose(weights.sum(dim=-1), torch.tensor(config.routed_scaling_factor, dtype=torch.float64))
    if router.e_score_correction_bias is not None:
        bias = router.e_score_correction_bias.tolist()
        assert min(scores[t][i] + bias[i] for t, row in enumerate(expected_experts) for i in row) < 0


def test_a_hand_made_bias_decides() -> None:
    # Scores of 0.5 everywhere, groups {0,1}, {2,3}, {4,5}, {6,7}: two stay open, three experts are taken.
    config = tiny(n_group=4, topk_group=2, num_experts_per_tok=3)
    router: Any = Router(config).double()
    torch.nn.init.zeros_(router.weight)
    # Sums of both: −0.3, −1.6, −1.1, −1.4. By their best, −0.1, 0.9, −0.5, −0.4, the second group would be open; and if
    # closed experts stood at zero, they would beat every open one.
    bias = [-0.6, -0.7, -3.0, 0.4, -1.1, -1.0, -0.9, -1.5]
    router.e_score_correction_bias.copy_(torch.tensor(bias))
    experts, weights = router(inputs(1, 1))
    assert experts.tolist() == [[0, 1, 5]]  # at −0.1, −0.2 and −0.5
    assert weights.tolist() == [pytest.approx([2.5 / 3] * 3)]


def test_moe_output_equals_a_loop() -> None:
    config = tiny(**CONFIGS["V3"], n_shared_experts=2)
    layer: Any = MoE(config).double()
    fill(layer)
    x = inputs()
    experts, weights, _ = by_hand(layer.gate, x)
    expected = []
    for t, token in enumerate(x.flatten(0, 1)):
        shared = layer.shared_experts
        y = shared.down_proj.weight @ (F.silu(shared.gate_proj.weight @ token) * (shared.up_proj.weight @ token))
        for i, g in zip(experts[t], weights[t], strict=True):
            gate, up = layer.experts.gate_up_proj[i].chunk(2)
            y = y + g * (layer.experts.down_proj[i] @ (F.silu(gate @ token) * (up @ token)))
        expected.append(y)
    assert distance(layer(x).flatten(0, 1), torch.stack(expected)) < 1e-13
    assert MoE(tiny(n_shared_experts=0)).shared_experts is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_scores_are_at_least_fp32(dtype: torch.dtype) -> None:
    router, x = router_of(tiny(), torch.float32), inputs(dtype=dtype)
    _, weights = router(x)
    assert weights.dtype == torch.promote_types(dtype, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, under_autocast = router(x)
    assert torch.equal(under_autocast, weights)


# ── the bias ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_bias_update_by_hand() -> None:
    bias, load = torch.tensor([0.5, -0.1, 0.0, 2.0]), torch.tensor([10, 2, 6, 6])  # the mean is 6
    assert updated_bias(bias, load, 0.001).tolist() == pytest.approx([0.499, -0.099, 0.0, 2.0])
    assert torch.equal(updated_bias(bias, load, 0.0), bias)
    uneven = torch.tensor([9, 1, 1, 1])  # steps −γ, +γ, +γ, +γ: their mean is γ/2
    assert updated_bias(bias, uneven, 0.1).tolist() == pytest.approx([0.4, 0.0, 0.1, 2.1])
    centred = updated_bias(bias, uneven, 0.1, centred=True)
    assert centred.tolist() == pytest.approx([0.35, -0.05, 0.05, 2.05])
    assert centred.sum().item() == pytest.approx(bias.sum().item())
    assert bias.tolist() == pytest.approx([0.5, -0.1, 0.0, 2.0])  # the caller's is left alone


def test_bias_update_survives_large_counts() -> None:
    load = torch.full((8,), 10**15)
    load[0] += 8  # one above the mean of 10¹⁵ + 1 … in FP32 all would look even
    step = updated_bias(torch.zeros(8), load, 1.0)
    assert step.tolist() == [-1.0] + [1.0] * 7


def test_bias_updates_even_out_the_load() -> None:
    router, x = router_of(tiny(**CONFIGS["V3"]), torch.float32, mean=0.0), inputs(8, 64, torch.float32)
    violations = []
    for _ in range(150):
        router.load.zero_()
        router(x)
        violations.append(max_violation(router.load))
        router.e_score_correction_bias.copy_(updated_bias(router.e_score_correction_bias, router.load, 0.01))
    assert violations[0] > 1.0
    assert violations[-1] < 0.15


def test_max_violation_by_hand() -> None:
    assert max_violation(torch.tensor([4, 4, 4, 4])) == 0
    assert max_violation(torch.tensor([9, 1, 1, 1])) == pytest.approx(2.0)
    assert max_violation(torch.zeros(4, dtype=torch.int64)) == 0


def test_bias_is_state_and_nothing_else_is() -> None:
    model = ours(tiny(n_group=4, topk_group=2, first_k_dense_replace=1, num_nextn_predict_layers=1))
    buffers = [name for name, _ in model.named_buffers() if name in model.state_dict()]
    assert buffers == ["layers.1.mlp.gate.e_score_correction_bias", "mtp.2.block.mlp.gate.e_score_correction_bias"]
    assert list(model.routers()) == ["layers.1.mlp.gate", "mtp.2.block.mlp.gate"]
    assert not any("bias" in name for name, _ in model.named_parameters())
    assert Router(tiny(topk_method="greedy")).e_score_correction_bias is None


def test_buffers_are_never_rounded() -> None:
    value = torch.tensor(0.1234567)
    for cast in (
        lambda model: model.bfloat16(),
        lambda model: model.half(),
        lambda model: model.to(torch.bfloat16),
        lambda model: model.to("cpu", torch.bfloat16),
        lambda model: model.bfloat16().float(),
    ):
        model = ours(tiny())
        router = model.layers["0"].mlp.gate
        for buffer in (router.e_score_correction_bias, router.balance_weight, router.balance_loss):
            buffer.fill_(value)
        cast(model)
        for buffer in (router.e_score_correction_bias, router.balance_weight, router.balance_loss):
            assert buffer.dtype == torch.float32
            assert (buffer == value).all()
        assert router.load.dtype == torch.int64
        assert "e_score_correction_bias" in router.state_dict()
    assert ours(tiny()).double().layers["0"].mlp.gate.e_score_correction_bias.dtype == torch.float64
    assert ours(tiny()).to("meta").layers["0"].mlp.gate.e_score_correction_bias.is_meta


# ── the sequence-wise balance loss ────────────────────────────────────────────────────────────────────────────────


def slow_balance_loss(scores: list[list[float]], k: int) -> float:
    """Report eq. 17-20 without α, for the scores of one sequence."""
    tokens, n = len(scores), len(scores[0])
    loss = 0.0
    for i in range(n):
        f = n / (k * tokens) * sum(i in sorted(range(n), key=lambda j: -row[j])[:k] for row in scores)
        p = sum(row[i] / sum(row) for row in scores) / tokens
        loss += f * p
    return loss


def test_balance_loss_by_hand() -> None:
    scores = torch.rand(3, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    expected = [slow_balance_loss(sequence.tolist(), 2) for sequence in scores]
    assert sequence_balance_loss(scores, 2).tolist() == pytest.approx(expected, rel=1e-14)
    # Two tokens, four experts, one chosen. f = 4/2 · [1, 1, 0, 0] and P = [.4, .3, .2, .1]: 2 · .7.
    two = torch.tensor([[[0.6, 0.2, 0.1, 0.1], [0.2, 0.4, 0.3, 0.1]]], dtype=torch.float64)
    assert sequence_balance_loss(two, 1).tolist() == pytest.approx([1.4])
    even = torch.eye(4, dtype=torch.float64)[None] + 0.1
    assert sequence_balance_loss(even, 1).tolist() == pytest.approx([1.0])


def test_balance_loss_has_gradient_through_the_probabilities_alone() -> None:
    scores = torch.rand(1, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    scores.requires_grad_()
    sequence_balance_loss(scores, 2).sum().backward()
    chosen = scores.detach().topk(2, dim=-1).indices
    f = torch.bincount(chosen.flatten(), minlength=4).double() * 4 / (2 * 5)
    # ∂P_i / ∂s_jt = (δ_ij Σ − s_it) / (T Σ²)
    total = scores.detach().sum(dim=-1, keepdim=True)
    expected = (f * total - (f * scores.detach()).sum(dim=-1, keepdim=True)) / (5 * total**2)
    assert scores.grad is not None
    assert distance(scores.grad, expected) < 1e-13


def test_balance_loss_joins_the_graph_with_its_weight() -> None:
    config = tiny(**CONFIGS["V3"])
    cotangent = torch.randn(3, 20, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(10))

    def gradients(weight: float, explicit: bool) -> tuple[list[Tensor], float]:
        layer = MoE(config).double()
        fill(layer)
        layer.gate.balance_weight.fill_(0.0 if explicit else weight)
        x = inputs().requires_grad_()
        loss = (layer(x) * cotangent).sum() * 3.0  # the injected part must not see this factor
        if explicit:
            scores = F.linear(x, layer.gate.weight).sigmoid()
            added = weight * sequence_balance_loss(scores, config.num_experts_per_tok).sum()
            loss = loss + added
        found = torch.autograd.grad(loss, [x, *layer.parameters()])
        return list(found), added.item() if explicit else layer.gate.balance_loss.item()

    (injected, booked), (added, value), (without, nothing) = (
        gradients(50.0, False),
        gradients(50.0, True),
        gradients(0.0, False),
    )
    assert booked == pytest.approx(value, rel=1e-13)
    assert nothing == 0
    assert all(distance(a, b) < 1e-12 for a, b in zip(injected, added, strict=True))
    assert distance(injected[0], without[0]) > 1e-3  # it does matter


def test_balance_loss_ignores_bias_and_groups() -> None:
    plain, biased = router_of(tiny()), router_of(tiny(n_group=4, topk_group=1, num_experts_per_tok=2))
    biased.config = tiny(n_group=4, topk_group=2)
    for router in (plain, biased):
        router.balance_weight.fill_(1.0)
        _, weights = router(inputs())
        weights.sum().backward()
    plain.e_score_correction_bias.zero_()
    assert plain.balance_loss.item() == biased.balance_loss.item() > 0
    assert plain.load.tolist() != biased.load.tolist()


# ── counting once ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_load_counts_every_choice_and_adds_up() -> None:
    router, x = router_of(tiny(**CONFIGS["V3"])), inputs()
    first, _ = router(x)
    expected = torch.bincount(first.flatten(), minlength=16)
    assert torch.equal(router.load, expected)
    assert router.load.sum() == 60 * 5
    second, _ = router(-x)
    assert torch.equal(router.load, expected + torch.bincount(second.flatten(), minlength=16))


def test_nothing_is_counted_outside_training() -> None:
    router, x = router_of(tiny()).eval(), inputs().requires_grad_()
    router.balance_weight.fill_(1.0)
    _, weights = router(x)
    weights.sum().backward()
    assert not router.load.any()
    assert router.balance_loss == 0


def keep_routing(ctx: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    if op is torch.ops.leanseek.route.default:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("mode", ["stored", "recomputed, routing kept", "all recomputed"])
def test_recomputation_counts_once_where_routing_is_kept(mode: str) -> None:
    config = tiny(**CONFIGS["V3"])
    plain, other = ours(config), ours(config)
    ids, positions = sample(config)
    for model in (plain, other):
        for router in model.routers().values():
            router.balance_weight.fill_(0.1)
    contexts = partial(create_selective_checkpoint_contexts, keep_routing)
    if mode != "stored":
        for block in other.layers.values():
            extra: dict[str, Any] = {"context_fn": contexts} if "kept" in mode else {}
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, **extra)
    for model in (plain, other):
        model(ids, positions).square().sum().backward()
    for name, router in plain.routers().items():
        twice = 2 if mode == "all recomputed" else 1  # what must-save is for
        assert torch.equal(other.routers()[name].load, twice * router.load)
        assert router.load.sum() == 2 * 24 * config.num_experts_per_tok
        # The loss is booked in the backward pass, which runs once in any case.
        assert router.balance_loss > 0
        assert other.routers()[name].balance_loss == router.balance_loss
    theirs = dict(other.named_parameters())
    for name, parameter in plain.named_parameters():
        if not name.startswith("lm_head"):
            assert torch.equal(theirs[name].grad, parameter.grad), name


def test_sequences_are_balanced_one_by_one() -> None:
    # Two rows of one batch book what they book apart: the loss is per sequence, its weight carries the mean.
    together, apart = router_of(tiny()), router_of(tiny())
    x = inputs(2, 12)
    together.balance_weight.fill_(0.5)
    together(x)[1].sum().backward()
    apart.balance_weight.fill_(0.5)
    for row in x:
        apart(row[None])[1].sum().backward()
    assert apart.balance_loss.item() == pytest.approx(together.balance_loss.item(), rel=1e-12)
    assert distance(apart.weight.grad, together.weight.grad) < 1e-12
    assert torch.equal(apart.load, together.load)
