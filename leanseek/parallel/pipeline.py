"""The model cut into stages, which PyTorch's own pipeline schedules execute (report §3.2.1, §3.2.3).

b rows of a micro-batch · T tokens in a row · D hidden_size · K MTP depths · S stages.

A stage is a `Transformer` from which parts were left out. Stage 0 has the embedding; the last one has final norm, head
and all MTP modules, and makes the losses. Under the schedules that lay the stages as a V both are on the first rank.
Layers keep their global names, so that a checkpoint knows nothing of stages. Between stages travels the hidden state
alone: ids, targets, positions and segments are at every rank, and each router joins its own balance loss to the graph.

The MTP modules need the embedding, which is stage 0's. Where both stages are on one rank it is one parameter; else the
last stage borrows it: it is sent the weight before a step and sends its gradient back after it, so that one rank has
the whole gradient, and neither optimizer nor checkpoint sees the copy.
"""

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from itertools import accumulate, islice, pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from leanseek.config import Config, ModelConfig
from leanseek.model.transformer import Transformer
from leanseek.ops.loss import IGNORE, token_losses
from leanseek.parallel.apply import forget_gathered
from leanseek.parallel.mesh import Ranks
from leanseek.parallel.parts import local
from leanseek.parallel.timetable import enough_batches, even_cuts, stages_of

# The losses of a micro-batch, each summed over its tokens: of the main model and of each MTP depth, 1 + K scalars.
# (model, final hidden states [b, T, D], ids, targets, positions, segments [b, T], tokens of a row that MTP learns from)
LossSums = Callable[[Transformer, Tensor, Tensor, Tensor, Tensor, Tensor | None, int | None], list[Tensor]]

MANY_STAGES: dict[str, Any] = {  # a rank has several stages under these
    "Interleaved1F1B": ScheduleInterleaved1F1B,
    "ZBV": ScheduleZBVZeroBubble,
    "DualPipeV": ScheduleDualPipeV,
}


# ── the cut ───────────────────────────────────────────────────────────────────────────────────────────────────────


def layers_of_stages(
    model: ModelConfig, stages: int, loads: Sequence[int], cuts: Sequence[int] | None = None
) -> list[range]:
    """Which layers each stage has: as `cuts` says, else with the loads as even as can be.

    The model is a row of pieces: the embedding, the layers, the MTP modules, the head. `loads` is by piece, `cuts` how
    many each stage has. MTP modules and head are together in the last stage, so that no loss is made elsewhere.
    """
    layers, end = model.num_hidden_layers, model.num_nextn_predict_layers + 1
    cuts = cuts or even_cuts((*loads[:-end], sum(loads[-end:])), stages)
    return [range(max(first - 1, 0), min(after - 1, layers)) for first, after in pairwise([0, *accumulate(cuts)])]


def cut(model: Transformer, layers: Sequence[range], held: Sequence[int]) -> None:
    """Leaves in `model` what the stages `held` have, under its global names; `layers` is by stage."""
    kept = {str(layer) for stage in held for layer in layers[stage]}
    model.layers = nn.ModuleDict({name: layer for name, layer in model.layers.items() if name in kept})
    if 0 not in held:
        model.embed_tokens = None
    if len(layers) - 1 not in held:
        model.norm = model.lm_head = None
        model.mtp = nn.ModuleDict()


