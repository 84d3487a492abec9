"""Schedules, optimizers and the training step, against closed forms and slow twins."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from leanseek.config import BadInput, Config, OptimizerConfig, Piece, read_recipe
from leanseek.model.moe import updated_bias
from leanseek.model.transformer import Transformer
from leanseek.ops.loss import IGNORE
from leanseek.plan.count import flops_per_token
from leanseek.train.optim import (
    ADAM_RMS,
    NEWTON_SCHULZ,
    Muon,
    NarrowAdamW,
    as_matrices,
    build_optimizers,
    forget_logits,
    orthogonalise,
    qk_clip,
    set_learning_rate,
    watch_logits,
)
from leanseek.train.schedule import Knobs, curve, knobs
from leanseek.train.step import loss_sums, train_step
from tests.tiny import PLAIN

TINY = (
    "model.vocab_size=64",
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.moe_intermediate_size=16",
    "model.num_hidden_layers=3",
    "model.num_attention_heads=2",
    "model.q_lora_rank=16",
    "model.kv_lora_rank=16",
    "model.qk_nope_head_dim=8",
    "model.qk_rope_head_dim=8",
    "model.v_head_dim=8",
    "model.n_routed_experts=8",
    "model.max_position_embeddings=32",
    "stages.0.sequence_length=16",
    "train.micro_batch=4",
    "train.init_std=0.1",
)
LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
NOW = Knobs(learning_rate=0.01, batch_tokens=128, bias_speed=0.01, mtp_weight=0.3)


def tiny(*overrides: str) -> Config:
    return read_recipe(str(PLAIN), (*TINY, *overrides))


def model_of(config: Config, dtype: torch.dtype = torch.float32) -> Transformer:
    model = Transformer(config.model, dtype)
    model.initialise(config.train.init_std, torch.Generator().manual_seed(0))
    return model.to(dtype)


def batch_of(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 64, (rows, 17), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


# ── schedules ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("tokens", "rate", "speed", "weight"),
    [  # report §4.2
        (0, 0.0, 0.001, 0.3),
        (12.6e9, 1.1e-4, 0.001, 0.3),
        (25.2e9, 2.2e-4, 0.001, 0.3),
        (9.9e12, 2.2e-4, 0.001, 0.3),
        (10.0e12, 2.2e-4, 0.001, 0.1),
        (12.15e12, (2.2e-4 + 2.2e-5) / 2, 0.001, 0.1),  # half way down the cosine
        (14.3e12, 2.2e-5, 0.0, 0.1),
        (14.6e12, 2.2e-5, 0.0, 0.1),
        (14.7e12, 7.3e-6, 0.0, 0.1),
        (14.8e12, 7.3e-6, 0.0, 0.1),
    ],
)
def test_v3_schedule_at_published_token_counts(tokens: float, rate: float, speed: float, weight: float) -> None:
    config = read_recipe("v3")
    now = knobs(config.schedule, tokens, config.train.tokens)
    assert now.learning_rate == pytest.approx(rate, rel=1e-9, abs=1e-12)
    assert (now.bias_speed, now.mtp_weight) == (speed, weight)


def test_v3_batch_ramp_is_in_published_sequences() -> None:
    config = read_recipe("v3")
    sequences = [knobs(config.schedule, t, config.train.tokens).batch_tokens / 4096 for t in (0, 234.5e9, 469e9, 14e12)]
    assert sequences == pytest.approx([3072, (3072 + 15360) / 2, 15360, 15360])


def test_v2_steps_down_at_60_and_90_percent() -> None:
    config = read_recipe("v2")
    rates = [knobs(config.schedule, share * 8.1e12, config.train.tokens).learning_rate for share in (0.59, 0.61, 0.91)]
    assert rates == pytest.approx([2.4e-4, 2.4e-4 * 0.316, 2.4e-4 * 0.316**2])


def test_fractions_scale_with_the_budget() -> None:
    schedule = read_recipe("nano").schedule
    assert knobs(schedule, 50, 100) == knobs(schedule, 5_000_000, 10_000_000)


def test_warm_up_stable_decay() -> None:
    pieces = (
        Piece(until=0.1, value=1.0, shape="linear"),
        Piece(until=0.8, value=1.0),
        Piece(until=1.0, value=0.0, shape="sqrt"),
    )
    assert [curve(pieces, at) for at in (0.0, 0.05, 0.1, 0.5, 0.79)] == pytest.approx([0, 0.5, 1, 1, 1])
    assert curve(pieces, 0.85) == pytest.approx(1 - math.sqrt(0.25))
    assert curve(pieces, 1.0) == curve(pieces, 2.0) == 0.0


# ── optimizers ────────────────────────────────────────────────────────────────────────────────────────────────────


def slow_muon_direction(gradient: Tensor) -> Tensor:
    """Newton-Schulz on one matrix, written as the polynomial of its singular values."""
    u, s, vh = torch.linalg.svd(gradient.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vh


@pytest.mark.parametrize("shape", [(3, 12, 20), (2, 20, 12), (1, 8, 8)])
def test_orthogonalise_equals_the_polynomial_of_the_singular_values(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    result = orthogonalise(x, 5)
    for matrix, wanted in zip(result, x, strict=True):
        torch.testing.assert_close(matrix, slow_muon_direction(wanted), rtol=0, atol=1e-5)
        singular = torch.linalg.svdvals(matrix)
        assert 0.6 < singular.min() < singular.max() < 1.3


def test_muon_treats_every_expert_and_gate_and_up_as_matrices_of_their_own() -> None:
    stack = torch.nn.Parameter(torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(0)))
    before, gradient = stack.detach().clone(), torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(1))
    stack.grad = gradient.clone()
    muon = Muon([{"params": [stack], "parts": 2}], momentum=0.9, weight_decay=0.1, steps=5)
    set_learning_rate([muon], 0.5)
    muon.step()
    for expert in range(3):
        for half in (slice(0, 4), slice(4, 8)):
            direction = slow_muon_direction(gradient[expert, half] * 1.9)  # first step: g + 0.9 g, direction unchanged
            wanted = before[expert, half] * (1 - 0.5 * 0.1) - 0.5 * ADAM_RMS * math.sqrt(6) * direction.float()
            torch.testing.assert_close(stack[expert, half].detach(), wanted, rtol=1e-3, atol=1e-4)


def test_muon_momentum_over_two_steps() -> None:
    p = torch.nn.Parameter(torch.zeros(4, 6))
    g1, g2 = (torch.randn(4, 6, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    muon = Muon([p], momentum=0.9, weight_decay=0.0, steps=5)
    set_learning_rate([muon], 1.0)
    size = ADAM_RMS * math.sqrt(6)
    p.grad = g1.clone()
    muon.step()
    first = p.detach().clone()
    p.grad = g2.clone()
    muon.step()
    buffer = 0.9 * g1 + g2
    wanted = first - size * slow_muon_direction(g2 + 0.9 * buffer).float()
    torch.testing.assert_close(p.detach(), wanted, rtol=1e-3, atol=1e-4)


def test_a_muon_update_has_the_size_of_an_adam_update() -> None:
    for shape in [(64, 256), (256, 64), (128, 128)]:
        update = orthogonalise(torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)), 5)
        rms = (update * ADAM_RMS * math.sqrt(max(shape))).square().mean().sqrt().item()
        assert rms == pytest.approx(ADAM_RMS, rel=0.2)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_optimizers_hold_every_parameter_once_and_decay_matrices_only(name: str) -> None:
    config = tiny(f"optimizer.name={name}")
    model = model_of(config)
    held = [
        (id(p), group["weight_decay"])
        for o in build_optimizers(model, config.optimizer)
        for group in o.param_groups
        for p in group["params"]
    ]
    decay = dict(held)
    assert len(held) == len(decay) == len(list(model.parameters()))
    assert all(decay[id(p)] == (config.optimizer.weight_decay if p.dim() >= 2 else 0.0) for p in model.parameters())


def test_muon_takes_no_embedding_head_or_norm() -> None:
    model = model_of(tiny("model.value_embeddings=true", "model.embedding_shares=true"))
    muon = build_optimizers(model, OptimizerConfig(name="muon"))[0]
    taken = {id(p) for group in muon.param_groups for p in group["params"]}
    apart = {"embed_tokens.weight", "embed_values.weight", "lm_head.weight"} | {
        n for n, p in model.named_parameters() if p.dim() < 2
    }
    assert {n for n, p in model.named_parameters() if id(p) not in taken} == apart


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_embeddings_may_learn_at_a_rate_of_their_own(name: str) -> None:
    """A first step of AdamW is the rate along the gradient's sign; nothing of the embeddings decays then."""
    model = model_of(tiny("model.value_embeddings=true"))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizers = build_optimizers(model, OptimizerConfig(name=name, embedding_rate=20.0, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    set_learning_rate(optimizers, 1e-3)
    for optimizer in optimizers:
        optimizer.step()
    after = dict(model.named_parameters())
    for table in ("embed_tokens.weight", "embed_values.weight"):
        torch.testing.assert_close(after[table].detach(), before[table] - 20 * 1e-3, rtol=0, atol=1e-6)
    decayed = before["lm_head.weight"] * (1 - 1e-3 * 0.5) - 1e-3
    torch.testing.assert_close(after["lm_head.weight"].detach(), decayed, rtol=0, atol=1e-6)


def test_views_of_a_stack_write_through() -> None:
    p = torch.zeros(2, 6, 4)
    as_matrices(p, 2)[3].fill_(1.0)
    assert p[1, 3:].eq(1).all()
    assert p.sum() == 12


@pytest.mark.parametrize("q_lora", ["16", "null"])
def test_qk_clip_brings_the_largest_logit_to_the_threshold(q_lora: str) -> None:
    model = model_of(tiny(f"model.q_lora_rank={q_lora}", "train.init_std=0.6"))
    ids, _ = batch_of(4)
    positions = torch.arange(16).expand_as(ids)
    watch_logits(model)
    model.train()
    model(ids, positions)
    attention = model.layers["0"].self_attn
    before = attention.largest_logits.clone()
    threshold = before.min().item() * 1.01  # one head below, the other above
    assert before.max() > threshold
    largest = qk_clip(model, threshold)
    assert largest >= before.max().item()
    forget_logits(model)
    assert all(layer.self_attn.largest_logits.eq(0).all() for layer in model.layers.values())
    model(ids, positions)
    after = attention.largest_logits  # the first layer's input has not changed
    torch.testing.assert_close(after, before.clamp(max=threshold), rtol=1e-4, atol=1e-5)


def test_moments_rest_in_bf16_and_are_computed_with_in_full() -> None:
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4))
    optimizer = NarrowAdamW([{"params": [weight], "weight_decay": 0.1}], (0.9, 0.95), 1e-8, torch.bfloat16)
    optimizer.param_groups[0]["lr"] = 0.01
    w = weight.detach().clone()
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for number in range(1, 4):
        gradient = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
        weight.grad = gradient.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        w = w * (1 - 0.01 * 0.1) - 0.01 * (m / (1 - 0.9**number)) / ((v / (1 - 0.95**number)).sqrt() + 1e-8)
        m, v = m.bfloat16().double(), v.bfloat16().double()
        torch.testing.assert_close(weight.detach(), w, rtol=0, atol=1e-12)
    assert {value.dtype for key, value in optimizer.state[weight].items() if key != "step"} == {torch.bfloat16}


