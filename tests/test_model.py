"""The model against transformers' own, against a slow twin written from the report's equations, and against itself."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from leanseek.config import ModelConfig, RopeScaling, read_recipe, recipe_names
from leanseek.model import mla, moe, rope
from leanseek.model.mla import MLA
from leanseek.model.moe import Router
from leanseek.model.mtp import MTPModule
from leanseek.model.rope import rope_frequencies, rotary, softmax_scale
from leanseek.model.transformer import SHARES, Transformer
from leanseek.ops.attention import attention_reference
from leanseek.ops.backend import PLAIN
from leanseek.ops.experts import grouped_linear_reference
from leanseek.ops.heads import apply_rope, turned
from leanseek.ops.loss import IGNORE, linear_cross_entropy
from leanseek.ops.routing import route
from leanseek.plan.count import flops_per_token, forward_flops_per_token, parameters
from tests.oracle import (
    differences,
    distance,
    fill,
    ours,
    same_mtp,
    same_weights,
    sample,
    their_mtp_name,
    their_name,
    tiny,
)
from tests.twin import slow_losses, slow_states

TOLERANCE = 2e-5  # FP32 rounding leaves 1e-6 to 4e-6 here

# 16 positions before YaRN, so that most of the sample lies beyond them.
YARN = {"factor": 16.0, "original_max_position_embeddings": 16}
YARN_V2 = YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}
V2 = {
    "model_type": "deepseek_v2",
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "n_shared_experts": 2,
}
V2_GROUPS = {"topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0}

GRID: dict[str, dict[str, object]] = {
    "plain": {},
    "two groups": {"n_group": 2, "topk_group": 1},
    "four groups": {"n_group": 4, "topk_group": 2},
    "four groups, all open": {"n_group": 4, "topk_group": 4},
    "sixteen experts": {"n_routed_experts": 16, "n_group": 4, "topk_group": 3, "num_experts_per_tok": 6},
    "one dense layer": {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1},
    "two dense layers": {"n_group": 2, "topk_group": 2, "first_k_dense_replace": 2, "num_hidden_layers": 3},
    "only dense layers": {"first_k_dense_replace": 2},
    "null q_lora_rank": {"q_lora_rank": None, "n_group": 2, "topk_group": 1},
    "two shared experts": {"n_shared_experts": 2, "first_k_dense_replace": 1},
    "raw weights": {"norm_topk_prob": False},
    "large epsilon": {"rms_norm_eps": 0.03},
    "wide values": {"v_head_dim": 20},
    "another theta": {"rope_theta": 50.0, "qk_rope_head_dim": 12},
    "YaRN": {"rope_scaling": YARN, "n_group": 4, "topk_group": 2},
    "YaRN, null q_lora_rank": {"rope_scaling": YARN, "q_lora_rank": None, "first_k_dense_replace": 1},
    "YaRN, one boundary": {"rope_scaling": YARN | {"beta_fast": 1, "beta_slow": 1, "factor": 32.0}},
    "YaRN, two mscales": {"rope_scaling": YARN | {"mscale": 0.5, "mscale_all_dim": 1.0}},
    "V2-Lite": V2 | {"q_lora_rank": None, "first_k_dense_replace": 1},
    "V2-Lite, YaRN": V2 | {"q_lora_rank": None, "rope_scaling": YARN_V2},
    "V2": V2 | V2_GROUPS | {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1},
    "V2, one open group": V2 | V2_GROUPS | {"n_group": 2, "topk_group": 1, "rms_norm_eps": 0.01},
    "V2, YaRN": V2 | V2_GROUPS | {"n_group": 4, "topk_group": 3, "rope_scaling": YARN_V2, "n_shared_experts": 1},
}


def shaped(changes: dict[str, object]) -> ModelConfig:
    """TINY with changes; under YaRN the length that transformers expects beside the factor."""
    if yarn := changes.get("rope_scaling"):
        assert isinstance(yarn, dict)
        reach = int(yarn["factor"] * yarn["original_max_position_embeddings"])
        changes = changes | {"max_position_embeddings": reach}
    return tiny(**changes)


# ── transformers ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", GRID)
def test_logits_and_every_gradient_equal_transformers(name: str) -> None:
    # transformers 5.23 gives V2 the same mscale² on the softmax scale as V3, which is what the released V2 code does;
    # mscale_all_dim = 0, which no release has, it reads in its own way and is not compared.
    config = shaped(GRID[name])
    model = ours(config)
    found = differences(model, same_weights(model), *sample(config))
    assert max(found.values()) < TOLERANCE, found
    for router in model.routers().values():
        assert router.load.sum() == 2 * 24 * config.num_experts_per_tok


def test_positions_far_beyond_the_original_length() -> None:
    config = shaped({"rope_scaling": YARN})
    model = ours(config)
    assert differences(model, same_weights(model), *sample(config, start=200))["logits"] < TOLERANCE


# ── planted faults: each must be far above the tolerance ──────────────────────────────────────────────────────────

GROUPED = shaped({"n_group": 4, "topk_group": 2, "rope_scaling": YARN, "rms_norm_eps": 0.03})
Weigh = Callable[[Router, Tensor, Tensor], Tensor]


def router_that_weighs(weigh: Weigh) -> Callable[[Router, Tensor], tuple[Tensor, Tensor]]:
    """A router that chooses rightly and weighs as `weigh(router, scores, experts)` says."""
    right = Router.forward

    def forward(self: Router, x: Tensor) -> tuple[Tensor, Tensor]:
        experts, _ = right(self, x)
        return experts, weigh(self, F.linear(x.flatten(0, 1), self.weight).sigmoid(), experts)

    return forward


def biased_weights(router: Router, scores: Tensor, experts: Tensor) -> Tensor:
    assert router.e_score_correction_bias is not None
    weights = (scores + router.e_score_correction_bias).gather(1, experts)
    return weights / weights.sum(dim=-1, keepdim=True) * router.config.routed_scaling_factor


def scaled_too_early(router: Router, scores: Tensor, experts: Tensor) -> Tensor:
    weights = scores.gather(1, experts) * router.config.routed_scaling_factor
    return weights / weights.sum(dim=-1, keepdim=True)


def normalised_over_all(router: Router, scores: Tensor, experts: Tensor) -> Tensor:
    return (scores / scores.sum(dim=-1, keepdim=True)).gather(1, experts) * router.config.routed_scaling_factor


def half_split_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin, width = cos[:, None], sin[:, None], cos.shape[-1]
    nope, first, second = x.transpose(1, 2).split([x.shape[-1] - 2 * width, width, width], dim=-1)
    return torch.cat((nope, first * cos - second * sin, second * cos + first * sin), dim=-1)


def route_by_maximum(scores: Tensor, load: Tensor, k: int, n_group: int, topk_group: int, group_top: int) -> Tensor:
    return route(scores, load, k, n_group, topk_group, 1)


def route_by_sum(scores: Tensor, load: Tensor, k: int, n_group: int, topk_group: int, group_top: int) -> Tensor:
    return route(scores, load, k, n_group, topk_group, 2)


def route_closing_with_zero(
    scores: Tensor, load: Tensor, k: int, n_group: int, topk_group: int, group_top: int
) -> Tensor:
    groups = scores.view(scores.shape[0], n_group, -1)
    best = groups.topk(group_top, dim=-1).values.sum(dim=-1).topk(topk_group, dim=-1).indices
    closed = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(1, best, False)
    return groups.masked_fill(closed[..., None], 0.0).flatten(1).topk(k, dim=-1).indices


def route_without_groups(scores: Tensor, load: Tensor, k: int, n_group: int, topk_group: int, group_top: int) -> Tensor:
    return route(scores, load, k, 1, 1, 1)


FAULTS: dict[str, tuple[object, str, object]] = {
    "mscale to the first power": (mla, "softmax_scale", lambda c: math.sqrt(softmax_scale(c) * c.qk_head_dim**-0.5)),
    "no mscale": (mla, "softmax_scale", lambda c: c.qk_head_dim**-0.5),
    "half-split RoPE": (mla, "turned", half_split_rope),
    "RoPE turned backwards on queries and keys": (mla, "turned", lambda x, cos, sin: turned(x, cos, -sin)),
    "no YaRN": (rope, "rope_frequencies", lambda c: rope_frequencies(c.model_copy(update={"rope_scaling": None}))),
    "group score by maximum": (moe, "route", route_by_maximum),
    "closed groups at zero": (moe, "route", route_closing_with_zero),
    "no groups": (moe, "route", route_without_groups),
    "bias in the weights": (Router, "forward", router_that_weighs(biased_weights)),
    "scaling before normalisation": (Router, "forward", router_that_weighs(scaled_too_early)),
    "normalised over all experts": (Router, "forward", router_that_weighs(normalised_over_all)),
    "latent norms with rms_norm_eps": (mla, "LATENT_NORM_EPS", GROUPED.rms_norm_eps),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = same_weights(ours(GROUPED))
    assert differences(ours(GROUPED), oracle, *sample(GROUPED))["logits"] < TOLERANCE
    owner, attribute, fault = FAULTS[name]
    monkeypatch.setattr(owner, attribute, fault)
    assert differences(ours(GROUPED), oracle, *sample(GROUPED))["logits"] > 100 * TOLERANCE


def no_kv_norm(block: Any) -> None:
    block.self_attn.kv_a_layernorm = nn.Identity()


def no_q_norm(block: Any) -> None:
    block.self_attn.q_a_layernorm = nn.Identity()


def no_bias(block: Any) -> None:
    block.mlp.gate.e_score_correction_bias.zero_()


def no_shared_expert(block: Any) -> None:
    block.mlp.shared_experts = None


def up_before_gate(block: Any) -> None:
    block.mlp.experts.gate_up_proj.copy_(torch.cat(block.mlp.experts.gate_up_proj.chunk(2, dim=1)[::-1], dim=1))


def value_before_key(block: Any) -> None:
    heads = block.self_attn.kv_b_proj.weight.unflatten(0, (GROUPED.num_attention_heads, -1))
    block.self_attn.kv_b_proj.weight.copy_(heads.roll(GROUPED.v_head_dim, dims=1).flatten(0, 1))


@pytest.mark.parametrize(
    "fault",
    [no_kv_norm, no_q_norm, no_bias, no_shared_expert, up_before_gate, value_before_key],
    ids=lambda f: f.__name__,
)
def test_faults_in_one_layer_are_seen(fault: Callable[[Any], None]) -> None:
    model = ours(GROUPED)
    oracle = same_weights(model)
    with torch.no_grad():
        fault(model.layers["1"])
        ids, positions = sample(GROUPED)
        wrong = model.lm_head(model(ids, positions))
        right = oracle(input_ids=ids, position_ids=positions, use_cache=False).logits
    assert distance(wrong, right) > 100 * TOLERANCE


def test_v2_group_score_by_sum_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    config = shaped(GRID["V2"])
    oracle = same_weights(ours(config))
    monkeypatch.setattr(moe, "route", route_by_sum)
    assert differences(ours(config), oracle, *sample(config))["logits"] > 100 * TOLERANCE


# ── multi-token prediction ────────────────────────────────────────────────────────────────────────────────────────


def with_mtp(depths: int, **changes: object) -> ModelConfig:
    return tiny(num_nextn_predict_layers=depths, n_group=4, topk_group=2, first_k_dense_replace=1, **changes)


def our_losses(model: Any, ids: Tensor, positions: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """States and loss sums of the main model and of every depth."""
    hidden = model(ids, positions)
    states = [hidden, *model.predict_further(hidden, ids, positions)]
    losses = [
        linear_cross_entropy(state[:, :-1].flatten(0, 1), model.lm_head.weight, ids[:, k + 1 :].flatten())
        for k, state in enumerate(states)
    ]
    return states, losses


def together(losses: list[Tensor]) -> Tensor:
    return losses[0] + 0.3 / max(len(losses) - 1, 1) * sum(losses[1:])


def mtp_against_transformers(config: ModelConfig) -> dict[str, float]:
    model = ours(config)
    oracle = same_weights(model)
    modules = same_mtp(model, oracle)
    ids, positions = sample(config)
    base = oracle.get_decoder()
    hidden = base(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    embedded = base.embed_tokens(ids)
    their_states = [hidden]
    for k in range(1, config.num_nextn_predict_layers + 1):
        kept = ids.shape[1] - k
        hidden = modules.forward_layer(k - 1, hidden[:, :kept], positions[:, k:], None, inputs_embeds=embedded[:, k:])
        their_states.append(hidden)
    their_losses = [
        F.cross_entropy(oracle.lm_head(state[:, :-1]).flatten(0, 1), ids[:, k + 1 :].flatten(), reduction="sum")
        for k, state in enumerate(their_states)
    ]
    together(their_losses).backward()
    states, losses = our_losses(model, ids, positions)
    together(losses).backward()
    found = {f"states {k}": distance(a, b) for k, (a, b) in enumerate(zip(states, their_states, strict=True))}
    found |= {f"loss {k}": distance(a, b) for k, (a, b) in enumerate(zip(losses, their_losses, strict=True))}
    main, further = dict(oracle.named_parameters()), dict(modules.named_parameters())
    for name, parameter in model.named_parameters():
        mtp = name.startswith("mtp.")
        theirs = further[their_mtp_name(name, config.num_hidden_layers)] if mtp else main[their_name(name)]
        found[name] = distance(parameter.grad, theirs.grad)
    return found


@pytest.mark.parametrize(
    "config",
    [with_mtp(1), with_mtp(2, rope_scaling=YARN), with_mtp(3), with_mtp(1, rms_norm_eps=0.03, q_lora_rank=None)],
    ids=["1", "2, YaRN", "3", "1, epsilon"],
)
def test_mtp_equals_transformers(config: ModelConfig) -> None:
    found = mtp_against_transformers(config)
    assert max(found.values()) < TOLERANCE, found


def test_mtp_concatenation_the_other_way_round_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden_first(self: MTPModule, embedding: Tensor, hidden: Tensor, *rest: object) -> Tensor:
        x = self.eh_proj(torch.cat((self.hnorm(hidden), self.enorm(embedding)), dim=-1))
        return self.norm(self.block(x, *rest))

    monkeypatch.setattr(MTPModule, "forward", hidden_first)
    found = mtp_against_transformers(with_mtp(1))
    assert found["states 0"] < TOLERANCE
    assert found["states 1"] > 100 * TOLERANCE


def test_mtp_one_token_late_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = MTPModule.forward
    monkeypatch.setattr(MTPModule, "forward", lambda self, e, *rest: right(self, e.roll(1, dims=1), *rest))
    assert mtp_against_transformers(with_mtp(1))["states 1"] > 100 * TOLERANCE


@pytest.mark.parametrize("depths", [1, 2, 3])
def test_mtp_equals_a_slow_twin_and_shares_embedding_and_head(depths: int) -> None:
    model = ours(with_mtp(depths, rope_scaling=YARN), dtype=torch.float64)
    ids, positions = sample(model.config, tokens=9)
    states, losses = our_losses(model, ids, positions)
    together(losses).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()

    cos, sin = (table[0].double() for table in rotary(positions, model.config))
    embeddings, heads = (
        tuple(weight.detach().clone().requires_grad_() for _ in range(2))
        for weight in (model.embed_tokens.weight, model.lm_head.weight)
    )
    total: Any = 0.0
    sums = [0.0] * (depths + 1)
    for b, row in enumerate(ids.tolist()):
        slow = slow_states(model, row, (cos, sin), embeddings)
        for k, depth in enumerate(slow):
            assert distance(states[k][b], torch.stack(depth)) < 1e-11
        slow_sums = slow_losses(slow, row, heads)
        sums = [a + b.item() for a, b in zip(sums, slow_sums, strict=True)]
        total = total + together(slow_sums)
    total.backward()
    assert [loss.item() for loss in losses] == pytest.approx(sums, rel=1e-12)
    for name, parameter in model.named_parameters():
        if name not in ("embed_tokens.weight", "lm_head.weight"):
            assert distance(gradients[name], parameter.grad) < 1e-10, name
    for name, uses in (("embed_tokens.weight", embeddings), ("lm_head.weight", heads)):
        assert all(use.grad.abs().max() > 1e-2 for use in uses)
        assert distance(gradients[name], uses[0].grad + uses[1].grad) < 1e-10


# ── positions ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_yarn_as_published() -> None:
    released = {"factor": 40.0, "original_max_position_embeddings": 4096}
    v3 = read_recipe("v3").model.model_copy(update={"rope_scaling": RopeScaling.model_validate(released)})
    plain = [10000 ** (-2 * j / 64) for j in range(32)]
    assert rope_frequencies(read_recipe("v3").model) == pytest.approx(plain, rel=1e-15)
    scaled = rope_frequencies(v3)
    assert scaled[:11] == pytest.approx(plain[:11], rel=1e-15)  # low = 10
    assert scaled[23:] == pytest.approx([f / 40 for f in plain[23:]], rel=1e-15)  # high = 23
    for j in range(11, 23):
        ramp = (j - 10) / 13
        assert scaled[j] == pytest.approx(plain[j] / 40 * ramp + plain[j] * (1 - ramp), rel=1e-14)
        assert plain[j] / 40 < scaled[j] < plain[j]
    assert softmax_scale(v3) * 192**0.5 == pytest.approx(1.87385421, abs=5e-9)
    assert softmax_scale(v3) == pytest.approx(0.1352338, abs=5e-8)
    lite = RopeScaling.model_validate(released | {"mscale": 0.707, "mscale_all_dim": 0.707})
    assert softmax_scale(v3.model_copy(update={"rope_scaling": lite})) * 192**0.5 == pytest.approx(1.5896262, abs=5e-8)
    assert softmax_scale(read_recipe("v3").model) == 192**-0.5


def test_rotary_turns_pairs_by_position_times_frequency() -> None:
    config = tiny()
    x = torch.randn(3, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2, 3, 50, 51, 200]]).expand(3, -1)
    turned = apply_rope(x, *rotary(positions, config))
    for b in range(3):
        for t in range(7):
            for j in range(4):
                z = complex(x[b, t, 2 * j], x[b, t, 2 * j + 1])
                angle = positions[b, t].item() * 10000 ** (-2 * j / 8)
                expected = z * complex(math.cos(angle), math.sin(angle))
                assert complex(turned[b, t, 2 * j], turned[b, t, 2 * j + 1]) == pytest.approx(expected, abs=3e-5)


# ── the two forms of attention, and the cache ─────────────────────────────────────────────────────────────────────


class ListCache:
    """Keeps everything it was given."""

    def __init__(self) -> None:
        self.latent: list[Tensor] = []
        self.keys: list[Tensor] = []

    def append(self, latent: Tensor, rope_key: Tensor) -> tuple[Tensor, Tensor]:
        self.latent.append(latent)
        self.keys.append(rope_key)
        return torch.cat(self.latent, dim=1), torch.cat(self.keys, dim=1)


SHAPES: dict[str, dict[str, object]] = {
    "tiny": {},
    "YaRN": {"rope_scaling": YARN},
    "null q": {"q_lora_rank": None, "qk_nope_head_dim": 4, "v_head_dim": 20},
    "narrow latent": {"kv_lora_rank": 4, "num_attention_heads": 4},
    "value embeddings": {"value_embeddings": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_absorbed_equals_direct(shape: str, masked: bool, dtype: torch.dtype) -> None:
    config = tiny(**SHAPES[shape])
    layer = MLA(config).to(dtype)
    fill(layer)
    generator = torch.Generator().manual_seed(3)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, dtype=dtype, generator=generator)

    heads, keys = config.num_attention_heads, 11
    queries = 5 if masked else keys
    mask = None
    if masked:
        mask = torch.rand(2, 1, queries, keys, generator=generator) < 0.6
        mask[..., 0] = True
    parts = (
        random(2, heads, queries, config.qk_head_dim),
        random(2, keys, config.latent_width),
        random(2, keys, config.qk_rope_head_dim),
    )
    direct, absorbed = layer.direct(*parts, mask), layer.absorbed(*parts, mask)
    assert direct.std() > 0.1
    assert distance(absorbed, direct) < (1e-12 if dtype == torch.float64 else 1e-5)


def test_absorbing_is_cheaper_where_fewer_flops_say_so() -> None:
    def cost(layer: MLA, form: str, queries: int, keys: int) -> int:
        parts = [
            torch.empty(1, layer.heads, queries, layer.qk_nope_head_dim + layer.qk_rope_head_dim, device="meta"),
            torch.empty(1, keys, layer.latent_width, device="meta"),
            torch.empty(1, keys, layer.qk_rope_head_dim, device="meta"),
        ]
        mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device="meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            getattr(layer, form)(*parts, mask)
        return counter.get_total_flops()

    published = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    answers = []
    for changes in (
        published,
        {},
        {"kv_lora_rank": 4},
        {"kv_lora_rank": 40, "v_head_dim": 30},
        {"value_embeddings": True},
    ):
        layer = MLA(tiny(**changes)).to("meta")
        for queries, keys in itertools.product((1, 2, 7, 15, 24, 169, 170, 171), (1, 2, 8, 170, 1000, 100_000)):
            if queries <= keys:
                cheaper = cost(layer, "absorbed", queries, keys) < cost(layer, "direct", queries, keys)
                assert layer.absorbing_is_cheaper(queries, keys) == cheaper, (changes, queries, keys)
                answers.append(cheaper)
    assert 20 < sum(answers) < len(answers) - 20


@pytest.mark.parametrize("own", [False, True], ids=["", "value embeddings"])
@pytest.mark.parametrize("chunks", [[1] * 14, [14], [5, 1, 1, 4, 3], [12, 1, 1], [2, 12]], ids=str)
def test_decoding_over_the_cache_equals_the_full_forward(
    chunks: list[int], own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms: list[str] = []

    def noted(form: str) -> Callable[..., Tensor]:
        right = getattr(MLA, form)

        def run(self: MLA, *parts: Any) -> Tensor:
            forms.append(form)
            return right(self, *parts)

        return run

    monkeypatch.setattr(MLA, "direct", noted("direct"))
    monkeypatch.setattr(MLA, "absorbed", noted("absorbed"))
    changes = {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "rope_scaling": YARN, "kv_lora_rank": 100}
    config = tiny(**changes, value_embeddings=own)
    wide = config.latent_width
    model = ours(config, dtype=torch.float64).eval()
    ids, positions = sample(config, tokens=14)
    full = model(ids, positions)
    forms.clear()
    cache = [ListCache() for _ in model.layers]
    pieces = [
        model(some_ids, some_positions, cache=cache)
        for some_ids, some_positions in zip(ids.split(chunks, 1), positions.split(chunks, 1), strict=True)
    ]
    assert distance(torch.cat(pieces, dim=1), full) < 1e-12
    seen = list(itertools.accumulate(chunks))
    cheaper = [n * (wide * 20 + keys * (2 * wide - 20)) < keys * 100 * 20 for n, keys in zip(chunks, seen, strict=True)]
    assert forms == [form for absorb in cheaper for form in ["absorbed" if absorb else "direct"] * 2]
    assert cache[0].latent[0].shape[-1] + cache[0].keys[0].shape[-1] == wide + config.qk_rope_head_dim


def test_a_cache_refuses_segments() -> None:
    model = ours(tiny())
    ids, positions = sample(model.config)
    with pytest.raises(ValueError, match="segments"):
        model(ids, positions, torch.zeros_like(ids), [ListCache(), ListCache()])


def test_segments_isolate_packed_samples() -> None:
    config = with_mtp(2, rope_scaling=YARN)
    model = ours(config, dtype=torch.float64)
    ids, _ = sample(config, batch=1, tokens=20)
    lengths = [7, 4, 9]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    generator = torch.Generator().manual_seed(4)
    cotangents = [torch.randn(1, n, 32, dtype=torch.float64, generator=generator) for n in lengths]

    def gradients() -> dict[str, Tensor]:
        found = {name: p.grad.clone() for name, p in model.named_parameters() if name != "lm_head.weight"}
        model.zero_grad()
        return found

    hidden = model(ids, positions, segments)
    packed = [hidden, *model.predict_further(hidden, ids, positions, segments)]
    score: Any = 0.0
    for state, start, length, cotangent in zip(
        [packed] * 3, [0, 7, 11], lengths, cotangents, strict=True
    ):  # of depth k only the positions whose target lies in the same sample count
        score = score + sum((d[:, start : start + length - k] * cotangent[:, k:]).sum() for k, d in enumerate(state))
    score.backward()
    together_gradients = gradients()

    for start, length, cotangent in zip([0, 7, 11], lengths, cotangents, strict=True):
        some, where = ids[:, start : start + length], torch.arange(length)[None]
        hidden = model(some, where)
        alone = [hidden, *model.predict_further(hidden, some, where)]
        for k, state in enumerate(alone):
            assert distance(packed[k][:, start : start + length - k], state) < 1e-12
        sum((state * cotangent[:, k:]).sum() for k, state in enumerate(alone)).backward()
    for name, alone_gradient in gradients().items():
        assert distance(together_gradients[name], alone_gradient) < 1e-11, name
    assert distance(model(ids, positions), packed[0]) > 0.1  # without segments the samples do see each other


# ── counting ──────────────────────────────────────────────────────────────────────────────────────────────────────


def part_of(name: str) -> str:
    """The field of plan.count.Parameters that a parameter or buffer belongs to."""
    if name.startswith("mtp."):
        return "mtp"
    if "norm" in name or name.endswith("_share"):
        return "norms"
    for piece, part in (
        ("embed_tokens.", "embedding"),
        ("embed_values.", "embedding"),
        ("lm_head.", "head"),
        (".self_attn.", "attention"),
        (".mlp.experts.", "routed_experts"),
        (".mlp.shared_experts.", "shared_experts"),
        (".mlp.gate.", "router"),
        (".mlp.", "dense_ffn"),
    ):
        if piece in f".{name}" or name.startswith(piece):
            return part
    raise AssertionError(name)


@pytest.mark.parametrize("name", recipe_names())
def test_plan_counts_the_real_parameters_of_every_recipe(name: str) -> None:
    config = read_recipe(name).model
    with torch.device("meta"):
        model = Transformer(config)
    counted = dict.fromkeys(
        ("embedding", "head", "attention", "dense_ffn", "routed_experts", "shared_experts", "router", "norms", "mtp"), 0
    )
    for tensor_name, tensor in model.state_dict().items():
        counted[part_of(tensor_name)] += tensor.numel()
    planned = parameters(config)
    assert counted == {part: getattr(planned, part) for part in counted}
    assert sum(counted.values()) == planned.total_with_mtp
    if name == "v3":
        assert sum(counted.values()) - counted["mtp"] == 671_026_419_200


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None, "num_nextn_predict_layers": 0}, V2], ids=str)
def test_planned_flops_are_those_of_the_real_model(changes: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mla, "attention", attention_reference)  # the counter does not see the fused kernels
    config = tiny(**({"num_nextn_predict_layers": 2, "first_k_dense_replace": 1} | changes))
    model = ours(config)
    model.use(replace(PLAIN, grouped_linear=grouped_linear_reference))
    batch, length = 2, 24
    ids, positions = sample(config, batch, length)
    layers, depths = config.num_hidden_layers, config.num_nextn_predict_layers

    def planned(mtp: bool) -> float:
        """By the plan's formula, each depth over its own T − k tokens, and what the plan leaves out on purpose."""
        flops = length * forward_flops_per_token(config, length, mtp=False)
        runs = [(length, layers)]  # tokens, blocks
        for k in range(1, depths + 1) if mtp else ():
            kept = length - k
            both, main = (forward_flops_per_token(config, kept, mtp=m) for m in (True, False))
            flops += kept * (both - main) / depths
            runs.append((kept, 1))
        for tokens, blocks in runs:
            # The reference attention multiplies the masked half out: T² scores instead of T (T + 1) / 2.
            width = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
            flops += blocks * 2 * width * tokens * (tokens - 1) / 2
        return batch * flops

    with FlopCounterMode(display=False) as counter:
        model.lm_head(model(ids, positions))
    assert counter.get_total_flops() == pytest.approx(planned(mtp=False), rel=1e-12)
    targets = F.pad(ids, (0, 1), value=IGNORE)[:, 1:]
    with FlopCounterMode(display=False) as counter:
        hidden = model(ids, positions)
        states = [hidden, *model.predict_further(hidden, ids, positions)]
        losses = [
            linear_cross_entropy(state.flatten(0, 1), model.lm_head.weight, targets[:, k:].flatten())
            for k, state in enumerate(states)
        ]
        together(losses).backward()
    assert counter.get_total_flops() == pytest.approx(3 * planned(mtp=True), rel=1e-12)
    assert flops_per_token(config, length) == 3 * forward_flops_per_token(config, length)
    assert flops_per_token(config, length, training=False) == forward_flops_per_token(config, length, mtp=False)