class Stage(nn.Module):
    """What a schedule calls for one stage; `part` is the Transformer with only this stage's modules."""

    def __init__(self, part: Transformer, losses: LossSums) -> None:
        super().__init__()
        self.part = part
        self.losses = losses
        self.mtp_length: int | None = None  # of each row, from which the MTP modules learn; 0 while they are at rest

    def forward(
        self,
        x: Tensor,
        ids: Tensor,
        targets: Tensor,
        rows: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """x [b, T, D], in stage 0 the ids → [b, T, D], in the last stage the summed losses [1, 1 + K].

        The last stage in evaluation: −ln p of the targets, summed [1, 1]. Only the first `rows` ([1], on the CPU) of
        the b are there, perhaps none: what comes after them fills a micro-batch or a schedule up, no module sees it.
        """
        missing = ids.shape[0] - int(rows)
        if missing:
            x, ids, targets = x[: int(rows)], ids[: int(rows)], targets[: int(rows)]
            positions, segments = (None if each is None else each[: int(rows)] for each in (positions, segments))
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        if isinstance(self.part.embed_tokens, LateEmbedding):
            self.part.embed_tokens.beside = x
        hidden = self.part(x, positions, segments)
        if self.part.lm_head is None:
            return F.pad(hidden, (0, 0, 0, 0, 0, missing)) if missing else hidden
        if self.training:
            losses = self.losses(self.part, hidden, ids, targets, positions, segments, self.mtp_length)
            sums = torch.cat([loss.view(1, 1) for loss in losses], dim=1)
            return F.pad(sums, (0, 1 + len(self.part.mtp) - sums.shape[1]))
        valid = targets != IGNORE
        return token_losses(hidden[valid], self.part.lm_head.weight, targets[valid]).double().sum().view(1, 1)


class LateEmbedding(nn.Embedding):
    """The embedding in the last stage, where the MTP modules use it, once for each depth.

    Its gradient is added up when that of the stage's input is taken, and not with those of the weights, which a
    schedule may put off: that second pass cannot go through one MTP module to get to an earlier one's embedding.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__(embedding.num_embeddings, embedding.embedding_dim, device="meta")
        self.weight = embedding.weight
        self.beside: Tensor | None = None  # the stage's input

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = _Lookup.apply(self.beside, self, ids)
        return rows


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, beside: Tensor, embedding: nn.Embedding, ids: Tensor) -> Tensor:
        ctx.weight, ctx.ids = embedding.weight, ids
        return F.embedding(ids, embedding.weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        if ctx.weight.grad is None:
            ctx.weight.grad = torch.zeros_like(ctx.weight)
        ctx.weight.grad.index_add_(0, ctx.ids.flatten(), grad.flatten(0, -2).to(ctx.weight.dtype))
        return None, None, None


# ── the schedule ──────────────────────────────────────────────────────────────────────────────────────────────────


class Pipeline:
    """This rank's stages of a model, and the schedule that runs them with those of the other ranks of `group`."""

    def __init__(
        self, model: Transformer, config: Config, ranks: Ranks, loads: Sequence[int], losses: LossSums
    ) -> None:
        """Cuts `model`, on its device, down to what this rank holds.

        `loads` is by piece, see `layers_of_stages`; `losses` makes the losses at the end of the last stage.
        """
        group = ranks.group("pp")
        assert group is not None
        self.model = model
        self.group = group
        self.device = ranks.device
        self.schedule = config.mesh.schedule
        self.ranks = ranks.division.pp
        held = [stages_of(self.schedule, self.ranks, rank, config.mesh.chunks) for rank in range(self.ranks)]
        self.homes = {stage: rank for rank, stages in enumerate(held) for stage in stages}
        self.count = len(self.homes)
        # Weight gradients that come later are autograd's second pass over a stage. Recomputation allows one only.
        self.puts_off = config.train.recompute == "none"

        # FSDP gives each parameter to one stage, so that on one rank too the embeddings are two.
        shared = self.homes[0] == self.homes[self.count - 1] and ranks.division.dp * ranks.division.cp == 1
        borrows = model.config.num_nextn_predict_layers > 0 and not shared
        mine = held[ranks.place["pp"]]
        self.lent = model.embed_tokens if borrows and 0 in mine else None
        self.late: LateEmbedding | None = None
        if self.count - 1 in mine and len(model.mtp):
            assert model.embed_tokens is not None
            self.late = LateEmbedding(deepcopy(model.embed_tokens) if borrows else model.embed_tokens)
        self.borrowed = self.late if borrows else None

        layers = layers_of_stages(model.config, self.count, loads, config.mesh.cuts)
        cut(model, layers, mine)
        self.stages = {stage: Stage(self._part(stage, layers[stage]), losses) for stage in mine}
        self._built: tuple[tuple[int, int, int], Any] | None = None

    def _part(self, stage: int, layers: range) -> Transformer:
        with torch.device("meta"):  # everything in it is replaced or left out
            part = Transformer(self.model.config, self.model.dtype)
        part.layers = nn.ModuleDict({str(layer): self.model.layers[str(layer)] for layer in layers})
        part.embed_tokens = self.model.embed_tokens if stage == 0 else None
        part.norm = part.lm_head = None
        part.mtp = nn.ModuleDict()
        if stage == self.count - 1:
            part.norm, part.lm_head, part.mtp = self.model.norm, self.model.lm_head, self.model.mtp
            part.embed_tokens = self.late
        return part

    def backward(
        self,
        ids: Tensor,
        targets: Tensor,
        factors: Sequence[float],
        micro_batch: int,
        micro_batches: int,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """Adds the gradients of Σ factor · loss sum to the parameters; returns the 1 + K sums in FP64, at every rank.

        ids, targets, positions, segments [B, T] of this data-parallel rank, the same at all ranks of the pipeline.
        `factors` are of the main loss and of each depth; where these are 0 the MTP modules are at rest. `micro_batches`
        of `micro_batch` rows are the same on all data-parallel ranks; where rows are missing, or the schedule takes no
        fewer, the last ones are empty.
        """
        count = enough_batches(self.schedule, self.ranks, micro_batches)
        more = (0, 0, 0, count * micro_batch - ids.shape[0])
        of_rows = {"ids": ids, "targets": targets, "positions": positions, "segments": segments}
        filled = {name: F.pad(tensor, more) for name, tensor in of_rows.items() if tensor is not None}
        schedule = self._scheduled(count, micro_batch, ids.shape[1])
        self._train(True)
        mtp = any(factors[1:])
        for stage in self.stages.values():
            stage.mtp_length = None if mtp else 0
        if mtp:
            self._lend()
        sums = schedule.step(
            *([filled["ids"]] if 0 in self.stages else []),
            # The executor hands each micro-batch its part of `target` beside its output: here, the factors.
            target=torch.tensor(factors, dtype=torch.float64, device=self.device).expand(count, -1),
            rows=(ids.shape[0] - micro_batch * torch.arange(count)).clamp(0, micro_batch),
            **filled,
        )
        if mtp:
            self._give_back()
        told = torch.zeros(len(factors), dtype=torch.float64, device=self.device)
        if self.count - 1 in self.stages:
            told += sums.double().sum(dim=0)
        dist.all_reduce(told, group=self.group)
        return told

    @torch.no_grad()
    def nats(self, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
        """−ln p of all targets of all batches, each ids and targets [B, T] of sizes of its own; at every rank.

        A few batches at a time go through each stage in turn, so that ranks work at once. The executor wants
        micro-batches of one size, which windows of a text are not.
        """
        training = self.model.training
        self._train(False)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        left = iter(batches)
        while wave := [(ids.to(self.device), targets.to(self.device)) for ids, targets in islice(left, 2 * self.ranks)]:
            total += self._through(wave)
        self._train(training)
        for stage in self.stages.values():
            forget_gathered(stage)  # no backward pass comes that would, and the next step lends new weights
        dist.all_reduce(total, group=self.group)
        return total.item()

    def _through(self, wave: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """A wave of batches through this rank's stages, forward only."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        handed: list[Tensor] = [ids for ids, _ in wave]
        for index, stage in self.stages.items():
            sent = []
            for i, (ids, targets) in enumerate(wave):
                x = handed[i]
                if index and index - 1 not in self.stages:
                    x = torch.empty(
                        *ids.shape, self.model.config.hidden_size, dtype=self.model.dtype, device=ids.device
                    )
                    dist.recv(x, group=self.group, group_src=self.homes[index - 1])
                handed[i] = stage(x, ids, targets, torch.tensor([len(ids)]))
                if index == self.count - 1:
                    total += handed[i].sum()
                elif index + 1 not in self.stages:
                    sent.append(dist.isend(handed[i], group=self.group, group_dst=self.homes[index + 1]))
            for work in sent:
                assert work is not None  # this rank is in the group
                work.wait()
        return total

    def _scheduled(self, batches: int, size: int, length: int) -> Any:
        """PyTorch's schedule for so many micro-batches [size, length]; the newest is kept."""
        shape = batches, size, length
        if self._built is None or self._built[0] != shape:
            with torch.device("meta"):  # examples, so that no stage is run to see what it makes: it would count
                ids = torch.empty(size, length, dtype=torch.int64)
                hidden = torch.empty(size, length, self.model.config.hidden_size, dtype=self.model.dtype)
                hidden.requires_grad_()
                sums = torch.empty(1, 1 + self.model.config.num_nextn_predict_layers)
            stages = [
                PipelineStage(
                    stage,
                    index,
                    self.count,
                    self.device,
                    input_args=hidden if index else ids,
                    output_args=hidden if index < self.count - 1 else sums,
                    group=self.group,
                    dw_builder=None if self.puts_off else _done_already,
                )
                for index, stage in self.stages.items()
            ]
            # Sums and not means: what they are divided by is in the factors.
            settings: dict[str, Any] = {"loss_fn": _weighted, "scale_grads": False}
            made = (
                Schedule1F1B(stages[0], batches, **settings)
                if self.schedule == "1F1B"
                else MANY_STAGES[self.schedule](stages, batches, **settings)
            )
            self._built = shape, made
        return self._built[1]

    def _train(self, mode: bool) -> None:
        self.model.train(mode)
        for stage in self.stages.values():
            stage.train(mode)

    @torch.no_grad()
    def _lend(self) -> None:
        """What the last stage borrows becomes what stage 0 has."""
        if self.lent is not None and self.borrowed is not None:
            local(self.borrowed.weight).copy_(local(self.lent.weight))
        elif self.lent is not None:
            dist.send(local(self.lent.weight), group=self.group, group_dst=self.homes[self.count - 1])
        elif self.borrowed is not None:
            dist.recv(local(self.borrowed.weight), group=self.group, group_src=self.homes[0])

    @torch.no_grad()
    def _give_back(self) -> None:
        """What is borrowed gives its gradient to stage 0's."""
        if self.borrowed is not None:
            assert self.borrowed.weight.grad is not None
            gradient = local(self.borrowed.weight.grad)
            self.borrowed.weight.grad = None
            if self.lent is None:
                dist.send(gradient, group=self.group, group_dst=self.homes[0])
        if self.lent is not None:
            assert self.lent.weight.grad is not None
            sum_of_both = local(self.lent.weight.grad)
            if self.borrowed is None:
                gradient = torch.empty_like(sum_of_both)
                dist.recv(gradient, group=self.group, group_src=self.homes[self.count - 1])
            sum_of_both += gradient


def _done_already() -> Callable[[], None]:
    """Has the executor make a stage's gradients whole, and do nothing more when those of the weights are due."""
    return lambda: None


def _weighted(sums: Tensor, factors: Tensor) -> Tensor:
    return (sums * factors).sum()
