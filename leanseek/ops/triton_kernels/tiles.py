"""How a matmul's output is cut into tiles, one for each program, also where its rows belong to groups (experts)."""

from typing import NamedTuple

import triton
import triton.language as tl

from leanseek.ops.triton_kernels.common import cdiv

DENSE, RAGGED, SLOTS = (tl.constexpr(n) for n in range(3))  # forms: one group, groups one behind the other, fixed slots
NEIGHBOURS = tl.constexpr(8)  # row tiles that walk through the columns together, so that both operands stay in L2


class Tile(NamedTuple):
    rows: int
    columns: int
    warps: int
    stages: int  # pieces of K that are under way at once


@triton.jit
def swizzled(program, row_tiles, column_tiles):
    """Program number → row tile, column tile."""
    wide = NEIGHBOURS * column_tiles
    first = (program // wide) * NEIGHBOURS
    height = tl.minimum(row_tiles - first, NEIGHBOURS)
    return first + (program % wide) % height, (program % wide) // height


@triton.jit
def located(tile, counts, groups, rows, FORM: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """Row tile → its group, its first row, the row behind its group's last. Surplus tiles begin behind the last.

    counts [G]: the rows of each group; `rows`: all rows (DENSE), or those of each group's slot (SLOTS).
    """
    if FORM == DENSE:
        return tl.full((), 0, tl.int32), tile * ROWS, rows
    elif FORM == SLOTS:  # noqa: RET505 - Triton knows no branch that returns without the other
        per_slot = tl.cdiv(rows, ROWS)
        group = tile // per_slot
        filled = tl.minimum(tl.load(counts + group).to(tl.int32), rows)
        return group, group * rows + (tile % per_slot) * ROWS, group * rows + filled
    else:
        every = tl.arange(0, GROUPS)
        count = tl.load(counts + every, every < groups, other=0).to(tl.int32)
        ends = tl.cumsum(tl.cdiv(count, ROWS), axis=0)  # in tiles
        group = tl.sum((ends <= tile).to(tl.int32), axis=0)
        tiles_before = tl.sum(tl.where(every < group, tl.cdiv(count, ROWS), 0), axis=0)
        rows_before = tl.sum(tl.where(every < group, count, 0), axis=0)
        own = tl.sum(tl.where(every == group, count, 0), axis=0)  # 0 for a surplus tile
        return group, rows_before + (tile - tiles_before) * ROWS, rows_before + own


@triton.jit
def rows_of_group(group, counts, groups, GROUPS: tl.constexpr):
    """First row of a group, and the row behind its last."""
    every = tl.arange(0, GROUPS)
    count = tl.load(counts + every, every < groups, other=0).to(tl.int32)
    first = tl.sum(tl.where(every < group, count, 0), axis=0)
    return first, first + tl.sum(tl.where(every == group, count, 0), axis=0)


@triton.jit
def tiles_of_group(group, counts, groups, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """First tile of a group where each begins a new one, and the tile behind its last."""
    every = tl.arange(0, GROUPS)
    tiles = tl.cdiv(tl.load(counts + every, every < groups, other=0).to(tl.int32), ROWS)
    first = tl.sum(tl.where(every < group, tiles, 0), axis=0)
    return first, first + tl.sum(tl.where(every == group, tiles, 0), axis=0)


def most_row_tiles(rows: int, groups: int, tile_rows: int) -> int:
    """Row tiles of groups whose sizes only the GPU knows: each may end in a tile that is not full."""
    return min(cdiv(rows, tile_rows) + groups, rows)


def fitting(tiles: tuple[Tile, ...], rows: int, columns: int, processors: int) -> Tile:
    """The first, largest tile that keeps every processor busy; else the last, smallest."""
    busy = (tile for tile in tiles if cdiv(rows, tile.rows) * cdiv(columns, tile.columns) >= processors)
    return next(busy, tiles[-1])
