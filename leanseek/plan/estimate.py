"""How long a training step takes: a roofline for every matmul, the links, the pipeline's timetable, the optimizer.

What a kernel reaches of a machine's figures is taken from published kernels (`MATMUL` and those after it). What a
whole training stack loses on top, in launches, copies, jitter and imperfect overlap, is one constant for each stack,
fitted on one published row and on none of those it is held against (`rows.py`). t tokens of a micro-batch on a rank.
"""

import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from leanseek.config import ModelConfig
from leanseek.parallel.timetable import Costs, play
from leanseek.plan.count import Piece, flops_per_token, muon_flops
from leanseek.plan.hardware import Hardware
from leanseek.plan.layout import Layout, checked, runs
from leanseek.plan.memory import RankMemory, rank_bytes

MATMUL = 0.78  # of peak: DeepGEMM reaches 1550 of 1979 TFLOPS in FP8 on an H800
ATTENTION_FORWARD = 0.65  # of BF16 peak: 1460 TFLOPS on a B200 (FlashMLA's dense kernel)
ATTENTION_BACKWARD = 0.44  # 1000 TFLOPS there; counted with the scores that it computes again, 2.5 forward passes
MEMORY = 0.85  # of bandwidth, for streams
FAST = 0.79  # of the fast links: DeepEP's 158 of 200 GB/s on H800 (which the report takes as 160 to begin with)
SLOW = 1.0  # DeepEP reaches 43 to 58 GB/s, all of InfiniBand's 50, because some of what it counts stays in the node
EXCHANGE_UNITS = 20 / 132  # of an H800's processors that move data while the others compute (report §3.5.1)


@dataclass(frozen=True)
class Stack:
    """A training system. `efficiency`: roofline time of its computation ÷ the time it takes."""

    name: str
    efficiency: float
    fitted_on: str


# Fitted by `rows.fitted`; a test fits them again.
STACKS = {
    "megatron": Stack("megatron", 0.756, "1,061 tokens/s on each of 1,024 H100 in BF16"),
    "torchtitan": Stack("torchtitan", 0.314, "651 tokens/s on each of 256 B200 in BF16"),
    # This package's own trainer on a CPU, against the peak and the copy rate measured right before each step.
    "leanseek": Stack("leanseek", 0.86, "bench-20m on one core in FP32"),
}
# The spread that a single row cannot show: the middle half of the validation rows' errors, see docs/plan.md.
RANGE = 0.15


class Matmul(NamedTuple):
    """Weights [k, n], `groups` of them on a rank, met by `rows` rows for each token of the rank."""

    k: float
    n: float
    rows: float = 1.0
    groups: float = 1.0
    low: Literal["never", "linear", "expert"] = "linear"  # whether it runs in FP8 where the recipe does


@dataclass(frozen=True)
class Times:
    """Seconds of a micro-batch on a rank, for one piece or a sum of them."""

    forward: float = 0.0
    input_gradient: float = 0.0
    weight_gradient: float = 0.0
    recompute: float = 0.0
    exchange_forward: float = 0.0  # all-to-all with the experts
    exchange_backward: float = 0.0
    within: float = 0.0  # tensor- and context-parallel exchange, forward and backward

    def __add__(self, other: "Times") -> "Times":
        return Times(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))

    def __mul__(self, factor: float) -> "Times":
        return Times(*(value * factor for value in _values(self)))


def _values(times: Times) -> tuple[float, ...]:
    return tuple(getattr(times, name) for name in Times.__dataclass_fields__)


