"""`leanseek plan`: what a recipe takes on a cluster, or what a budget buys; here all the answers come together."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from leanseek.config import BadInput, Config, read_recipe, to_toml
from leanseek.plan import bill, rows, serving, simulate
from leanseek.plan.bill import Stage
from leanseek.plan.count import flops_per_token, parameters, recomputed_flops_per_token
from leanseek.plan.estimate import STACKS, Estimate, Stack, estimate, traffic
from leanseek.plan.hardware import Hardware, find
from leanseek.plan.layout import SCHEDULE_NAMES, Layout, Precision, checked
from leanseek.plan.memory import RankMemory, rank_bytes, why_not
from leanseek.plan.propose import Proposal, propose
from leanseek.plan.search import Found, Rejected, search, smallest_cluster


@dataclass(frozen=True)
class Request:
    """The command line of `leanseek plan`."""

    recipe: str = "v3"
    overrides: tuple[str, ...] = ()
    hardware: str = "h800"
    gpus: int | None = None
    tokens: float | None = None
    price: float | None = None
    precision: str = "auto"
    stack: str | None = None
    mesh: str | None = None


@dataclass(frozen=True)
class Plan:
    config: Config
    hardware: Hardware
    stack: Stack
    chosen: Estimate
    memory: list[RankMemory]
    stages: list[Stage]
    per_billion: list[Stage]  # other stages, for a billion tokens each
    others: list[Estimate]  # further layouts that fit, cheapest first
    rejected: list[Rejected]
    tried: int
    own: Estimate | None  # V3 as it was trained, where that is what was asked
    serving: list[tuple[str, serving.Serving]]
    large: list[tuple[simulate.Cluster, int, simulate.Simulated]]

    def as_json(self) -> dict[str, Any]:
        count, layout = parameters(self.config.model), self.chosen.layout
        main = self.stages[0]
        return {
            "params_total": count.total,
            "params_activated": count.activated,
            "flops_per_token": self.chosen.flops_per_token,
            "recomputed_flops_per_token": recomputed_flops_per_token(
                self.config.model, layout.length, layout.recompute
            ),
            "hardware": self.hardware.name,
            "gpus": layout.gpus,
            "tokens": main.tokens,
            "tokens_per_second_per_device": self.chosen.tokens_per_second,
            "mfu": self.chosen.mfu,
            "gpu_hours": main.device_hours,
            "days": main.days,
            "cost_usd": main.usd,
            "cost_usd_range": list(main.range_usd()),
            "cost_usd_all_stages": sum(stage.usd for stage in self.stages),
            "kwh": main.kwh,
            "memory_per_rank_bytes": [each.total for each in self.memory],
            "fits": why_not(self.config.model, layout, self.hardware) is None,
            "mesh": mesh_of(layout),
            "step_seconds": self.chosen.step.parts(),
            "step_bytes_per_rank": traffic(self.config.model, layout, self.hardware),
            "stages": [stage.row() for stage in self.stages],
            "per_billion_tokens": [stage.row() for stage in self.per_billion],
            "own": None
            if self.own is None
            else {"mesh": mesh_of(self.own.layout), "tokens_per_second_per_device": self.own.tokens_per_second},
            "others": [
                {"mesh": mesh_of(e.layout), "tokens_per_second_per_device": e.tokens_per_second} for e in self.others
            ],
            "rejected": [{"mesh": mesh_of(each.layout), "why": each.why} for each in self.rejected],
        }


def mesh_of(layout: Layout) -> dict[str, Any]:
    return {
        "dp": layout.dp,
        "pp": layout.pp,
        "ep": layout.ep,
        "tp": layout.tp,
        "cp": layout.cp,
        "schedule": layout.schedule,
        "micro_batch": layout.micro_batch,
        "micro_batches": layout.micro_batches,
        "precision": layout.precision,
        "recompute": layout.recompute,
        "shards": layout.shards,
    }


def machine(request: Request) -> Hardware:
    hardware = find(request.hardware)
    if request.price is not None:
        if not 0 <= request.price < 1e9:
            raise BadInput(f"--price {request.price:g}: a price per device and hour is at least 0 and a number")
        hardware = replace(hardware, usd_per_hour=request.price)
    return hardware


def stack_of(request: Request) -> Stack:
    name = request.stack or ("leanseek" if request.hardware == "cpu" else "megatron")
    if name not in STACKS:
        raise BadInput(f"--stack {name!r}: known are {', '.join(STACKS)}")
    return STACKS[name]


def plan(request: Request) -> Plan:
    """Raises BadInput: unknown names, impossible meshes, a recipe that fits nowhere."""
    config = read_recipe(request.recipe, request.overrides)
    hardware, stack = machine(request), stack_of(request)
    model = config.model
    tokens = float(config.train.tokens) if request.tokens is None else request.tokens
    if not 0 < tokens < 1e20:
        raise BadInput(f"--tokens {tokens:g}: a run takes more than none, and a number")
    precisions = _precisions(request.precision, hardware)
    length, muon = config.stages[0].sequence_length, config.optimizer.name == "muon"
    sequences = max(1, round(config.schedule.batch_tokens[-1].value / length))
    gpus = request.gpus
    if gpus is None:
        gpus = smallest_cluster(model, hardware, sequences, length, precisions)
        if gpus is None:
            raise BadInput(f"{request.recipe}: fits on no cluster of {hardware.name}")
    if gpus < 1:
        raise BadInput(f"--gpus {gpus}: at least one")
    batch = _divisible(sequences, gpus)
    own = _own(request, config, hardware, gpus, stack)
    if request.mesh is not None:
        layout = checked(parse_mesh(request.mesh, gpus, batch, length, precisions[-1]), model)
        found = Found([estimate(model, layout, hardware, stack)], [], 1)
        why = why_not(model, layout, hardware)
        if why is not None:
            found = replace(found, rejected=[Rejected(layout, why)])
    else:
        found = search(model, hardware, gpus, batch, length, precisions, stack, muon=muon)
    chosen = own or found.best[0]
    return Plan(
        config,
        hardware,
        stack,
        chosen,
        rank_bytes(model, chosen.layout),
        _stages(request, config, chosen, stack, tokens),
        bill.per_billion(model, chosen, stack),
        found.best if own else found.best[1:],
        found.rejected,
        found.tried,
        own,
        _serving(config, hardware, stack, gpus),
        _large(config, chosen),
    )


def _divisible(sequences: int, gpus: int) -> int:
    """The batch in sequences, rounded up where the number of devices leaves no mesh that would divide it."""
    odd = gpus // (gpus & -gpus)  # meshes are powers of two: data parallelism takes what is left
    part = gpus if sequences < gpus else odd
    return -(-sequences // part) * part


def _precisions(asked: str, hardware: Hardware) -> list[Precision]:
    if asked == "bf16" or (asked == "auto" and hardware.fp8_tflops is None):
        return ["bf16"]
    if asked == "fp8":
        if hardware.fp8_tflops is None:
            raise BadInput(f"--precision fp8: {hardware.name} has no FP8 units: take bf16")
        return ["fp8"]
    if asked == "auto":
        return ["bf16", "fp8"]
    raise BadInput(f"--precision {asked!r}: auto, bf16 or fp8")


def _own(request: Request, config: Config, hardware: Hardware, gpus: int, stack: Stack) -> Estimate | None:
    own = rows.v3_layout()
    if request.recipe != "v3" or request.overrides or request.mesh or request.precision == "bf16" or gpus != own.gpus:
        return None
    if hardware.fp8_tflops is None or why_not(config.model, own, hardware) is not None:
        return None
    return estimate(config.model, own, hardware, stack)


def _stages(request: Request, config: Config, chosen: Estimate, stack: Stack, tokens: float) -> list[Stage]:
    if chosen.layout == rows.v3_layout():
        told = config.model_copy(update={"train": config.train.model_copy(update={"tokens": int(tokens)})})
        return bill.v3_stages(told, chosen, stack)
    return [bill.pretraining(chosen, tokens)]


def parse_mesh(text: str, gpus: int, batch: int, length: int, precision: Precision) -> Layout:
    """`pp=16,ep=64,schedule=DualPipe,recompute=selective,micro_batch=1,…`. Raises BadInput."""
    values: dict[str, Any] = {}
    numbers = ("pp", "ep", "tp", "cp", "micro_batch", "chunks")
    names = {
        "schedule": SCHEDULE_NAMES,
        "recompute": ("none", "selective", "full"),
        "shards": ("states", "all"),
        "overlaps": ("yes", "no"),
    }
    for item in text.split(","):
        key, equals, value = item.partition("=")
        if key in numbers and equals and value.isdecimal() and int(value) > 0:
            values[key] = int(value)
        elif key in names and value in names[key]:
            values[key] = value == "yes" if key == "overlaps" else value
        else:
            known = "; ".join(f"{name}: {', '.join(choices)}" for name, choices in names.items())
            raise BadInput(f"--mesh {item!r}: {', '.join(numbers)} take a number; {known}")
    low = precision == "fp8"
    return Layout(
        gpus,
        batch=batch,
        length=length,
        precision=precision,
        dispatch_bytes=1 if low else 2,
        moment_bytes=2 if low else 4,
        **values,
    )


def _serving(config: Config, hardware: Hardware, stack: Stack, gpus: int) -> list[tuple[str, serving.Serving]]:
    """Prefill and decode on the units of DeepSeek's service, for a cluster that is of their size."""
    model, out = config.model, []
    if gpus < 144:
        return []
    try:
        out.append(("prefill, 32 devices, 4K prompts", serving.prefill(model, hardware, stack)))
        out.append(("decode, 144 devices, 5K contexts, 20 tokens/s each", serving.decode(model, hardware, stack)))
    except BadInput:  # the machine cannot serve it that way; the plan is about training
        pass
    return out


