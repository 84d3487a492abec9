"""Runs side by side: a table, a plot and one HTML file, from what their folders hold (report §4.4, §4.5.2, §5.4.3).

Quality with its interval, cost, and the two standing columns: how evenly the experts are used, and how often the MTP
module's drafts are right.
"""

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from leanseek.checkpoint import read_run
from leanseek.config import BadInput
from leanseek.eval.harness import results_of
from leanseek.train.log import read_metrics

LATEST = 0.1  # of a run's steps, over whose mean the balance of the experts is told
COLOURS = ("#253237", "#c1666b", "#5c8d89", "#d4b483", "#7d6b91", "#4281a4", "#9c9c9c", "#b0752b")


@dataclass(frozen=True)
class Told:
    """What a run's folder tells. `receipt` is empty for a run that was imported."""

    name: str
    receipt: dict[str, Any]
    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    results: dict[str, dict[str, Any]]

    @property
    def max_violation(self) -> float | None:
        """Mean over the last tenth of the steps, of the worst layer; else as evaluation met it."""
        latest = [step["max_violation"] for step in self.steps[-max(1, int(len(self.steps) * LATEST)) :]]
        return sum(latest) / len(latest) if latest else self._evaluated("max_violation")

    @property
    def drafts_accepted(self) -> float | None:
        return self._evaluated("drafts_accepted")

    @property
    def scores(self) -> dict[str, dict[str, Any]]:
        return {name: result for name, result in self.results.items() if "score" in result}

    def _evaluated(self, key: str) -> float | None:
        """As bits per byte met it, over given text; else a task, over the model's own."""
        found = sorted(self.results.items(), key=lambda item: "bpb" not in item[1])
        return next((result[key] for _, result in found if result.get(key) is not None), None)


def report(runs: Sequence[Path], out: Path | None = None, console: Console | None = None) -> Path:
    """Prints the table, writes report.html and report.png into `out`, else the first run's folder; returns the former.

    Raises BadInput for what is no run, for a damaged one, and for two runs of one name.
    """
    told = [read(run) for run in runs]
    names = [one.name for one in told]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise BadInput(f"two runs are named {twice!r}: a report could not tell them apart")
    lines = list(zip(names_of(told), *(cells(one, told) for one in told), strict=True))
    folder = runs[0] if out is None else out
    folder.mkdir(parents=True, exist_ok=True)
    picture = plot(told)
    (folder / "report.png").write_bytes(picture)
    (folder / "report.html").write_text(page(lines, picture), encoding="utf-8")
    table = Table(show_edge=False)
    for number, name in enumerate(lines[0]):
        table.add_column(Text(name), justify="right" if number else "left", overflow="fold")
    for line in lines[1:]:
        table.add_row(*map(Text, line))
    (console or Console()).print(table)
    return folder / "report.html"


def read(run: Path) -> Told:
    """Raises BadInput."""
    read_run(run)
    try:
        receipt = json.loads((run / "receipt.json").read_bytes()) if (run / "receipt.json").exists() else {}
        steps, validations = read_metrics(run) if (run / "metrics.jsonl").exists() else ([], [])
    except ValueError:
        raise BadInput(f"{run}: receipt.json or metrics.jsonl is damaged") from None
    scored = [row for row in validations if "bpb" in row]  # a reward model's are of another kind
    return Told(run.resolve().name, receipt, steps, scored, results_of(run))


# ── the table ─────────────────────────────────────────────────────────────────────────────────────────────────────


def names_of(told: Sequence[Told]) -> list[str]:
    """What the lines of the table are about."""
    own = ["run", "tokens", "activated", "cost", "bpb", "MaxVio", "drafts right"]
    return [*own, *tasks_of(told)]


