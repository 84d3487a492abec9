"""Turned around: from a budget to a model, its tokens and what to expect of it, as a recipe that `pretrain` takes.

The law is Ludziejewski et al. 2025, "Joint MoE Scaling Laws" (arXiv 2502.05172, eq. 6 and table 3): the loss of a
mixture of E experts' worth of parameters with N of them active after D tokens. It was fitted on 280 models of up to
2.7B active parameters, E up to 32, on FineWeb-Edu; beyond that it extrapolates. Its mixtures have no shared experts, no
MLA and no finer grain, which others found to help: what is proposed here should do a little better, on its text.
"""

import math
from dataclasses import dataclass

from leanseek.config import BadInput, Config, ModelConfig, read_recipe
from leanseek.plan.bill import pretraining
from leanseek.plan.count import flops_per_token, parameters
from leanseek.plan.estimate import Estimate, Stack, estimate
from leanseek.plan.hardware import Hardware
from leanseek.plan.layout import Precision
from leanseek.plan.search import layouts, thriftiest

A, ALPHA, DELTA, GAMMA = 35.91, -0.1889, -0.2285, 0.0098
B, BETA, OMEGA, ZETA = 35.98, -0.1775, 0.5529, -0.0259
E_START, E_MAX, FLOOR = 2.0732, 290.4521, 1.3637
# Half the width of the range: what a change of tokenizer, text or recipe moves the loss by. Llama 3 and Chinchilla, a
# law each, differ by as much about one budget.
DOUBT = 0.05

WIDTHS = (256, 384, 512, 768, 1024, 1280, 1536, 2048, 2560, 3072, 4096, 5120, 6144, 7168)
EXPERTS = (16, 32, 64, 128, 256)
LENGTH = 4096


def loss(active: float, tokens: float, experts: float) -> float:
    """Nats per token; `experts` is total ÷ active parameters of the FFNs, 1 for a dense model."""
    ratio = 1 / (experts - 1 + 1 / (1 / E_START - 1 / E_MAX)) + 1 / E_MAX
    log = -math.log(ratio)
    return (
        A * math.exp(DELTA * log) * active ** (ALPHA + GAMMA * log)
        + B * math.exp(OMEGA * log) * tokens ** (BETA + ZETA * log)
        + FLOOR
    )


@dataclass(frozen=True)
class Proposal:
    config: Config
    estimate: Estimate
    tokens: float
    loss_range: tuple[float, float]
    usd: float
    days: float


