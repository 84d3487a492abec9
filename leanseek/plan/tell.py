"""A plan as lines for people: what it takes, where the time goes, what lies where, what else was tried."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from leanseek.plan.count import parameters
from leanseek.plan.estimate import RANGE
from leanseek.plan.memory import RESERVED
from leanseek.plan.page import page
from leanseek.plan.planner import Plan, Request, plan, plan_budget, proposals_as_json, write_recipe
from leanseek.plan.propose import Proposal
from leanseek.plan.words import amount, duration, energy, money


def answer(request: Request, budget: float | None, out: Path | None, html: Path | None, as_json: bool) -> None:
    """All of the verb `plan`: on the terminal, as JSON, as a page, as a recipe. Raises BadInput."""
    console = Console(highlight=False)
    if budget is not None:
        proposals = plan_budget(request, budget)
        if out is not None:
            write_recipe(proposals[0], out)
        if as_json:
            print(json.dumps(proposals_as_json(proposals)))
            return
        tell_proposals(proposals, budget, console)
        if out is not None:
            console.print(f"{out}: written; leanseek pretrain {out} --data DATA --out RUN")
        return
    made = plan(request)
    if html is not None:
        html.write_text(page(made), encoding="utf-8")
    if as_json:
        print(json.dumps(made.as_json()))
    else:
        tell(made, console)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    return table


def tell(plan: Plan, console: Console) -> None:
    count, layout, hardware = parameters(plan.config.model), plan.chosen.layout, plan.hardware
    main = plan.stages[0]
    peak = "measured" if hardware.name == "cpu" else layout.precision
    low, high = main.range_usd()
    console.print(
        f"{amount(count.total)} parameters, {amount(count.activated)} activated; "
        f"{plan.chosen.flops_per_token / 1e9:,.4g} GFLOPs per token at {layout.length:,} tokens"
    )
    console.print(f"{layout.gpus:,} × {hardware.name} at ${hardware.usd_per_hour:g} per hour: {layout.named()}")
    console.print(
        f"{plan.chosen.tokens_per_second:,.0f} tokens/s a device, {plan.chosen.mfu:.0%} of its {peak} peak "
        f"(efficiency of {plan.stack.name})"
    )
    total = sum(stage.usd for stage in plan.stages)
    hours = f"{main.device_hours:,.{0 if main.device_hours >= 100 else 2}f}"
    console.print(
        f"[bold]{hours} device hours, {duration(main.days)}, {money(main.usd)}[/] "
        f"({money(low)} to {money(high)}: ± {RANGE:.0%}), {energy(main.kwh)}"
    )
    if len(plan.stages) > 1:
        console.print(f"all stages: {money(total)}")
        table = _table("\nStages", "stage", "tokens", "tokens/s", "device hours", "days", "cost", "")
        for stage in plan.stages:
            table.add_row(
                stage.name, amount(stage.tokens), f"{stage.tokens_per_second:,.0f}", f"{stage.device_hours:,.0f}",
                f"{stage.days:.2f}", money(stage.usd), stage.note,
            )  # fmt: skip
        console.print(table)
    table = _table("\nAnother billion tokens on the same cluster", "stage", "tokens/s", "device hours", "cost")
    for stage in plan.per_billion:
        hours = f"{stage.device_hours:,.{0 if stage.device_hours >= 100 else 2}f}"
        table.add_row(stage.name, f"{stage.tokens_per_second:,.0f}", hours, money(stage.usd))
    console.print(table)
    table = _table("\nA step", "where the time goes", "seconds", "share")
    for name, seconds in plan.chosen.step.parts().items():
        if seconds:
            table.add_row(name, f"{seconds:.3g}", f"{seconds / plan.chosen.step.seconds:.1%}")
    console.print(table)
    fullest = max(plan.memory, key=lambda each: each.total)
    table = _table("\nMemory of the fullest rank", f"pipeline rank {fullest.rank}", "GB")
    for name, size in fullest.parts().items():
        table.add_row(name, f"{size / 1e9:.1f}")
    room = (1 - RESERVED) * hardware.memory_gib * 2**30
    table.add_row("[bold]all[/]", f"[bold]{fullest.total / 1e9:.1f} of {room / 1e9:.1f}[/]")
    console.print(table)
    if plan.others:
        title = "\nThe best found" if plan.own else "\nOthers that fit"
        table = _table(f"{title}, of {plan.tried:,} layouts", "mesh", "tokens/s", "cost")
        for each in plan.others[:4]:
            cost = main.usd * plan.chosen.tokens_per_second / each.tokens_per_second
            table.add_row(each.layout.named(), f"{each.tokens_per_second:,.0f}", money(cost))
        console.print(table)
    if plan.rejected:
        table = _table("\nWhat does not fit, nearest first", "mesh", "why")
        table.columns[1].justify = "left"
        for rejected in plan.rejected[:3]:
            table.add_row(rejected.layout.named(), rejected.why)
        console.print(table)
    if plan.serving:
        table = _table("\nServing, at full load", "unit", "tokens/s a device", "$ per million", "held back by")
        for name, served in plan.serving:
            table.add_row(name, f"{served.tokens_per_second:,.0f}", f"{served.usd_per_million:.3f}", served.bound)
        console.print(table)
    if plan.large:
        table = _table("\nFailures and stragglers", "devices", "fails every", "best checkpoint every", "goodput")
        for cluster, steps, simulated in plan.large:
            interval = steps * cluster.step_seconds / 60
            table.add_row(
                f"{cluster.devices:,}",
                f"{cluster.mtbf_seconds / 3600:.2f} h",
                f"{interval:.1f} min",
                f"{simulated.goodput:.1%}",
            )
        console.print(table)


def tell_proposals(proposals: list[Proposal], budget: float, console: Console) -> None:
    best = proposals[0]
    console.print(
        f"{money(budget)} buys {duration(best.days)} of {best.estimate.layout.gpus} × {best.estimate.hardware.name}"
    )
    table = _table("", "parameters", "activated", "experts", "tokens", "expected loss", "tokens/s a device", "mesh")
    for each in proposals:
        count, model = parameters(each.config.model), each.config.model
        table.add_row(
            amount(count.total), amount(count.activated), f"{model.num_experts_per_tok} of {model.n_routed_experts}",
            amount(each.tokens), f"{each.loss_range[0]:.2f} to {each.loss_range[1]:.2f}",
            f"{each.estimate.tokens_per_second:,.0f}", each.estimate.layout.named(),
        )  # fmt: skip
    console.print(table)
