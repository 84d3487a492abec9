"""The ledger's page and plot, written from the receipts alone."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from leanseek.bench.queue import BEYOND, SEARCH_SHARE, Place, searched
from leanseek.bench.quick import WORSE
from leanseek.bench.rows import BEST, ORDINARY, Row, vocabulary
from leanseek.bench.score import Score, best_of_each, full_runs, scores
from leanseek.bench.speed import SPEED_ROUNDS, SPEED_STEPS, SPEED_WARM_UP

COLOURS = ("#8a8f98", "#d1803f", "#4f86c6", "#1f3b4d", "#7a9e57", "#a0527a")

# How the files of a track that is no part of this project come about.
PREPARATION = {
    "easy": """The track `easy` is simple prose from public-domain books: the repository `mlschmitt/classic-books-
markdown` at commit 944882722e9a. Front matter and all Markdown and HTML marks go. Books whose
stated year is after 1929, those not in English and very short ones are left out; 713 remain. Each
is cut at paragraphs and headings into documents of about 8,000 characters; a document goes when
more than 30 in 100 of its long paragraphs have been seen before. Every document has an ease score,
the share of its words among the 2,500 most frequent less penalties for long sentences and long
words; `easy` are those of at least 0.8267. Whole books are assigned by the SHA-256 of author and
title to training, validation or neither, so that no book is in both. Training documents are ordered
by the SHA-256 of their text. A line is a JSON object with `text` and `source`, UTF-8.""",
    "stdlib": """The track `stdlib` is the sources of the machine's own Python, as `data/at_hand.py` reads them, whole
files held out by the SHA-256 of their text. It differs from Python to Python: compare rows within one ledger only.""",
    "storyworld": "The track `storyworld` is text that LeanSeek generates, the same on every machine.",
}


def write_page(place: Place, rows: tuple[Row, ...], target: float, page: Path) -> None:
    """Writes the page and beside it `img/ledger.png`."""
    found = scores(place, rows, target)
    plot = page.parent / "img" / "ledger.png"
    plot.parent.mkdir(parents=True, exist_ok=True)
    draw(place.receipts(), best_of_each(found), target, plot)
    page.write_text(rendered(place, rows, found, target), encoding="utf-8")


def rendered(place: Place, rows: tuple[Row, ...], found: list[Score], target: float) -> str:
    """The whole page as Markdown."""
    receipts = place.receipts()
    track, best = place.track, best_of_each(found)
    full = [run for row in rows for runs in full_runs(receipts, row).values() for run in runs]
    machines = sorted({f"{run['machine']['cpu']}, {run['machine']['cores']} cores" for run in full})
    commits = sorted({run["commit"][:12] for run in full})
    data = " --data DIR" if track.name not in ("stdlib", "storyworld") else ""
    command = f"leanseek bench ledger{data} --track {track.name}"
    parts = [
        "# The ledger: what it costs to reach a fixed quality",
        f"""This page is written by `{command} --write docs/ledger.md` from the receipts of the runs.

## The work

Train a language model from scratch on the training text of one track, with windows of 256 tokens, until it scores
**{target:.4f} bits per byte** on the track's whole validation text. Any tokenizer will do, its training included in
the bill; no other text and no other weights. Bits per byte are those of `eval/bpb.py` for every row: every token of
every document, documents apart, windows that do not overlap.

The target is what the row `{ORDINARY}` ends with. Track: `{track.name}`.

## The score

    score = tokens to the target (median over seeds) × CPU-seconds per token
            + CPU-seconds of learning the tokenizer, tokenising and, where a recipe learns from counts, counting

- *Tokens to the target* are those of a row's own tokenizer, read off a run's validations, in a line between the two
  around the target.
- *CPU-seconds per token* (user and system, of the whole process) are measured in turn in one short run:
  {SPEED_ROUNDS} rounds of all rows, each time a process of its own on one thread, {SPEED_STEPS} optimizer steps,
  the first {SPEED_WARM_UP} not counted; median. The two factors are measured apart because hours of training
  share their machine with other work.
