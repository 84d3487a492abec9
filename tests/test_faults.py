"""Faults: what hangs is named with its ranks, what is slow is named, and what dies starts again and loses nothing."""

import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from leanseek.parallel.watch import Waits, Where, covered, report, slowest
from tests.pool import Pool

IN_IT = Where(told=100.0, entered={"0": 17, "3": 4}, line="step.py:9 (update)", waits="all_reduce of [8]", group="0",
              number=17, since=60.0)  # fmt: skip
AT_WORK = Where(told=99.0, entered={"0": 16, "3": 4}, line="loader.py:7 (batch)")


def test_a_report_names_the_ranks_that_are_not_there() -> None:
    ranks = {0: IN_IT, 1: IN_IT, 2: AT_WORK}
    said = "all_reduce of [8] hangs for 40 s, entered by ranks 0, 1 at step.py:9 (update); it waits for rank 2, which "
    assert report(0, ranks, [0, 1, 2]) == said + "is at loader.py:7 (batch)"
    assert report(1, ranks, [0, 1, 2]) is None  # one says it for both
    stopped = replace(AT_WORK, told=65.0)
    assert (
        report(0, ranks | {2: stopped}, [0, 1, 2]) == said + "has been silent for 35 s and was at loader.py:7 (batch)"
    )
    elsewhere = replace(AT_WORK, waits="all_to_all of [4]", group="3", number=4)
    assert report(0, ranks | {2: elsewhere}, [0, 1, 2]) == said + "waits in all_to_all of [4], at loader.py:7 (batch)"
    assert report(0, {0: IN_IT}, [0, 2]) == said.replace("ranks 0, 1", "rank 0") + "never said anything"
    assert (report(0, {0: IN_IT, 1: IN_IT}, [0, 1]) or "").endswith("it waits for none of them: the network may be cut")


def test_a_message_between_pipeline_ranks_waits_for_who_does_not_wait() -> None:
    receiving = Where(told=100.0, entered={}, line="pipeline.py:5 (gradients)", waits="recv (x.py:1)", since=90.0)
    assert report(0, {0: receiving, 1: receiving, 2: AT_WORK}, [0, 1, 2]) == (
        "recv (x.py:1) hangs for 10 s, entered by ranks 0, 1 at pipeline.py:5 (gradients); it waits for rank 2, which "
        "is at loader.py:7 (batch)"
    )


def test_the_slowest_rank_is_named_where_it_stands_out() -> None:
    assert slowest([1.0, 1.1, 1.2, 1.0]) is None
    said = "rank 2 is slow: 1.50 s of a step are its own work, the median is 1.00 s"
    assert slowest([1.0, 0.9, 1.5, 1.0]) == said
    assert slowest([1.0, 1.5]) == "rank 1 is slow: 1.50 s of a step are its own work, the median is 1.00 s"
    assert covered([(0, 2), (1, 3), (2, 2.5), (5, 6)]) == 4
    assert covered([]) == 0


def works(rank: int, world: int, slow: int) -> tuple[float, float]:
    """Seconds of a step and those of its own, where one rank takes longer than the others."""
    value = torch.ones(1000)
    with Waits(torch.device("cpu")) as waits:
        for _ in range(3):
            time.sleep(0.2 if rank == slow else 0.01)
            dist.all_reduce(value)
    return waits.seconds, waits.own


def test_waiting_for_others_is_not_a_ranks_own_time(pool: Pool) -> None:
    found = pool.run(3, works, 1)
    assert all(seconds > 0.6 for seconds, _ in found)  # all of them last as long as the slow one
    own = [own for _, own in found]
    assert own[1] > 0.6
    assert max(own[0], own[2]) < 0.4
    assert "rank 1 is slow" in str(slowest(own))


@pytest.mark.parametrize("slow", [0, 2])
def test_it_is_the_slow_rank_that_is_named(pool: Pool, slow: int) -> None:
    assert f"rank {slow} is slow" in str(slowest([own for _, own in pool.run(3, works, slow)]))