# ── precision, cutting, starting ──────────────────────────────────────────────────────────────────────────────────


def test_bf16_activations_keep_the_router_in_fp32() -> None:
    # Every expert is chosen, so that rounding cannot change the choice and the outputs may be compared closely.
    config = tiny(n_routed_experts=4, num_experts_per_tok=4, first_k_dense_replace=1)
    ids, positions = sample(config, tokens=12)
    wide, narrow = ours(config), cast(Any, Transformer(config, torch.bfloat16))
    narrow.load_state_dict(wide.state_dict())
    seen: list[tuple[Tensor, Tensor]] = []
    narrow.layers["1"].mlp.gate.register_forward_hook(lambda gate, args, out: seen.append((args[0], out[1])))
    exact, rounded = wide(ids, positions), narrow(ids, positions)
    assert rounded.dtype == torch.bfloat16
    error = ((rounded - exact).norm() / exact.norm()).item()
    assert 2**-10 < error < 2**-6  # unit roundoff is 2⁻⁹; a few roundings in a row, none of them a mistake
    x, weights = seen[0]
    assert x.dtype == torch.bfloat16
    assert weights.dtype == torch.float32
    scores = F.linear(x.float(), wide.layers["1"].mlp.gate.weight).sigmoid().flatten(0, 1)
    expected = (scores / scores.sum(dim=-1, keepdim=True) * 2.5).sort(dim=-1).values
    assert distance(weights.sort(dim=-1).values, expected) < 1e-6
    narrow.lm_head(rounded).float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in narrow.parameters())