def matmuls(model: ModelConfig, piece: Piece, tp: int = 1, ep: int = 1) -> list[Matmul]:
    """Every matmul of a piece as one rank sees it; tensor parallelism cuts heads and inner widths."""
    d, heads = model.hidden_size, model.num_attention_heads
    if piece == "embedding":
        return []
    if piece == "head":
        return [Matmul(d, model.vocab_size / tp, rows=tp, low="never")]
    queries, latent = heads * model.qk_head_dim, model.kv_lora_rank
    rows = [
        Matmul(d, latent + model.qk_rope_head_dim),
        Matmul(latent, heads * (model.qk_nope_head_dim + model.v_head_dim) / tp, rows=tp),
        Matmul(heads * model.v_head_dim / tp, d, rows=tp),
    ]
    if model.q_lora_rank:
        rows += [Matmul(d, model.q_lora_rank), Matmul(model.q_lora_rank, queries / tp, rows=tp)]
    else:
        rows += [Matmul(d, queries / tp, rows=tp)]
    if piece == "dense":
        inner = model.intermediate_size
        return [*rows, Matmul(d, 2 * inner / tp, rows=tp), Matmul(inner / tp, d, rows=tp)]
    f, k, e = model.moe_intermediate_size, model.num_experts_per_tok, model.n_routed_experts
    shared = model.n_shared_experts * f
    rows += [Matmul(d, 2 * f, k, e / ep, "expert"), Matmul(f, d, k, e / ep, "expert"), Matmul(d, e, low="never")]
    if shared:
        rows += [Matmul(d, 2 * shared), Matmul(shared, d)]
    if piece == "mtp":
        rows += [Matmul(2 * d, d), *matmuls(model, "head", tp)]
    return rows


def elementwise_values(model: ModelConfig, piece: Piece) -> float:
    """Values that the forward pass of a block reads or writes beside its matmuls, per token.

    Norms and residual sums, RoPE and the joining of heads, SwiGLU, the sorting of tokens by expert and back, and the
    rounding of each matmul's input to a narrower format. The backward pass moves twice as many.
    """
    d, heads = model.hidden_size, model.num_attention_heads
    if piece in ("embedding", "head"):
        return 2.0 * d
    values = 2 * 2 * d + 2 * 3 * d + 2 * ((model.q_lora_rank or 0) + model.kv_lora_rank)
    values += 2 * heads * model.qk_head_dim * 2
    inputs = 2 * d + (model.q_lora_rank or 0) + model.kv_lora_rank + heads * model.v_head_dim
    if piece == "dense":
        values += 3 * model.intermediate_size
        inputs += d + model.intermediate_size
    else:
        k, f = model.num_experts_per_tok, model.moe_intermediate_size
        values += 3 * (k + model.n_shared_experts) * f + 2 * k * d + (k + 1) * d
        inputs += (k + 1) * (d + f)
    return values + 2 * inputs


def piece_times(model: ModelConfig, layout: Layout, hardware: Hardware, piece: Piece) -> Times:
    """Roofline seconds of one piece for a micro-batch on a rank."""
    t, bandwidth = layout.tokens_per_rank, hardware.memory_gb_per_second * 1e9 * MEMORY
    forward = gradient = again = 0.0
    for m in matmuls(model, piece, layout.tp, layout.ep):
        narrow = m.low == "expert" or (m.low == "linear" and layout.fp8_of == "all")
        precision = layout.precision if narrow else "bf16"
        width = 1 if precision == "fp8" else 2
        flops = 2 * t * m.rows * m.k * m.n
        computing = flops / (hardware.peak(precision) * MATMUL)
        moved = t * m.rows * (m.k * width + m.n * 2) + m.groups * m.k * m.n * width
        one = max(computing, moved / bandwidth)
        forward += one
        # The weight gradient reads both sides and adds to an FP32 sum.
        read = t * m.rows * (m.k + m.n) * width + 8 * m.groups * m.k * m.n
        gradient += max(computing, read / bandwidth)
        widens = m.k in (model.q_lora_rank, model.kv_lora_rank)
        if (layout.recompute == "full" and piece != "head") or (layout.recompute == "selective" and widens):
            again += one
    backward = forward
    if piece not in ("embedding", "head"):
        core, core_back = attention_seconds(model, layout, hardware)
        forward, backward = forward + core, backward + core_back
        again += core if layout.recompute == "full" else 0.0
    passing = elementwise_values(model, piece) * 2 * t / bandwidth
    forward, backward = forward + passing, backward + 2 * passing
    again += {"none": 0.0, "selective": 0.5, "full": 1.0}[layout.recompute] * passing
    if layout.adapters:
        gradient = 0.0
    times = Times(forward, backward, gradient, again, within=_within(model, layout, hardware, piece))
    if piece in ("moe", "mtp") and layout.ep > 1:
        there, back = exchange_seconds(model, layout, hardware)
        passes = 2 if layout.recompute == "full" else 1  # what is computed again is sent again
        times = replace(times, exchange_forward=there + back, exchange_backward=passes * (there + back))
    return times


