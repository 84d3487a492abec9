"""Parameters, FLOPs, bytes and the reference price, from a configuration alone (report §1, §2.1, §4.2, table 1).

One formula per fact: the log's share of peak, the receipt, the planner and the documentation all call these. No torch.
"""

from dataclasses import dataclass
from typing import Literal

from leanseek.config import LoraConfig, ModelConfig

# What DeepSeek-V3's own pre-training says of an H800: its FLOPs per token by the formula below, 14.8T tokens (report
# §4), 2664K GPU hours at 2 USD (report table 1). 6·N·D alone, without attention and MTP, would say 3.4e14 FLOP/s.
V3_FLOPS_PER_TOKEN = 260_649_271_296
V3_TOKENS = 14.8e12
V3_H800_HOURS = 2664e3
H800_FLOPS_PER_SECOND = V3_FLOPS_PER_TOKEN * V3_TOKENS / (V3_H800_HOURS * 3600)
H800_USD_PER_HOUR = 2.0


@dataclass(frozen=True)
class Parameters:
    """How many parameters each part has, over all layers of the main model; `mtp` stands apart from the total."""

    embedding: int  # of tokens, and of their values
    head: int
    attention: int  # projections of MLA
    dense_ffn: int  # the first `first_k_dense_replace` layers
    routed_experts: int
    shared_experts: int
    router: int  # gate weights and, with noaux_tc, e_score_correction_bias
    norms: int  # every RMSNorm, those on the latents included, and the shares of what tokens bring
    mtp: int  # what the MTP modules own; embedding and head are the main model's
    idle_experts: int  # of `routed_experts`, those a token does not visit
    mtp_idle_experts: int

    @property
    def total(self) -> int:
        """The main model without MTP: 671,026,419,200 for V3."""
        ffn = self.dense_ffn + self.routed_experts + self.shared_experts + self.router
        return self.embedding + self.head + self.attention + ffn + self.norms

    @property
    def total_with_mtp(self) -> int:
        return self.total + self.mtp

    @property
    def activated(self) -> int:
        """Parameters one token meets in the main model, embedding and head counted: 37.55B for V3."""
        return self.total - self.idle_experts

    @property
    def activated_without_embedding(self) -> int:
        """The same without the embedding, which is only looked up: 36.63B for V3."""
        return self.activated - self.embedding


def parameters(config: ModelConfig) -> Parameters:
    """Every parameter of the model that `config` describes, by part."""
    d, layers, depths = config.hidden_size, config.num_hidden_layers, config.num_nextn_predict_layers
    moe_layers = sum(config.is_moe(layer) for layer in range(layers))
    expert = 3 * d * config.moe_intermediate_size
    routed = config.n_routed_experts * expert
    idle = (config.n_routed_experts - config.num_experts_per_tok) * expert
    shared = config.n_shared_experts * expert
    router = _gate(config) + (config.n_routed_experts if config.topk_method == "noaux_tc" else 0)
    norms = norm_weights(config)
    mtp = 2 * d + _eh_proj(config) + attention_weights(config) + routed + shared + router + norms + d
    return Parameters(
        embedding=config.vocab_size * (d + config.value_width),
        head=config.vocab_size * d,
        attention=layers * attention_weights(config),
        dense_ffn=(layers - moe_layers) * 3 * d * config.intermediate_size,
        routed_experts=moe_layers * routed,
        shared_experts=moe_layers * shared,
        router=moe_layers * router,
        norms=layers * (norms + config.embedding_shares) + d,
        mtp=depths * mtp,
        idle_experts=moe_layers * idle,
        mtp_idle_experts=depths * idle,
    )


@dataclass(frozen=True)
class ForwardFlops:
    """Model FLOPs of one forward pass per token, by part, over all layers; MTP blocks are counted in their parts."""

    attention: float  # projections of MLA
    mixing: float  # scores and values
    dense_ffn: float
    routed_experts: float
    shared_experts: float
    router: float
    head: float
    mtp_join: float  # `eh_proj`

    @property
    def total(self) -> float:
        experts = self.routed_experts + self.shared_experts + self.router
        return self.attention + self.mixing + self.dense_ffn + experts + self.head + self.mtp_join


def forward_flops_by_part(
    config: ModelConfig, sequence_length: int, mtp: bool = True, awake: int | None = None
) -> ForwardFlops:
    """Model FLOPs of one forward pass, per token of a full causal window of `sequence_length` tokens.

    A multiplication and an addition for every weight of every matrix that a token meets: attention, FFN, visited
    experts, gate, head and, with `mtp`, the MTP blocks with their `eh_proj` and one more pass of the head each. Then
    scores and values in the direct form of MLA, over the keys that the causal mask leaves, (T + 1) / 2 on average: the
    masked half is not counted. Not counted either: the embedding lookup, norms, RoPE, softmax, activations, anything
    recomputed. MTP is counted at every position, though its last ones have no target. Of the layers the first `awake`
    are counted, all where it is None.
    """
    d, layers = config.hidden_size, min(config.num_hidden_layers, awake or config.num_hidden_layers)
    depths = config.num_nextn_predict_layers if mtp else 0
    moe = sum(config.is_moe(layer) for layer in range(layers)) + depths
    expert = 3 * d * config.moe_intermediate_size
    keys = (sequence_length + 1) / 2
    return ForwardFlops(
        attention=2.0 * (layers + depths) * attention_weights(config),
        mixing=2.0 * (layers + depths) * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * keys,
        dense_ffn=2.0 * (layers + depths - moe) * 3 * d * config.intermediate_size,
        routed_experts=2.0 * moe * config.num_experts_per_tok * expert,
        shared_experts=2.0 * moe * config.n_shared_experts * expert,
        router=2.0 * moe * _gate(config),
        head=2.0 * (1 + depths) * config.vocab_size * d,
        mtp_join=2.0 * depths * _eh_proj(config),
    )