def test_a_model_cut_in_two_gives_the_same() -> None:
    config = tiny(first_k_dense_replace=1)
    whole, first, second = (ours(config) for _ in range(3))
    ids, positions = sample(config)
    first.norm = first.lm_head = None
    del first.layers["1"]
    second.embed_tokens = None
    del second.layers["0"]
    assert set(first.state_dict()) | set(second.state_dict()) == set(whole.state_dict())
    assert torch.equal(second(first(ids, positions), positions), whole(ids, positions))


def test_initialise_fills_an_emptied_model() -> None:
    with torch.device("meta"):
        model = Transformer(with_mtp(1))
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().fill_(7)  # whatever memory held
    model.initialise(0.006, torch.Generator().manual_seed(5))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all()
        else:
            assert parameter.std().item() == pytest.approx(0.006, rel=0.2), name
            assert abs(parameter.mean().item()) < 0.001
    assert not any(buffer.any() for buffer in model.buffers())
    again = Transformer(with_mtp(1))
    again.initialise(0.006, torch.Generator().manual_seed(5))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_outputs_may_begin_at_zero_and_the_embedding_wide() -> None:
    model = Transformer(with_mtp(1))
    model.initialise(0.006, torch.Generator().manual_seed(5), embedding_std=1.0, zero_outputs=True)
    zero = {name for name, parameter in model.named_parameters() if not parameter.any()}
    writes = {name for name, _ in model.named_parameters() if "o_proj" in name or "down_proj" in name}
    assert zero == writes | {"lm_head.weight"}
    assert model.embed_tokens.weight.std().item() == pytest.approx(1.0, rel=0.1)
    ids, positions = torch.randint(0, 64, (2, 9)), torch.arange(9).expand(2, -1)
    assert torch.equal(model(ids, positions), model.norm(model.embed_tokens(ids)))  # no block says anything yet


