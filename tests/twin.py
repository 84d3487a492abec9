"""A slow twin of the model, written from the report's equations: one token, one head and one expert at a time."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from leanseek.config import ModelConfig
from leanseek.model.layers import RMSNorm, SwiGLU


def choose(scores: list[float], bias: list[float], config: ModelConfig) -> tuple[list[int], list[float]]:
    """Experts of one token, best first, and their weights (report eq. 12-16 and §2.1.2; V2's gates as V2 §2.2.1)."""
    n, k = config.n_routed_experts, config.num_experts_per_tok
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    groups = 1 if config.topk_method == "greedy" else config.n_group
    size = n // groups
    top = 2 if config.topk_method == "noaux_tc" else 1
    worth = [sum(sorted(biased[g * size : (g + 1) * size], reverse=True)[:top]) for g in range(groups)]
    kept = sorted(range(groups), key=lambda g: -worth[g])[: config.topk_group if groups > 1 else 1]
    experts = sorted((i for g in kept for i in range(g * size, (g + 1) * size)), key=lambda i: -biased[i])[:k]
    weights = [scores[i] for i in experts]
    if config.norm_topk_prob:
        weights = [weight / sum(weights) for weight in weights]
    return experts, [weight * config.routed_scaling_factor for weight in weights]


def slow_states(
    model: Any, ids: list[int], rope: tuple[Tensor, Tensor], embeddings: tuple[Tensor, Tensor]
) -> list[list[Tensor]]:
    """Final states of one sequence at depth 0 (the main model) and each MTP depth; rope = cos, sin [T, R/2].

    `embeddings` are two [V, D], of the main model and of the MTP modules, so that their gradients can be told apart.
    """
    xs = [embeddings[0][token] for token in ids]
    for block in model.layers.values():
        xs = _block(block, xs, rope, model.config)
    assert model.norm is not None
    states = [[_norm(x, model.norm) for x in xs]]
    for k, module in enumerate(model.mtp.values(), start=1):
        xs = [
            module.eh_proj.weight
            @ torch.cat((_norm(embeddings[1][ids[i + k]], module.enorm), _norm(states[k - 1][i], module.hnorm)))
            for i in range(len(ids) - k)
        ]
        states.append([_norm(x, module.norm) for x in _block(module.block, xs, rope, model.config)])
    return states


def slow_losses(states: list[list[Tensor]], ids: list[int], heads: tuple[Tensor, Tensor]) -> list[Tensor]:
    """−Σ log P of the token k + 1 places ahead, for each depth k; heads are the two uses of the output head, [V, D]."""
    losses = []
    for k, depth in enumerate(states):
        loss = depth[0].new_zeros(())
        for i in range(len(ids) - k - 1):
            logits = heads[min(k, 1)] @ depth[i]
            loss = loss - (logits[ids[i + k + 1]] - torch.log(torch.exp(logits).sum()))
        losses.append(loss)
    return losses


def _block(block: Any, xs: list[Tensor], rope: tuple[Tensor, Tensor], config: ModelConfig) -> list[Tensor]:
    mixed = _attention(block.self_attn, [_norm(x, block.input_layernorm) for x in xs], rope, config)
    xs = [x + y for x, y in zip(xs, mixed, strict=True)]
    return [x + _ffn(block.mlp, _norm(x, block.post_attention_layernorm), config) for x in xs]


def _attention(attn: Any, xs: list[Tensor], rope: tuple[Tensor, Tensor], config: ModelConfig) -> list[Tensor]:
    nope, value, latent = config.qk_nope_head_dim, config.v_head_dim, config.kv_lora_rank
    scale = 1 / math.sqrt(nope + config.qk_rope_head_dim)
    if config.rope_scaling is not None:
        scale *= (0.1 * config.rope_scaling.mscale_all_dim * math.log(config.rope_scaling.factor) + 1) ** 2
    queries, keys, values = [], [], []
    for t, x in enumerate(xs):
        if config.q_lora_rank is None:
            q = attn.q_proj.weight @ x
        else:
            q = attn.q_b_proj.weight @ _norm(attn.q_a_proj.weight @ x, attn.q_a_layernorm)
        compressed = attn.kv_a_proj_with_mqa.weight @ x
        kv = attn.kv_b_proj.weight @ _norm(compressed[:latent], attn.kv_a_layernorm)
        shared = _turn(compressed[latent:], rope[0][t], rope[1][t])
        queries.append([torch.cat((h[:nope], _turn(h[nope:], rope[0][t], rope[1][t]))) for h in q.chunk(attn.heads)])
        keys.append([torch.cat((h[:nope], shared)) for h in kv.chunk(attn.heads)])
        values.append([h[-value:] for h in kv.chunk(attn.heads)])
    out = []
    for t in range(len(xs)):
        heads = []
        for h in range(attn.heads):
            scores = torch.stack([queries[t][h] @ keys[s][h] * scale for s in range(t + 1)])
            share = torch.exp(scores) / torch.exp(scores).sum()
            heads.append(sum(share[s] * values[s][h] for s in range(t + 1)))
        out.append(attn.o_proj.weight @ torch.cat(heads))
    return out


def _ffn(ffn: Any, x: Tensor, config: ModelConfig) -> Tensor:
    if isinstance(ffn, SwiGLU):
        return _swiglu(x, ffn.gate_proj.weight, ffn.up_proj.weight, ffn.down_proj.weight)
    logits = ffn.gate.weight @ x
    scores = 1 / (1 + torch.exp(-logits)) if config.scoring_func == "sigmoid" else logits.softmax(0)
    bias = ffn.gate.e_score_correction_bias
    experts, _ = choose(scores.tolist(), [0.0] * len(scores) if bias is None else bias.tolist(), config)
    total = sum(scores[i] for i in experts) if config.norm_topk_prob else 1.0
    y = torch.zeros_like(x)
    if ffn.shared_experts is not None:
        y = y + _ffn(ffn.shared_experts, x, config)
    for i in experts:
        gate, up = ffn.experts.gate_up_proj[i].chunk(2)
        y = y + scores[i] / total * config.routed_scaling_factor * _swiglu(x, gate, up, ffn.experts.down_proj[i])
    return y


def _swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return down @ (F.silu(gate @ x) * (up @ x))


def _norm(x: Tensor, norm: RMSNorm) -> Tensor:
    return norm.weight * x / torch.sqrt((x * x).mean() + norm.eps)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (x₀, x₁), (x₂, x₃), … as complex numbers, each times e^{iφ}."""
    pairs = torch.view_as_complex(x.reshape(-1, 2).contiguous()) * torch.complex(cos, sin)
    return torch.view_as_real(pairs).flatten()
