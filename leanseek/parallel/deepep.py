"""The tokens' way by DeepEP's kernels, DeepSeek's own, where it is installed and the ranks are GPUs.

It does what the hops of `parallel.expert` do: a copy of a token for each rank that has one of its experts, through one
rank of each machine, and sums on the way back. A dispatch backward is a combine, and a combine a dispatch. Nothing here
could be run by its authors on GPUs: what is proven is this side of the seam, with a twin of its buffer on the CPU.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from leanseek.parallel.expert import Beside, ParallelDispatcher, Traffic
from leanseek.parallel.mesh import Ranks


def buffer_of(ranks: Ranks, width: int) -> Any:
    """DeepEP's communication buffer for tokens of so many BF16 values; None where it cannot be had."""
    group = ranks.group("ep")
    if ranks.device.type != "cuda" or group is None:
        return None
    try:
        from deep_ep import Buffer
    except ImportError:
        return None
    size = dist.get_world_size(group)
    configs = Buffer.get_dispatch_config(size), Buffer.get_combine_config(size)
    within = max(config.get_nvl_buffer_size_hint(2 * width, size) for config in configs)
    across = max(config.get_rdma_buffer_size_hint(2 * width, size) for config in configs)
    return Buffer(group, within, across)


class DeepEPDispatcher(ParallelDispatcher):
    """`buffer` has DeepEP's `get_dispatch_layout`, `dispatch` and `combine`."""

    def __init__(self, n_experts: int, ranks: Ranks, traffic: Traffic, buffer: Any) -> None:
        super().__init__(n_experts, ranks, traffic)
        self.buffer = buffer

    def there(self, x: Tensor, experts: Tensor, beside: Beside) -> tuple[Tensor, Tensor, Tensor, Any]:
        """As in the class it is made from."""
        way = _Way(self.buffer, self.n_experts)
        x, own, weights = _Dispatch.apply(x, beside.weights.float(), experts, way)
        beside.compute()
        way.wait()
        return x, own, weights, way

    def back(self, y: Tensor, way: Any) -> Tensor:
        """As in the class it is made from."""
        y = _Combine.apply(y, way)
        way.wait()
        return y


class _Way:
    def __init__(self, buffer: Any, n_experts: int) -> None:
        self.buffer, self.n_experts = buffer, n_experts
        self.handle: Any = None
        self.event: Any = None

    def wait(self) -> None:
        """Until what set out last has arrived."""
        self.event.current_stream_wait()


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, experts: Tensor, way: _Way) -> tuple[Tensor, Tensor, Tensor]:
        per_rank, per_machine, per_expert, is_in_rank, _ = way.buffer.get_dispatch_layout(experts, way.n_experts)
        arrived, own, arrived_weights, _, way.handle, way.event = way.buffer.dispatch(
            x,
            topk_idx=experts,
            topk_weights=weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_machine,
            is_token_in_rank=is_in_rank,
            num_tokens_per_expert=per_expert,
            async_finish=True,
        )
        ctx.way = way
        ctx.mark_non_differentiable(own)
        return arrived, own, arrived_weights

    @staticmethod
    def backward(ctx: Any, grad: Tensor, of_own: Any, of_weights: Tensor) -> tuple[Tensor, Tensor, None, None]:
        way = ctx.way
        grad_x, grad_weights, way.event = way.buffer.combine(
            grad.contiguous(), way.handle, topk_weights=of_weights.contiguous(), async_finish=True
        )
        way.wait()
        return grad_x, grad_weights, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, way: _Way) -> Tensor:
        ctx.way = way
        summed: Tensor
        summed, _, way.event = way.buffer.combine(y, way.handle, async_finish=True)
        return summed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        way = ctx.way
        spread, _, _, _, _, way.event = way.buffer.dispatch(grad.contiguous(), handle=way.handle, async_finish=True)
        way.wait()
        return spread, None