def cells(one: Told, told: Sequence[Told]) -> list[str]:
    """A run's column; a dash where its folder does not say."""
    receipt = one.receipt
    own = [
        one.name,
        _shown(receipt.get("tokens"), ",.0f"),
        _shown(receipt.get("params_activated"), ",.0f"),
        _shown(receipt.get("cost_usd"), ".4f", "$"),
        _shown(receipt.get("bpb"), ".4f"),
        _shown(one.max_violation, ".2f"),
        _shown(one.drafts_accepted, ".1%"),
    ]
    return [*own, *(_score(one.results.get(task)) for task in tasks_of(told))]


def tasks_of(told: Sequence[Told]) -> list[str]:
    """Everything that any of the runs was asked, bits per byte of given texts among it."""
    return sorted({name for one in told for name in one.results if name != "bpb"})


def _score(result: dict[str, Any] | None) -> str:
    if result is None:
        return "–"
    if "bpb" in result:
        return f"{result['bpb']:.4f} bpb"
    unanswered = sum(result.get(key, 0) for key in ("too_long", "hung"))
    noted = f", {unanswered} not answered" if unanswered else ""
    return f"{result['score']:.1%} ({result['low']:.1%} to {result['high']:.1%}, n {result['n']}{noted})"


def _shown(value: float | None, how: str, before: str = "") -> str:
    return "–" if value is None else before + format(value, how)


# ── plot and page ─────────────────────────────────────────────────────────────────────────────────────────────────


def plot(told: Sequence[Told]) -> bytes:
    """Bits per byte and MaxVio over tokens, and the scores with their intervals, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (quality, balance, scores) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    names = sorted({name for one in told for name in one.scores})
    for number, one in enumerate(told):
        colour = COLOURS[number % len(COLOURS)]
        across = [row["tokens"] / 1e6 for row in one.validations]
        quality.plot(across, [row["bpb"] for row in one.validations], marker="o", markersize=3, color=colour)
        along = [row["tokens"] / 1e6 for row in one.steps]
        balance.plot(along, [row["max_violation"] for row in one.steps], linewidth=1, color=colour)
        places = [names.index(name) + (number - (len(told) - 1) / 2) * 0.8 / len(told) for name in one.scores]
        found = list(one.scores.values())
        below = [max(0.0, result["score"] - result["low"]) for result in found]
        above = [max(0.0, result["high"] - result["score"]) for result in found]
        middle = [result["score"] for result in found]
        scores.errorbar(places, middle, (below, above), fmt="o", capsize=3, color=colour, label=one.name)
    for place, name in enumerate(names):
        chances = [one.scores[name]["chance"] for one in told if "chance" in one.scores.get(name, {})]
        if chances:
            scores.hlines(chances[0], place - 0.4, place + 0.4, color="#9c9c9c", linestyle=":")
    quality.set(xlabel="million tokens", ylabel="validation, bits per byte")
    balance.set(xlabel="million tokens", ylabel="MaxVio of the worst layer", ylim=(0, None))
    scores.set(ylabel="score, 95% interval; dotted: chance", ylim=(0, None))
    scores.set_xticks(range(len(names)), names, rotation=20, ha="right")
    scores.legend(frameon=False)
    for axis in (quality, balance, scores):
        axis.spines[["top", "right"]].set_visible(False)
    file = BytesIO()
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return file.getvalue()


def page(lines: Sequence[Sequence[str]], picture: bytes) -> str:
    """One file that needs no other. The first of the table's lines names the runs."""

    def line(kind: str, row: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in row) + "</tr>"

    table = "\n".join([line("th", lines[0]), *(line("td", row) for row in lines[1:])])
    image = base64.b64encode(picture).decode()
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(", ".join(lines[0][1:]))}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem; color: #253237 }}
table {{ border-collapse: collapse }}
th, td {{ padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right }}
th:first-child, td:first-child {{ text-align: left }}
img {{ max-width: 100%; margin-top: 1.5rem }}
</style>
<table>
{table}
</table>
<p>MaxVio: how far the busiest expert of the worst layer lies above the mean load, 0 when even. Drafts right: how often
the MTP module's draft is what the model itself finds likeliest. In parentheses 95% intervals.</p>
<img alt="Bits per byte, expert balance and scores" src="data:image/png;base64,{image}">
</html>
"""
