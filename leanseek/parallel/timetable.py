"""Pipeline schedules as data (report §3.2.1, figures 4 and 5, table 2): who does what in which order, what it idles.

A schedule is a list of steps for each rank. A step is one action, or two that overlap: a forward pass with the backward
pass of another micro-batch. Stages are numbered along the model, micro-batches as they enter. Nothing here executes:
the planner reads bubbles and peak activations off these lists, the drawings draw them, and what does execute can be
held against them. No torch.

F forward · B whole backward · I gradient of the input · W gradient of the weights, which can wait.
"""

import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

Kind = Literal["F", "B", "I", "W"]


class Action(NamedTuple):
    kind: Kind
    stage: int
    batch: int


Step = tuple[Action, ...]  # one action, or a forward and a backward that overlap


@dataclass(frozen=True)
class Timetable:
    name: str
    ranks: int
    stages: int
    batches: int
    steps: tuple[tuple[Step, ...], ...]  # by rank
    copies: int = 1  # how often each stage's parameters are held: DualPipe's two directions hold them twice

    @property
    def stages_per_rank(self) -> int:
        return self.stages * self.copies // self.ranks

    def rank_of(self, stage: int, batch: int) -> int:
        """Which rank takes a micro-batch through a stage."""
        return next(
            rank
            for rank, steps in enumerate(self.steps)
            if any(a.stage == stage and a.batch == batch for step in steps for a in step)
        )


@dataclass(frozen=True)
class Costs:
    """How long one stage takes over one micro-batch, in any one unit; a stage is what a rank holds once."""

    forward: float = 1.0
    input_gradient: float = 1.0
    weight_gradient: float = 1.0
    pair: float | None = None  # F and B overlapped; None: as long as both in turn
    hop: float = 0.0  # to another rank

    @property
    def backward(self) -> float:
        return self.input_gradient + self.weight_gradient

    def of(self, step: Step) -> float:
        if len(step) == 2 and self.pair is not None and step[1].kind == "B":
            return self.pair
        by_kind = {
            "F": self.forward,
            "B": self.backward,
            "I": self.input_gradient,
            "W": self.weight_gradient,
        }
        return sum(by_kind[action.kind] for action in step)


class Played(NamedTuple):
    seconds: float  # from the first action to the last, over all ranks, in the unit of the costs
    begins: tuple[tuple[float, ...], ...]  # of each rank's steps
    busy: tuple[float, ...]  # by rank


class Deadlock(Exception):
    """A schedule in which some action waits for ever."""


# ── the schedules ─────────────────────────────────────────────────────────────────────────────────────────────────


def one_f_one_b(ranks: int, batches: int) -> Timetable:
    """1F1B: rank r runs ranks − r micro-batches ahead, then one backward for each forward."""
    rows = []
    for rank in range(ranks):
        ahead = min(ranks - rank - 1, batches)
        row: list[Step] = [(Action("F", rank, b),) for b in range(ahead)]
        for b in range(batches):
            if ahead + b < batches:
                row.append((Action("F", rank, ahead + b),))
            row.append((Action("B", rank, b),))
        rows.append(tuple(row))
    return Timetable("1F1B", ranks, ranks, batches, tuple(rows))


def interleaved(ranks: int, batches: int, chunks: int = 2) -> Timetable:
    """Interleaved 1F1B: a rank holds `chunks` stages, ranks apart; micro-batches go in rounds of one for each rank."""
    if batches % ranks:
        raise ValueError(f"interleaved 1F1B takes micro-batches in rounds of {ranks}: {batches} are not")
    rounds = batches // ranks

    def nth(rank: int, i: int, forward: bool) -> tuple[int, int]:
        """Stage and micro-batch of a rank's i-th forward or backward pass."""
        turn, place = divmod(i, ranks * chunks)
        chunk, batch = divmod(place, ranks)
        chunk = chunk if forward else chunks - 1 - chunk
        return chunk * ranks + rank, turn * ranks + batch

    rows = []
    total = rounds * ranks * chunks
    for rank in range(ranks):
        ahead = min((chunks - 1) * ranks + 2 * (ranks - 1 - rank), total)
        row: list[Step] = [(Action("F", *nth(rank, i, True)),) for i in range(ahead)]
        for i in range(total):
            if ahead + i < total:
                row.append((Action("F", *nth(rank, ahead + i, True)),))
            row.append((Action("B", *nth(rank, i, False)),))
        rows.append(tuple(row))
    return Timetable("Interleaved1F1B", ranks, ranks * chunks, batches, tuple(rows))