def forward_flops_per_token(
    config: ModelConfig, sequence_length: int, mtp: bool = True, awake: int | None = None
) -> float:
    """Model FLOPs of one forward pass per token, all parts together."""
    return forward_flops_by_part(config, sequence_length, mtp, awake).total


def recomputed_flops_per_token(config: ModelConfig, sequence_length: int, recompute: str) -> float:
    """FLOPs spent again in the backward pass, per token; they are no model FLOPs and count in no share of peak.

    `none`; `selective`: norms, SwiGLU and the up-projections of MLA (report §3.2.3), of which the last are matmuls;
    `full`: every block from its input, all but the head.
    """
    if recompute == "none":
        return 0.0
    if recompute == "full":
        flops = forward_flops_by_part(config, sequence_length)
        return flops.total - flops.head
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    return 2.0 * layers * up_projections(config)


def up_projections(config: ModelConfig) -> int:
    """Weights of one layer's `q_b_proj` and `kv_b_proj`, which widen the latents to all heads."""
    heads = config.num_attention_heads
    q_b = config.q_lora_rank * heads * config.qk_head_dim if config.q_lora_rank else 0
    return q_b + config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)


def flops_per_token(
    config: ModelConfig,
    sequence_length: int,
    training: bool = True,
    mtp: bool = True,
    awake: int | None = None,
    mtp_length: int | None = None,
    candidates: float | None = None,
) -> float:
    """Model FLOPs per token: training is forward and backward (twice the forward), else forward without MTP.

    In training MTP may be at rest too, while its loss has no weight, and so may be the layers beyond those `awake`; of
    each window it may have the first `mtp_length` tokens only; and the main head's loss may be over so many
    `candidates` instead of all ids.
    """
    if not training:
        return forward_flops_per_token(config, sequence_length, mtp=False)
    flops = forward_flops_per_token(config, sequence_length, False, awake)
    if mtp:
        length = min(mtp_length or sequence_length, sequence_length)
        both, main = (forward_flops_per_token(config, length, with_mtp, awake) for with_mtp in (True, False))
        flops += (both - main) * length / sequence_length
    if candidates is not None:
        flops -= 2.0 * (config.vocab_size - candidates) * config.hidden_size
    return 3.0 * flops


def muon_flops(config: ModelConfig, steps: int = 5) -> float:
    """FLOPs of orthogonalising every matrix of the blocks once, as Muon does at each optimizer step.

    An iteration multiplies a matrix [r, c], r the shorter side, by its transpose, the result by itself, and that by the
    matrix again.
    """
    d, heads, e = config.hidden_size, config.num_attention_heads, config.n_routed_experts
    f, shared, queries = config.moe_intermediate_size, config.n_shared_experts, heads * config.qk_head_dim
    kv = heads * (config.qk_nope_head_dim + config.v_head_dim)
    block = [
        (d, config.kv_lora_rank + config.qk_rope_head_dim),
        (config.kv_lora_rank, kv),
        (heads * config.v_head_dim, d),
    ]
    block += [(d, config.q_lora_rank), (config.q_lora_rank, queries)] if config.q_lora_rank else [(d, queries)]
    moe = [(d, f)] * (3 * e) + ([(d, f * shared)] * 3 if shared else []) + [(d, e)]
    rows = []
    for layer in range(config.num_hidden_layers):
        rows += block + (moe if config.is_moe(layer) else [(d, config.intermediate_size)] * 3)
    rows += config.num_nextn_predict_layers * [*block, *moe, (d, 2 * d)]
    return steps * sum(4.0 * min(m) ** 2 * max(m) + 2.0 * min(m) ** 3 for m in rows)


def cache_bytes_per_token(config: ModelConfig, bytes_per_value: int = 2, mtp: bool = False) -> int:
    """Bytes of a cached token: the latent and the rotated key of each layer (V3 in BF16: 70,272, with MTP 71,424)."""
    layers = config.num_hidden_layers + (config.num_nextn_predict_layers if mtp else 0)
    return layers * (config.latent_width + config.qk_rope_head_dim) * bytes_per_value


def training_bytes(config: ModelConfig, moments: float = 2) -> int:
    """Bytes of weights, gradients and moments (AdamW has two) in FP32, MTP included; activations come on top.

    A moment in BF16 is half a one.
    """
    return int(4 * (2 + moments) * parameters(config).total_with_mtp)