# ── the step ──────────────────────────────────────────────────────────────────────────────────────────────────────


def slow_loss(model: Transformer, ids: Tensor, targets: Tensor, config: Config, mtp_weight: float) -> Tensor:
    """The whole objective on the whole batch at once, from full logits."""
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    hidden = model(ids, positions)
    total = F.cross_entropy(model.lm_head(hidden).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    kept = config.train.mtp_length or ids.shape[1]  # tokens of each row, as if there were no others
    further = model.predict_further(hidden[:, :kept], ids[:, :kept], positions[:, :kept])
    for k, state in enumerate(further, start=1):
        loss = F.cross_entropy(model.lm_head(state).flatten(0, 1), targets[:, k:kept].flatten(), ignore_index=IGNORE)
        total = total + mtp_weight / len(model.mtp) * loss
    return total


@pytest.mark.parametrize("length", ["none", 7])
def test_accumulation_changes_nothing(length: str | int) -> None:
    ids, targets = batch_of(12)
    targets = targets.clone()
    targets[0, 5:] = IGNORE  # rows of unequal counts: a mean of means would differ
    weights = []
    for micro in (12, 5, 1):
        asked = f"train.micro_batch={micro}", f"train.mtp_length={length}", "train.balance_loss_alpha=0.01"
        config = tiny(*asked, "optimizer.name=adamw")
        model = model_of(config, torch.float64)
        result = train_step(model, build_optimizers(model, config.optimizer), ids, targets, NOW, config)
        weights.append((result, model.state_dict()))
    for result, state in weights[1:]:
        assert result.loss == pytest.approx(weights[0][0].loss, rel=1e-12)
        assert result.mtp_loss == pytest.approx(weights[0][0].mtp_loss, rel=1e-12)
        assert result.balance_loss == pytest.approx(weights[0][0].balance_loss, rel=1e-6)
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, weights[0][1][name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("clip", [0.05, 100])
@pytest.mark.parametrize(("depth", "length"), [(0, "none"), (1, "none"), (2, "none"), (1, 5), (2, 7), (1, 16), (1, 40)])
def test_a_step_is_the_slow_loss_clipped_and_stepped(depth: int, length: str | int, clip: float) -> None:
    config = tiny(
        f"model.num_nextn_predict_layers={depth}",
        f"train.mtp_length={length}",
        "optimizer.name=adamw",
        "train.balance_loss_alpha=0",
        f"optimizer.clip={clip}",
        "optimizer.eps=0.1",  # the first step of AdamW would not tell gradients of other sizes apart
    )
    ids, targets = batch_of(6)
    ours, theirs = model_of(config, torch.float64), model_of(config, torch.float64)
    result = train_step(ours, build_optimizers(ours, config.optimizer), ids, targets, NOW, config)
    theirs.train()
    slow_loss(theirs, ids, targets, config, NOW.mtp_weight).backward()
    loads = {name: router.load.clone() for name, router in theirs.routers().items()}
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip)
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-9)
    assert 0.05 < norm < 100
    decay = [p for p in theirs.parameters() if p.dim() >= 2]
    rest = [p for p in theirs.parameters() if p.dim() < 2]
    torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=NOW.learning_rate,
        betas=(0.9, 0.95),
        eps=0.1,
    ).step()
    for name, router in theirs.routers().items():
        router.e_score_correction_bias.copy_(updated_bias(router.e_score_correction_bias, loads[name], NOW.bias_speed))
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, theirs.state_dict()[name], rtol=0, atol=1e-9)


