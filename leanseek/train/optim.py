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

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al.: takes singular values near 1 in five steps
VALUES_AT_ONCE = 1 << 19  # of the matrices that a CPU orthogonalises together
ADAM_RMS = 0.2  # the root mean square of a typical AdamW update (Liu et al., "Muon is scalable")


def build_optimizers(model: Transformer, config: OptimizerConfig) -> list[Optimizer]:
    """The optimizers that together hold every trained parameter once. Tensors of two or more dims decay, others not."""
    single: list[nn.Parameter] = []
    stacked: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if config.name == "muon" and is_matrix(name, parameter):
            (stacked if name.endswith("gate_up_proj") else single).append(parameter)
        else:
            (decayed if parameter.dim() >= 2 else plain).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    adamw = AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
    if config.name == "adamw":
        return [adamw]
    matrices: list[dict[str, Any]] = [{"params": single, "parts": 1}, {"params": stacked, "parts": 2}]
    return [Muon(matrices, config.muon_momentum, config.weight_decay, config.muon_steps, model.dtype), adamw]


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon takes it: every matrix of the blocks and `eh_proj`. Embedding, heads and norms stay with AdamW."""
    return parameter.dim() >= 2 and not name.startswith(("embed_tokens.", "lm_head.", "score."))


def set_learning_rate(optimizers: list[Optimizer], learning_rate: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate


class Muon(Optimizer):
    """Momentum, orthogonalised. A parameter is a matrix [r, c] or a stack of them [n, r, c], each with its own update.

    `parts` of a group says how many matrices lie one above the other in a slice: 2 where gate and up are fused. `dtype`
    is the precision of the orthogonalisation; momentum and weights keep theirs.
    """

    def __init__(
        self,
        params: Iterable[Any],
        momentum: float,
        weight_decay: float,
        steps: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        defaults = {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay, "steps": steps, "parts": 1}
        super().__init__(params, defaults)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        # Matrices of one shape go through one batched orthogonalisation, whichever layer they come from.
        by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor, dict[str, Any]]]] = defaultdict(list)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffer = self.state[p]["momentum_buffer"].mul_(group["momentum"]).add_(p.grad)
                update = p.grad.add(buffer, alpha=group["momentum"])  # Nesterov's look ahead
                matrices = as_matrices(p, group["parts"])
                rows, columns = matrices.shape[1:]
                by_shape[rows, columns].append((matrices, as_matrices(update, group["parts"]), group))
        for (rows, columns), members in by_shape.items():
            updates = torch.cat([update.to(self.dtype) for _, update, _ in members])
            updates = orthogonalise(updates, members[0][2]["steps"])
            counts = [matrices.shape[0] for matrices, _, _ in members]
            for (matrices, _, group), update in zip(members, updates.split(counts), strict=True):
                matrices.mul_(1 - group["lr"] * group["weight_decay"])
                matrices.sub_(update, alpha=ADAM_RMS * math.sqrt(max(rows, columns)) * group["lr"])


def as_matrices(p: Tensor, parts: int) -> Tensor:
    """The stack of matrices [n, r, c] that a parameter [r, c] or [n, parts · r, c] consists of, a view."""
    return p[None] if p.dim() == 2 else p.view(-1, p.shape[1] // parts, p.shape[2])


def orthogonalise(x: Tensor, steps: int) -> Tensor:
    """For each matrix of a stack [n, r, c], about the nearest orthogonal one, by Newton-Schulz iteration in x's dtype.

    A few matrices at a time go through all iterations, so that on a CPU they stay in its cache.
    """
    a, b, c = NEWTON_SCHULZ
    tall = x.shape[-2] > x.shape[-1]
    at_once = max(1, VALUES_AT_ONCE // x[0].numel()) if x.device.type == "cpu" else x.shape[0]
    out = torch.empty_like(x)
    for piece, result in zip(x.split(at_once), out.split(at_once), strict=True):
        m = (piece.mT if tall else piece).contiguous()
        wide = m.to(torch.promote_types(m.dtype, torch.float32))
        m = m / (torch.linalg.matrix_norm(wide, keepdim=True) + 1e-7).to(m.dtype)
        for _ in range(steps):
            gram = m @ m.mT
            m = torch.baddbmm(m, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), m, beta=a)
        result.copy_(m.mT if tall else m)
    return out


def watch_logits(model: Transformer) -> None:
    """Has every attention layer record the largest logit of each head, for `qk_clip`."""
    for layer in _attention(model):
        layer.largest_logits = torch.zeros(layer.heads, device=layer.o_proj.weight.device)


@torch.no_grad()
def qk_clip(model: Transformer, threshold: float) -> float:
    """Shrinks each head whose largest logit passed the threshold, so that it would just have reached it.

    The factor is shared evenly between query and key where a head owns both; the rotary key belongs to all heads, so
    there the query bears it alone. Returns the largest logit seen.
    """
    largest = 0.0
    for layer in _attention(model):
        assert layer.largest_logits is not None
        factor = (threshold / layer.largest_logits.clamp(min=threshold))[:, None, None]  # [H, 1, 1]
        query = (layer.q_b_proj if layer.compresses_queries else layer.q_proj).weight.unflatten(0, (layer.heads, -1))
        query[:, : layer.qk_nope_head_dim] *= factor.sqrt()
        query[:, layer.qk_nope_head_dim :] *= factor
        layer.kv_b_proj.weight.unflatten(0, (layer.heads, -1))[:, : layer.qk_nope_head_dim] *= factor.sqrt()
        largest = max(largest, layer.largest_logits.max().item())
    return largest


def forget_logits(model: Transformer) -> None:
    """Clears the records of a step, also of one whose logits were not finite."""
    for layer in _attention(model):
        if layer.largest_logits is not None:
            layer.largest_logits.zero_()


def _attention(model: Transformer) -> list[MLA]:
    return [module for module in model.modules() if isinstance(module, MLA)]
