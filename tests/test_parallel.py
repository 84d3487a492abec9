"""One process against many: whatever the mesh, a run computes what the plain model computes."""

import time

import pytest
import torch
import torch.distributed as dist

from leanseek.config import BadInput, Config, read_recipe
from leanseek.parallel.mesh import Division, divide
from tests.pool import Pool, RanksFailed, ranks_of
from tests.tiny import RECIPE


def config_of(*overrides: str) -> Config:
    return read_recipe(str(RECIPE), ("train.dtype=fp32", "train.device=cpu", *overrides))


# ── the mesh ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_rank_has_a_place_of_its_own() -> None:
    division = Division(pp=2, dp=4, cp=2, tp=2, ep=4)
    places = [division.place(rank) for rank in range(division.world)]
    assert len({tuple(place.values()) for place in places}) == 32
    assert places[0] == {"pp": 0, "dp": 0, "cp": 0, "tp": 0, "ep": 0}
    assert places[-1] == {"pp": 1, "dp": 3, "cp": 1, "tp": 1, "ep": 3}
    # an expert group is neighbours: ranks of dp 0 and 1
    assert [place["ep"] for place in places[:16:2]] == [0, 1, 2, 3, 0, 1, 2, 3]


def test_dp_is_what_the_other_axes_leave() -> None:
    assert divide(config_of("mesh.tp=2"), 8) == Division(dp=4, tp=2)
    assert divide(config_of(), 1) == Division()


@pytest.mark.parametrize(
    ("overrides", "world", "reason", "nearest"),
    [
        (["mesh.tp=3"], 8, "are 6 ranks, and 8 processes run", "mesh.tp=2"),
        (["mesh.dp=3"], 4, "are 3 ranks, and 4 processes run", "mesh.dp=4"),
        (["mesh.ep=3"], 6, "does not divide model.n_routed_experts 8", "mesh.ep=2"),
        (["mesh.ep=8"], 4, "ep 8 does not divide the 4 ranks", "mesh.ep=4"),
        (["mesh.tp=4"], 4, "does not divide model.num_attention_heads 2", "mesh.tp=2"),
        (["mesh.pp=4"], 4, "makes 4 stages of 3 layers", "mesh.pp=2"),
        (["mesh.replicate=3"], 4, "replicate 3 does not divide dp 4", "mesh.replicate="),
        (["mesh.ep=4", "mesh.replicate=2"], 4, "the 2 ranks", "mesh.ep=2"),
    ],
)
def test_impossible_divisions_are_refused_with_the_nearest(
    overrides: list[str], world: int, reason: str, nearest: str
) -> None:
    with pytest.raises(BadInput) as refused:
        divide(config_of(*overrides), world)
    assert reason in str(refused.value)
    assert nearest in str(refused.value)


def groups(rank: int, world: int, *overrides: str) -> dict[str, list[int]]:
    """By axis, the ranks of this rank's group."""
    ranks = ranks_of(config_of(*overrides))
    axes = ("pp", "dp", "cp", "tp", "ep", "batch", "node", "local")
    found = {axis: ranks.group(axis) for axis in axes}
    assert ranks.total(torch.tensor(rank)) == sum(range(world))
    assert ranks.any(rank == 1)
    assert ranks.agreed(rank + 0.5) == 0.5
    return {axis: [rank] if group is None else dist.get_process_group_ranks(group) for axis, group in found.items()}


def test_groups_are_as_the_place_says(pool: Pool) -> None:
    config = ("mesh.pp=2", "mesh.cp=2", "mesh.ep=4", "mesh.node=2")
    division = divide(config_of(*config), 8)
    places = [division.place(rank) for rank in range(8)]
    for rank, found in enumerate(pool.run(8, groups, *config)):
        for axis in ("pp", "dp", "cp", "tp"):
            others = {key: value for key, value in places[rank].items() if key not in (axis, "ep")}
            assert found[axis] == [r for r in range(8) if others.items() <= places[r].items()]
        stage = [r for r in range(8) if places[r]["pp"] == places[rank]["pp"]]
        assert found["batch"] == found["ep"] == stage
        assert found["local"] == [r for r in stage if r // 2 == rank // 2]
        assert found["node"] == [r for r in stage if r % 2 == rank % 2]


# ── the pool ──────────────────────────────────────────────────────────────────────────────────────────────────────


def fails(rank: int, world: int, how: str) -> None:
    if rank == 1:
        if how == "raises":
            raise ValueError("a planted fault")
        while True:
            time.sleep(1)
    dist.barrier()


def test_a_failing_rank_is_named_with_its_traceback(pool: Pool) -> None:
    with pytest.raises(RanksFailed, match=r"(?s)^── rank 1 of 3: Traceback.*in fails.*a planted fault"):
        pool.run(3, fails, "raises")


def test_a_hanging_rank_is_named_with_where_it_hangs(pool: Pool) -> None:
    with pytest.raises(RanksFailed, match=r"(?s)rank 1 of 2: no answer in 2 seconds.*in fails"):
        pool.run(2, fails, "hangs", seconds=2)
