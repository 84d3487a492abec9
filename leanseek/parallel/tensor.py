"""Tensor parallelism, for serving weights that one device cannot hold: every matrix is cut, every rank sees all tokens.

Attention is cut by heads, FFNs and experts by their inner width. A rank has a share of the heads' queries, keys and
values and of gate and up, and of the matrices behind them the columns that read that share; what the ranks make of a
token then adds up to the whole, in one sum after attention and one after the FFN. What is small rests whole on each
rank: latents and their norms, which all heads read, routers, embedding and head. So every rank has the whole cache, and
knows the same next token.

Training works too, and is proved; V3's own layouts need none of it (report §3.2).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from leanseek.config import BadInput, ModelConfig
from leanseek.model.layers import SwiGLU
from leanseek.model.mla import MLA
from leanseek.model.moe import Experts, MoE
from leanseek.model.transformer import Transformer

# The dim along which a tensor is cut, and how many matrices lie one above the other there: gate and up are cut each.
CUTS = {
    "q_proj.weight": (0, 1),
    "q_b_proj.weight": (0, 1),
    "kv_b_proj.weight": (0, 1),
    "o_proj.weight": (1, 1),
    "gate_proj.weight": (0, 1),
    "up_proj.weight": (0, 1),
    "down_proj.weight": (1, 1),
    "experts.gate_up_proj": (1, 2),
    "experts.down_proj": (2, 1),
}


def cut(name: str) -> tuple[int, int] | None:
    """The entry of CUTS that a tensor of the state dict, or its gradient, falls under; None where it rests whole."""
    return next((how for ending, how in CUTS.items() if f".{name}".endswith(f".{ending}")), None)


def share(name: str, whole: Tensor, rank: int, ways: int) -> Tensor:
    """What a rank holds of a tensor of the state dict."""
    how = cut(name)
    if how is None:
        return whole
    dim, stacked = how
    return whole.unflatten(dim, (stacked, ways, -1)).select(dim + 1, rank).flatten(dim, dim + 1)


def joined(name: str, shares: list[Tensor]) -> Tensor:
    """The tensor that the ranks' shares are of."""
    how = cut(name)
    if how is None:
        return shares[0]
    dim, stacked = how
    return torch.stack([each.unflatten(dim, (stacked, -1)) for each in shares], dim + 1).flatten(dim, dim + 2)


def cut_matrices(model: Transformer, group: dist.ProcessGroup) -> Transformer:
    """Leaves this rank's share of each parameter, and has forward and backward sum over the group where they must.

    Works on a model without memory (device "meta") as well. Raises BadInput where something cannot be cut evenly.
    """
    ways, rank = group.size(), group.rank()
    check(model.config, ways)
    for name, parameter in list(model.named_parameters()):
        if cut(name) is not None:
            owner, _, last = name.rpartition(".")
            piece = share(name, parameter.detach(), rank, ways).clone()
            setattr(model.get_submodule(owner), last, nn.Parameter(piece, parameter.requires_grad))

    def spread(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(_Spread.apply(x, group) if x.is_floating_point() else x for x in inputs)

    def add_up(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return _AddUp.apply(output, group)

    def spread_key(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        latent, key = output.split([model.config.kv_lora_rank, model.config.qk_rope_head_dim], dim=-1)
        return torch.cat((latent, _Spread.apply(key, group)), dim=-1)

    for name, module in model.named_modules():
        if isinstance(module, MLA):
            module.heads //= ways
            (module.q_b_proj if module.compresses_queries else module.q_proj).register_forward_pre_hook(spread)
            module.kv_b_proj.register_forward_pre_hook(spread)
            module.kv_a_proj_with_mqa.register_forward_hook(spread_key)
            module.register_forward_hook(add_up)
        elif isinstance(module, MoE):
            module.register_forward_hook(add_up)
        elif isinstance(module, (Experts, SwiGLU)):
            module.register_forward_pre_hook(spread)
            if isinstance(module, SwiGLU) and not name.endswith("shared_experts"):
                module.register_forward_hook(add_up)
    return model


def check(config: ModelConfig, ways: int) -> None:
    """Raises BadInput where a model cannot be cut so many ways."""
    if config.value_embeddings and ways > 1:
        raise BadInput(
            f"mesh.tp {ways}: value embeddings are not cut by heads: export the run, and import what it wrote"
        )
    for value, what in (
        (config.num_attention_heads, "attention heads"),
        (config.intermediate_size, "values of the dense FFN"),
        (config.moe_intermediate_size, "values of an expert"),
    ):
        if value % ways:
            raise BadInput(f"mesh.tp {ways}: does not divide the {value} {what}")


class _Spread(torch.autograd.Function):
    """Where what all ranks have goes into their shares of the work: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _total(grad, ctx.group), None


class _AddUp(torch.autograd.Function):
    """Where shares of the work are put together: each has the sum's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _total(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _total(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
