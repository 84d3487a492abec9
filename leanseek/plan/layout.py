"""How a model lies on a cluster: mesh, pipeline schedule, micro-batches, precision; and which layers each rank holds.

T tokens in a sequence · dp, pp, ep, tp as in `mesh.*`. Experts are spread over ep of the gpus ÷ pp ranks of a stage;
what is no expert lies on each of them, cut by tp. Tensor- and context-parallel ranks share a sequence's tokens.
"""

import itertools
from dataclasses import dataclass
from typing import Literal

from leanseek.config import BadInput, ModelConfig
from leanseek.parallel.timetable import (
    Timetable,
    dualpipe,
    dualpipe_v,
    even_cuts,
    interleaved,
    one_f_one_b,
    stages_of,
    zb1p,
    zbv,
)
from leanseek.plan.count import Piece, loads, pieces

Precision = Literal["bf16", "fp8"]
Recompute = Literal["none", "selective", "full"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
SCHEDULE_NAMES = ("1F1B", "Interleaved1F1B", "ZB1P", "ZBV", "DualPipe", "DualPipeV")


@dataclass(frozen=True)
class Layout:
    gpus: int
    pp: int = 1
    ep: int = 1
    tp: int = 1
    cp: int = 1
    schedule: str = "1F1B"
    chunks: int = 1  # stages a rank holds, where the schedule leaves it open
    micro_batch: int = 1  # sequences
    batch: int = 1  # sequences of an optimizer step, over the whole cluster
    length: int = 4096
    precision: Precision = "bf16"
    recompute: Recompute = "none"
    shards: Literal["states", "all"] = "states"  # over data-parallel ranks: optimizer states (ZeRO-1), or weights too
    overlaps: bool = False  # all-to-all of one micro-batch under the computation of another
    by_node: bool = True  # a token crosses to a node once, whatever number of its experts are there
    dispatch_bytes: int = 2  # per value sent to the experts; what comes back is BF16
    fp8_of: Literal["all", "experts"] = "all"  # which matmuls run in FP8 where `precision` says so
    fp8_attention: bool = False
    moment_bytes: int = 4  # per value of each of the two moments
    muon: bool = False  # matrices are orthogonalised at each step
    adapters: bool = False  # LoRA: weights are frozen, only small adapters are trained
    cuts: tuple[int, ...] | None = None  # pieces in each stage; None: as even as can be

    @property
    def dp(self) -> int:
        return self.gpus // (self.pp * self.tp * self.cp)

    @property
    def stage_ranks(self) -> int:
        return self.gpus // self.pp

    @property
    def expert_dp(self) -> int:
        """On how many ranks each expert lies."""
        return self.stage_ranks // self.ep

    @property
    def micro_batches(self) -> int:
        """Per pipeline and step."""
        return self.batch // (self.dp * self.micro_batch)

    @property
    def tokens_per_rank(self) -> int:
        """Tokens of a micro-batch that one rank takes through its layers; tp and cp ranks share a sequence."""
        return self.micro_batch * self.length // (self.tp * self.cp)

    @property
    def stages(self) -> int:
        """Pieces the model is cut into."""
        return self.pp * {"Interleaved1F1B": self.chunks, "ZBV": 2, "DualPipeV": 2}.get(self.schedule, 1)

    @property
    def copies(self) -> int:
        return 2 if self.schedule == "DualPipe" else 1

    def timetable(self, batches: int) -> Timetable:
        if self.schedule == "Interleaved1F1B":
            return interleaved(self.pp, batches, self.chunks)
        return {"1F1B": one_f_one_b, "ZB1P": zb1p, "ZBV": zbv, "DualPipe": dualpipe, "DualPipeV": dualpipe_v}[
            self.schedule
        ](self.pp, batches)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages whose parameters pipeline rank `rank` holds."""
        return stages_of(self.schedule, self.pp, rank, self.chunks)

    def named(self) -> str:
        """The mesh in one line, for people."""
        if self.gpus == 1:
            return f"one device, micro-batches of {self.micro_batch}, {self.precision}, recompute {self.recompute}"
        mesh = f"dp {self.dp} · pp {self.pp} · ep {self.ep}" + "".join(
            f" · {name} {ways}" for name, ways in (("tp", self.tp), ("cp", self.cp)) if ways > 1
        )
        chunks = f" × {self.chunks}" if self.schedule == "Interleaved1F1B" else ""
        pipeline = f", {self.schedule}{chunks}" if self.pp > 1 else ""
        zero = "ZeRO-1" if self.shards == "states" else "FSDP"
        micro = f", micro-batches of {self.micro_batch}" if self.micro_batch > 1 else ""
        return f"{mesh}{pipeline}{micro}, {zero}, {self.precision}, recompute {self.recompute}"


def checked(layout: Layout, model: ModelConfig) -> Layout:
    """The layout itself, when the model can lie on the cluster that way. Raises BadInput."""
    wrong = wrong_with(layout, model)
    if wrong:
        raise BadInput(f"mesh {layout.named()}: {wrong}")
    return layout


def wrong_with(layout: Layout, model: ModelConfig) -> str | None:
    """Why a layout is impossible, or None."""
    ways = layout.pp * layout.tp * layout.cp
    if layout.gpus % ways:
        return f"pp × tp × cp = {ways} does not divide {layout.gpus} devices"
    if layout.length % (layout.tp * layout.cp):
        return f"tp × cp does not divide sequences of {layout.length} tokens"
    if layout.stage_ranks % layout.ep:
        return f"ep {layout.ep} does not divide the {layout.stage_ranks} devices of a stage"
    if model.n_routed_experts % layout.ep:
        return f"ep {layout.ep} does not divide {model.n_routed_experts} experts"
    if model.num_attention_heads % layout.tp:
        return f"tp {layout.tp} does not divide {model.num_attention_heads} heads"
    if layout.batch % (layout.dp * layout.micro_batch):
        return (
            f"a batch of {layout.batch} sequences does not divide into micro-batches of {layout.micro_batch} on "
            f"{layout.dp} data-parallel ranks"
        )
    if layout.cuts is not None and (len(layout.cuts), sum(layout.cuts)) != (layout.stages, len(pieces(model))):
        return f"cuts {layout.cuts} are not {layout.stages} stages of {len(pieces(model))} pieces together"
    if layout.stages > model.num_hidden_layers + model.num_nextn_predict_layers + 1:
        return f"{layout.stages} stages are more than the {model.num_hidden_layers} layers"
    n, name = layout.micro_batches, layout.schedule
    if name == "Interleaved1F1B" and n % layout.pp:
        return f"{n} micro-batches are no multiple of pp {layout.pp}, as {name} wants"
    if name in ("ZBV", "DualPipe", "DualPipeV") and n < 2 * layout.pp:
        return f"{n} micro-batches are fewer than 2 × pp, as {name} wants"
    if name == "DualPipe" and (n % 2 or layout.pp % 2):
        return f"{name} wants an even pp and an even number of micro-batches"
    return None


# ── which layers lie where ────────────────────────────────────────────────────────────────────────────────────────


def runs(model: ModelConfig, layout: Layout) -> list[list[Piece]]:
    """The pieces of each stage: as the layout says, or with the loads as even as can be."""
    row = pieces(model)
    lengths = layout.cuts or even_cuts(loads(model), layout.stages)
    starts = [0, *itertools.accumulate(lengths)]
    return [row[start:end] for start, end in itertools.pairwise(starts)]
