"""Pipeline schedules against the published table, against each other's laws, and with faults planted."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from leanseek.parallel.timetable import (
    SCHEDULES,
    Action,
    Costs,
    Deadlock,
    Timetable,
    bubble,
    draw,
    drawing,
    peak_activations,
    peak_put_off,
    play,
)

EVEN = [(2, 4), (4, 8), (4, 12), (8, 16), (8, 32)]
COSTS = Costs(forward=1.0, input_gradient=1.3, weight_gradient=0.9)  # no two alike: a swap shows


def published_bubble(name: str, ranks: int, c: Costs) -> float:
    """Report table 2; PP is the number of stages' worth of depth, which DualPipeV's V lays on half as many ranks."""
    f, b, w = c.forward, c.backward, c.weight_gradient
    pair = f + b if c.pair is None else c.pair
    return {
        "1F1B": (ranks - 1) * (f + b),
        "Interleaved1F1B": (ranks - 1) * (f + b),  # of a chunk, which is a part of what 1F1B's stage is
        "ZB1P": (ranks - 1) * (f + b - 2 * w),
        "DualPipe": (ranks / 2 - 1) * (pair + b - 3 * w),
        "DualPipeV": (ranks - 1) * (pair + b - 3 * w),
    }[name]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("ranks", "batches"), EVEN)
def test_each_stage_does_everything_once(name: str, ranks: int, batches: int) -> None:
    table = SCHEDULES[name](ranks, batches)
    actions = [a for steps in table.steps for step in steps for a in step]
    assert len(actions) == len(set(actions))
    for stage in range(table.stages):
        of = [a for a in actions if a.stage == stage]
        for batch in range(batches):
            kinds = sorted(a.kind for a in of if a.batch == batch)
            assert kinds in (["B", "F"], ["F", "I", "W"])
    assert len({len([a for step in steps for a in step if a.kind == "F"]) for steps in table.steps}) == 1


@pytest.mark.parametrize("name", ["1F1B", "Interleaved1F1B", "DualPipe", "DualPipeV"])
@pytest.mark.parametrize(("ranks", "batches"), EVEN)
def test_bubbles_are_the_published_ones(name: str, ranks: int, batches: int) -> None:
    # ZB1P and the DualPipes are published for F = I = W, where no rank waits within the steady phase.
    costs = COSTS if "1F1B" in name else Costs()
    assert bubble(SCHEDULES[name](ranks, batches), costs) == pytest.approx(published_bubble(name, ranks, costs))


@pytest.mark.parametrize(("ranks", "batches"), EVEN)
def test_zero_bubble_schedules_idle_as_published(ranks: int, batches: int) -> None:
    assert bubble(SCHEDULES["ZB1P"](ranks, batches)) == pytest.approx(published_bubble("ZB1P", ranks, Costs()))
    # ZBV idles only while the first micro-batch comes down to the last rank.
    assert bubble(SCHEDULES["ZBV"](ranks, batches)) == pytest.approx((ranks - 1) * 1.0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_bubbles_do_not_grow_with_micro_batches(name: str) -> None:
    few, many = (bubble(SCHEDULES[name](4, n), Costs()) for n in (16, 64))
    assert few == pytest.approx(many)


@pytest.mark.parametrize(("ranks", "batches"), EVEN)
def test_peaks_are_the_published_ones(ranks: int, batches: int) -> None:
    def peak(name: str) -> int:
        return max(peak_activations(SCHEDULES[name](ranks, batches)))

    assert peak("1F1B") == ranks
    assert peak("ZB1P") == ranks
    assert (
        max(
            map(
                sum, zip(*(f(SCHEDULES["ZB1P"](ranks, batches)) for f in (peak_activations, peak_put_off)), strict=True)
            )
        )
        <= ranks + 1
    )
    assert peak("ZBV") == 2 * ranks  # of half stages
    assert set(peak_activations(SCHEDULES["DualPipe"](ranks, batches))) == {ranks + 1}
    assert set(peak_activations(SCHEDULES["DualPipeV"](ranks, batches))) == {2 * ranks + 1}  # PP + 1, PP = 2 · ranks


def test_overlap_pays_and_hops_cost() -> None:
    table = SCHEDULES["DualPipe"](4, 16)
    plain = play(table, Costs()).seconds
    assert play(table, Costs(pair=2.5)).seconds < plain
    assert play(table, Costs(hop=0.1)).seconds > plain


def test_a_schedule_that_waits_for_itself_is_seen() -> None:
    table = SCHEDULES["1F1B"](2, 4)
    first, last = table.steps
    backward = next(step for step in first if step[0].kind == "B")
    stuck = replace(table, steps=((backward, *(s for s in first if s is not backward)), last))
    with pytest.raises(Deadlock, match="1F1B"):
        play(stuck)


def test_what_a_schedule_cannot_take_is_refused() -> None:
    for name, ranks, batches in [
        ("Interleaved1F1B", 4, 6),
        ("ZBV", 4, 7),
        ("DualPipe", 3, 8),
        ("DualPipe", 4, 9),
        ("DualPipeV", 4, 7),
    ]:
        with pytest.raises(ValueError, match=r"micro-batches|batches"):
            SCHEDULES[name](ranks, batches)


def test_dualpipe_goes_both_ways() -> None:
    table: Timetable = SCHEDULES["DualPipe"](4, 8)
    assert [table.rank_of(0, 0), table.rank_of(3, 0)] == [0, 3]
    assert [table.rank_of(0, 7), table.rank_of(3, 7)] == [3, 0]
    assert table.stages_per_rank == 2
    assert (Action("F", 0, 0),) == table.steps[0][0]


def test_the_drawing_shows_what_is_played(tmp_path: Path) -> None:
    tables = [SCHEDULES[name](4, 8) for name in SCHEDULES]
    figure = drawing(tables)
    for axis, table in zip(figure.axes, tables, strict=True):
        part = table.ranks / table.stages
        played = play(table, Costs(part, part, part))
        boxes = [[box for box in axis.patches if int(box.get_y()) == rank] for rank in range(table.ranks)]
        assert sum(map(len, boxes)) == sum(len(step) for steps in table.steps for step in steps)
        for rank, row in enumerate(boxes):
            areas = sum(box.get_width() * box.get_height() for box in row) / 0.9
            assert areas == pytest.approx(played.busy[rank])
            assert max(box.get_x() + box.get_width() for box in row) <= played.seconds
    draw(tables, tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")


# PyTorch's executor knows its whole order beforehand; the process group is a fake that moves nothing.
THEIRS = """
import json, torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.distributed.pipelining import PipelineStage, schedules
RANKS, BATCHES = 4, 12
dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
orders = {}
for ours, name, held in [
    ("Interleaved1F1B", "ScheduleInterleaved1F1B", [0, RANKS]),
    ("ZBV", "ScheduleZBVZeroBubble", [0, 2 * RANKS - 1]),
    ("DualPipeV", "ScheduleDualPipeV", [0, 2 * RANKS - 1]),
]:
    stages = [PipelineStage(torch.nn.Linear(1, 1), i, len(held) * RANKS, torch.device("cpu")) for i in held]
    schedule = getattr(schedules, name)(stages, BATCHES, loss_fn=lambda a, b: 0)
    rows = [[a for a in schedule.pipeline_order[rank] if a is not None] for rank in range(RANKS)]
    orders[ours] = [[[str(x) for x in getattr(a, "sub_actions", None) or [a]] for a in row] for row in rows]
print(json.dumps(orders))
"""


def test_orders_are_those_that_pytorch_executes() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", THEIRS], capture_output=True, text=True, check=True)
    theirs = json.loads(done.stdout)
    # PyTorch has neither ZB1P nor DualPipe, and its 1F1B runs a loop of its own, beside which its list names micro-
    # batches that do not exist.
    assert set(theirs) == set(SCHEDULES) - {"1F1B", "ZB1P", "DualPipe"}
    for name, rows in theirs.items():
        ours = [[[f"{a.stage}{a.kind}{a.batch}" for a in step] for step in row] for row in SCHEDULES[name](4, 12).steps]
        assert ours == rows, name