def test_what_tokens_bring_begins_wide_and_with_its_shares() -> None:
    model = Transformer(tiny(value_embeddings=True, embedding_shares=True, num_nextn_predict_layers=1))
    model.initialise(0.006, torch.Generator().manual_seed(5), embedding_std=1.0, zero_outputs=True)
    assert model.embed_values.weight.std().item() == pytest.approx(1.0, rel=0.1)
    shares = {name: parameter.item() for name, parameter in model.named_parameters() if name.endswith("_share")}
    assert sorted(shares.values()) == [0.0] * 2 + [2.0] * 3  # of two layers' FFNs; of their attention and MTP's
    assert all(value == SHARES[name.rpartition(".")[2]] for name, value in shares.items())


@pytest.mark.filterwarnings("ignore")  # PyTorch's tracer warns of its own doings
def test_a_block_can_be_compiled() -> None:
    config = tiny(n_group=4, topk_group=2)
    found = []
    for compiled in (False, True):
        block = ours(config).layers["0"]
        router = block.mlp.gate
        router.balance_weight.fill_(0.1)
        x = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        # The tracing is what may fail; generating machine code takes a minute and is PyTorch's own.
        run = torch.compile(block, backend="aot_eager") if compiled else block
        y = run(x, rotary(torch.arange(12).expand(2, -1), config))
        y.square().sum().backward()
        found.append((y.detach(), x.grad, router.weight.grad, router.balance_loss.clone(), router.load.double()))
    for eager, traced in zip(*found, strict=True):
        assert distance(traced, eager) < 4e-6  # eager, the kernels of a CPU; traced, PyTorch's