def zb1p(ranks: int, batches: int) -> Timetable:
    """ZB1P (Qi et al., ZB-H1): 1F1B whose rank r puts its weight gradients off by r micro-batches.

    What it puts off fills what would be bubbles at the end; what it keeps for it, 1F1B's first rank keeps anyway.
    """
    rows = []
    for rank in range(ranks):
        ahead = min(ranks - rank - 1, batches)
        row: list[Step] = [(Action("F", rank, b),) for b in range(ahead)]
        for b in range(batches + rank):
            if ahead + b < batches:
                row.append((Action("F", rank, ahead + b),))
            if b < batches:
                row.append((Action("I", rank, b),))
            if 0 <= b - rank < batches:
                row.append((Action("W", rank, b - rank),))
        rows.append(tuple(row))
    return Timetable("ZB1P", ranks, ranks, batches, tuple(rows))


def zbv(ranks: int, batches: int) -> Timetable:
    """ZBV (Qi et al.): two stages a rank, laid out as a V, so that the first rank also ends the forward pass."""
    if batches < 2 * ranks:
        raise ValueError(f"ZBV over {ranks} ranks wants at least {2 * ranks} micro-batches, not {batches}")
    rows = []
    for rank in range(ranks):
        down, up = rank, 2 * ranks - 1 - rank
        row: list[Step] = []
        done = {(kind, stage): 0 for kind in "FIW" for stage in (down, up)}

        def do(kind: Kind, stage: int, row: list[Step] = row, done: dict[tuple[str, int], int] = done) -> None:
            if done[kind, stage] < batches:
                row.append((Action(kind, stage, done[kind, stage]),))
                done[kind, stage] += 1

        for _ in range(2 * (ranks - rank) - 1):
            do("F", down)
        for _ in range(rank):
            do("F", up)
            do("F", down)
        for _ in range(ranks - rank):
            do("F", up)
            do("I", up)
            do("W", up)
        while done["F", up] < batches:
            do("F", down)
            do("I", down)
            do("W", down)
            do("F", up)
            do("I", up)
            do("W", up)
        for _ in range(rank):
            do("I", down)
            do("I", up)
        for _ in range(ranks - rank):
            do("I", down)
            do("W", down)
        for stage in (up, down):
            for _ in range(batches - done["W", stage]):
                do("W", stage)
        rows.append(tuple(row))
    return Timetable("ZBV", ranks, 2 * ranks, batches, tuple(rows))