@dataclass(frozen=True)
class Adaptation:
    """Parameters of a model with adapters (model/lora.py), MTP included: at rest, wide as they came, and trained."""

    frozen: int  # matrices of the blocks
    wide: int  # embedding, head, norms, gates, `eh_proj`
    adapters: int


def adaptation(config: ModelConfig, lora: LoraConfig) -> Adaptation:
    """How adapters of `lora` divide the model's parameters."""
    d, f, heads = config.hidden_size, config.moe_intermediate_size, config.num_attention_heads
    depths, count = config.num_nextn_predict_layers, parameters(config)
    layers = config.num_hidden_layers + depths
    moe = sum(config.is_moe(layer) for layer in range(config.num_hidden_layers)) + depths
    latent, queries = config.kv_lora_rank, heads * config.qk_head_dim
    attention = {
        "kv_a_proj_with_mqa": (latent + config.qk_rope_head_dim, d),
        "kv_b_proj": (heads * (config.qk_nope_head_dim + config.v_head_dim), latent),
        "o_proj": (d, heads * config.v_head_dim),
    }
    if config.q_lora_rank is None:
        attention["q_proj"] = (queries, d)
    else:
        attention |= {"q_a_proj": (config.q_lora_rank, d), "q_b_proj": (queries, config.q_lora_rank)}
    inner = {True: f * config.n_shared_experts, False: config.intermediate_size}
    adapters = layers * sum(sum(shape) for name, shape in attention.items() if name in lora.modules)
    for kind, blocks in ((True, moe), (False, layers - moe)):
        if inner[kind]:  # the shared experts, or a dense FFN
            adapters += blocks * sum(inner[kind] + d for name in _FFN if name in lora.modules)
    if lora.experts:
        adapters += moe * config.n_routed_experts * ((2 * f + d) + (d + f))
    matrices = layers * attention_weights(config) + count.dense_ffn
    matrices += moe * (config.n_routed_experts + config.n_shared_experts) * 3 * d * f
    return Adaptation(matrices, count.total_with_mtp - matrices, lora.rank * adapters)


def adapted_bytes(config: ModelConfig, lora: LoraConfig, wide: int = 2) -> float:
    """Bytes of a frozen model and of its adapters with gradients and moments, FP32; activations come on top.

    `wide`: bytes per value of what does not rest in 8 bits. Blocks of 128 × 128 have an FP32 scale.
    """
    parts = adaptation(config, lora)
    resting = wide if lora.base == "unchanged" else 1 + 4 / 128**2
    return parts.frozen * resting + parts.wide * wide + 16.0 * parts.adapters


_FFN = ("gate_proj", "up_proj", "down_proj")


def h800_cost(flops: float) -> tuple[float, float]:
    """Hours and US dollars that `flops` model FLOPs take on one H800 at the rate and price of V3's own pre-training."""
    hours = flops / H800_FLOPS_PER_SECOND / 3600
    return hours, hours * H800_USD_PER_HOUR


# A model is a row of pieces: the embedding, the blocks, the MTP blocks with their pass of the head, the head.
Piece = Literal["embedding", "dense", "moe", "mtp", "head"]


def pieces(config: ModelConfig) -> list[Piece]:
    blocks: list[Piece] = ["moe" if config.is_moe(layer) else "dense" for layer in range(config.num_hidden_layers)]
    further: list[Piece] = ["mtp"] * config.num_nextn_predict_layers
    return ["embedding", *blocks, *further, "head"]


def loads(config: ModelConfig) -> tuple[int, ...]:
    """Weights that a token meets in each piece of the row, those of norms and router left out."""
    d = config.hidden_size
    expert = 3 * d * config.moe_intermediate_size
    attention, head = attention_weights(config), config.vocab_size * d
    moe = attention + expert * (config.num_experts_per_tok + config.n_shared_experts)
    of_piece: dict[Piece, int] = {
        "embedding": 0,
        "dense": attention + 3 * d * config.intermediate_size,
        "moe": moe,
        "mtp": moe + head + _eh_proj(config),
        "head": head,
    }
    return tuple(of_piece[piece] for piece in pieces(config))


def attention_weights(config: ModelConfig) -> int:
    """Weights of one layer's MLA projections; without `q_lora_rank` the query has a single `q_proj`."""
    d, heads = config.hidden_size, config.num_attention_heads
    q_out = heads * config.qk_head_dim
    q = d * config.q_lora_rank + config.q_lora_rank * q_out if config.q_lora_rank else d * q_out
    kv_a = d * (config.kv_lora_rank + config.qk_rope_head_dim)
    kv_b = config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    return q + kv_a + kv_b + heads * config.v_head_dim * d


def norm_weights(config: ModelConfig) -> int:
    """Weights of one block's norms, those on the latents included, and its share of value embeddings."""
    return 2 * config.hidden_size + (config.q_lora_rank or 0) + config.kv_lora_rank + config.value_embeddings


def _gate(config: ModelConfig) -> int:
    return config.n_routed_experts * config.hidden_size


def _eh_proj(config: ModelConfig) -> int:
    return config.hidden_size * 2 * config.hidden_size