def shape(width: int, experts: int, vocabulary: int = 32768) -> ModelConfig:
    """V3's proportions at another width: depth, heads, latents, and experts of a fine grain, a sixteenth awake."""
    depth = max(4, min(61, round(width / 96)))
    heads = max(2, width // 64)
    grain = max(64, width // 4 // 32 * 32)
    groups = 8 if experts >= 64 else 4
    return read_recipe("v3").model.model_copy(
        update={
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": 11 * width // 4 // 32 * 32,
            "moe_intermediate_size": grain,
            "num_hidden_layers": depth,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "q_lora_rank": max(96, 3 * width // 8),
            "kv_lora_rank": max(64, width // 4 if width < 2048 else 512),
            "qk_nope_head_dim": 64 if width < 2048 else 128,
            "qk_rope_head_dim": 32 if width < 2048 else 64,
            "v_head_dim": 64 if width < 2048 else 128,
            "n_routed_experts": experts,
            "num_experts_per_tok": 4 if experts < 64 else 8,
            "first_k_dense_replace": 1 if depth < 24 else 3,
            "n_group": groups,
            "topk_group": groups // 2,
            "max_position_embeddings": LENGTH,
        }
    )


def sparsity(model: ModelConfig) -> float:
    """Total ÷ active of a layer's experts, shared ones included: the law's E."""
    return (model.n_routed_experts + model.n_shared_experts) / (model.num_experts_per_tok + model.n_shared_experts)


def propose(
    budget: float, hardware: Hardware, gpus: int, precision: Precision, stack: Stack, days: float = 60.0
) -> list[Proposal]:
    """What to train for `budget` US dollars on so many devices, best first. Raises BadInput.

    Every shape takes as many tokens as the money buys at its own speed; the law says which of them ends lowest.
    """
    hours = budget / hardware.usd_per_hour
    takes = hours / gpus / 24
    if takes > days:
        raise BadInput(
            f"--budget {budget:g}: on {gpus} × {hardware.name} it would take {takes:,.0f} days: take more devices with "
            f"--gpus, at least {math.ceil(gpus * takes / days)}"
        )
    found = []
    for width in WIDTHS:
        for experts in EXPERTS:
            model = shape(width, experts)
            if parameters(model).total_with_mtp * 2 > gpus * hardware.memory_gib * 2**30:
                continue
            got = _quick(model, hardware, gpus, precision, stack)
            if got is None:
                continue
            tokens = hours * 3600 * got.tokens_per_second
            if not 5 < tokens / parameters(model).activated < 5000:
                continue  # far outside of what the law has seen
            expected = loss(parameters(model).activated_without_embedding, tokens, sparsity(model))
            found.append((expected, model, got, tokens))
    if not found:
        raise BadInput(
            f"--budget {budget:g}: buys {hours:,.2f} hours of one {hardware.name}, too little for any shape: raise it, "
            f"or train a shipped recipe"
        )
    found.sort(key=lambda each: each[0])
    proposals = []
    for expected, model, got, tokens in found[:3]:
        stage = pretraining(got, tokens)
        proposals.append(
            Proposal(
                recipe(model, tokens, hardware),
                got,
                tokens,
                (expected - DOUBT, expected + DOUBT),
                stage.usd,
                stage.days,
            )
        )
    return proposals


def _quick(model: ModelConfig, hardware: Hardware, gpus: int, precision: Precision, stack: Stack) -> Estimate | None:
    """The best of a few layouts, by rules of thumb instead of a search: short pipelines, experts inside a domain."""
    batch = max(64, gpus * 4)
    best: Estimate | None = None
    for layout in layouts(model, hardware, gpus, batch, LENGTH, precision):
        thrifty = (
            layout.tp == 1 and layout.micro_batch == 1 and layout.ep in (1, min(hardware.domain, gpus // layout.pp))
        )
        if not thrifty or layout.schedule not in ("1F1B", "DualPipeV") or layout.pp > 8:
            continue
        layout, why = thriftiest(model, layout, hardware)
        if why is not None:
            continue
        got = estimate(model, layout, hardware, stack)
        if best is None or got.tokens_per_second > best.tokens_per_second:
            best = got
    return best


def recipe(model: ModelConfig, tokens: float, hardware: Hardware) -> Config:
    """A whole recipe: V3's method, with learning rate and batch by DeepSeek's own scaling laws.

    DeepSeek LLM (Bi et al. 2024, arXiv 2401.02954, §3.1): rate 0.3118 C^−0.1250 and batch 0.2920 C^0.3271 tokens of
    compute C, non-embedding FLOPs; found on dense models.
    """
    compute = tokens * flops_per_token(model, LENGTH)
    rate = 0.3118 * compute**-0.1250
    batch = max(LENGTH, round(0.2920 * compute**0.3271 / LENGTH) * LENGTH)
    count = parameters(model)
    tree = {
        "description": f"proposed: {count.total_with_mtp / 1e6:,.0f} million parameters, {tokens / 1e9:.2f}B tokens",
        "model": model.model_dump(exclude_none=True),
        "train": {
            "tokens": int(tokens),
            "dtype": "bf16",
            "micro_batch": 1,
            "init_std": 0.006 if model.hidden_size > 4000 else 0.02,
        },
        "optimizer": {"name": "adamw"},
        "schedule": {
            "unit": "fraction",
            "learning_rate": [
                {"until": 0.01, "value": rate, "shape": "linear"},
                {"until": 0.8, "value": rate},
                {"until": 1.0, "value": rate / 10, "shape": "cosine"},
            ],
            "batch_tokens": [{"until": 1.0, "value": batch}],
            "bias_speed": [{"until": 0.97, "value": 0.001}, {"until": 1.0, "value": 0.0}],
            "mtp_weight": [{"until": 0.67, "value": 0.3}, {"until": 1.0, "value": 0.1}],
        },
        "stages": [{"sequence_length": LENGTH}],
        "cost": {"device": hardware.name, "usd_per_device_hour": hardware.usd_per_hour},
    }
    return Config.model_validate(tree)
