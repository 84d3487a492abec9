"""DeepSeekMoE with auxiliary-loss-free balancing (report §2.1.2).

B batch · T tokens in a row · N = B·T · D width · E routed experts · K chosen · F expert width.
A token's experts are chosen by score plus bias and weighted by the score alone. After each optimizer step the bias of
an overloaded expert is lowered and that of an underloaded one raised (`updated_bias`); a faint sequence-wise loss
beside it keeps single sequences from extremes (`sequence_balance_loss`).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from leanseek.config import ModelConfig
from leanseek.model.layers import SwiGLU
from leanseek.ops.backend import PLAIN
from leanseek.ops.experts import Layout, lay_out, wants_padding
from leanseek.ops.precision import Plain, Precision
from leanseek.ops.routing import choose, route


class MoE(nn.Module):
    """Shared experts, which see every token, beside routed ones. No token is dropped."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = (
            SwiGLU(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)
            if config.n_shared_experts
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] → [B, T, D]."""
        experts, weights = self.gate(x)
        routed = self.experts(x.flatten(0, 1), experts, weights).view_as(x)
        return routed if self.shared_experts is None else routed + self.shared_experts(x)


class Router(nn.Module):
    """The gate: scores in at least FP32 whatever the activations are.

    `e_score_correction_bias` is state, not a parameter: no gradient reaches it. The other buffers belong to one
    optimizer step; the training step sets `balance_weight` before it, reads `load` and `balance_loss` after it and
    clears them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # Puts a sequence's counts together where its tokens lie on several ranks; parallelism sets it.
        self.complete: Callable[[Tensor], Tensor] | None = None
        self.given: Tensor | None = None  # [N, K] experts chosen elsewhere, −1 where the router is to choose
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        bias = torch.zeros(config.n_routed_experts, dtype=torch.float32) if config.topk_method == "noaux_tc" else None
        self.e_score_correction_bias: Tensor | None
        self.register_buffer("e_score_correction_bias", bias)
        self.load: Tensor
        self.balance_weight: Tensor
        self.balance_loss: Tensor
        self.register_buffer("load", torch.zeros(config.n_routed_experts, dtype=torch.int64), persistent=False)
        self.register_buffer("balance_weight", torch.zeros(()), persistent=False)
        self.register_buffer("balance_loss", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, D] → experts [N, K] int64 and their weights [N, K], at least FP32."""
        precise = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            scores = self.scores(F.linear(x.to(precise), self.weight.to(precise)))  # [B, T, E]
        experts, weights = self.select(scores.flatten(0, 1))
        if self.training:
            loss = (
                sequence_balance_loss(scores, self.config.num_experts_per_tok, self.complete).sum()
                * self.balance_weight
            )
            weights = _JoinLoss.apply(weights, loss, self.balance_loss)
        return experts, weights

    def scores(self, logits: Tensor) -> Tensor:
        """How well each expert suits a token: V3's sigmoid, V2's softmax [..., E]."""
        return logits.sigmoid() if self.config.scoring_func == "sigmoid" else logits.softmax(dim=-1)

    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """scores [N, E] → experts [N, K] and their weights [N, K]. The tokens are counted in training."""
        c = self.config
        choice = scores.detach()
        if self.e_score_correction_bias is not None:
            choice = choice + self.e_score_correction_bias  # steers the choice …
        n_group = 1 if c.topk_method == "greedy" else c.n_group
        how = c.num_experts_per_tok, n_group, c.topk_group, 2 if c.topk_method == "noaux_tc" else 1
        experts = route(choice, self.load, *how) if self.training else choose(choice, *how)
        if self.given is not None:
            experts = torch.where(self.given < 0, experts, self.given)
        weights = scores.gather(1, experts)  # … but never the weight
        if c.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return experts, weights * c.routed_scaling_factor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts like any module, but never rounds the buffers: steps of 0.001 vanish in BF16."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.is_floating_point() and moved.itemsize < 4:
                self._buffers[name] = buffer.to(moved.device)
        return self


@contextmanager
def watched(routers: Mapping[str, Router]) -> Iterator[dict[str, Tensor]]:
    """Within it, every router's newest choice by name: experts [N, K]."""
    chosen: dict[str, Tensor] = {}

    def watch(name: str) -> RemovableHandle:
        def note(_: nn.Module, __: Any, output: tuple[Tensor, Tensor]) -> None:
            chosen[name] = output[0]

        return routers[name].register_forward_hook(note)

    hooks = [watch(name) for name in routers]
    try:
        yield chosen
    finally:
        for hook in hooks:
            hook.remove()


