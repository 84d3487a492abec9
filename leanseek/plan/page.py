"""A plan as one HTML page: drawings in SVG, light and dark, nothing fetched from anywhere."""

from html import escape

from leanseek.parallel.timetable import Costs, play
from leanseek.plan.bill import Stage
from leanseek.plan.count import parameters
from leanseek.plan.estimate import RANGE
from leanseek.plan.memory import RESERVED
from leanseek.plan.planner import Plan
from leanseek.plan.words import amount, duration, energy, money

STYLE = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #fff; --ink: #1d2326; --soft: #66727a; --line: #e2e4e1;
  --a: #2f6690; --b: #81a4cd; --c: #e0a458; --d: #7a9e7e; --e: #b56576; --f: #9a8c98; --hot: 47 102 144; }
@media (prefers-color-scheme: dark) { :root { --page: #14181b; --card: #1c2226; --ink: #e6eaec; --soft: #98a4ab;
  --line: #2e363b; --a: #5b9bd0; --b: #3a6491; --c: #d69a4c; --d: #6f9a75; --e: #c0707f; --f: #84788a;
  --hot: 91 155 208; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 36px 24px 64px; }
h1 { font-size: 27px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 15px; margin: 0 0 2px; }
h1 + p code { display: inline-block; margin-top: 4px; }
p { margin: 0 0 12px; color: var(--soft); max-width: 84ch; }
.grid { display: grid; grid-template-columns: repeat(12, 1fr); gap: 16px; margin-top: 20px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; min-width: 0;
  grid-column: span 12; }
.half { grid-column: span 6; } .fact { grid-column: span 3; padding: 14px 18px; }
.fact b { display: block; font-size: 25px; line-height: 1.25; font-variant-numeric: tabular-nums; }
.fact span { color: var(--soft); font-size: 13px; }
@media (max-width: 820px) { .half { grid-column: span 12; } .fact { grid-column: span 6; } }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th { text-align: right; font-weight: 500; color: var(--soft); font-size: 12.5px; }
th, td { padding: 5px 10px; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child, .left { text-align: left; padding-left: 0; }
tr:last-child td { border-bottom: 0; } tr.sum td { font-weight: 600; }
.heat td { text-align: center; padding: 7px 4px; border: 2px solid var(--card); border-radius: 6px; }
.heat th { text-align: center; border: 0; vertical-align: middle; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 12px; }
svg .strong { fill: var(--ink); }
.key { display: flex; flex-wrap: wrap; gap: 4px 16px; margin-top: 10px; font-size: 13px; color: var(--soft); }
.key i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px; }
code { font: 13px ui-monospace, Menlo, monospace; }
"""
COLOURS = ("--a", "--b", "--c", "--d", "--e", "--f")


def page(plan: Plan) -> str:
    """The whole document."""
    count, layout, main = parameters(plan.config.model), plan.chosen.layout, plan.stages[0]
    low, high = main.range_usd()
    name = plan.config.description or "A recipe"
    facts = [
        (money(main.usd), f"{money(low)} to {money(high)}, ± {RANGE:.0%}"),
        (duration(main.days), f"{main.device_hours:,.{0 if main.device_hours >= 100 else 1}f} device hours"),
        (
            f"{plan.chosen.tokens_per_second:,.0f} tokens/s",
            f"a device; {plan.chosen.mfu:.0%} of its {layout.precision} peak",
        ),
        (energy(main.kwh), "with hosts, network and cooling"),
    ]
    cards = "".join(
        f'<section class="fact"><b>{escape(big)}</b><span>{escape(small)}</span></section>' for big, small in facts
    )
    parts = [
        f"<h1>{escape(amount(main.tokens))} tokens on {layout.gpus:,} × {escape(plan.hardware.name.upper())}</h1>",
        f"<p>{escape(name)}. {amount(count.total)} parameters, {amount(count.activated)} activated, "
        f"{plan.chosen.flops_per_token / 1e9:,.4g} GFLOPs per token.<br><code>{escape(layout.named())}</code></p>",
        '<div class="grid">',
        cards,
        _stages(plan),
        _time(plan),
        _sensitivity(main, plan),
        _memory(plan),
        _pipeline(plan),
        _others(plan),
        _large(plan),
        "</div>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Plan: {escape(amount(main.tokens))} tokens on {layout.gpus:,} {escape(plan.hardware.name)}</title>"
        f"<style>{STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def _card(title: str, said: str, inside: str, kind: str = "") -> str:
    return f'<section class="{kind}"><h2>{escape(title)}</h2><p>{said}</p><div class="scroll">{inside}</div></section>'


def _rows(head: list[str], rows: list[list[str]], left: tuple[int, ...] = (0,), total: bool = False) -> str:
    def cell(tag: str, i: int, text: str) -> str:
        return f"<{tag}{' class=left' if i in left else ''}>{text}</{tag}>"

    lines = ["<tr>" + "".join(cell("th", i, escape(text)) for i, text in enumerate(head)) + "</tr>"]
    for at, row in enumerate(rows):
        mark = ' class="sum"' if total and at == len(rows) - 1 else ""
        lines.append(f"<tr{mark}>" + "".join(cell("td", i, escape(text)) for i, text in enumerate(row)) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def _key(names: list[str]) -> str:
    items = zip(names, COLOURS, strict=False)
    return (
        '<div class="key">'
        + "".join(f'<span><i style="background:var({c})"></i>{escape(n)}</span>' for n, c in items)
        + "</div>"
    )


def _stages(plan: Plan) -> str:
    rows = [
        [
            stage.name + (f" ({stage.note})" if stage.note else ""), amount(stage.tokens),
            f"{stage.tokens_per_second:,.0f}", f"{stage.device_hours:,.0f}", duration(stage.days), money(stage.usd),
        ]
        for stage in plan.stages
    ]  # fmt: skip
    if len(rows) > 1:
        hours, days, usd = (sum(getattr(s, key) for s in plan.stages) for key in ("device_hours", "days", "usd"))
        rows.append(["all", "", "", f"{hours:,.0f}", duration(days), money(usd)])
    further = [
        [stage.name, amount(stage.tokens), f"{stage.tokens_per_second:,.0f}", f"{stage.device_hours:,.1f}",
         duration(stage.days), money(stage.usd)]
        for stage in plan.per_billion
    ]  # fmt: skip
    head = ["stage", "tokens", "tokens/s a device", "device hours", "time", "cost"]
    return _card(
        "The bill",
        f"At ${plan.hardware.usd_per_hour:g} per device and hour.",
        _rows(head, rows, total=len(rows) > 1) + "<br>" + _rows(["another billion tokens", *head[1:]], further),
    )


def _bar(parts: list[tuple[str, float]], total: float, y: float, height: float, left: float, width: float) -> str:
    out, x = [], left
    for (name, size), colour in zip(parts, COLOURS, strict=False):
        w = width * size / total
        out.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(w - 1, 0):.1f}" height="{height}" rx="2" fill="var({colour})">'
            f"<title>{escape(name)}</title></rect>"
        )
        x += w
    return "".join(out)


def _time(plan: Plan) -> str:
    parts = [(name, seconds) for name, seconds in plan.chosen.step.parts().items() if seconds]
    total = plan.chosen.step.seconds
    cost = plan.stages[0].usd
    bar = f'<svg viewBox="0 0 520 34">{_bar(parts, total, 4, 26, 0, 520)}</svg>'
    rows = [[name, f"{s:.3g} s", f"{s / total:.1%}", money(cost * s / total)] for name, s in parts]
    said = f"One optimizer step takes {total:.3g} seconds; here is where they, and the money, go."
    inside = bar + _key([name for name, _ in parts]) + _rows(["", "of a step", "share", "cost"], rows)
    return _card("Where the time goes", said, inside, "half")


def _sensitivity(main: Stage, plan: Plan) -> str:
    """What the bill becomes at other prices and other shares of peak."""
    price, mfu = plan.hardware.usd_per_hour, plan.chosen.mfu
    prices = [price * f for f in (0.5, 0.75, 1.0, 1.5, 2.0)]
    shares = [mfu * f for f in (0.7, 0.85, 1.0, 1.15, 1.3)]
    most = max(prices) / min(shares)
    lines = ["<tr><th></th>" + "".join(f"<th>${p:.3g}/h</th>" for p in prices) + "</tr>"]
    for share in shares:
        cells = []
        for p in prices:
            usd = main.usd * (p / price if price else 0) * mfu / share
            heat = (p / share / most) ** 0.8 * 0.55
            mark = "outline: 2px solid var(--c); outline-offset: -4px;" if p == price and share == mfu else ""
            cells.append(f'<td style="background: rgb(var(--hot) / {heat:.2f}); {mark}">{escape(money(usd))}</td>')
        lines.append(f"<tr><th>{share:.0%}</th>{''.join(cells)}</tr>")
    said = "The cost at other prices per device and hour (across) and other shares of peak (down)."
    return _card("If price or speed differ", said, f'<table class="heat">{"".join(lines)}</table>', "half")


def _memory(plan: Plan) -> str:
    ranks = plan.memory
    room = plan.hardware.memory_gib * 2**30
    usable = (1 - RESERVED) * room
    left, width, row = 64, 980, 20 if len(ranks) > 4 else 30
    scale = max(room, *(each.total for each in ranks)) * 1.02
    out = []
    for i, each in enumerate(ranks):
        y = 18 + i * row
        out.append(f'<text x="0" y="{y + row - 8}">rank {each.rank}</text>')
        out.append(
            _bar([(f"{n}: {s / 1e9:.1f} GB", s) for n, s in each.parts().items()], scale, y, row - 5, left, width)
        )
        x = left + width * each.total / scale
        out.append(f'<text x="{x + 6:.1f}" y="{y + row - 8}" class="strong">{each.total / 1e9:.1f}</text>')
    height = 26 + row * len(ranks)
    for limit, said in ((usable, "usable"), (room, "all")):
        x = left + width * limit / scale
        out.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="14" y2="{height - 6}" stroke="var(--soft)" stroke-dasharray="3 3"/>'
        )
        anchor = "end" if said == "usable" else "start"
        out.append(f'<text x="{x - 3 if anchor == "end" else x - 14:.1f}" y="10" text-anchor="{anchor}">{said}</text>')
    names = list(ranks[0].parts())
    inside = f'<svg viewBox="0 0 {left + width + 30} {height}">{"".join(out)}</svg>' + _key(names)
    said = f"GB at the peak of a step on each pipeline rank, of the {room / 1e9:.0f} of a device."
    return _card("What lies where", said, inside)


def _pipeline(plan: Plan) -> str:
    layout = plan.chosen.layout
    if layout.pp == 1:
        return ""
    n = min(layout.micro_batches, max(2 * layout.pp + 4, 8))
    if layout.schedule == "Interleaved1F1B":
        n = max(n - n % layout.pp, layout.pp)
    elif n % 2:
        n += 1
    table = layout.timetable(n)
    costs = Costs(1, 1, 1)
    played = play(table, costs)
    left, width, row = 34, 1030, max(11, min(24, 260 // layout.pp))
    kinds = {"F": "--a", "B": "--c", "I": "--d", "W": "--e"}
    out = []
    for rank, (steps, begins) in enumerate(zip(table.steps, played.begins, strict=True)):
        y = 4 + rank * row
        out.append(f'<text x="0" y="{y + row - 4}">{rank}</text>')
        for step, begin in zip(steps, begins, strict=True):
            x, w = left + width * begin / played.seconds, width * costs.of(step) / played.seconds
            h = (row - 2) / len(step)
            for i, action in enumerate(step):
                shade = 0.55 if action.stage >= layout.pp or (layout.copies == 2 and action.batch >= n // 2) else 1
                out.append(
                    f'<rect x="{x:.1f}" y="{y + i * h:.1f}" width="{max(w - 0.8, 0.4):.1f}" height="{h - 0.4:.1f}" '
                    f'fill="var({kinds[action.kind]})" opacity="{shade}"/>'
                )
    height = 8 + row * layout.pp
    key = "".join(
        f'<span><i style="background:var({colour})"></i>{said}</span>'
        for (kind, colour), said in zip(
            kinds.items(), ("forward", "backward", "gradient of the input", "gradient of the weights"), strict=True
        )
        if any(a.kind == kind for steps in table.steps for step in steps for a in step)
    )
    said = (
        f"{layout.schedule} over {layout.pp} ranks, drawn for {n} micro-batches of {layout.micro_batches} a step; gaps "
        f"are bubbles, pairs overlap, the lighter shade is the other direction or a rank's further stages."
    )
    return _card(
        "The pipeline",
        said,
        f'<svg viewBox="0 0 {left + width} {height}">{"".join(out)}</svg><div class="key">{key}</div>',
    )


def _others(plan: Plan) -> str:
    main, out = plan.stages[0], []
    if plan.others:
        rows = []
        for each in plan.others[:5]:
            cost = main.usd * plan.chosen.tokens_per_second / each.tokens_per_second
            rows.append([each.layout.named(), f"{each.tokens_per_second:,.0f}", f"{each.mfu:.0%}", money(cost)])
        title = "The best layouts found, beside V3's own" if plan.own else "Other layouts that fit"
        said = f"Of {plan.tried:,} layouts tried, cheapest first."
        out.append(_card(title, said, _rows(["mesh", "tokens/s a device", "of peak", "cost"], rows)))
    if plan.rejected:
        rows = [[each.layout.named(), each.why] for each in plan.rejected]
        out.append(
            _card(
                "What does not fit, and why", "Nearest first.", _rows(["mesh", "what is too much"], rows, left=(0, 1))
            )
        )
    return "".join(out)


def _large(plan: Plan) -> str:
    out = []
    if plan.serving:
        rows = [
            [
                name,
                f"{s.tokens_per_second:,.0f}",
                f"{s.tokens_per_second_per_text:,.1f}" if "decode" in name else "",
                f"${s.usd_per_million:.3f}",
                s.bound,
            ]
            for name, s in plan.serving
        ]
        head = ["unit", "tokens/s a device", "a text", "per million tokens", "held back by"]
        out.append(_card("Serving it", "At full, even load.", _rows(head, rows)))
    if plan.large:
        rows = [
            [
                f"{c.devices:,}", f"{c.mtbf_seconds / 3600:.2f} h", f"{steps * c.step_seconds / 60:.1f} min",
                f"{c.straggling - 1:.1%}", f"{s.goodput:.1%}",
            ]
            for c, steps, s in plan.large
        ]  # fmt: skip
        head = ["devices", "fails every", "best checkpoint every", "stragglers cost", "goodput"]
        said = "Simulated month by month, with the failure rate that Llama 3's training reports."
        out.append(_card("Larger clusters", said, _rows(head, rows)))
    return "".join(out)
