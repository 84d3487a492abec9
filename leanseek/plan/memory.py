"""What lies in a rank's memory, tensor by tensor: weights, gradients, optimizer states, activations (report §3.2.3).

Two trainers keep different things. `trainer_bytes` is this package's own on one device, as its code stands: FP32
weights, every input a gradient needs, and the gradients of the head that the fused loss keeps. `rank_bytes` is a
cluster's: BF16 weights, FP32 gradients, optimizer states in shards, flash attention, activations by recompute policy.
Both add up one list of what a block keeps.
"""

import functools
import itertools
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from leanseek.config import Config, LoraConfig, ModelConfig
from leanseek.parallel.timetable import peak_activations
from leanseek.plan.count import Piece, adaptation, adapted_bytes, attention_weights, norm_weights, parameters
from leanseek.plan.hardware import Hardware
from leanseek.plan.layout import Layout, runs

RESERVED = 0.06  # of a device's memory: its runtime, communication buffers, fragments; an assumption (4.8 GiB of 80)
SUPPORTS = 512  # keys up to which the trainer keeps the probabilities of attention on a CPU (ops/attention.py)
AT_ONCE = 1 << 20  # values of the matrices that Muon orthogonalises together on a CPU (train/optim.py)


class Kept(NamedTuple):
    """A tensor kept from the forward pass for the backward pass, per token of a block."""

    name: str
    values: float
    width: float  # bytes per value
    spared_by: tuple[str, ...] = ()  # the recompute policies that do not keep it


def kept_by_block(model: ModelConfig, moe: bool, layout: Layout) -> list[Kept]:
    """What a block keeps per token on a cluster: BF16, the inputs of matmuls in FP8 where they run in FP8.

    `selective` is the report's policy: norms, SwiGLU and the up-projections of MLA are computed again, so that of
    attention only the latents and the output remain. `full` keeps the block's input alone.
    """
    d, heads = model.hidden_size, model.num_attention_heads
    low = 1.03 if layout.precision == "fp8" else 2.0  # with one FP32 scale for each 128 values
    k, f, shared = model.num_experts_per_tok, model.moe_intermediate_size, model.n_shared_experts
    some = ("selective", "full")
    latents = (model.q_lora_rank or 0) + model.kv_lora_rank + model.qk_rope_head_dim
    rows = [
        Kept("input of the block", d, 2),
        Kept("normed input of attention", d, low, some),
        Kept("latents", latents, 2, ("full",)),
        Kept("normed latents", latents, low, some),
        Kept("queries, keys and values", heads * (2 * model.qk_head_dim + model.v_head_dim), 2, some),
        # 12 bits a value in V3 (E5M6, report §3.3.3), which keeps nothing else of it
        Kept("output of attention", heads * model.v_head_dim, 1.5 if layout.precision == "fp8" else 2, ("full",)),
        Kept("log sums of attention", heads, 4, ("full",)),
        Kept("input of the FFN's norm", d, 2, ("full",)),
        Kept("normed input of the FFN", d, low, some),
    ]
    if not moe:
        inner = model.intermediate_size
        return [
            *rows,
            Kept("gate and up", 2 * inner, low, ("full",)),
            Kept("SwiGLU", inner, low, some),
        ]
    return [
        *rows,
        Kept("scores", model.n_routed_experts, 4, ("full",)),
        Kept("choice and weights", 2 * k, 8, ("full",)),
        Kept("tokens at their experts", k * d, low, ("full",)),
        Kept("gate and up of experts", 2 * (k + shared) * f, low, ("full",)),
        Kept("SwiGLU of experts", (k + shared) * f, low, some),
    ]


