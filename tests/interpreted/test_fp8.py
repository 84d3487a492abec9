"""FP8 kernels under Triton's interpreter: codes against the reference bit for bit, products against FP64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from leanseek.ops import fp8
from leanseek.ops.fp8 import BLOCK, COLUMN, ROW, Quantised, Tile
from leanseek.ops.triton_kernels import fp8_matmul, quantise
from tests.interpreted.grid import RAGGED, codes_of, hard, off

SHAPES = ((37, 300), (5, 128), (1, 7), (130, 640))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def same(ours: Quantised, reference: Quantised) -> bool:
    scales = torch.equal(ours.scales.nan_to_num(-1), reference.scales.nan_to_num(-1))
    return (
        scales
        and torch.equal(codes_of(ours.codes) & 0x7F, codes_of(reference.codes) & 0x7F)
        and ours.tile == reference.tile
    )


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("tile", [ROW, COLUMN, BLOCK], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_and_scales_are_the_references(
    shape: tuple[int, int], tile: Tile, power_of_two: bool, generator: torch.Generator
) -> None:
    x = hard(*shape, generator)
    assert same(quantise.quantised(x, tile, power_of_two), fp8.quantised(x, tile, power_of_two))
    x[shape[0] // 2, shape[1] // 2], x[-1, shape[1] // 3] = float("nan"), float("-inf")
    ours, reference = quantise.quantised(x, tile, power_of_two), fp8.quantised(x, tile, power_of_two)
    assert same(ours, reference)
    assert ours.values().isnan().any()
    assert torch.equal(ours.values().isnan(), reference.values().isnan())


def test_stacked_weights_are_quantised_each_for_itself(generator: torch.Generator) -> None:
    weight = torch.randn(2, 2, 130, 200, generator=generator)
    assert same(quantise.quantised(weight, BLOCK), fp8.quantised(weight, BLOCK))
    assert same(quantise.quantised(weight.mT, BLOCK), fp8.quantised(weight.mT, BLOCK))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_swiglu_and_norm_are_quantised_as_if_they_had_been_stored(
    shape: tuple[int, int], power_of_two: bool, generator: torch.Generator
) -> None:
    (m, k), eps = shape, 1e-6
    gate_up = torch.randn(m, 2 * k, generator=generator) * 8
    gate, up = gate_up.double().chunk(2, dim=-1)
    weight = torch.randn(k, generator=generator)
    x = hard(m, k, generator)
    normed = x.double() * torch.rsqrt(x.double().square().mean(dim=-1, keepdim=True) + eps) * weight.double()
    q, kept, inverse = quantise.quantised_norm(x, weight, eps, power_of_two, keep=True)
    assert kept is not None
    assert inverse is not None
    # An FP32 error of the value may carry it over the middle between two codes: then it lies at the bound's edge.
    for ours, exact in ((quantise.quantised_swiglu(gate_up, power_of_two), F.silu(gate) * up), (q, normed)):
        scale = fp8.whole(ours.scales[:, None, :, None].expand(-1, 1, -1, 128), torch.Size((m, -(-k // 128) * 128)))
        bound = torch.maximum(exact.abs() * 2**-4, scale[:, :k].double() * 2**-10) * (1 + 2**-16)
        assert off(ours.values(), exact, bound) <= 1
    assert off(kept, normed, normed.abs() * 2**-20 + 2**-126) <= 1
    assert off(inverse, torch.rsqrt(x.double().square().mean(dim=-1) + eps), inverse.double() * 2**-20) <= 1
    x[m // 2, 0] = float("nan")
    q, _, _ = quantise.quantised_norm(x, weight, eps, power_of_two)
    assert q.values()[m // 2].isnan().all()
    assert q.values().isnan().sum() == k


def bound_of(a: Tensor, b: Tensor) -> Tensor:
    """What the docstring promises of a · bᵀ over these exact values [M, K] and [N, K]."""
    k = a.shape[-1]
    return (min(k, 128) + -(-k // 128) + 4) * 2.0**-24 * (a.abs() @ b.abs().mT)


@pytest.mark.parametrize("weights", [BLOCK, ROW], ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(37, 130, 300), (128, 128, 128), (1, 64, 16), (70, 1, 512), (3, 200, 40)])
def test_matmul_keeps_its_bound(m: int, n: int, k: int, weights: Tile, generator: torch.Generator) -> None:
    x = hard(m, k, generator)
    a, b = fp8.quantised(x, ROW), fp8.quantised(hard(n, k, generator), weights)
    exact, bound = a.values().double() @ b.values().double().T, bound_of(a.values().double(), b.values().double())
    for tile in (None, *fp8_matmul.TILES[:2]):
        assert off(fp8_matmul.matmul(a, b, tile=tile), exact, bound) <= 1
    neighbour = Quantised(a.codes, a.scales.roll(1, 0), ROW)
    assert m == 1 or off(fp8_matmul.matmul(neighbour, b), exact, bound) > 1  # this can fail
    x[m // 2, k // 2] = float("nan")
    out = fp8_matmul.matmul(fp8.quantised(x, ROW), b)
    assert out[m // 2].isnan().all()
    assert out.isnan().sum() == n


@pytest.mark.parametrize("counts", RAGGED, ids=str)
def test_grouped_products_keep_their_bounds(counts: list[int], generator: torch.Generator) -> None:
    experts, n, k, rows = len(counts), 200, 272, sum(counts)
    x, grad = torch.randn(rows, k, generator=generator), torch.randn(rows, n, generator=generator)
    loads = torch.tensor(counts)
    a, dy = fp8.quantised(x, ROW), fp8.quantised(grad, ROW)
    w = fp8.quantised(torch.randn(experts, n, k, generator=generator), BLOCK)
    out, dx = fp8_matmul.grouped_matmul(a, w, loads), fp8_matmul.grouped_matmul(dy, w.mT, loads)
    columns = [quantise.quantised_by_expert(each, loads) for each in (grad, x)]
    dw = fp8_matmul.grouped_wgrad(columns[0], columns[1], loads)
    references = [fp8.quantised_by_expert(each, loads) for each in (grad, x)] if rows else []
    ends = loads.cumsum(0).tolist()
    for e, (count, end) in enumerate(zip(counts, ends, strict=True)):
        own, weight = slice(end - count, end), w.values()[e].double()
        here, there = a.values()[own].double(), dy.values()[own].double()
        assert off(out[own], here @ weight.T, bound_of(here, weight)) <= 1
        assert off(dx[own], there @ weight, bound_of(there, weight.T)) <= 1
        if count:
            g, h = (fp8.of_experts(q, loads)[e].values().double() for q in references)
            # Of a tile only so many tokens are summed as the expert has, but never more than the tile.
            assert off(dw[e], g.T @ h, bound_of(g.T, h.T) + 128 * 2.0**-24 * (g.T.abs() @ h.abs())) <= 1
        else:
            assert not dw[e].any()


def test_rows_in_slots_are_those_that_are_filled(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    counts, slot, n, k = torch.tensor([3, 0, 70, 64]), 70, 100, 160
    a = fp8.quantised(torch.randn(4, slot, k, generator=generator), ROW)
    w = fp8.quantised(torch.randn(4, n, k, generator=generator), BLOCK)
    monkeypatch.setattr(torch, "empty", lambda *shape, **where: torch.full(shape, 7.0, **where))
    out = fp8_matmul.slotted_matmul(a, w, counts)
    for e, count in enumerate(counts.tolist()):
        here, weight = a.values()[e, :count].double(), w.values()[e].double()
        assert off(out[e, :count], here @ weight.T, bound_of(here, weight)) <= 1
        assert bool((out[e, count:] == 7).all())  # nothing is computed for nobody


def test_a_neighbours_nan_stays_with_the_neighbour(generator: torch.Generator) -> None:
    counts, n, k = torch.tensor([3, 61, 5]), 72, 144
    x, grad = torch.randn(69, k, generator=generator), torch.randn(69, n, generator=generator)
    x[3:64], grad[3:64] = float("nan"), float("nan")
    w = torch.randn(3, n, k, generator=generator)
    w[1] = float("nan")
    a, dy, weights = fp8.quantised(x, ROW), fp8.quantised(grad, ROW), fp8.quantised(w, BLOCK)
    for out in (fp8_matmul.grouped_matmul(a, weights, counts), fp8_matmul.grouped_matmul(dy, weights.mT, counts)):
        assert out[3:64].isnan().all()
        assert not out[:3].isnan().any()
        assert not out[64:].isnan().any()
    dw = fp8_matmul.grouped_wgrad(*(quantise.quantised_by_expert(each, counts) for each in (grad, x)), counts)
    assert [bool(each.isnan().any()) for each in dw] == [False, True, False]
