"""Draws how V3 lies on 2,048 GPUs, from the recipe and the code that divides: `python scripts/draw_mesh.py OUT.png`."""

import itertools
import sys

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from leanseek.config import read_recipe
from leanseek.parallel.mesh import Division, divide
from leanseek.plan.layout import Layout, runs

WORLD = 2048
GROUPS = (("#dbe7f5", "#b9d0ea"), ("#fae5cf", "#f3cda3"))  # two shades by machine, of each expert group
INK, MARK = "#333333", "#b3261e"


def main(out: str) -> None:
    config = read_recipe("v3")
    division = divide(config, WORLD)
    figure, (grid, group) = plt.subplots(1, 2, figsize=(13, 7.2), width_ratios=(1.55, 1), layout="constrained")
    draw_ranks(grid, division, stage_names(division))
    draw_group(group, division, config.model.n_routed_experts)
    figure.suptitle(
        f"DeepSeek-V3 on {WORLD:,} GPUs: pp {division.pp} × dp {division.dp}, experts over {division.ep}, "
        f"{config.mesh.schedule}, ZeRO-1",
        fontsize=13,
        color=INK,
    )
    figure.savefig(out, dpi=110)


def stage_names(division: Division) -> list[str]:
    """For each pipeline rank the layers of its two stages, on the way down the V and on the way up."""
    config = read_recipe("v3")
    layout = Layout(WORLD, pp=division.pp, ep=division.ep, schedule="DualPipeV", batch=15360)
    sizes = [sum(piece in ("dense", "moe") for piece in run) for run in runs(config.model, layout)]
    firsts = [0, *itertools.accumulate(sizes)]
    spans = [f"{first}–{after - 1}" if after > first else "" for first, after in itertools.pairwise(firsts)]
    spans[0], spans[-1] = f"embedding\n{spans[0]}", f"{spans[-1]}\nMTP, head".strip()
    return [f"{spans[rank]}\n{spans[2 * division.pp - 1 - rank]}" for rank in range(division.pp)]


def draw_ranks(axes: Axes, division: Division, layers: list[str]) -> None:
    for first in range(0, division.world, division.node):
        place = division.place(first)
        shade = GROUPS[place["dp"] // division.ep % 2][first // division.node % 2]
        axes.add_patch(Rectangle((place["pp"], place["dp"] + 0.2), 0.92, division.node - 0.4, color=shade, lw=0))
    for pp, text in enumerate(layers):
        axes.text(pp + 0.46, -1.5, text, ha="center", va="bottom", fontsize=7, color=INK)
    axes.add_patch(Rectangle((-0.04, -0.1), 1.0, division.ep, fill=False, ec=MARK, lw=1.5))
    middle = division.ep / 2
    axes.text(-1.1, middle, "an expert group", rotation=90, color=MARK, ha="right", va="center", fontsize=9)
    axes.set(xlim=(-0.1, division.pp), ylim=(division.dp + 1, -12))
    axes.set_xlabel("pipeline rank; above, the layers of its two stages", color=INK)
    axes.set_xticks([pp + 0.46 for pp in range(division.pp)], [str(pp) for pp in range(division.pp)])
    axes.set_yticks([*range(0, division.dp, 16), division.dp - 1])
    axes.set_ylabel("data-parallel rank", labelpad=24, color=INK)
    finish(axes)


def draw_group(axes: Axes, division: Division, experts: int) -> None:
    held, machines = experts // division.ep, division.ep // division.node
    for rank in range(division.ep):
        machine, x = divmod(rank, division.node)
        axes.add_patch(Rectangle((x, 1.25 * machine), 0.92, 0.92, color=GROUPS[0][machine % 2], lw=0))
        first = division.place(rank)["ep"] * held
        label = f"{first}–\n{first + held - 1}"
        axes.text(x + 0.46, 1.25 * machine + 0.46, label, ha="center", va="center", fontsize=8, color=INK, zorder=3)
    for machine in range(machines):
        axes.text(-0.15, 1.25 * machine + 0.46, f"machine {machine}", ha="right", va="center", fontsize=8, color=INK)
    # A token of GPU 2 of machine 0: first to GPU 2 of the other machine, from there to who has the expert.
    style = {"arrowstyle": "-|>", "color": MARK, "lw": 2, "alpha": 0.55, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (2.46, 3.75), (2.46, 0.92), arrowprops=style)
    axes.annotate("", (5.0, 4.21), (2.92, 4.21), arrowprops=style)
    for x, y in ((2, 0), (2, 3.75), (5, 3.75)):
        axes.add_patch(Rectangle((x, y), 0.92, 0.92, fill=False, ec=MARK, lw=1.5))
    middle, below = division.node / 2, 1.25 * machines + 0.2
    axes.set(xlim=(-1.4, division.node), ylim=(below + 1.0, -1.0))
    title = f"An expert group: {division.ep} GPUs with {held} of {experts} experts each"
    axes.text(middle, -0.35, title, ha="center", fontsize=10, color=MARK)
    told = "a token crosses to a machine once,\nthen goes on to the GPUs that have its experts"
    axes.text(middle, below, told, ha="center", va="top", fontsize=9, color=MARK)
    axes.set_xticks([])
    axes.set_yticks([])
    finish(axes)


def finish(axes: Axes) -> None:
    axes.tick_params(length=0, labelsize=8, colors=INK)
    for side in axes.spines.values():
        side.set_visible(False)


if __name__ == "__main__":
    main(sys.argv[1])