def activation_bytes(model: ModelConfig, moe: bool, layout: Layout) -> float:
    """Bytes that a block keeps for each token of a rank. Tensor-parallel ranks share heads as they share tokens."""
    kept = kept_by_block(model, moe, layout)
    return sum(each.values * each.width for each in kept if layout.recompute not in each.spared_by)


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the fullest rank of a pipeline rank, by what they are."""

    rank: int
    weights: float
    gradients: float
    states: float
    activations: float
    loss: float
    buffers: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.states + self.activations + self.loss + self.buffers

    def parts(self) -> dict[str, float]:
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer states": self.states,
            "activations": self.activations,
            "logits": self.loss,
            "buffers": self.buffers,
        }


def rank_bytes(model: ModelConfig, layout: Layout) -> list[RankMemory]:
    """What each pipeline rank holds at its peak; all ranks of a stage hold alike."""
    of_stage = [Counter(run) for run in runs(model, layout)]
    dense, moe = (activation_bytes(model, kind, layout) for kind in (False, True))
    peaks = _peaks(layout.schedule, layout.pp, layout.chunks, min(layout.micro_batches, 2 * layout.pp))
    tokens = layout.tokens_per_rank
    out = []
    for rank in range(layout.pp):
        held = [of_stage[stage] for stage in layout.stages_of(rank)]
        count = functools.reduce(Counter.__add__, held)
        experts, rest = _parameters_of(model, layout, count)
        # The timetable counts (stage, micro-batch) pairs; a rank's stages differ little, their mean stands for each.
        stage = sum(_stage_activations(model, layout, run, dense, moe) for run in held) / len(held)
        own = experts / layout.copies, rest / layout.copies  # copies share one optimizer state
        states = 4 + 2 * layout.moment_bytes
        if layout.shards == "all":
            # FSDP keeps shards, and the widest block whole while it computes, in BF16 with its gradient in FP32.
            whole = (layout.expert_dp, layout.dp)
            block = 6.0 * _block_parameters(model, layout)
            weights = 4 * sum(part / n for part, n in zip((experts, rest), whole, strict=True))
            gradients = weights
            shard_states = sum(2 * layout.moment_bytes * part / n for part, n in zip(own, whole, strict=True))
        else:
            block = 0.0
            weights = 2.0 * (experts + rest)
            gradients = 4.0 * (experts + rest)
            shard_states = states * (own[0] / layout.expert_dp + own[1] / layout.dp)
        if layout.adapters:  # of the adapters themselves a hundredth is a generous measure
            gradients, shard_states = gradients / 100, shard_states / 100
        # Logits are taken in pieces; a piece in FP32 and its gradient.
        logits = 2 * 4 * min(tokens, 1024) * model.vocab_size / layout.tp if count["head"] or count["mtp"] else 0.0
        # What the exchange with the experts sends and receives, both ways.
        exchange = 2 * tokens * model.num_experts_per_tok * model.hidden_size * 2.0 if count["moe"] else 0.0
        out.append(
            RankMemory(rank, weights, gradients, shard_states, stage * tokens * peaks[rank], logits, exchange + block)
        )
    return out


@functools.lru_cache(maxsize=512)
def _peaks(schedule: str, pp: int, chunks: int, batches: int) -> tuple[int, ...]:
    """Stages' activations that each rank holds at most; from 2 · pp micro-batches on a schedule only repeats itself."""
    return peak_activations(Layout(pp, pp=pp, schedule=schedule, chunks=chunks).timetable(batches))


def fits(model: ModelConfig, layout: Layout, hardware: Hardware) -> bool:
    room = (1 - RESERVED) * hardware.memory_gib * 2**30
    return max(each.total for each in rank_bytes(model, layout)) <= room


def why_not(model: ModelConfig, layout: Layout, hardware: Hardware) -> str | None:
    """Which tensors on which rank do not fit, or None."""
    fullest = max(rank_bytes(model, layout), key=lambda each: each.total)
    room = (1 - RESERVED) * hardware.memory_gib * 2**30
    if fullest.total <= room:
        return None
    held = itertools.accumulate(fullest.parts().values())
    name = next(name for name, size in zip(fullest.parts(), held, strict=True) if size > room)
    return (
        f"pipeline rank {fullest.rank} wants {fullest.total / 1e9:.1f} GB of {room / 1e9:.1f}: "
        f"its {name} ({fullest.parts()[name] / 1e9:.1f} GB) no longer fit"
    )


def _stage_activations(model: ModelConfig, layout: Layout, count: Counter[Piece], dense: float, moe: float) -> float:
    """Bytes a stage keeps for a token; `dense` and `moe` are those of a block of either kind."""
    d = model.hidden_size
    joined = 2.0 * (3 * d) if layout.recompute != "full" else 2.0 * 2 * d  # eh_proj's inputs
    return (
        count["dense"] * dense + (count["moe"] + count["mtp"]) * moe + count["mtp"] * joined + count["head"] * 2.0 * d
    )


def _parameters_of(model: ModelConfig, layout: Layout, count: Counter[Piece]) -> tuple[float, float]:
    """Parameters a rank holds of its pieces: of routed experts, and of the rest."""
    d = model.hidden_size
    expert = 3 * d * model.moe_intermediate_size
    moe = count["moe"] + count["mtp"]
    blocks = moe + count["dense"]
    experts = moe * model.n_routed_experts * expert / layout.ep
    rest = (
        blocks * (attention_weights(model) / layout.tp + norm_weights(model))
        + count["dense"] * 3 * d * model.intermediate_size / layout.tp
        + moe * (model.n_shared_experts * expert / layout.tp + model.n_routed_experts * d)
        + count["mtp"] * (2 * d * d + 3 * d)
        + (count["embedding"] + count["head"]) * model.vocab_size * d / layout.tp
    )
    # An MTP module wants embedding and head at hand: shared on its own rank, or copies of what is elsewhere.
    if count["mtp"]:
        rest += (2 - min(count["embedding"], 1) - min(count["head"], 1)) * model.vocab_size * d / layout.tp
    return experts, rest


def _block_parameters(model: ModelConfig, layout: Layout) -> float:
    experts, rest = _parameters_of(model, layout, Counter[Piece]({"moe": 1}))
    return experts + rest


# ── this package's own trainer, on one device ─────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class TrainerMemory:
    """Bytes of live tensors at the peak of a training step of `train/`, on one device."""

    weights: float
    gradients: float
    moments: float
    activations: float
    loss: float  # gradients of the head that the fused loss keeps for each depth, and one more while they are added up
    updating: float  # what the optimizer makes and drops again, when activations and loss are gone

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.moments + max(self.activations + self.loss, self.updating)


