"""From a plain Transformer to one that many ranks compute together, by functions applied from outside, in this order:

1. matrices are cut over tp (`parallel.tensor`);
2. the balance loss is told of rows that are cut over cp (`parallel.context`);
3. experts are spread over ep, and their dispatcher brings the tokens to them (`parallel.expert`);
4. what is to be recomputed backward is marked;
5. FSDP shares weights, gradients and optimizer states, block by block.

The model stays the one-device code it was, and with one rank it is returned as it is.

**Precision.** Masters rest in FP32, gradients are added up over ranks in FP32, and the weights are gathered in FP32
too: the model casts them where it uses them, so that router and norms see the masters as in one process. **Gradients**
are sums: every loss is divided by its count over the whole batch before it is differentiated, so nothing here divides
by a number of ranks.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from leanseek.config import Config
from leanseek.model.block import Block
from leanseek.model.mla import MLA
from leanseek.model.moe import Experts, MoE
from leanseek.model.transformer import Transformer
from leanseek.parallel.context import cut_rows
from leanseek.parallel.deepep import DeepEPDispatcher, buffer_of
from leanseek.parallel.expert import ParallelDispatcher, Traffic, spread_experts
from leanseek.parallel.mesh import Ranks
from leanseek.parallel.parts import parts
from leanseek.parallel.tensor import cut_matrices, share


def parallelize(
    model: Transformer,
    config: Config,
    ranks: Ranks,
    stages: Sequence[nn.Module] | None = None,
    beginning: Iterable[tuple[str, Tensor]] | None = None,
) -> Transformer:
    """The model, changed in place to be this rank's part.

    It may have only some layers already; `stages` are then the modules that are called instead of it. It may have no
    memory yet (device "meta"); `beginning` is then the value of each parameter of the whole, one after the other.
    """
    if (heads := ranks.group("tp")) is not None:
        cut_matrices(model, heads)
    if (rows := ranks.group("cp")) is not None:
        cut_rows(model, rows)
    if ranks.division.ep > 1:
        traffic, buffer = Traffic(), buffer_of(ranks, config.model.hidden_size)
        for moe in [module for module in model.modules() if isinstance(module, MoE)]:
            given = config.model.n_routed_experts, ranks, traffic
            dispatcher = ParallelDispatcher(*given) if buffer is None else DeepEPDispatcher(*given, buffer)
            spread_experts(moe, dispatcher, ranks, config.mesh.most_load)
    if beginning is not None:
        parts_of_stages = [part for stage in stages or () for part in stage.children() if isinstance(part, Transformer)]
        _begin([model, *parts_of_stages], beginning, ranks)
    recompute(model, config.train.recompute)
    _share_states(model, config, ranks, [model] if stages is None else stages)
    return model


def _begin(models: Sequence[Transformer], beginning: Iterable[tuple[str, Tensor]], ranks: Ranks) -> None:
    """Puts memory under the parameters and buffers of models that have none. One tensor at a time is there as a whole.

    A parameter that several modules hold is one afterwards too.
    """
    held = [(f"{name}.{own}", module, own) for model in models for name, module in model.named_modules()
            for own, _ in module.named_parameters(recurse=False)]  # fmt: skip
    places: dict[str, list[tuple[nn.Module, str]]] = defaultdict(list)
    for whole_name, module, own in held:
        places[whole_name].append((module, own))
    rows, tp = parts(models[0], ranks), ranks.division.tp
    made: dict[nn.Parameter, nn.Parameter] = {}
    for name, value in beginning:
        for module, own in places.get(name, ()):
            without = module.get_parameter(own)
            if not without.is_meta:
                continue  # the same module, met in another model
            if without not in made:
                mine = share(name, value, ranks.place["tp"], tp) if tp > 1 else value
                if name in rows:
                    mine = mine[rows[name].first : rows[name].first + rows[name].rows]
                made[without] = nn.Parameter(mine.to(ranks.device, copy=True), without.requires_grad)
            setattr(module, own, made[without])
    for module in {module for model in models for module in model.modules()}:
        for own, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, own, torch.zeros_like(buffer, device=ranks.device))


# ── FSDP ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _share_states(model: Transformer, config: Config, ranks: Ranks, roots: Sequence[nn.Module]) -> None:
    d = ranks.division
    if d.dp * d.cp == 1:
        return
    dense, experts = ranks.meshes["dense"], ranks.meshes["experts"]
    over = dense["shard"] if d.replicate == 1 else dense["replicate", "shard"]
    over_copies = experts["copies"] if d.replicate == 1 else experts["experts_replicate", "copies"]
    # The schedules that run a stage's halves apart gather once per step: PyTorch resharding between is silently wrong.
    gathers_again = config.mesh.shards == "all" and config.mesh.schedule not in ("ZBV", "DualPipeV")
    for module in list(model.modules()):
        if isinstance(module, Experts) and d.ep > 1:
            fully_shard(module, mesh=over_copies, reshard_after_forward=gathers_again)
    for block in (*model.layers.values(), *model.mtp.values()):
        fully_shard(block, mesh=over, reshard_after_forward=gathers_again)
    for root in roots:
        # Embedding and head are used by the MTP modules once more, after the model's own forward pass is over.
        fully_shard(root, mesh=over, reshard_after_forward=False)
        for unit in _units(root):
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)


def before_micro_batch(model: nn.Module, last: bool, config: Config) -> None:
    """Has gradients added up over ranks in the `last` micro-batch of a step only.

    Under `mesh.shards` = "states" the gathered weights stay from one micro-batch to the next, too.
    """
    for unit in _units(model):
        unit.set_requires_gradient_sync(last, recurse=False)
        if config.mesh.shards == "states":
            unit.set_reshard_after_backward(last, recurse=False)


def forget_gathered(model: nn.Module) -> None:
    """Lets go of gathered weights that no backward pass will free, before the weights change."""
    for unit in _units(model):
        unit.reshard()


def _units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


# ── recomputation ─────────────────────────────────────────────────────────────────────────────────────────────────


def recompute(model: Transformer, what: Literal["none", "selective", "full"]) -> None:
    """Marks every block: `full` keeps its input only; `selective`, as V3 (report §3.2.3), all matrix products but
    MLA's up-projections, so that these, the norms and SwiGLU are computed again.

    Either way routing runs once: its result is kept, and tokens are not counted twice.
    """
    if what == "none":
        return
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        keeps = _routing_only if what == "full" else partial(_as_v3, _up_projections(block.self_attn))
        contexts = partial(_contexts, keeps)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)  # type: ignore[method-assign]


Keeps = Callable[[Any, tuple[Any, ...]], bool]  # whether the result of an operation, with its arguments, is kept

_aten, _collectives = torch.ops.aten, torch.ops._c10d_functional
_PRODUCTS = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten._grouped_mm.default,
    _aten._softmax.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}
_TRAVEL = {_collectives.all_to_all_single.default, _collectives.wait_tensor.default}
_ROUTING = torch.ops.leanseek.route.default


def _routing_only(operation: Any, args: tuple[Any, ...]) -> bool:
    return bool(operation == _ROUTING)


def _as_v3(up: set[tuple[int, ...]], operation: Any, args: tuple[Any, ...]) -> bool:
    if operation == _aten.mm.default and tuple(args[1].shape) in up:
        return False
    return operation == _ROUTING or operation in _TRAVEL or operation in _PRODUCTS


def _up_projections(attention: MLA) -> set[tuple[int, ...]]:
    """The shapes [in, out] by which MLA's up-projections are told from other products; one like them is redone too."""
    up = [attention.kv_b_proj, *([attention.q_b_proj] if attention.compresses_queries else [])]
    return {(linear.weight.shape[1], linear.weight.shape[0]) for linear in up}


def _contexts(keeps: Keeps) -> tuple["_Keeping", "_Keeping"]:
    """What a checkpointed forward pass runs under, and its repetition.

    PyTorch's own pair of this kind wants every operation repeated, and FSDP gathers weights once forward and otherwise
    backward.
    """
    kept: dict[Any, deque[Any]] = defaultdict(deque)
    return _Keeping(keeps, kept, again=False), _Keeping(keeps, kept, again=True)


class _Keeping(TorchDispatchMode):
    def __init__(self, keeps: Keeps, kept: dict[Any, deque[Any]], again: bool) -> None:
        super().__init__()
        self.keeps, self.kept, self.again = keeps, kept, again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.keeps(func, args):
            return func(*args, **(kwargs or {}))
        if self.again:
            return self.kept[func].popleft()
        result = func(*args, **(kwargs or {}))
        self.kept[func].append(tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, result))
        return result
