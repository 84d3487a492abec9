"""The optimizers: AdamW as V3 trains (report §4.2), and Muon for the matrices with AdamW for the rest.

Muon replaces a matrix's momentum by the nearest orthogonal matrix, scaled so that its root mean square is that of an
Adam step; one learning rate then serves both. Each expert, and gate and up within it, is a matrix of its own. QK-clip,
as Kimi-K2 does it for MLA, shrinks the query and key weights of a head whose attention logits grow too large.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from leanseek.config import OptimizerConfig
from leanseek.model.mla import MLA
from leanseek.model.transformer import Transformer
from leanseek.parallel.mesh import ALONE, Ranks
from leanseek.parallel.parts import local, on_one_rank_each, scale_rows

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al.: takes singular values near 1 in five steps
VALUES_AT_ONCE = 1 << 20  # of the matrices that a CPU orthogonalises together
EMBEDDINGS = ("embed_tokens.", "embed_values.")
ADAM_RMS = 0.2  # the root mean square of a typical AdamW update (Liu et al., "Muon is scalable")


def build_optimizers(model: Transformer, config: OptimizerConfig, ranks: Ranks = ALONE) -> list[Optimizer]:
    """The optimizers that together hold every trained parameter once. Tensors of two or more dims decay, others not."""
    single: list[nn.Parameter] = []
    stacked: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    embedding: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if config.embedding_rate != 1 and name.startswith(EMBEDDINGS):
            embedding.append(parameter)
        elif config.name == "muon" and is_matrix(name, parameter):
            (stacked if name.endswith("gate_up_proj") else single).append(parameter)
        else:
            (decayed if parameter.dim() >= 2 else plain).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    if config.embedding_rate != 1:  # an empty group on a stage without it: all stages have the same
        groups.append({"params": embedding, "weight_decay": 0.0, "rate": config.embedding_rate})
    betas, moments = (config.beta1, config.beta2), torch.bfloat16 if config.moments == "bf16" else None
    adamw: Optimizer
    if moments is None:
        adamw = AdamW(groups, lr=0.0, betas=betas, eps=config.eps, fused=True)
    else:
        adamw = NarrowAdamW(groups, betas, config.eps, moments)
    if config.name == "adamw":
        return [adamw]
    matrices: list[dict[str, Any]] = [{"params": single, "parts": 1}, {"params": stacked, "parts": 2}]
    return [
        Muon(matrices, config.muon_momentum, config.weight_decay, config.muon_steps, model.dtype, ranks, moments),
        adamw,
    ]


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon takes it: every matrix of the blocks and `eh_proj`. Embeddings, heads and norms stay with AdamW."""
    return parameter.dim() >= 2 and not name.startswith((*EMBEDDINGS, "lm_head.", "score."))