def test_mtp_of_the_beginning_of_rows_is_billed_as_what_it_computes() -> None:
    model = tiny().model
    main, whole, short = flops_per_token(model, 16, mtp=False), flops_per_token(model, 16), flops_per_token(model, 4)
    short -= flops_per_token(model, 4, mtp=False)
    assert flops_per_token(model, 16, mtp_length=4) == pytest.approx(main + short / 4, rel=1e-12)
    assert flops_per_token(model, 16, mtp_length=4) < main + (whole - main) / 4  # over fewer keys, too
    assert flops_per_token(model, 16, mtp_length=40) == flops_per_token(model, 16, mtp_length=16) == whole
    assert flops_per_token(model, 16, mtp=False, mtp_length=4) == main


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("train.mtp_length=1",), "above model.num_nextn_predict_layers"),
        (("train.mtp_length=4", "mesh.cp=2"), "mesh.cp=1"),
        (("train.mtp_length=4", "mesh.pp=2"), "mesh.pp=1"),
    ],
)
def test_rows_that_mtp_cannot_cut_are_refused(asked: tuple[str, ...], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        tiny(*asked)


def test_mtp_without_weight_is_at_rest() -> None:
    """The main model learns as if there were no MTP module."""
    resting = replace(NOW, mtp_weight=0.0)
    weights, results = [], []
    for depth in (1, 0):
        config = tiny(f"model.num_nextn_predict_layers={depth}")
        model = model_of(config, torch.float64)
        optimizers = build_optimizers(model, config.optimizer)
        results.append([train_step(model, optimizers, *batch_of(6, seed), resting, config) for seed in range(3)])
        weights.append(model.state_dict())
    assert results[0] == results[1]
    for name, weight in weights[1].items():
        torch.testing.assert_close(weights[0][name], weight, rtol=0, atol=0)


def test_what_mtp_has_learnt_stays_while_it_rests() -> None:
    """Nothing decays, no moment pulls it on, and its routing bias does not move."""
    config = tiny("model.num_nextn_predict_layers=1")
    model = model_of(config, torch.float64)
    optimizers = build_optimizers(model, config.optimizer)
    states = []
    for weight in (0.3, 0.0, 0.3):
        result = train_step(model, optimizers, *batch_of(6), replace(NOW, mtp_weight=weight), config)
        assert (result.mtp_loss > 0) == (weight > 0)
        states.append({name: value.clone() for name, value in model.mtp.state_dict().items()})
    for name, weight in states[0].items():
        torch.testing.assert_close(states[1][name], weight, rtol=0, atol=0)
    assert not all(torch.equal(states[2][name], weight) for name, weight in states[0].items())


def test_the_bias_moves_by_its_speed_against_the_load() -> None:
    config = tiny()
    model = model_of(config)
    ids, targets = batch_of(8)
    model.train()
    loss_sums(model, ids, targets)
    loads = {name: router.load.clone() for name, router in model.routers().items()}
    for router in model.routers().values():
        router.load.zero_()
    train_step(model, build_optimizers(model, config.optimizer), ids, targets, NOW, config)
    for name, router in model.routers().items():
        load = loads[name].double()
        wanted = [0.01 if n < load.mean() else -0.01 if n > load.mean() else 0.0 for n in load]
        assert router.e_score_correction_bias.tolist() == pytest.approx(wanted)
        assert router.load.sum() == 0


def test_a_centred_bias_keeps_its_mean() -> None:
    load = torch.tensor([10, 0, 0, 2])
    assert updated_bias(torch.zeros(4), load, 0.1).tolist() == pytest.approx([-0.1, 0.1, 0.1, 0.1])
    assert updated_bias(torch.zeros(4), load, 0.1, centred=True).tolist() == pytest.approx([-0.15, 0.05, 0.05, 0.05])


def test_balancing_balances() -> None:
    """A router that starts lopsided ends even, by its bias alone."""
    config = tiny("train.balance_loss_alpha=0", "model.num_nextn_predict_layers=0")
    model = model_of(config)
    for router in model.routers().values():
        router.e_score_correction_bias[:2] = 0.1
    still = Knobs(learning_rate=0.0, batch_tokens=0, bias_speed=0.005, mtp_weight=0.0)
    optimizers = build_optimizers(model, config.optimizer)
    violations = [train_step(model, optimizers, *batch_of(16, seed), still, config).max_violation for seed in range(40)]
    assert violations[0] > 1
    assert max(violations[-5:]) < 0.5


@pytest.mark.parametrize("where", ["loss", "gradient", "attention"])
def test_a_step_that_is_not_finite_leaves_the_model_as_it_was(where: str) -> None:
    config = tiny("optimizer.qk_clip=100.0")
    model = model_of(config)
    optimizers = build_optimizers(model, config.optimizer)
    watch_logits(model)
    train_step(model, optimizers, *batch_of(4), NOW, config)
    broken = {"loss": model.norm.weight, "attention": model.layers["0"].input_layernorm.weight}.get(where)
    if broken is not None:
        whole = broken.data[0].item()
        broken.data[0] = math.inf
    else:
        model.layers["1"].self_attn.o_proj.weight.register_hook(lambda grad: grad * math.nan)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = train_step(model, optimizers, *batch_of(4, seed=1), NOW, config)
    assert not result.finite
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(router.load.sum() == 0 for router in model.routers().values())
    assert all(p.grad is None for p in model.parameters())
    if broken is not None:  # and the step after it is a good one
        broken.data[0] = whole
        assert train_step(model, optimizers, *batch_of(4, seed=2), NOW, config).finite
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_a_depth_that_no_document_reaches_adds_nothing() -> None:
    config = tiny("model.num_nextn_predict_layers=2")
    model = model_of(config)
    ids, targets = batch_of(2)
    targets = targets.clone()
    targets[:, 1:] = IGNORE
    result = train_step(model, build_optimizers(model, config.optimizer), ids, targets, NOW, config)
    assert result.finite
    assert result.mtp_loss == 0


# ── a CPU ─────────────────────────────────────────────────────────────────────────────────────────────────────────

TAKES_MEMORY = """
import torch
from leanseek.train import cpu
ASK
kept = torch.ones(1 << 24)  # 64 MiB
told = open("/proc/self/smaps_rollup").read()
print(next(int(line.split()[1]) for line in told.splitlines() if line.startswith("AnonHugePages")))
"""


@pytest.mark.skipif(
    not (LARGE_PAGES.exists() and "[madvise]" in LARGE_PAGES.read_text() and Path("/proc/self/smaps_rollup").exists()),
    reason="this system gives no large pages, or all of them unasked",
)
def test_what_a_step_works_in_comes_in_large_pages() -> None:
    kib = []
    for ask in ("cpu.keep_freed_memory()", "cpu.ready_cpu()"):
        command = [sys.executable, "-c", TAKES_MEMORY.replace("ASK", ask)]
        kib.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert kib[1] > kib[0] + (32 << 10)  # half of it at least