def _large(config: Config, chosen: Estimate) -> list[tuple[simulate.Cluster, int, simulate.Simulated]]:
    if chosen.layout.gpus < 1024:
        return []
    state = 12.0 * parameters(config.model).total_with_mtp  # master weights and two FP32 moments
    return simulate.table(chosen.step.seconds, state)


# ── turned around ─────────────────────────────────────────────────────────────────────────────────────────────────


def plan_budget(request: Request, budget: float) -> list[Proposal]:
    """Raises BadInput."""
    if not 0 < budget < 1e15:
        raise BadInput(f"--budget {budget:g}: nothing can be bought for it: name a sum above 0")
    hardware = machine(request)
    if not hardware.usd_per_hour:
        raise BadInput(f"--budget {budget:g}: {hardware.name} costs nothing per hour: give --price")
    gpus = 8 if request.gpus is None and hardware.domain >= 8 else request.gpus or 1
    precision = _precisions(request.precision, hardware)[0]
    return propose(budget, hardware, gpus, precision, stack_of(request))


def write_recipe(proposal: Proposal, path: Path) -> None:
    path.write_text(to_toml(proposal.config), encoding="utf-8")


def proposals_as_json(proposals: list[Proposal]) -> dict[str, Any]:
    rows_ = []
    for each in proposals:
        count = parameters(each.config.model)
        rows_.append(
            {
                "params_total": count.total,
                "params_activated": count.activated,
                "flops_per_token": flops_per_token(each.config.model, each.config.stages[0].sequence_length),
                "tokens": each.tokens,
                "loss_range": list(each.loss_range),
                "cost_usd": each.usd,
                "days": each.days,
                "mesh": mesh_of(each.estimate.layout),
            }
        )
    return {"proposals": rows_}