def set_learning_rate(optimizers: list[Optimizer], learning_rate: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group.get("rate", 1.0)


class NarrowAdamW(Optimizer):
    """AdamW whose moments rest in `moments`, BF16 in V3 (report §3.3.3); it computes in the weights' own precision.

    A step uses the new moments before they are rounded.
    """

    def __init__(self, params: Iterable[Any], betas: tuple[float, float], eps: float, moments: torch.dtype) -> None:
        super().__init__(params, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.moments = moments

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            (beta1, beta2), rate = group["betas"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(p, dtype=self.moments)
                    state["exp_avg_sq"] = torch.zeros_like(p, dtype=self.moments)
                state["step"] += 1
                gradient, weights = local(p.grad), local(p)
                mean, square = local(state["exp_avg"]), local(state["exp_avg_sq"])
                m = mean.to(weights.dtype).lerp_(gradient, 1 - beta1)
                v = square.to(weights.dtype).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                mean.copy_(m)
                square.copy_(v)
                scale = v.div_(1 - beta2 ** state["step"]).sqrt_().add_(group["eps"])
                weights.mul_(1 - rate * group["weight_decay"])
                weights.addcdiv_(m, scale, value=-rate / (1 - beta1 ** state["step"]))


class Muon(Optimizer):
    """Momentum, orthogonalised. A parameter is a matrix [r, c] or a stack of them [n, r, c], each with its own update.

    `parts` of a group says how many matrices lie one above the other in a slice: 2 where gate and up are fused. `dtype`
    is the precision of the orthogonalisation, `moments` the one the momentum rests in, the weights' own where it is
    None. Of a stack each of the `ranks` has whole matrices and does its own; the rows of a single matrix come together
    on one of them, the work of all matrices spread as evenly as it can be.
    """

    def __init__(
        self,
        params: Iterable[Any],
        momentum: float,
        weight_decay: float,
        steps: int,
        dtype: torch.dtype = torch.float32,
        ranks: Ranks = ALONE,
        moments: torch.dtype | None = None,
    ) -> None:
        defaults = {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay, "steps": steps, "parts": 1}
        super().__init__(params, defaults)
        self.dtype, self.ranks, self.moments = dtype, ranks, moments

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        own: list[tuple[Tensor, Tensor, dict[str, Any]]] = []  # rows of a parameter, their update, its group
        shared: list[tuple[Tensor, Tensor, dict[str, Any]]] = []  # of matrices whose other rows are on other ranks
        rows_of_shared: list[int] = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p, dtype=self.moments)
                gradient, resting = local(p.grad), local(self.state[p]["momentum_buffer"])
                buffer = resting.to(gradient.dtype).mul_(group["momentum"]).add_(gradient)
                resting.copy_(buffer)
                update = gradient.add(buffer, alpha=group["momentum"]).to(self.dtype)  # Nesterov's look ahead
                if p.dim() == 2 and self.ranks.group("shard") is not None:
                    shared.append((local(p), update, group))
                    rows_of_shared.append(p.shape[0])
                else:
                    own.append((as_matrices(local(p), group["parts"]), as_matrices(update, group["parts"]), group))
        updates = self._orthogonal([update for _, update, _ in own])
        updates += on_one_rank_each(
            [update for _, update, _ in shared],
            rows_of_shared,
            lambda whole: [update[0] for update in self._orthogonal([matrix[None] for matrix in whole])],
            self.ranks,
        )
        scales = [ADAM_RMS * math.sqrt(max(matrices.shape[1:])) for matrices, _, _ in own]
        scales += [
            ADAM_RMS * math.sqrt(max(rows, part.shape[1]))
            for rows, (part, _, _) in zip(rows_of_shared, shared, strict=True)
        ]
        for (weights, _, group), update, scale in zip(own + shared, updates, scales, strict=True):
            if group["weight_decay"]:
                weights.mul_(1 - group["lr"] * group["weight_decay"])
            weights.sub_(update, alpha=scale * group["lr"])

    def _orthogonal(self, stacks: list[Tensor]) -> list[Tensor]:
        """Stacks of matrices [n, r, c]; those of one shape go through one batched orthogonalisation."""
        by_shape: dict[torch.Size, list[int]] = defaultdict(list)
        for i, stack in enumerate(stacks):
            by_shape[stack.shape[1:]].append(i)
        updates = list(stacks)
        for members in by_shape.values():
            done = orthogonalise(torch.cat([stacks[i] for i in members]), self.defaults["steps"])
            for i, update in zip(members, done.split([stacks[i].shape[0] for i in members]), strict=True):
                updates[i] = update
        return updates


def as_matrices(p: Tensor, parts: int) -> Tensor:
    """The stack of matrices [n, r, c] that a parameter [r, c] or [n, parts · r, c] consists of, a view."""
    return p[None] if p.dim() == 2 else p.view(-1, p.shape[1] // parts, p.shape[2])


def orthogonalise(x: Tensor, steps: int) -> Tensor:
    """For each matrix of a stack [n, r, c], about the nearest orthogonal one, by Newton-Schulz iteration in x's dtype.

    A few matrices at a time go through all iterations, so that on a CPU they stay in its cache.
    """
    a, b, c = NEWTON_SCHULZ
    tall = x.shape[-2] > x.shape[-1]
    at_once = max(1, VALUES_AT_ONCE // x.shape[1:].numel()) if x.device.type == "cpu" else x.shape[0]
    out = torch.empty_like(x)
    for piece, result in zip(x.split(at_once), out.split(at_once), strict=True):
        m = (piece.mT if tall else piece).contiguous()
        norm = torch.linalg.vector_norm(
            m, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(m.dtype, torch.float32)
        )
        m = m / (norm + 1e-7).to(m.dtype)
        for _ in range(steps):
            gram = torch.bmm(m, m.mT)
            m = torch.baddbmm(m, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), m, beta=a)
        result.copy_(m.mT if tall else m)
    return out


def watch_logits(model: Transformer) -> None:
    """Has every attention layer record the largest logit of each head, for `qk_clip`."""
    for layer in _attention(model):
        precise = torch.promote_types(model.dtype, torch.float32)
        layer.largest_logits = torch.zeros(layer.heads, dtype=precise, device=layer.o_proj.weight.device)


@torch.no_grad()
def qk_clip(model: Transformer, threshold: float, ranks: Ranks = ALONE) -> float:
    """Shrinks each head whose largest logit passed the threshold, so that it would just have reached it.

    The factor is shared evenly between query and key where a head owns both; the rotary key belongs to all heads, so
    there the query bears it alone. Returns the largest logit seen by the ranks of a batch.
    """
    largest = 0.0
    for layer in _attention(model):
        assert layer.largest_logits is not None
        logits = ranks.largest(layer.largest_logits, "batch")
        factor = (threshold / logits.clamp(min=threshold))[:, None]  # [H, 1]
        nope, rope, value = layer.qk_nope_head_dim, layer.qk_rope_head_dim, layer.v_head_dim
        query = (layer.q_b_proj if layer.compresses_queries else layer.q_proj).weight
        scale_rows(query, torch.cat((factor.sqrt().expand(-1, nope), factor.expand(-1, rope)), dim=1).flatten())
        key = torch.cat((factor.sqrt().expand(-1, nope), torch.ones_like(factor).expand(-1, value)), dim=1)
        scale_rows(layer.kv_b_proj.weight, key.flatten())
        largest = max(largest, logits.max().item())
    return largest


def forget_logits(model: Transformer) -> None:
    """Clears the records of a step, also of one whose logits were not finite."""
    for layer in _attention(model):
        if layer.largest_logits is not None:
            layer.largest_logits.zero_()


def _attention(model: Transformer) -> list[MLA]:
    return [module for module in model.modules() if isinstance(module, MLA)]
