"""LoRA: adapters of low rank beside matrices that are not trained and rest in 8 bits, put onto a model from outside.

y = x Wᵀ + α/r · (x Aᵀ) Bᵀ, A [r, in], B [out, r], B zero at first. A stack of experts has a pair for each: A [E, r, in]
and B [E, out, r]. The blocks' matrices are frozen in 8 bits, embedding, head, norms and gates as they came; the routing
bias stays. Of an adapted model a checkpoint holds the adapters alone.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanseek.config import LoraConfig
from leanseek.model.layers import Linear
from leanseek.model.moe import Experts
from leanseek.model.transformer import Transformer
from leanseek.ops.elementwise import swiglu
from leanseek.ops.experts import grouped_linear
from leanseek.ops.fp8 import FP8
from leanseek.ops.frozen import at_rest, frozen_linear

RESTS_AS = {"fp8": FP8, "int8": torch.int8}
A, B = ".lora_A", ".lora_B"  # behind the name of what they adapt

Read = Callable[[str], tuple[Tensor, Tensor | None]]  # by name: values, or codes in FP8 and their scales


class Frozen(nn.Module):
    """A matrix [out, in], or a stack [E, out, in], that is not trained; without scales it rests as it came."""

    def __init__(self, codes: Tensor, scales: Tensor | None) -> None:
        super().__init__()
        self.codes: Tensor
        self.scales: Tensor | None
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor, counts: Tensor | None = None, after_swiglu: bool = False) -> Tensor:
        """x [..., in], or as `Linear` takes it, → [..., out]; with `counts` [E] rows sorted by expert."""
        return frozen_linear(swiglu(x) if after_swiglu else x, self.codes, self.scales, counts)


class Adapted(nn.Module):
    """A frozen matrix, or stack, with its adapter."""

    def __init__(self, frozen: Frozen, config: LoraConfig, generator: torch.Generator) -> None:
        super().__init__()
        *stack, out, inner = frozen.codes.shape
        device = frozen.codes.device
        self.frozen, self.scale = frozen, scale_of(config)
        bound = 1 / math.sqrt(inner)  # as PEFT begins
        values = torch.empty(*stack, config.rank, inner).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(values.to(device))
        self.lora_B = nn.Parameter(torch.zeros(*stack, out, config.rank, device=device))

    def forward(self, x: Tensor, counts: Tensor | None = None, after_swiglu: bool = False) -> Tensor:
        x, a, b = swiglu(x) if after_swiglu else x, self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        if counts is None:
            return self.frozen(x) + self.scale * F.linear(F.linear(x, a), b)
        return self.frozen(x, counts) + self.scale * grouped_linear(grouped_linear(x, a, counts), b, counts)


class FrozenExperts(nn.Module):
    """`Experts` whose two stacks are frozen, with adapters or without."""

    def __init__(self, experts: Experts, gate_up_proj: Frozen | Adapted, down_proj: Frozen | Adapted) -> None:
        super().__init__()
        self.dispatcher = experts.dispatcher
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """x [N, D], experts and weights [N, K] → [N, D]."""
        rows, counts, way_back = self.dispatcher.dispatch(x, experts)
        rows = self.down_proj(swiglu(self.gate_up_proj(rows, counts)), counts)
        return self.dispatcher.combine(rows, weights, way_back)


def adapt(model: Transformer, config: LoraConfig, read: Read, generator: torch.Generator) -> None:
    """Makes of a model, in place, the adapted one; its tensors, which may be on no device, are those that `read` gives.

    What remains wide is read as it came. FP8 codes stay what they are where the base rests in FP8.
    """

    def frozen(name: str) -> Frozen:
        values, scales = read(name)
        if scales is None and config.base in RESTS_AS:
            values, scales = at_rest(values, RESTS_AS[config.base])
        return Frozen(values, scales)

    def with_adapter(name: str, wanted: bool) -> Frozen | Adapted:
        return Adapted(frozen(name), config, generator) if wanted else frozen(name)

    for name, module in list(model.named_modules()):
        if isinstance(module, Linear) and (".self_attn." in name or ".mlp." in name):
            wanted = name.rpartition(".")[2] in config.modules
            model.set_submodule(name, with_adapter(f"{name}.weight", wanted))
        elif isinstance(module, Experts):
            stacks = (with_adapter(f"{name}.{stack}", config.experts) for stack in ("gate_up_proj", "down_proj"))
            model.set_submodule(name, FrozenExperts(module, *stacks))
    for name, module in model.named_modules():
        if isinstance(module, (Frozen, Adapted)):
            continue
        for own in [own for own, _ in module.named_parameters(recurse=False)]:
            setattr(module, own, nn.Parameter(read(f"{name}.{own}")[0], requires_grad=False))
        for own, buffer in list(module.named_buffers(recurse=False)):
            kept = own not in module._non_persistent_buffers_set
            value = read(f"{name}.{own}")[0] if kept else torch.zeros(buffer.shape, dtype=buffer.dtype)
            module.register_buffer(own, value, persistent=kept)
    model.register_state_dict_post_hook(_adapters_alone)


def scale_of(config: LoraConfig) -> float:
    """What an adapter says is multiplied by."""
    return config.alpha / config.rank


def delta(a: Tensor, b: Tensor, config: LoraConfig) -> Tensor:
    """What an adapter adds to its matrix, in FP32: A [..., r, in], B [..., out, r] → [..., out, in]."""
    return scale_of(config) * (b.float() @ a.float())


def adapted_name(adapter: str) -> str:
    """The tensor of a plain model that an adapter's tensor belongs to."""
    name = adapter.removesuffix(A).removesuffix(B)
    return name if name.endswith((".experts.gate_up_proj", ".experts.down_proj")) else f"{name}.weight"


@torch.no_grad()
def merge(model: Transformer, adapters: Mapping[str, Tensor], config: LoraConfig) -> None:
    """Adds adapters, by the names of an adapted model, to the matrices of a plain one."""
    for name, a in adapters.items():
        if name.endswith(A):
            parameter = model.get_parameter(adapted_name(name))
            change = delta(a, adapters[name.removesuffix(A) + B], config).to(parameter.device)
            parameter.copy_(parameter.float() + change)


def _adapters_alone(_: nn.Module, state: dict[str, Any], *__: Any) -> None:
    for name in [name for name in state if not name.endswith((A, B))]:
        del state[name]