def trainer_bytes(config: Config, stage: int = 0) -> TrainerMemory:
    """The peak of a step after the first, on a CPU: when the last micro-batch's backward pass begins, or in the update.

    At the former the earlier micro-batches have left their gradients, and everything this one kept is there. In the
    latter Muon holds an update of every matrix, and those of the commonest shape, gate and up, joined and orthogonal;
    at work are three times as many values as it takes at once.
    """
    model, width = config.model, 2 if config.train.dtype in ("bf16", "fp8") else 4
    length = config.stages[stage].sequence_length
    tokens = config.train.micro_batch * length
    count = parameters(model)
    all_of_it = count.total_with_mtp
    depths = model.num_nextn_predict_layers
    if config.lora is not None:
        return _adapted_bytes(config, config.lora, width, tokens, length)
    muon = config.optimizer.name == "muon"
    by_adam = count.embedding + count.head + count.norms
    moment = 2 if config.optimizer.moments == "bf16" else 4
    moments = moment * (all_of_it + by_adam if muon else 2 * all_of_it)
    kept = _kept(model, width, tokens, length)
    casts = 0.0
    if width == 2:  # each matrix in BF16 beside the FP32 master, kept for the backward pass
        casts = 2.0 * (all_of_it - count.norms - count.embedding - count.head - count.router)
    head = 4.0 * count.head
    moe = sum(model.is_moe(layer) for layer in range(model.num_hidden_layers)) + depths
    gate_and_up = 2.0 * moe * (model.n_routed_experts + 1) * model.moe_intermediate_size * model.hidden_size
    by_muon = width * (2 * gate_and_up + 3 * min(gate_and_up, AT_ONCE))
    return TrainerMemory(
        weights=4.0 * all_of_it,
        gradients=4.0 * all_of_it,
        moments=moments,
        activations=kept + casts,
        loss=head * (2 + depths),
        updating=4.0 * (all_of_it - by_adam) + by_muon if muon else 0.0,
    )


def _kept(model: ModelConfig, width: int, tokens: int, length: int) -> float:
    """Bytes that a forward pass of so many tokens keeps for the backward pass."""
    depths = model.num_nextn_predict_layers
    kept = 0.0
    for layer in range(model.num_hidden_layers + depths):
        kept += tokens * _trainer_block(model, model.is_moe(layer), width, length)
    # Embedded tokens and their norm, hidden states and theirs, the two joined, each depth's and the model's last norm.
    return kept + tokens * width * model.hidden_size * (2 + depths * 4.0 + (1 if depths else 0))


def _adapted_bytes(config: Config, lora: LoraConfig, width: int, tokens: int, length: int) -> TrainerMemory:
    """With adapters: matrices at rest, and the widest stack of experts wide, once as FP32, while it is multiplied.

    As much is taken to be kept of a token as if all were trained: what only frozen matrices read is not, what adapters
    say on the way is, and the two are of about a size.
    """
    model, parts = config.model, adaptation(config.model, lora)
    stack = 2 * model.n_routed_experts * model.moe_intermediate_size * model.hidden_size
    return TrainerMemory(
        weights=adapted_bytes(model, lora, width) - 12 * parts.adapters,
        gradients=4.0 * parts.adapters,
        moments=8.0 * parts.adapters,
        activations=_kept(model, width, tokens, length) + stack * width + 4 * stack / model.n_routed_experts,
        loss=0.0,
        updating=0.0,
    )


def _trainer_block(model: ModelConfig, moe: bool, width: int, length: int) -> float:
    """Bytes that a block of `model/` keeps for each token of a sequence of so many."""
    d, heads = model.hidden_size, model.num_attention_heads
    q, kv = model.q_lora_rank or 0, model.kv_lora_rank + model.qk_rope_head_dim
    values = 2 * d  # the residual stream before attention, and normed
    values += 2 * q + kv + model.kv_lora_rank
    values += 2 * model.value_width  # of the tokens' own: behind the latent, and in the values
    values += heads * (2 * model.qk_head_dim + model.v_head_dim)  # queries, keys, values
    values += heads * model.v_head_dim  # attention's output, as o_proj reads it
    if length <= SUPPORTS:
        values += heads * length  # probabilities
    else:
        values += heads * model.qk_head_dim  # the flash kernel's output, as wide as the keys
    values += 2 * d  # before the FFN, and normed
    exact = 4.0 * 4  # the norms' scales
    if moe:
        k, f, e = model.num_experts_per_tok, model.moe_intermediate_size, model.n_routed_experts
        values += k * (2 * d + 3 * f) + 3 * model.n_shared_experts * f
        exact += 4.0 * e + 8.0 * 3 * k + 4.0 * 4 * k  # scores; places, sources and choices; weights
        if width == 2:
            exact += 4.0 * d  # the gate reads in FP32
    else:
        values += 3 * model.intermediate_size
    return values * width + exact
