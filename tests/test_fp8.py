"""FP8, its products and training in it: against FP64, brute force, and BF16."""

import json
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from random import Random

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from leanseek import checkpoint
from leanseek.config import read_recipe
from leanseek.data.tokenizer import Tokenizer
from leanseek.hub import QUANTISED, export_release, import_release, layout
from leanseek.model.layers import Linear, SwiGLU
from leanseek.model.moe import Experts
from leanseek.model.transformer import Transformer
from leanseek.ops import e5m6, fp8
from leanseek.ops.fp8 import BLOCK, COLUMN, LARGEST, ROW, Quantised, Tile, from_bytes, of_experts, to_bytes
from leanseek.ops.fp8_linear import AfterAttention, Fp8
from leanseek.ops.precision import Plain
from leanseek.serve.llm import load_model
from leanseek.train.optim import NarrowAdamW, build_optimizers, set_learning_rate
from leanseek.train.precision import in_fp8, weights_quantised_once
from leanseek.train.pretrain import pretrain
from leanseek.train.step import loss_sums
from tests.gap import BF16, FAULTS, FP8, error, gap, instead, losses, middle, stories
from tests.releases import quantised as blocks_one_by_one
from tests.releases import read
from tests.tiny import RECIPE, make_data, story

U = 2.0**-24  # rounding to FP32 is off by at most this, relatively
TILES = [ROW, COLUMN, BLOCK]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# ── inputs that are hard ──────────────────────────────────────────────────────────────────────────────────────────


def plain(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator)