def dualpipe(ranks: int, batches: int) -> Timetable:
    """DualPipe (report §3.2.1, figure 5): micro-batches enter at both ends; forward and backward passes overlap.

    Rank r holds stage r for those that come down and stage ranks − 1 − r for those that come up. The first half of the
    micro-batches goes down.
    """
    if ranks % 2 or batches % 2 or batches < 2 * ranks:
        raise ValueError(f"DualPipe wants an even number of ranks and an even number of at least {2 * ranks} batches")
    rows = []
    for rank in range(ranks):
        first = rank < ranks // 2
        near = min(rank, ranks - 1 - rank)
        # Direction 0 of a rank is that which enters nearer to it.
        stages = (rank, ranks - 1 - rank) if first else (ranks - 1 - rank, rank)
        starts = (0, batches // 2) if first else (batches // 2, 0)
        row = _both_ways(near, ranks // 2, batches // 2, stages, starts, 2 * (batches // 2 - ranks + near + 1) // 2)
        rows.append(row)
    return Timetable("DualPipe", ranks, ranks, batches, tuple(rows), copies=2)


def dualpipe_v(ranks: int, batches: int) -> Timetable:
    """DualPipeV: DualPipe cut in half. Rank r holds stages r and 2·ranks − 1 − r, and no parameter twice."""
    if batches < 2 * ranks:
        raise ValueError(f"DualPipeV over {ranks} ranks wants at least {2 * ranks} micro-batches, not {batches}")
    rows = []
    for rank in range(ranks):
        stages = (rank, 2 * ranks - 1 - rank)
        rows.append(_both_ways(rank, ranks, batches, stages, (0, 0), batches - 2 * ranks + rank + 1))
    return Timetable("DualPipeV", ranks, 2 * ranks, batches, tuple(rows))


def _both_ways(
    near: int, half: int, each: int, stages: tuple[int, int], starts: tuple[int, int], main: int
) -> tuple[Step, ...]:
    """The eight steps that DualPipe and DualPipeV share, for one rank.

    `near` ranks away from where direction 0 enters, `half` ranks from there to the turning point; `each` micro-batches
    a direction, of which direction d's are at stages[d] and numbered from starts[d].
    """
    row: list[Step] = []
    done = {(kind, d): 0 for kind in "FB" for d in (0, 1)}
    put_off: deque[Action] = deque()

    def take(kind: Literal["F", "B"], d: int) -> Action:
        action = Action(kind, stages[d], starts[d] + done[kind, d])
        done[kind, d] += 1
        return action

    def forward(d: int) -> None:
        row.append((take("F", d),))

    def backward(d: int, split: bool = False) -> None:
        whole = take("B", d)
        if split:
            row.append((whole._replace(kind="I"),))
            put_off.append(whole._replace(kind="W"))
        else:
            row.append((whole,))

    def weights() -> None:
        row.append((put_off.popleft(),))

    for _ in range(2 * (half - near - 1)):
        forward(0)
    for _ in range(near + 1):
        forward(0)
        forward(1)
    for _ in range(half - near - 1):
        backward(1, split=True)
        weights()
        forward(1)
    for i in range(main):
        if i == 0 and near == half - 1:  # at the turning point the first backward needs this very forward
            forward(0)
            backward(1)
        else:
            row.append((take("F", 0), take("B", 1)))
        row.append((take("F", 1), take("B", 0)))
    for _ in range(half - near - 1):
        backward(1)
        row.append((take("F", 1), take("B", 0)))
    for i in range(2 * (near + 1)):
        backward(1 - i % 2, split=i >= near + 1)
    for _ in range(half - near - 1):
        weights()
        backward(0, split=True)
    for _ in range(near + 1):
        weights()
    assert not put_off
    assert set(done.values()) == {each}
    return tuple(row)


SCHEDULES: Mapping[str, Callable[[int, int], Timetable]] = {
    "1F1B": one_f_one_b,
    "Interleaved1F1B": interleaved,
    "ZB1P": zb1p,
    "ZBV": zbv,
    "DualPipe": dualpipe,
    "DualPipeV": dualpipe_v,
}
V_SHAPED = ("ZBV", "DualPipeV")  # the first rank holds the last stage too


def stages_of(name: str, ranks: int, rank: int, chunks: int = 2) -> tuple[int, ...]:
    """The stages that a rank holds under a schedule, in the order of the model; `chunks` of them where it is open."""
    if name == "Interleaved1F1B":
        return tuple(rank + chunk * ranks for chunk in range(chunks))
    if name in V_SHAPED:
        return rank, 2 * ranks - 1 - rank
    if name == "DualPipe":
        return rank, ranks - 1 - rank
    return (rank,)


def enough_batches(name: str, ranks: int, batches: int) -> int:
    """The fewest micro-batches, at least `batches`, that a schedule takes."""
    if name == "Interleaved1F1B":
        return -(-batches // ranks) * ranks
    if name == "DualPipe":
        batches += batches % 2
    return max(batches, ranks if name in ("1F1B", "ZB1P") else 2 * ranks)


@lru_cache(maxsize=1024)
def even_cuts(loads: tuple[int, ...], stages: int) -> tuple[int, ...]:
    """How many pieces of a row each stage takes, in order and at least one, for loads as even as they can be.

    That is when the sum of the squares of the stages' loads is least.
    """
    n, sums = len(loads), [0, *itertools.accumulate(loads)]
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for stage in range(1, stages + 1):
        best = {
            i: min((best[j][0] + float(sums[i] - sums[j]) ** 2, (*best[j][1], i - j)) for j in best if j < i)
            for i in range(stage, n - stages + stage + 1)
        }
    return best[n][1]


# ── what they take ────────────────────────────────────────────────────────────────────────────────────────────────


def play(table: Timetable, costs: Costs = Costs()) -> Played:
    """Each rank works through its list as soon as what a step needs has arrived. Raises Deadlock."""
    ends: dict[tuple[str, int, int], tuple[float, int]] = {}  # F, and I or B as "I": when, and where
    at, clock, busy = [0] * table.ranks, [0.0] * table.ranks, [0.0] * table.ranks
    begins: list[list[float]] = [[] for _ in range(table.ranks)]
    left = sum(map(len, table.steps))
    last = table.stages - 1

    def ready(rank: int, step: Step) -> float | None:
        when = clock[rank]
        for kind, stage, batch in step:
            needs = []
            if kind == "F" and stage > 0:
                needs = [("F", stage - 1, batch)]
            elif kind in "BI":
                needs = [("F", stage, batch), *([("I", stage + 1, batch)] if stage < last else [])]
            elif kind == "W":
                needs = [("I", stage, batch)]
            for need in needs:
                if need not in ends:
                    return None
                end, where = ends[need]
                when = max(when, end + (costs.hop if where != rank else 0.0))
        return when

    while left:
        moved = False
        for rank, steps in enumerate(table.steps):
            while at[rank] < len(steps) and (when := ready(rank, steps[at[rank]])) is not None:
                step = steps[at[rank]]
                takes = costs.of(step)
                begins[rank].append(when)
                clock[rank], busy[rank] = when + takes, busy[rank] + takes
                for kind, stage, batch in step:
                    if kind != "W":
                        ends["F" if kind == "F" else "I", stage, batch] = clock[rank], rank
                at[rank] += 1
                left -= 1
                moved = True
        if not moved:
            waiting = {rank: steps[at[rank]] for rank, steps in enumerate(table.steps) if at[rank] < len(steps)}
            raise Deadlock(f"{table.name}: each of these waits for another: {waiting}")
    return Played(max(clock), tuple(map(tuple, begins)), tuple(busy))


def bubble(table: Timetable, costs: Costs = Costs()) -> float:
    """Time that the least busy rank idles over one optimizer step, in the unit of the costs."""
    played = play(table, costs)
    return played.seconds - min(played.busy)


def peak_activations(table: Timetable) -> tuple[int, ...]:
    """By rank: for how many (stage, micro-batch) at a time activations are kept, at most.

    They are kept from the forward pass to the gradient of the input; what a put-off weight gradient still needs of
    them, the inputs of its matmuls and the gradients of their outputs, is counted by `peak_put_off`.
    """
    return tuple(_peak(steps, opens="F", closes="BI") for steps in table.steps)


def peak_put_off(table: Timetable) -> tuple[int, ...]:
    """By rank: how many weight gradients are put off at a time, at most."""
    return tuple(_peak(steps, opens="I", closes="W") for steps in table.steps)


def _peak(steps: tuple[Step, ...], opens: str, closes: str) -> int:
    held = most = 0
    for step in steps:
        held += sum(action.kind in opens for action in step)
        most = max(most, held)
        held -= sum(action.kind in closes for action in step)
    return most


# ── the drawing ───────────────────────────────────────────────────────────────────────────────────────────────────

COLOURS = {"F": "#8fb3c7", "B": "#c98b6b", "I": "#d9b382", "W": "#8aa88f"}
SAID = {"F": "forward", "B": "backward", "I": "gradient of the input", "W": "gradient of the weights"}


def draw(tables: Sequence[Timetable], file: Path) -> None:
    """Writes a PNG: a panel for each schedule, in it a line for each rank, over time; gaps are bubbles."""
    from matplotlib import pyplot as plt

    figure = drawing(tables)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def drawing(tables: Sequence[Timetable]) -> Any:
    """The matplotlib figure of `draw`.

    A stage takes the longer the fewer of them a rank has, so that it is always the same model on so many ranks. What
    overlaps shares a box; a further stage of a rank, or DualPipe's second direction, is paler.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    heights = [table.ranks for table in tables]
    size = 13, 1 + 0.34 * sum(heights) + 0.45 * len(tables)
    figure, axes = plt.subplots(
        len(tables), 1, figsize=size, sharex=True, squeeze=False, layout="constrained", height_ratios=heights
    )
    longest = max(_panel(axis, table) for axis, table in zip(axes[:, 0], tables, strict=True))
    axes[-1, 0].set(xlabel="time, in forward passes of a micro-batch through a rank", xlim=(0, longest))
    kinds = [Patch(color=colour, label=SAID[kind]) for kind, colour in COLOURS.items()]
    figure.legend(handles=kinds, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def _panel(axis: Any, table: Timetable) -> float:
    """Draws one schedule and returns how long it takes."""
    from matplotlib.patches import Rectangle

    part = table.ranks / table.stages  # of what a rank has
    costs = Costs(part, part, part)
    played = play(table, costs)
    for rank, (steps, begins) in enumerate(zip(table.steps, played.begins, strict=True)):
        for step, begin in zip(steps, begins, strict=True):
            width, height = costs.of(step), 0.9 / len(step)
            for i, action in enumerate(step):
                pale = action.stage >= table.ranks or (table.copies > 1 and action.batch >= table.batches // 2)
                box = Rectangle((begin, rank + i * height), width, height, alpha=0.55 if pale else 1.0)
                box.set(facecolor=COLOURS[action.kind], edgecolor="white")
                axis.add_patch(box)
                middle = box.get_center()
                axis.annotate(str(action.batch), middle, ha="center", va="center", fontsize=6 if len(step) == 1 else 5)
    idle = 1 - min(played.busy) / played.seconds
    most = max(peak_activations(table)) * part
    said = f"{table.name}: {idle:.0%} idle, activations of up to {most:g} micro-batches"
    axis.set_title(said, loc="left", fontsize=9)
    axis.set(ylim=(table.ranks, 0), ylabel="rank")
    axis.set_yticks([rank + 0.45 for rank in range(table.ranks)], range(table.ranks), fontsize=7)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return played.seconds