def attention_seconds(model: ModelConfig, layout: Layout, hardware: Hardware) -> tuple[float, float]:
    """Seconds of scores, softmax and values of a block, forward and backward; causal attention counted half."""
    keys = (layout.length + 1) / 2
    pairs = layout.tokens_per_rank * model.num_attention_heads * keys
    flops = 2 * pairs * (model.qk_head_dim + model.v_head_dim)
    peak = hardware.peak("fp8" if layout.fp8_attention else "bf16")
    forward, backward = flops / (peak * ATTENTION_FORWARD), 2.5 * flops / (peak * ATTENTION_BACKWARD)
    if hardware.exponentials_per_second:
        raising = pairs / (hardware.exponentials_per_second * 1e12)
        return max(forward, raising), max(backward, raising)
    return forward, backward


def nodes_reached(model: ModelConfig, nodes: int) -> float:
    """To how many of the nodes that hold the experts a token's choice takes it, on average, loads even.

    V3 limits the choice to `topk_group` groups, which lie node by node (report §2.1.2); a group of those may go empty.
    """
    groups, limit = (model.n_group, model.topk_group) if model.topk_method != "greedy" else (nodes, nodes)
    chosen = limit * (1 - (1 - 1 / limit) ** model.num_experts_per_tok)
    if nodes >= groups:
        return chosen
    return nodes * (1 - (1 - 1 / nodes) ** chosen)


def exchange_seconds(model: ModelConfig, layout: Layout, hardware: Hardware) -> tuple[float, float]:
    """Seconds to bring a micro-batch's tokens of a rank to one block's experts, and to bring the results back.

    Over the slow links a token goes once to each other node, over the fast ones once to each device that wants it;
    without that care (`by_node`) once for every expert. The two kinds of links work at the same time.
    """
    slow, fast = crossings(model, layout, hardware)
    t = layout.tokens_per_rank
    values = t * model.hidden_size
    seconds = max(
        slow * values / (hardware.slow_gb_per_second * 1e9 * SLOW),
        fast * values / (hardware.fast_gb_per_second * 1e9 * FAST) if hardware.fast_gb_per_second else 0.0,
    )
    return seconds * layout.dispatch_bytes, seconds * 2