- A recipe's kinds of tokens are measured one by one, and weighted: those of short rows and of long ones, of small
  batches and of large ones, those whose MTP modules are at rest (`schedule.mtp_weight` 0), those that counts teach
  (`schedule.count_weight`), those for which only some layers are awake (`schedule.layers`).
- Every row multiplies matrices in BF16 or FP32, whichever is faster for it on this machine; weights are FP32.
- Validations and checkpoints are not in the bill. FLOPs are model FLOPs by `plan/count.py`, attention's causal half
  included; for the dense rows the same formula, six per weight of a matmul.
- A row's budget is its own; where several were tried, the one that reaches the target at the least cost counts.""",
        "## The rows\n\n" + "\n".join(f"- `{row.name}`: {row.about}" for row in rows),
        "## The result\n\n" + _result(best, target) + "\n\n![bits per byte against CPU-seconds](img/ledger.png)",
        "Machine: "
        + "; ".join(machines)
        + f". Commits: {', '.join(commits)}. "
        + "The last column shows how a row scatters from seed to seed; smaller differences say little.",
    ]
    parts.append(_machines(place, rows, target))
    if len(found) > len(best):
        parts.append("### Budgets tried\n\n" + _budgets(found))
    parts += [_searches(place, rows), _how_to(command, track.name), _text(place)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _result(best: dict[str, Score], target: float) -> str:
    head = (
        "row",
        "ids",
        "parameters",
        "learning rate",
        "tokens to target",
        "CPU-µs per token",
        "fixed CPU-s",
        "**score** (CPU-s)",
        f"cost ÷ `{ORDINARY}`",
        f"cost ÷ `{BEST}`",
        f"FLOPs ÷ `{ORDINARY}`",
        f"CPU-s per token ÷ `{ORDINARY}`",
        "seeds",
        "final bpb, least to most",
        "score, least to most",
    )
    lines = []
    for name, score in best.items():
        ratios = [f"{score.score / best[peer].score:.3f}" if peer in best else "" for peer in (ORDINARY, BEST)]
        control = best.get(ORDINARY)
        lines.append(
            (
                f"`{name}`",
                f"{vocabulary(score.row):,}",
                f"{score.parameters / 1e6:.1f} M",
                "as shipped" if score.learning_rate is None else f"{score.learning_rate:g}",
                _tokens(score.median_tokens),
                f"{1e6 * score.cpu_seconds_per_token:.1f}",
                f"{score.fixed_cpu_seconds:.0f}",
                f"**{_number(score.score)}**",
                *ratios,
                f"{_flops(score) / _flops(control):.3f}" if control else "",
                f"{score.cpu_seconds_per_token / control.cpu_seconds_per_token:.3f}" if control else "",
                str(len(score.tokens)),
                f"{min(score.final_bpb):.4f} to {max(score.final_bpb):.4f}",
                f"{_number(score.cost(min(score.tokens)))} to {_number(score.cost(max(score.tokens)))}",
            )
        )
    return _table(head, lines)


def _machines(place: Place, rows: tuple[Row, ...], target: float) -> str:
    """What each machine that speeds were measured on makes of it; nothing where it was only one."""
    lines, speeds = [], place.speeds()
    if len(speeds) < 2:
        return ""
    for speed in speeds:
        best = best_of_each(scores(place, rows, target, speed))
        for name, score in best.items():
            lines.append(
                (
                    f"{speed['machine']['cpu']}, {speed['machine']['cores']} cores, commit {speed['commit'][:12]}",
                    f"`{name}`",
                    f"{1e6 * score.cpu_seconds_per_token:.1f}",
                    f"**{_number(score.score)}**",
                    *(f"{score.score / best[peer].score:.3f}" if peer in best else "" for peer in (ORDINARY, BEST)),
                )
            )
    head = ("speeds on", "row", "CPU-µs per token", "score (CPU-s)", f"cost ÷ `{ORDINARY}`", f"cost ÷ `{BEST}`")
    return (
        "### On each machine\n\nThe same runs with the speeds that each machine had at its commit, the newest first. "
        "Units that multiply BF16 faster help those rows the most that do little else."
        "\n\n" + _table(head, lines)
    )


def _budgets(found: list[Score]) -> str:
    head = ("row", "budget", "final bpb (median)", "tokens to target", "score (CPU-s)", "seeds")
    lines = [
        (
            f"`{score.row.name}`",
            _tokens(score.budget),
            f"{median(score.final_bpb):.4f}",
            _tokens(score.median_tokens),
            _number(score.score),
            str(len(score.tokens)),
        )
        for score in found
    ]
    return _table(head, lines)


def _searches(place: Place, rows: tuple[Row, ...]) -> str:
    out = []
    for row in rows:
        points = sorted(searched(place, row).items())
        if points:
            least = min(bpb for _, bpb in points)
            head = (f"`{row.name}`", *(f"{rate:g}" for rate, _ in points))
            marked = (f"**{bpb:.4f}**" if bpb == least else f"{bpb:.4f}" for _, bpb in points)
            out.append(_table(head, [("bpb", *marked)]))
    if not out:
        return ""
    return (
        f"## Learning rates\n\nSearched at {SEARCH_SHARE:g} of a row's own length, seed 0, whole validation text; "
        f"while the best is the outermost, up to {BEYOND} more are tried beyond it. Shipped recipes are as they are."
        "\n\n" + "\n\n".join(out)
    )


def _how_to(command: str, track: str) -> str:
    return f"""## The same on your machine

```sh
{command}                      # everything; killed, the same command goes on
{command} --minutes 60         # begin nothing new after an hour
{command} --threads 1          # on a busy machine; a second such process takes other items
{command} --status             # what is there, what is missing
{command} --seeds 3            # more seeds
{command} --recipe mine.toml   # your recipe as one more row
{command} --tokens {BEST}=5e6
{command} --write ledger.md    # this page
{command} --quick              # minutes: fails when `nano` is {WORSE - 1:.0%} dearer than `{BEST}` or more
```

Receipts are JSON, one per item, in `runs/ledger/{track}/receipts/`."""


def _text(place: Place) -> str:
    sums = "\n".join(f"| `{name}` | `{digest}` |" for name, digest in place.track.sha256.items())
    return f"## The text\n\n{PREPARATION.get(place.track.name, '')}\n\n| file | SHA-256 |\n|---|---|\n{sums}"


def draw(receipts: list[dict[str, Any]], best: dict[str, Score], target: float, file: Path) -> None:
    """Bits per byte against CPU-seconds, every seed of every row, the target as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for colour, (name, score) in zip(COLOURS * len(best), best.items(), strict=False):
        for i, run in enumerate(full_runs(receipts, score.row)[score.budget]):
            seconds = [score.cost(tokens) for tokens, _ in run["curve"]]
            label = name if i == 0 else None
            axis.plot(seconds, [bpb for _, bpb in run["curve"]], color=colour, linewidth=1.4, label=label)
        if math.isfinite(score.score):
            axis.plot([score.score], [target], "o", color=colour, markersize=6)
    axis.axhline(target, color="#444444", linewidth=0.8, linestyle=":")
    axis.annotate(f"target {target:.4f}", (0.01, target), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
    axis.set(xscale="log", xlabel="CPU-seconds, tokenizer included", ylabel="validation bits per byte")
    if best:
        ends = [run["bpb"] for score in best.values() for run in full_runs(receipts, score.row)[score.budget]]
        axis.set_ylim(min(*ends, target) - 0.03, target + 0.6)
        axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _flops(score: Score) -> float:
    return score.flops_per_token * score.median_tokens


def _tokens(tokens: float) -> str:
    return f"{tokens / 1e6:.2f} M" if math.isfinite(tokens) else "not reached"


def _number(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else "not reached"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