class Experts(nn.Module):
    """All routed experts, stacked: gate and up [E, 2F, D], gate first, and down [E, D, F]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        e, d, f = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(e, 2 * f, d))
        self.down_proj = nn.Parameter(torch.empty(e, d, f))
        self.dispatcher = LocalDispatcher(e)
        self.precision: Precision = Plain()

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """x [N, D], experts and weights [N, K] → [N, D]."""
        rows, counts, way_back = self.dispatcher.dispatch(x, experts)
        rows = self.precision.experts(rows, self.gate_up_proj, self.down_proj, counts)
        return self.dispatcher.combine(rows, weights, way_back)


class LocalDispatcher:
    """Brings tokens to their experts and back where every expert is at hand; expert parallelism puts another here."""

    def __init__(self, n_experts: int) -> None:
        self.n_experts = n_experts
        self.may_pad = True  # between experts, where that is faster
        self.kernels = PLAIN

    def dispatch(self, x: Tensor, experts: Tensor) -> tuple[Tensor, Tensor, Layout]:
        """x [N, D], experts [N, K] → rows [P, D] sorted by expert, counts [E], and what `combine` needs."""
        padded = self.may_pad and wants_padding(x, experts.numel(), self.n_experts)
        layout = lay_out(experts, self.n_experts, padded)
        return self.kernels.permute(x, layout), layout.counts, layout

    def combine(self, rows: Tensor, weights: Tensor, way_back: Layout) -> Tensor:
        """rows [P, D], weights [N, K] → weighted sums [N, D]."""
        return self.kernels.unpermute(rows, way_back, weights)


def sequence_balance_loss(scores: Tensor, k: int, complete: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Σᵢ fᵢ Pᵢ of each sequence (report eq. 17-20): scores [B, T, E] → [B].

    f, E ÷ K times the share of tokens that would choose expert i by raw score, carries no gradient; P, the mean
    normalised score, does. The sum is 1 when the load is even. Of a sequence that is cut, `complete` makes its counts
    [B, E] of those of a piece; each piece then has its own tokens' share of the loss.
    """
    n_experts = scores.shape[-1]
    chosen = scores.detach().topk(k, dim=-1).indices.flatten(1)  # [B, T·K]: no bias, no groups
    frequency = torch.zeros_like(scores[:, 0]).scatter_add_(1, chosen, scores.new_ones(()).expand(chosen.shape))
    if complete is not None:
        frequency = complete(frequency)
    tokens = frequency.sum(dim=-1, keepdim=True) / k  # [B, 1]
    probability = (scores / scores.sum(dim=-1, keepdim=True)).sum(dim=1) / tokens
    return (frequency * (n_experts / k) / tokens * probability).sum(dim=-1)


def updated_bias(bias: Tensor, load: Tensor, speed: float, centred: bool = False) -> Tensor:
    """b + γ sign(mean load − load), load [E] over the whole global batch (report §2.1.2).

    `centred` takes the mean out of the step, so that the biases cannot drift together.
    """
    step = speed * (load.sum() - load * len(load)).sign()  # in integers: exact, and on every device
    if centred:
        step = step - step.mean()
    return bias + step.to(bias.dtype)


def max_violation(load: Tensor) -> float:
    """MaxVio of one layer: how far the busiest expert lies above the mean load, 0 when perfectly even."""
    total = int(load.sum())
    return int(load.max()) * len(load) / total - 1 if total else 0.0


class _JoinLoss(torch.autograd.Function):
    """Identity that hands a loss its gradient of one, so that pipeline stages pass activations only.

    The loss is added to `total` in the backward pass, which runs once even where the forward pass is recomputed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, total: Tensor) -> Tensor:
        ctx.loss, ctx.total = loss.detach(), total
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        ctx.total += ctx.loss
        return grad, torch.ones_like(ctx.loss), None