def crossings(model: ModelConfig, layout: Layout, hardware: Hardware) -> tuple[float, float]:
    """How often a token goes over slow and over fast links, on average, to reach one block's experts."""
    nodes = max(1, layout.ep // hardware.domain)
    k, elsewhere = model.num_experts_per_tok, (nodes - 1) / nodes
    if not layout.by_node:
        return k * elsewhere, k * (1 / nodes - 1 / layout.ep)
    devices = layout.ep * (1 - (1 - 1 / layout.ep) ** k)  # that some expert of its choice is on
    return nodes_reached(model, nodes) * elsewhere, devices * (1 - 1 / layout.ep)


def traffic(model: ModelConfig, layout: Layout, hardware: Hardware) -> dict[str, float]:
    """Bytes that a rank sends over each axis of the mesh in an optimizer step, the mean over pipeline ranks."""
    d, n = model.hidden_size, layout.micro_batches
    tokens = n * layout.tokens_per_rank
    row = [piece for run in runs(model, layout) for piece in run]
    moe = sum(piece in ("moe", "mtp") for piece in row)
    blocks = moe + row.count("dense")
    sent = sum(crossings(model, layout, hardware)) * (layout.dispatch_bytes + 2.0) * d if layout.ep > 1 else 0.0
    again = 3 if layout.recompute == "full" else 2  # forward, backward, and once more where it is computed again
    latents = (model.kv_lora_rank + model.qk_rope_head_dim) * 2.0 * (layout.cp - 1) if layout.cp > 1 else 0.0
    gathers = sum(GATHERS.get(piece, 0) for piece in row)
    gradients = [each.gradients / 4 for each in rank_bytes(model, layout)]
    return {
        "ep": tokens * sent * again * moe / layout.pp,
        "tp": tokens * gathers * (layout.tp - 1) * d * 2.0 / layout.pp,
        "cp": tokens * 2 * latents * blocks / layout.pp,
        "pp": tokens * 2 * 2.0 * d * (layout.stages - 1) / layout.pp,
        "dp": sum(gradients) / layout.pp * (4 + 2) if layout.dp * layout.copies > 1 else 0.0,
    }


# Gathers and scatters of a piece under tensor parallelism, forward and backward, one gather more in the latter.
GATHERS: dict[Piece, int] = {"dense": 10, "moe": 5, "mtp": 8, "head": 3}


def _within(model: ModelConfig, layout: Layout, hardware: Hardware, piece: Piece) -> float:
    """Seconds of tensor- and context-parallel exchange of a piece, forward and backward, in BF16."""
    if piece == "embedding":
        return 0.0
    seconds = 0.0
    if layout.cp > 1 and piece != "head":
        # Latents and rotary keys of the whole sequence come to every rank, and their gradients go back, once each.
        gathered = layout.micro_batch * layout.length // layout.tp * (model.kv_lora_rank + model.qk_rope_head_dim) * 2.0
        link = (
            hardware.fast_gb_per_second * FAST
            if layout.tp * layout.cp <= hardware.domain
            else hardware.slow_gb_per_second
        )
        seconds += 2 * gathered * (layout.cp - 1) / layout.cp / (link * 1e9)
    if layout.tp == 1:
        return seconds
    times = GATHERS[piece]
    moved = (layout.tp - 1) * layout.tokens_per_rank * model.hidden_size * 2.0
    link = hardware.fast_gb_per_second if layout.tp <= hardware.domain else hardware.slow_gb_per_second
    return seconds + times * moved / (link * 1e9 * FAST)


# ── a step ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Step:
    """Where the seconds of an optimizer step go, on the busiest rank."""

    computing: float
    exchange: float  # with the experts, as far as nothing hides it
    within: float
    bubble: float
    sharing: float  # gradients and weights between data-parallel ranks, as far as nothing hides it
    optimizer: float

    @property
    def seconds(self) -> float:
        return self.computing + self.exchange + self.within + self.bubble + self.sharing + self.optimizer

    def parts(self) -> dict[str, float]:
        return {
            "computing": self.computing,
            "all-to-all": self.exchange,
            "tensor and context parallel": self.within,
            "pipeline bubble": self.bubble,
            "data parallel": self.sharing,
            "optimizer": self.optimizer,
        }


@dataclass(frozen=True)
class Estimate:
    """What a layout reaches on a machine."""

    layout: Layout
    hardware: Hardware
    step: Step
    flops_per_token: float  # model FLOPs, forward and backward

    @property
    def tokens_per_second(self) -> float:
        """Of one device."""
        return self.layout.batch * self.layout.length / self.step.seconds / self.layout.gpus

    @property
    def mfu(self) -> float:
        """Model FLOPs per second, of the peak in the precision that most matmuls run in."""
        return self.tokens_per_second * self.flops_per_token / self.hardware.peak(self.layout.precision)


def estimate(model: ModelConfig, layout: Layout, hardware: Hardware, stack: Stack) -> Estimate:
    """Raises BadInput where the model cannot lie on the cluster that way."""
    checked(layout, model)
    of_run = runs(model, layout)
    of_piece = {piece: piece_times(model, layout, hardware, piece) for piece in set(itertools.chain(*of_run))}
    of_stage = [_sum(of_piece[piece] for piece in run) for run in of_run]
    # Which rank is slowest decides: the others wait for it at every micro-batch.
    of_rank = [
        _sum(of_stage[stage] for stage in layout.stages_of(rank)) * (1 / layout.copies) for rank in range(layout.pp)
    ]
    slowest = max(of_rank, key=lambda times: sum(_one(times, layout, stack)[:2]))
    forward, backward, weights, exposed, within = _one(slowest, layout, stack)
    n = layout.micro_batches
    computing = n * (forward + backward)
    bubble = 0.0
    if layout.pp > 1:
        per_stage = layout.stages // layout.pp
        costs = Costs(
            forward=(forward + within / 3 + exposed / 2) / per_stage,
            input_gradient=(backward - weights + within * 2 / 3 + exposed / 2) / per_stage,
            weight_gradient=weights / per_stage,
        )
        bubble = _bubble(layout, _enough(layout, n), costs)
    last_backward = backward * min(n, 1)
    memory = rank_bytes(model, layout)
    sharing = sharing_seconds(layout, hardware, memory)
    hidden = min(sharing / 2, last_backward)  # gradients go while the last backward pass runs; weights come back after
    step = Step(
        computing, n * exposed, n * within, bubble, sharing - hidden, optimizer_seconds(layout, hardware, memory)
    )
    if layout.muon:  # each matrix once, spread over all devices
        work = muon_flops(model) / layout.gpus / (hardware.peak("bf16") * MATMUL) / stack.efficiency
        step = replace(step, optimizer=step.optimizer + work)
    return Estimate(layout, hardware, step, flops_per_token(model, layout.length))


def _sum(parts: Iterable[Times]) -> Times:
    return functools.reduce(Times.__add__, parts, Times())


def _one(times: Times, layout: Layout, stack: Stack) -> tuple[float, float, float, float, float]:
    """Seconds of one micro-batch on a rank: forward, backward, the part of it for weights, exposed exchange, within."""
    slower = 1 / stack.efficiency
    exchange = times.exchange_forward + times.exchange_backward
    if layout.overlaps and exchange:
        slower /= 1 - EXCHANGE_UNITS
    forward = times.forward * slower
    backward = (times.input_gradient + times.weight_gradient + times.recompute) * slower
    exposed = max(0.0, exchange - forward - backward) if layout.overlaps else exchange
    return forward, backward, times.weight_gradient * slower, exposed, times.within


def _enough(layout: Layout, n: int) -> int:
    """Micro-batches after which a schedule's bubble no longer grows, of a kind that the schedule takes."""
    enough = min(n, 2 * layout.pp)
    return enough - enough % layout.pp if layout.schedule == "Interleaved1F1B" else enough - enough % 2 or enough


@functools.lru_cache(maxsize=4096)
def _relative_bubble(schedule: str, pp: int, chunks: int, n: int, forward: float, weight: float) -> float:
    layout = Layout(pp, pp=pp, schedule=schedule, chunks=chunks)
    played = play(layout.timetable(n), Costs(forward, 1 - forward - weight, weight))
    return played.seconds - max(played.busy)


def _bubble(layout: Layout, n: int, costs: Costs) -> float:
    """Seconds of idling; a schedule is played in shares of one micro-batch, rounded so that like ones share it."""
    whole = costs.forward + costs.backward
    forward, weight = (round(part / whole * 50) / 50 for part in (costs.forward, costs.weight_gradient))
    return whole * _relative_bubble(layout.schedule, layout.pp, layout.chunks, n, forward, weight)


def sharing_seconds(layout: Layout, hardware: Hardware, ranks: list[RankMemory]) -> float:
    """Seconds to sum gradients over data-parallel ranks (FP32) and to hand new weights out (BF16), once a step.

    With shards of weights (FSDP) they are gathered for every forward and backward pass instead.
    """
    memory = max(ranks, key=lambda each: each.gradients)
    copies = layout.dp if layout.ep == 1 or layout.expert_dp == 1 else min(layout.dp, layout.expert_dp)
    if layout.dp * layout.copies == 1 or layout.adapters:
        return 0.0
    beyond = max(layout.dp * layout.tp, 1) > hardware.domain
    link = hardware.slow_gb_per_second if beyond or not hardware.fast_gb_per_second else hardware.fast_gb_per_second
    link *= 1e9 * (SLOW if beyond else FAST)
    if layout.shards == "all":
        whole = memory.gradients * max(copies, 1) / 4  # parameters of this rank's pieces, unsharded
        passes = layout.micro_batches if layout.pp == 1 else 1
        return whole * (4 + 2 * 2 * passes) / link
    return memory.gradients / 4 * (4 + 2) / link


def optimizer_seconds(layout: Layout, hardware: Hardware, ranks: list[RankMemory]) -> float:
    """Seconds of an AdamW step over a rank's shards: master, gradient, moments read, master and moments written."""
    if layout.adapters:
        return 0.0
    memory = max(ranks, key=lambda each: each.states)
    values = memory.states / (4 + 2 * layout.moment_bytes)
    return values * (2 * (4 + 2 * layout.moment_bytes) + 4 + 2) / (hardware.memory_gb_per_second * 1e9 * MEMORY)
