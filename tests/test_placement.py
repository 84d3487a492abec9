"""Placing experts: DeepSeek's published example, the best there is by exhaustion, and what holds for any loads."""

import itertools
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leanseek.config import BadInput
from leanseek.parallel.placement import copies, device_loads, groups_per_node, place, places, unevenness

PUBLISHED = [  # the README of DeepSeek's EPLB: 16 physical experts, 4 groups, 2 nodes, 8 GPUs
    (
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    ),
    (
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ),
]


@pytest.mark.parametrize(("loads", "expected"), PUBLISHED)
def test_the_published_example(loads: list[int], expected: list[int]) -> None:
    assert place(loads, 16, groups=4, nodes=2, devices=8) == expected
    assert groups_per_node(expected, 12, 4, 2) == 2
    assert [len(slots) for slots in copies(expected, 12)] == [expected.count(e) for e in range(12)]


def test_by_hand() -> None:
    # One expert carries half of all: its three copies carry 10 each, as every other expert does.
    placed = place([30, 10, 10, 10], 6, groups=1, nodes=1, devices=2)
    assert sorted(placed) == [0, 0, 0, 1, 2, 3]
    assert device_loads(placed, [30, 10, 10, 10], 2) == [30, 30]
    assert unevenness(placed, [30, 10, 10, 10], 2) == 1
    assert unevenness([0, 1, 2, 3], [30, 10, 10, 10], 2) == pytest.approx(40 / 30)
    assert unevenness([0, 1], [0, 0], 2) == 1
    # V3's units: 32 devices of eight experts (and one copy), 144 of two, 320 of one (report §3.4 and its sequel)
    assert [places(256, devices) for devices in (32, 144, 320)] == [8, 2, 1]


@given(st.lists(st.integers(0, 50), min_size=2, max_size=4), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_copies_make_the_busiest_copy_as_light_as_can_be(loads: list[int], more: int) -> None:
    physical = len(loads) + more
    placed = place(loads, physical, groups=1, nodes=1, devices=physical)  # one copy a device: only copying counts
    every = (c for c in itertools.product(range(1, more + 2), repeat=len(loads)) if sum(c) == physical)
    best = min(max(Fraction(load, n) for load, n in zip(loads, c, strict=True)) for c in every)
    ours = max(Fraction(load, len(slots)) for load, slots in zip(loads, copies(placed, len(loads)), strict=True))
    assert ours == best


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[float], int, int, int, int, list[int]]:
    """Loads, sizes that divide as they must, and a placement in force that may be anything that has every expert."""
    nodes, per_node = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    groups = draw(st.integers(1, 4)) * (nodes if draw(st.booleans()) else 1)
    size = draw(st.integers(1, 4))
    experts, devices = groups * size, nodes * per_node
    physical = -(-experts // devices) * devices + devices * draw(st.integers(0, 2))
    loads = draw(st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=experts, max_size=experts))
    spare = draw(st.lists(st.integers(0, experts - 1), min_size=physical - experts, max_size=physical - experts))
    return loads, physical, groups, nodes, devices, draw(st.permutations([*range(experts), *spare]))


@given(cases())
@settings(max_examples=300, deadline=None)
def test_any_loads(case: tuple[list[float], int, int, int, int, list[int]]) -> None:
    loads, physical, groups, nodes, devices, current = case
    fresh, placed = (place(loads, physical, groups, nodes, devices, was) for was in (None, current))
    for each in (fresh, placed):
        slots = copies(each, len(loads))
        assert len(each) == physical
        assert all(slots)
        assert sorted(itertools.chain(*slots)) == list(range(physical))
        if groups % nodes == 0:
            assert groups_per_node(each, len(loads), groups, nodes) <= groups // nodes
    assert place(loads, physical, groups, nodes, devices, current) == placed
    assert place(loads, physical, groups, nodes, devices, placed) == placed  # nothing moves twice
    busiest = [max(device_loads(p, loads, devices)) for p in (placed, fresh, current)]
    assert busiest[0] <= busiest[1]
    if groups % nodes or groups_per_node(current, len(loads), groups, nodes) <= groups // nodes:
        assert busiest[0] <= busiest[2]  # never worse than what was


def test_the_placement_in_force_can_be_the_better_one() -> None:
    # From the heaviest on, 3 | 3, then 2 to each and the last 2 to one of them: 7 | 5, where 6 | 6 is possible.
    loads, there = [3, 3, 2, 2, 2, 0], [0, 1, 5, 2, 3, 4]
    assert max(device_loads(place(loads, 6, 1, 1, 2), loads, 2)) == 7
    assert place(loads, 6, 1, 1, 2, there) == there


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([1, 1, 1], 4, 2, 1, 2), "2 groups do not divide 3 experts"),
        (([1, 1], 3, 1, 1, 2), "2 devices do not divide 3 physical experts"),
        (([1, 1], 4, 1, 3, 4), "3 nodes do not divide 4 devices"),
        (([1, 1, 1], 2, 1, 1, 2), "2 physical experts are fewer than the 3 experts"),
        (([1, -1], 2, 1, 1, 2), "a load is negative or no number"),
        (([1, float("nan")], 2, 1, 1, 2), "a load is negative or no number"),
    ],
)
def test_what_cannot_be_placed(arguments: tuple[list[float], int, int, int, int], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        place(*arguments)