def outlier_channels(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    values = plain(rows, columns, generator)
    values[:, :: max(columns // 3, 1)] *= 3e4
    return values


def zero_tiles(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    values = plain(rows, columns, generator)
    values[: rows // 2, : columns // 2] = 0
    return values


def largest_tiles(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Every value the largest of its tile, and in some columns as large as FP32's."""
    values = plain(rows, columns, generator).sign()
    values[:, columns // 2 :] *= 3e38 / columns
    return values


def denormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return plain(rows, columns, generator) * torch.logspace(-44, -30, columns)


def many_magnitudes(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return plain(rows, columns, generator) * torch.logspace(-9, 3, columns)


Maker = Callable[[int, int, torch.Generator], Tensor]
KINDS = [plain, outlier_channels, zero_tiles, largest_tiles, denormal, many_magnitudes]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def spread(scales: Tensor, tile: Tile, shape: torch.Size) -> Tensor:
    """The scale of each value."""
    return scales.repeat_interleave(tile[0], -2).repeat_interleave(tile[1], -1)[..., : shape[-2], : shape[-1]]


# ── codes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def numbers(exponents: int, mantissa: int, bias: int) -> Tensor:
    """The magnitudes that codes of a format mean, by its definition, in the order of the codes; exponents of them."""
    found, parts = [], 1 << mantissa
    for exponent in range(exponents):
        lowest = 2.0 ** (max(exponent, 1) - bias)
        found += [lowest * ((exponent > 0) + digits / parts) for digits in range(parts)]
    return torch.tensor(found, dtype=torch.float64)


E4M3 = numbers(16, 3, 7)[:-1]  # the last code is NaN
E5M6 = numbers(31, 6, 15)


def nearest(values: Tensor, numbers: Tensor) -> Tensor:
    """To each value the nearest of the numbers, with its sign; of two equally near ones that with the even code."""
    magnitudes = values.double().abs()
    above = torch.searchsorted(numbers, magnitudes).clamp(1, len(numbers) - 1)
    to_above, to_below = (numbers[above] - magnitudes).abs(), (magnitudes - numbers[above - 1]).abs()
    up = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    return torch.where(up, numbers[above], numbers[above - 1]) * values.double().sign()


@kinds
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_codes_are_the_nearest_numbers(tile: Tile, power_of_two: bool, kind: Maker, generator: torch.Generator) -> None:
    values = kind(130, 150, generator)
    quantised = fp8.quantised(values, tile, power_of_two)
    assert quantised.scales.shape == fp8.scale_shape(130, 150, tile=tile)
    scales = spread(quantised.scales, tile, values.shape)
    divided = (values / scales).clamp(-LARGEST, LARGEST)
    assert torch.equal(quantised.codes.double(), nearest(divided, E4M3))


@kinds
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("shape", [(256, 256), (130, 5), (1, 300)])
def test_values_come_back_within_the_bound(
    shape: tuple[int, int], tile: Tile, power_of_two: bool, kind: Maker, generator: torch.Generator
) -> None:
    values = kind(*shape, generator)
    quantised = fp8.quantised(values, tile, power_of_two)
    scales = spread(quantised.scales, tile, values.shape).double()
    error = (quantised.values().double() - values.double()).abs()
    assert (error <= torch.maximum(values.double().abs() * 2**-4, scales * 2**-10) * (1 + 2**-20)).all()
    assert quantised.scales.min() >= fp8.SMALLEST_SCALE
    assert not power_of_two or bool(torch.frexp(quantised.scales).mantissa.eq(0.5).all())
    if power_of_two:  # quantised once more, nothing changes
        again = fp8.quantised(quantised.values(), tile, power_of_two)
        assert torch.equal(again.values(), quantised.values())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_what_is_not_finite_spoils_its_own_tile_and_no_other(
    tile: Tile, power_of_two: bool, bad: float, generator: torch.Generator
) -> None:
    values = plain(300, 300, generator)
    values[140, 200] = bad
    spoilt = fp8.quantised(values, tile, power_of_two).values().isnan()
    rows = slice(128 if tile[0] > 1 else 140, 256 if tile[0] > 1 else 141)
    columns = slice(128 if tile[1] > 1 else 200, 256 if tile[1] > 1 else 201)
    expected = torch.zeros_like(spoilt)
    expected[rows, columns] = True
    assert torch.equal(spoilt, expected)


def test_a_tile_of_zeros_is_zero_and_its_scale_one() -> None:
    quantised = fp8.quantised(torch.zeros(3, 200), ROW)
    assert torch.equal(quantised.scales, torch.ones(3, 2))
    assert not quantised.values().any()


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_the_transposed_has_the_transposed_values(tile: Tile, generator: torch.Generator) -> None:
    quantised = fp8.quantised(torch.randn(2, 130, 300, generator=generator), tile)
    assert torch.equal(quantised.mT.values(), quantised.values().mT)
    assert torch.equal(quantised.mT.mT.values(torch.bfloat16), quantised.values().bfloat16())


# ── E5M6, and rows on the wire ────────────────────────────────────────────────────────────────────────────────────


def test_e5m6_is_the_nearest_number(generator: torch.Generator) -> None:
    values = torch.randn(400, generator=generator) * torch.logspace(-8, 2.65, 400)
    values[:300] = ((E5M6[1:301] + E5M6[:300]) / 2).float()  # half way between two
    rounded = e5m6.rounded(values)
    assert torch.equal(rounded.double(), nearest(values, E5M6))
    assert ((rounded - values).abs() <= torch.maximum(values.abs() * 2**-7, torch.tensor(2.0**-21))).all()


def test_halves_go_to_the_even_code() -> None:
    values = ((E4M3[1:] + E4M3[:-1]) / 2).float()[None]
    codes = fp8.quantise(values, torch.ones(1, 1), BLOCK)
    assert torch.equal(codes.double(), nearest(values, E4M3))
    assert not (codes.view(torch.uint8) % 2).any()


@pytest.mark.parametrize("columns", [1, 128, 257, 300])
def test_e5m6_takes_twelve_bits(columns: int, generator: torch.Generator) -> None:
    values = many_magnitudes(40, columns, generator)
    scales = fp8.scales_of(values, ROW, power_of_two=True)
    packed = e5m6.pack(values, scales)
    assert (packed.dtype, packed.shape) == (torch.uint8, (40, 3 * -(-columns // 2)))
    each = spread(scales, ROW, values.shape)
    back = e5m6.unpack(packed, scales, columns)
    assert torch.equal(back, e5m6.rounded(values / each) * each)
    values[3, 0] = math.nan
    scales = fp8.scales_of(values, ROW, power_of_two=True)
    spoilt = e5m6.unpack(e5m6.pack(values, scales), scales, columns).isnan()
    assert spoilt[3, : min(columns, 128)].all()
    assert spoilt.sum() == min(columns, 128)


@kinds
@pytest.mark.parametrize("width", [1, 128, 300])
def test_rows_on_the_wire_are_those_of_the_product(width: int, kind: Maker, generator: torch.Generator) -> None:
    rows = kind(50, width, generator)
    sent = to_bytes(rows)
    assert (sent.dtype, sent.shape) == (torch.uint8, (50, width + -(-width // 128)))
    there = fp8.quantised(rows, ROW, power_of_two=True)
    received = from_bytes(sent, width, torch.bfloat16)
    assert torch.equal(received.float(), there.values())
    assert torch.equal(fp8.quantised(received, ROW, power_of_two=True).values(), there.values())
    assert to_bytes(rows[:0]).shape == (0, sent.shape[1])
    rows[7, 0] = math.nan
    assert from_bytes(to_bytes(rows), width, torch.bfloat16).isnan().sum() == min(width, 128)


# ── products ──────────────────────────────────────────────────────────────────────────────────────────────────────

OPERANDS = {  # of y = x Wᵀ with x [M, K], W [N, K] and dy [M, N]: how each product's sides are quantised
    "y": (lambda x, w, dy: fp8.quantised(x, ROW), lambda x, w, dy: fp8.quantised(w, BLOCK)),
    "dx": (lambda x, w, dy: fp8.quantised(dy, ROW), lambda x, w, dy: fp8.quantised(w, BLOCK).mT),
    "dw": (lambda x, w, dy: fp8.quantised(dy, COLUMN).mT, lambda x, w, dy: fp8.quantised(x, COLUMN).mT),
}


def bound(a: Tensor, b: Tensor, bits: int | None = None) -> Tensor:
    """Of `fp8.matmul`, for the values of both sides in FP64."""
    k = a.shape[-1]
    share = (min(k, 128) + -(-k // 128) + 4) * U + (33 * 2.0 ** (3 - bits) if bits else 0)
    return share * (a.abs() @ b.abs().T) + k * 2.0**-125


def hard(kind: Maker, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Of `kind`, but small enough that products of two stay below FP32's largest number."""
    return kind(rows, columns, generator).clamp(-1e15, 1e15)


@kinds
@pytest.mark.parametrize("sizes", [(256, 128, 512), (70, 130, 300), (1, 5, 7)], ids=str)
@pytest.mark.parametrize("product", OPERANDS)
def test_products_equal_exact_sums(
    product: str, sizes: tuple[int, int, int], kind: Maker, generator: torch.Generator
) -> None:
    m, n, k = sizes
    x, w, dy = (hard(kind, *shape, generator) for shape in ((m, k), (n, k), (m, n)))
    a, b = (side(x, w, dy) for side in OPERANDS[product])
    exact = a.values(torch.float64), b.values(torch.float64)  # values are exact in FP32 but for one rounding
    assert ((fp8.matmul(a, b).double() - exact[0] @ exact[1].T).abs() <= bound(*exact)).all()
    ideal = {"y": x.double() @ w.double().T, "dx": dy.double() @ w.double(), "dw": dy.double().T @ x.double()}[product]
    # To the values themselves: the product of two that are each off by their own bound.
    sides = [
        (values.double(), torch.maximum(values.double().abs() * 2**-4, spread(q.scales, q.tile, values.shape) * 2**-10))
        for values, q in zip({"y": (x, w), "dx": (dy, w.T), "dw": (dy.T, x.T)}[product], (a, b), strict=True)
    ]
    (p, dp), (q, dq) = ((values, off * (1 + 2**-20)) for values, off in sides)
    off = p.abs() @ dq.T + dp @ q.abs().T + dp @ dq.T + bound(p.abs() + dp, q.abs() + dq)
    assert ((fp8.matmul(a, b).double() - ideal).abs() <= off).all()


def added_by_hand(a: list[float], b: list[float], bits: int) -> Fraction:
    """What Hopper's tensor core makes of Σ ab, in whole numbers."""
    total = Fraction(0)
    for start in range(0, len(a), 32):
        terms = [Fraction(x) * Fraction(y) for x, y in zip(a[start : start + 32], b[start : start + 32], strict=True)]
        terms.append(total)
        largest = max(map(abs, terms))
        if not largest:
            continue
        exponent = math.floor(math.log2(largest))  # exact: these have few digits
        unit = Fraction(2) ** (exponent + 1 - bits)
        total = sum(((-1 if t < 0 else 1) * (abs(t) // unit) * unit for t in terms), Fraction(0))
    return total


@pytest.mark.parametrize("bits", [8, 14])
def test_the_tensor_cores_sums_equal_those_by_hand(bits: int, generator: torch.Generator) -> None:
    a, b = (fp8.quantised(torch.randn(3, 200, generator=generator), ROW).codes for _ in range(2))
    ours = fp8.accumulate(a, b, bits)
    for m, row in enumerate(a.float().tolist()):
        for n, column in enumerate(b.float().tolist()):
            assert ours[m, n].item() == float(added_by_hand(row, column, bits))


@pytest.mark.parametrize("sizes", [(40, 24, 512), (7, 130, 300)], ids=str)
@pytest.mark.parametrize("product", OPERANDS)
def test_products_with_few_bits_stay_within_their_bound(
    product: str, sizes: tuple[int, int, int], generator: torch.Generator
) -> None:
    m, n, k = sizes
    x, w, dy = (torch.randn(shape, generator=generator) for shape in ((m, k), (n, k), (m, n)))
    a, b = (side(x, w, dy) for side in OPERANDS[product])
    exact = a.values(torch.float64), b.values(torch.float64)
    error = (fp8.matmul(a, b, accumulator_bits=14).double() - exact[0] @ exact[1].T).abs()
    assert (error <= bound(*exact, 14)).all()
    assert error.max() > (fp8.matmul(a, b).double() - exact[0] @ exact[1].T).abs().max()  # the bits are missed


def test_promotion_is_what_long_sums_need(generator: torch.Generator) -> None:
    """Random values of one sign, K = 4096 as in the report: without promotion what is cut off adds up."""
    a, b = (torch.rand(16, 4096, generator=generator) for _ in range(2))
    x, w = fp8.quantised(a, ROW), fp8.quantised(b, (128, 4096))
    one = Quantised(fp8.quantise(a, scale := fp8.scales_of(a, (16, 4096)), (16, 4096)), scale, (16, 4096))
    exact = one.values(torch.float64) @ w.values(torch.float64).T
    never = fp8.accumulate(one.codes, w.codes, 14).double() * (one.scales * w.scales).double()
    never_off = ((never - exact) / exact).abs().max().item()
    w = fp8.quantised(b, BLOCK)
    exact = x.values(torch.float64) @ w.values(torch.float64).T
    promoted_off = ((fp8.matmul(x, w, accumulator_bits=14).double() - exact) / exact).abs().max().item()
    assert promoted_off < never_off / 4


# ── products of experts ───────────────────────────────────────────────────────────────────────────────────────────

COUNTS = ([0, 130, 128, 0, 41, 1], [0, 0, 0, 0, 0, 0], [300, 0, 0, 0, 0, 0])


@kinds
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_grouped_products_equal_one_expert_after_the_other(
    counts: list[int], kind: Maker, generator: torch.Generator
) -> None:
    p, n, k, sizes = sum(counts), 72, 150, torch.tensor(counts)
    x, dy = (hard(kind, max(p, 3), width, generator)[:p] for width in (k, n))
    w = torch.stack([hard(kind, n, k, generator) for _ in counts])
    rows, grads, weight = fp8.quantised(x, ROW), fp8.quantised(dy, ROW), fp8.quantised(w, BLOCK)
    y, dx = fp8.grouped_matmul(rows, weight, sizes), fp8.grouped_matmul(grads, weight.mT, sizes)
    dw = fp8.grouped_wgrad(fp8.quantised_by_expert(dy, sizes), fp8.quantised_by_expert(x, sizes), sizes)
    assert (y.shape, dx.shape, dw.shape) == ((p, n), (p, k), (len(counts), n, k))
    start = 0
    for e, size in enumerate(counts):
        mine, wide = slice(start, start + size), weight.values(torch.float64)[e]
        for ours, a, b in (
            (y[mine], rows.values(torch.float64)[mine], wide),
            (dx[mine], grads.values(torch.float64)[mine], wide.T),
            (
                dw[e],
                fp8.quantised(dy[mine], COLUMN).values(torch.float64).T,
                fp8.quantised(x[mine], COLUMN).values(torch.float64).T,
            ),
        ):
            assert ((ours.double() - a @ b.T).abs() <= bound(a, b)).all()
        start += size


def test_tiles_of_experts_end_with_them(generator: torch.Generator) -> None:
    counts = torch.tensor([3, 0, 200])
    quantised = fp8.quantised_by_expert(plain(203, 10, generator), counts)
    assert quantised.scales.shape == (1 + 0 + 2, 10)
    assert [(len(part.codes), len(part.scales)) for part in of_experts(quantised, counts)] == [(3, 1), (0, 0), (200, 2)]


# ── layers ────────────────────────────────────────────────────────────────────────────────────────────────────────


def through_fp8(values: Tensor, tile: Tile, power_of_two: bool = False) -> Tensor:
    """What FP8 leaves of rows [R, C], in FP64, one tile after the other: a twin that shares no code with `ops.fp8`."""
    out, (r, c) = torch.zeros(values.shape, dtype=torch.float64), tile
    for i in range(0, values.shape[0], r):
        for j in range(0, values.shape[1], c):
            part = values[i : i + r, j : j + c].float()
            scale = part.abs().max() / 448 if part.any() else torch.tensor(1.0)
            if power_of_two:
                scale = 2.0 ** torch.log2(scale).ceil()
            out[i : i + r, j : j + c] = nearest((part / scale).clamp(-448, 448), E4M3) * scale.double()
    return out


def silu_product(gate_up: Tensor) -> Tensor:
    """In FP32, and then in the precision of what it is given."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def layer_twin(kind: str, x: Tensor, w: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dW of a layer on rows x [M, …], by the report's list and in FP64."""
    wide, attention = through_fp8(w, BLOCK), kind == "after attention"
    if kind == "after swiglu":
        read = silu_product(x)  # in the activations' precision, as the layer does
        kept = through_fp8(x, ROW).to(x.dtype).requires_grad_()
        hidden = silu_product(kept)
        y = through_fp8(read, ROW) @ wide.T
        d_hidden = (through_fp8(dy, ROW) @ wide).to(x.dtype)
        (dx,) = torch.autograd.grad(hidden, kept, d_hidden)
        return y, dx, through_fp8(dy, COLUMN).T @ through_fp8(hidden.detach(), COLUMN)
    y = through_fp8(x, ROW, attention) @ wide.T
    kept = through_fp8(x, ROW)
    if attention:
        scales = spread(fp8.scales_of(x, ROW, power_of_two=True), ROW, x.shape).double()
        kept = nearest(x.double() / scales, E5M6) * scales
    dw = through_fp8(dy, COLUMN).T @ through_fp8(kept, COLUMN, attention)
    return y, through_fp8(dy, ROW) @ wide, dw


@pytest.mark.parametrize("kind", ["linear", "after swiglu", "after attention"])
@pytest.mark.parametrize("sizes", [(2, 70, 136, 200), (1, 1, 16, 24)], ids=str)
def test_a_layer_equals_its_twin(kind: str, sizes: tuple[int, ...], generator: torch.Generator) -> None:
    b, t, n, k = sizes
    width = 2 * k if kind == "after swiglu" else k
    x = torch.randn(b, t, width, generator=generator).bfloat16().requires_grad_()
    layer = Linear(k, n)
    layer.weight.data.normal_(generator=generator)
    layer.precision = AfterAttention() if kind == "after attention" else Fp8()
    y = layer(x, after_swiglu=kind == "after swiglu")
    dy = torch.randn(b, t, n, generator=generator).bfloat16()
    y.backward(dy)
    twin = layer_twin(kind, x.detach().flatten(0, 1), layer.weight.detach(), dy.flatten(0, 1))
    assert (y.dtype, x.grad.dtype, layer.weight.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    for ours, theirs in zip((y.flatten(0, 1), x.grad.flatten(0, 1), layer.weight.grad), twin, strict=True):
        size = theirs.double().abs().max()
        # BF16 keeps eight digits; where one of the two rounds a value the other way, all that follows moves a little.
        assert ((ours.double() - theirs.double()).abs() <= 2**-8 * theirs.double().abs() + 2**-9 * size).all()
        assert (ours.double() - theirs.double()).square().mean().sqrt() <= 2**-9 * size


@pytest.mark.parametrize("counts", [[0, 150, 3, 47], [200, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("f", [128, 72])
def test_experts_equal_layers_one_after_the_other(f: int, counts: list[int], generator: torch.Generator) -> None:
    """Gate and up apart, each expert alone: the grouped layer joins them where it may."""
    d, sizes = 160, torch.tensor(counts)
    gate_up = torch.randn(4, 2 * f, d, generator=generator).requires_grad_()
    down = torch.randn(4, d, f, generator=generator).requires_grad_()
    rows = torch.randn(200, d, generator=generator).bfloat16().requires_grad_()
    dy = torch.randn(200, d, generator=generator).bfloat16()
    y = Fp8().experts(rows, gate_up, down, sizes)
    y.backward(dy)
    start = 0
    for e, count in enumerate(counts):
        mine = slice(start, start + count)
        start += count
        if not count:
            assert not gate_up.grad[e].any()
            assert not down.grad[e].any()
            continue
        x, g = rows.detach()[mine], dy[mine]
        w = [through_fp8(part, BLOCK) for part in gate_up.detach()[e].split(f)] + [through_fp8(down.detach()[e], BLOCK)]
        read = through_fp8(x, ROW, True)
        inner = torch.cat([read @ w[0].T, read @ w[1].T], dim=-1).bfloat16()
        kept = through_fp8(inner, ROW).bfloat16().requires_grad_()
        hidden = silu_product(kept)
        (d_inner,) = torch.autograd.grad(hidden, kept, (through_fp8(g, ROW, True) @ w[2]).bfloat16())
        halves = d_inner.chunk(2, dim=-1)
        twin = {
            "y": (y[mine], through_fp8(silu_product(inner), ROW) @ w[2].T),
            "dx": (rows.grad[mine], sum(through_fp8(half, ROW) @ wide for half, wide in zip(halves, w, strict=False))),
            "down": (down.grad[e], through_fp8(g, COLUMN, True).T @ through_fp8(hidden.detach(), COLUMN)),
            "gate_up": (
                gate_up.grad[e],
                torch.cat([through_fp8(half, COLUMN).T @ through_fp8(read, COLUMN, True) for half in halves]),
            ),
        }
        for ours, theirs in twin.values():
            size = theirs.double().abs().max()
            assert (ours.double() - theirs.double()).square().mean().sqrt() <= 2**-9 * size


def kept_for_backward(compute: Callable[[], Tensor]) -> dict[int, Tensor]:
    """The tensors that a forward pass keeps, by where they lie."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = compute()
    del output
    return kept


def test_codes_are_kept_and_not_the_input(generator: torch.Generator) -> None:
    """Of x [M, D]: M · D bytes and the scales, once, though gate and up both read it; of their outputs the same."""
    m, d, f = 256, 384, 128
    ffn, x = SwiGLU(d, f), torch.randn(1, m, d, generator=generator).bfloat16().requires_grad_()
    nn.init.normal_(ffn.gate_proj.weight), nn.init.normal_(ffn.up_proj.weight), nn.init.normal_(ffn.down_proj.weight)
    for module in ffn.children():
        module.precision = plain_ = Plain()
    wide = sum(tensor.untyped_storage().nbytes() for tensor in kept_for_backward(lambda: ffn(x)).values())
    precision = Fp8()
    for module in ffn.children():
        module.precision = precision
    kept = kept_for_backward(lambda: ffn(x))
    narrow = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert isinstance(plain_, Plain)
    weights = 3 * d * f + 4 * 3 * d * f // 128**2
    assert narrow == m * d + 4 * m * d // 128 + m * 2 * f + 4 * m * 2 * f // 128 + weights
    assert wide >= 2 * m * (d + 2 * f + f)  # BF16, and SwiGLU's output too


def test_the_output_of_attention_is_kept_in_twelve_bits(generator: torch.Generator) -> None:
    layer, x = Linear(256, 128), torch.randn(1, 64, 256, generator=generator).bfloat16().requires_grad_()
    nn.init.normal_(layer.weight)
    layer.precision = AfterAttention()
    kept = sum(tensor.untyped_storage().nbytes() for tensor in kept_for_backward(lambda: layer(x)).values())
    assert kept == 64 * 256 * 3 // 2 + 4 * 64 * 2 + 256 * 128 + 4 * 2


def tiny(dtype: str = "fp8", *overrides: str) -> Transformer:
    config = read_recipe(str(RECIPE), overrides)
    model = Transformer(config.model, torch.bfloat16)
    model.initialise(0.05, torch.Generator().manual_seed(0))
    if dtype == "fp8":
        in_fp8(model)
    return model


def test_exactly_the_reports_list_is_in_fp8() -> None:
    """All that a release holds in FP8, and nothing else: no embedding, head, gate, norm or `eh_proj`."""
    model = tiny()
    ours = {
        f"{name}.{weight}"
        for name, module in model.named_modules()
        if isinstance(module, (Linear, Experts)) and isinstance(module.precision, Fp8)
        for weight, _ in module.named_parameters(recurse=False)
    }
    released = {place.name for name, place in layout(model.config).items() if QUANTISED.fullmatch(name)}
    assert ours == released
    after = [name for name, m in model.named_modules() if isinstance(getattr(m, "precision", None), AfterAttention)]
    assert after == [name for name in dict(model.named_modules()) if name.endswith("self_attn.o_proj")]


def test_weights_are_quantised_once_a_step_and_anew_in_the_next() -> None:
    model = tiny()
    model.train()
    ids = torch.randint(0, 320, (2, 17), generator=torch.Generator().manual_seed(1))
    blocks: list[Tensor] = []

    def watched(quantised: Callable[..., Quantised]) -> Callable[..., Quantised]:
        def watch(values: Tensor, tile: Tile, power_of_two: bool = False) -> Quantised:
            if tile == BLOCK:
                blocks.append(values)
            return quantised(values, tile, power_of_two)

        return watch

    matrices = sum(len(list(m.parameters())) for m in model.modules() if isinstance(getattr(m, "precision", 0), Fp8))
    with instead("quantised", watched):
        for _ in range(2):
            with weights_quantised_once(model):
                first = [loss_sums(model, ids[:, :-1], ids[:, 1:])[0].item() for _ in range(3)]
            assert len(set(first)) == 1
        assert len(blocks) == 2 * matrices
        blocks.clear()
        with torch.no_grad():  # outside, every use sees the weights as they are
            before = loss_sums(model, ids[:, :-1], ids[:, 1:])[0].item()
            model.layers["0"].mlp.down_proj.weight.mul_(3)
            assert loss_sums(model, ids[:, :-1], ids[:, 1:])[0].item() != before
        assert len(blocks) == 2 * matrices


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails_the_twin(fault: str, generator: torch.Generator) -> None:
    with instead(*FAULTS[fault]), pytest.raises(AssertionError):
        test_a_layer_equals_its_twin("linear", (2, 70, 136, 200), generator)


# ── training ──────────────────────────────────────────────────────────────────────────────────────────────────────

WIDE = (  # more than one tile each way, and none that comes out even
    "model.hidden_size=160",
    "model.intermediate_size=200",
    "model.moe_intermediate_size=72",
    "model.num_hidden_layers=2",
    "model.num_nextn_predict_layers=0",
    "model.n_routed_experts=4",
    "model.n_group=2",
    "schedule.learning_rate=[{until=1.0,value=1e-3}]",
    "optimizer.name=adamw",
    "train.micro_batch=8",
    "train.checkpoint_every=1000",
    "train.eval_every=1000",
    "train.device=cpu",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


# Thirty steps bring the toy's loss from 5.9 to 1.4, so the slightest lag shows: four seeds on one CPU lie 0.1 to 0.4%
# from BF16, one seed on three CPUs 0.2 to 0.4%. Faults lie 45% and more away. The report's 0.25% is asked of a longer
# run, beside what chance alone does there: `test_fp8_lies_as_near_to_bf16_as_the_report_says`.
TOY = 0.01


def trained(run: Path, data: Path, steps: int, *overrides: str) -> list[float]:
    """The losses of a run of so many steps."""
    pretrain(read_recipe(str(RECIPE), (*WIDE, f"train.tokens={256 * steps}", *overrides)), data, run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def in_bf16(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return trained(tmp_path_factory.mktemp("bf16") / "run", data, 30, "train.dtype=bf16")


def test_thirty_steps_of_a_toy_follow_bf16(data: Path, in_bf16: list[float], tmp_path: Path) -> None:
    ours = trained(tmp_path / "run", data, 30, "train.dtype=fp8")
    assert ours[-1] < ours[0] - 0.5
    assert ours[0] == pytest.approx(in_bf16[0], rel=0.0025)  # the same weights: nothing has added up yet
    assert gap(ours, in_bf16, 10) < TOY


@pytest.mark.parametrize("fault", FAULTS)
def test_thirty_steps_with_a_planted_fault_do_not(fault: str, data: Path, in_bf16: list[float], tmp_path: Path) -> None:
    with instead(*FAULTS[fault]):
        faulty = trained(tmp_path / "run", data, 30, "train.dtype=fp8")
    assert len(faulty) < 30 or gap(faulty, in_bf16, 10) > 10 * TOY  # some never take a finite step


def test_a_stopped_run_goes_on_bit_identically(data: Path, tmp_path: Path) -> None:
    asked = ("train.dtype=fp8", "optimizer.moments=bf16", "train.micro_batch=4")
    whole = trained(tmp_path / "whole", data, 8, *asked)
    trained(tmp_path / "stopped", data, 8, *asked, "train.max_steps=3")
    assert trained(tmp_path / "stopped", data, 8, *asked) == whole
    newest = [checkpoint.newest(tmp_path / name, pytest.fail) for name in ("whole", "stopped")]
    assert newest[0] is not None
    assert newest[1] is not None
    for file in newest[0].path.rglob("*.safetensors"):
        theirs = load_file(newest[1].path / file.relative_to(newest[0].path))
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in load_file(file).items())


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stories(tmp_path_factory.mktemp("told") / "data")


@pytest.mark.slow
def test_fp8_lies_as_near_to_bf16_as_the_report_says(told: Path) -> None:
    """Within the report's 0.25%: means of runs that begin an ulp apart, less what chance alone does to those."""
    in_bf16, in_fp8 = ([losses(variant, told) for variant in kind] for kind in (BF16, FP8[:3]))
    assert all(run[-1] < run[0] / 2 for run in (*in_bf16, *in_fp8))
    assert gap(middle(in_fp8), middle(in_bf16)) <= 0.0025 + math.hypot(error(in_bf16), error(in_fp8))


@pytest.mark.slow
def test_each_planted_fault_exceeds_it_in_sixty_steps(told: Path) -> None:
    sound = losses("bf16", told, stop=60)
    assert not [fault for fault in FAULTS if gap(losses(fault, told, stop=60), sound) <= 0.0025]


@pytest.fixture(scope="module")
def taught(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("taught") / "run"
    trained(run, data, 60, "train.dtype=fp8", "model.num_nextn_predict_layers=1")
    return run


def test_an_export_has_the_codes_of_training(taught: Path, tmp_path: Path) -> None:
    """What the next step's forward pass would multiply by, matrix by matrix."""
    export_release(taught, tmp_path / "out", "fp8")
    released = read(tmp_path / "out")
    config, newest = checkpoint.read_run(taught), checkpoint.newest(taught, pytest.fail)
    assert newest is not None
    model = Transformer(config.model, torch.bfloat16)
    checkpoint.load(newest, model, build_optimizers(model, config.optimizer))
    in_fp8(model)
    used: dict[int, Quantised] = {}

    def watched(quantised: Callable[..., Quantised]) -> Callable[..., Quantised]:
        def watch(values: Tensor, tile: Tile, power_of_two: bool = False) -> Quantised:
            result = quantised(values, tile, power_of_two)
            if tile == BLOCK:
                used[values.data_ptr()] = result
            return result

        return watch

    with instead("quantised", watched):
        loss_sums(model, torch.zeros(1, 16, dtype=torch.int64), torch.zeros(1, 16, dtype=torch.int64))
    parameters, compared = dict(model.named_parameters()), 0
    for name, place in layout(config.model).items():
        if QUANTISED.fullmatch(name):
            quantised = used[parameters[place.name].data_ptr()]
            codes = quantised.codes.reshape(place.parts, *place.shape)[place.part]
            scales = quantised.scales.reshape(place.parts, *fp8.scale_shape(*place.shape))[place.part]
            assert torch.equal(codes.view(torch.uint8), released[name].view(torch.uint8))
            assert torch.equal(scales, released[name + "_scale_inv"])
            master = parameters[place.name].detach().reshape(place.parts, *place.shape)[place.part]
            assert torch.equal(codes.view(torch.uint8), blocks_one_by_one(master, False)[0].view(torch.uint8))
            compared += 1
    assert compared == sum(name + "_scale_inv" in released for name in released) > 40


def test_an_export_in_fp8_agrees_with_that_in_bf16(taught: Path, tmp_path: Path) -> None:
    """The same first choice for at least 95% of the tokens of 20 prompts, each token given those before it."""
    models = []
    for dtype in ("bf16", "fp8"):
        export_release(taught, tmp_path / dtype, dtype)
        import_release(tmp_path / dtype, tmp_path / f"run-{dtype}")
        models.append(load_model(tmp_path / f"run-{dtype}", "cpu", torch.bfloat16).eval())
    tokenizer, dice = Tokenizer.load(taught / "tokenizer"), Random(7)
    agreed = total = 0
    for _ in range(20):
        prompt = torch.tensor([tokenizer.bos_id, *tokenizer.encode(story(dice))[:47]])[None]
        positions = torch.arange(prompt.shape[1])[None]
        with torch.no_grad():
            first, second = (model.lm_head(model(prompt, positions)).argmax(dim=-1) for model in models)
        agreed, total = agreed + int((first == second).sum()), total + prompt.numel()
    assert total > 20 * 20
    assert agreed >= 0.95 * total


# ── moments in BF16 ───────────────────────────────────────────────────────────────────────────────────────────────


def test_moments_in_bf16_take_half_the_bytes_and_hardly_change_a_step(generator: torch.Generator) -> None:
    """The first step, before anything was rounded, is PyTorch's; after 200 the weights still lie close to its."""
    start = torch.randn(64, 32, generator=generator)
    theirs, ours = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    settings = {"betas": (0.9, 0.95), "eps": 1e-8}
    wide = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1, **settings)
    narrow = NarrowAdamW([{"params": [ours], "weight_decay": 0.1}], moments=torch.bfloat16, **settings)
    set_learning_rate([narrow], 0.01)
    for step in range(200):
        gradient = torch.randn(64, 32, generator=generator) * 1e-3
        theirs.grad, ours.grad = gradient.clone(), gradient
        wide.step()
        narrow.step()
        if step == 0:
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    moments = narrow.state[ours]
    assert (moments["exp_avg"].dtype, moments["exp_avg_sq"].dtype, ours.dtype) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    )
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 2**-7 * moved  # a moment is off by 2⁻⁹ and forgets: of them a step is made


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_moment_rests_in_bf16_where_it_is_asked(name: str) -> None:
    config = read_recipe(str(RECIPE), (f"optimizer.name={name}", "optimizer.moments=bf16"))
    model = tiny()
    optimizers = build_optimizers(model, config.optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    moments = [t for o in optimizers for state in o.state.values() for t in state.values() if isinstance(t, Tensor)]
    assert len(moments) >= len(list(model.parameters()))
    assert {moment.dtype for moment in moments} == {torch.bfloat16}
