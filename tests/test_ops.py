"""The kernels behind their seam: each against its reference, a slow twin, or PyTorch's own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from leanseek.ops import loss as loss_module
from leanseek.ops.attention import attention, attention_reference, largest_logits
from leanseek.ops.elementwise import (
    inverse_rms_reference,
    rms_norm,
    rms_norm_and_scale,
    rms_norm_beside,
    rms_norm_beside_reference,
    rms_norm_reference,
    swiglu,
    swiglu_reference,
)
from leanseek.ops.experts import (
    BLOCK,
    grouped_linear,
    grouped_linear_reference,
    lay_out,
    permute,
    unpermute,
)
from leanseek.ops.fp8 import FP8, dequantise, quantise, scale_shape, scales_of
from leanseek.ops.loss import IGNORE, linear_cross_entropy, token_losses
from tests.releases import plain, quantised


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


# ── attention ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("wide", "value"), [(24, 16), (16, 16), (12, 20)])
def test_attention_equals_its_reference(
    wide: int, value: int, masked: bool, dtype: torch.dtype, generator: torch.Generator
) -> None:
    queries, keys = (9, 17) if masked else (33, 33)
    q, k, v = (
        torch.randn(2, 3, length, width, dtype=dtype, generator=generator)
        for length, width in ((queries, wide), (keys, wide), (keys, value))
    )
    mask = None
    if masked:
        mask = torch.rand(2, 1, queries, keys, generator=generator) < 0.5
        mask[..., 0] = True
    cotangent = torch.randn(2, 3, queries, value, dtype=dtype, generator=generator)
    results = []
    functions: list[Callable[..., Tensor]] = [attention, attention_reference]
    for function in functions:
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = function(*inputs, 0.7, mask)
        results.append((out, *torch.autograd.grad(out, inputs, cotangent)))
    for ours, reference in zip(*results, strict=True):
        assert distance(ours, reference) < (1e-12 if dtype == torch.float64 else 1e-5)


def test_attention_reference_is_softmax_by_hand() -> None:
    q, k = torch.tensor([[[[1.0], [2.0]]]]), torch.tensor([[[[0.5], [-1.0]]]])
    v = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    share = torch.exp(torch.tensor([2 * 0.5 * 3, 2 * -1.0 * 3]))
    share = share / share.sum()
    out = attention_reference(q, k, v, scale=3.0)
    assert torch.allclose(out[0, 0], torch.stack((torch.tensor([1.0, 0.0]), share)))


def test_largest_logits_respect_the_mask(generator: torch.Generator) -> None:
    q, k = (torch.randn(2, 3, 6, 4, generator=generator) for _ in range(2))
    expected = [
        max((q[b, h, t] @ k[b, h, s]).item() * 0.5 for b in range(2) for t in range(6) for s in range(t + 1))
        for h in range(3)
    ]
    assert largest_logits(q, k, 0.5).tolist() == pytest.approx(expected, rel=1e-6)
    only_self = torch.eye(6, dtype=torch.bool)[None, None]
    diagonal = (q * k).sum(dim=-1).amax(dim=(0, 2)) * 0.5
    assert torch.allclose(largest_logits(q, k, 0.5, only_self), diagonal)


# ── experts ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("width", "out"), [(16, 24), (15, 24), (16, 9), (5, 3)])  # BF16 is aligned at 8, FP32 at 4
@pytest.mark.parametrize("counts", [[3, 0, 5, 0], [0, 0, 0, 7], [2, 2, 2, 2], [0, 0, 0, 0]], ids=str)
def test_grouped_linear_equals_its_reference(
    counts: list[int], width: int, out: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    rows = sum(counts)
    x = torch.randn(rows, width, generator=generator).to(dtype)
    weight = torch.randn(4, out, width, generator=generator).to(dtype)
    cotangent = torch.randn(rows, out, generator=generator).to(dtype)
    results = []
    functions: list[Callable[..., Tensor]] = [grouped_linear, grouped_linear_reference]
    for function in functions:
        inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        y = function(*inputs, torch.tensor(counts))
        assert (y.shape, y.dtype) == ((rows, out), dtype)
        results.append((y, *torch.autograd.grad(y, inputs, cotangent)))
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float64: 1e-14}[dtype]
    for ours, reference in zip(*results, strict=True):
        if ours.numel():
            assert (ours - reference).abs().max() <= tolerance * max(1.0, reference.abs().max().item())
    expert = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    by_hand = torch.einsum("mfd,md->mf", weight[expert].double(), x.double())
    for y, *_ in results:
        assert torch.allclose(y.double(), by_hand, rtol=0, atol=8 * tolerance)


def test_lay_out_keeps_the_order_of_tokens() -> None:
    layout = lay_out(torch.tensor([[2, 0], [0, 3], [3, 2]]), 5)
    assert layout.counts.tolist() == [2, 0, 2, 2, 0]
    assert layout.source.tolist() == [0, 1, 0, 2, 1, 2]
    assert layout.place.tolist() == [[2, 0], [1, 4], [5, 3]]


@pytest.mark.parametrize("skew", [0.1, 3.0], ids=["even loads", "most tokens to few"])
def test_padding_lies_between_the_experts_and_belongs_to_nobody(skew: float, generator: torch.Generator) -> None:
    chances = (skew * torch.randn(8, generator=generator)).softmax(dim=0)
    experts = torch.multinomial(chances.expand(600, 8), 2, generator=generator)
    tight, padded = lay_out(experts, 8), lay_out(experts, 8, padded=True)
    even = len(set(padded.counts.tolist())) == 1
    assert even == (skew < 1)
    assert even or not (padded.counts % BLOCK).any()
    assert bool((padded.counts >= tight.counts).all())
    assert padded.source.shape == (int(padded.counts.sum()),)
    assert torch.equal(padded.source[padded.place], torch.arange(600)[:, None].expand(-1, 2))
    expert_of_row = torch.repeat_interleave(torch.arange(8), padded.counts)
    assert torch.equal(expert_of_row[padded.place], experts)
    assert padded.place.unique().numel() == experts.numel()


def slow_round_trip(x: Tensor, experts: list[list[int]], weights: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Rows expert by expert and the weighted sums after each expert has multiplied its rows by its own scale."""
    rows = [x[t] for e in range(len(scale)) for t, row in enumerate(experts) for chosen in row if chosen == e]
    sums: list[Any] = [sum(weights[t, j] * scale[e] * x[t] for j, e in enumerate(row)) for t, row in enumerate(experts)]
    return torch.stack(rows), torch.stack(sums)


@pytest.mark.parametrize("padded", [False, True])
def test_permute_and_unpermute_equal_a_slow_twin(padded: bool, generator: torch.Generator) -> None:
    experts = torch.stack([torch.randperm(5, generator=generator)[:3] for _ in range(7)])
    layout = lay_out(experts, 5, padded)
    x = torch.randn(7, 4, dtype=torch.float64, generator=generator).requires_grad_()
    weights = torch.rand(7, 3, dtype=torch.float64, generator=generator).requires_grad_()
    scale = torch.randn(5, dtype=torch.float64, generator=generator)
    rows = permute(x, layout)
    sums = unpermute(rows * scale.repeat_interleave(layout.counts)[:, None], layout, weights)
    slow_rows, slow_sums = slow_round_trip(x, experts.tolist(), weights, scale)
    assert torch.equal(rows[layout.place.flatten().sort().values], slow_rows)
    assert distance(sums, slow_sums) < 1e-14
    cotangent = torch.randn(7, 4, dtype=torch.float64, generator=generator)
    ours = torch.autograd.grad(sums, (x, weights), cotangent)
    slow = torch.autograd.grad(slow_sums, (x, weights), cotangent)
    assert all(distance(a, b) < 1e-14 for a, b in zip(ours, slow, strict=True))


@pytest.mark.parametrize("padded", [False, True])
def test_permute_and_unpermute_pass_gradcheck(padded: bool, generator: torch.Generator) -> None:
    experts = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(5)])
    layout = lay_out(experts, 4, padded)
    x = torch.randn(5, 3, dtype=torch.float64, generator=generator).requires_grad_()
    rows = torch.randn(len(layout.source), 3, dtype=torch.float64, generator=generator).requires_grad_()
    weights = torch.rand(5, 2, dtype=torch.float64, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: permute(x, layout)[layout.place], (x,))
    assert torch.autograd.gradcheck(lambda rows, weights: unpermute(rows, layout, weights), (rows, weights))


# ── elementwise ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_norm_and_swiglu_equal_their_references(dtype: torch.dtype, generator: torch.Generator) -> None:
    x = torch.randn(2, 5, 12, generator=generator).to(dtype)
    weight = torch.randn(12, generator=generator, dtype=torch.promote_types(dtype, torch.float32))
    pairs: list[Any] = [
        (rms_norm, rms_norm_reference, (x, weight), (1e-3,), x.shape),
        (rms_norm_beside, rms_norm_beside_reference, (x, weight, x.flip(0), weight[:1]), (1e-3,), x.shape),
        (swiglu, swiglu_reference, (x,), (), (2, 5, 6)),
    ]
    tolerance = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2**-6}[dtype]
    for ours, reference, inputs, further, shape in pairs:
        cotangent = torch.randn(shape, generator=generator).to(dtype)
        results = []
        for function in (ours, reference):
            leaves = [tensor.clone().requires_grad_() for tensor in inputs]
            y = function(*leaves, *further)
            assert (y.shape, y.dtype) == (shape, dtype)
            results.append((y, *torch.autograd.grad(y, leaves, cotangent)))
        assert all(distance(a.double(), b.double()) < tolerance for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_what_a_norm_multiplies_by_is_precise_in_any_precision(dtype: torch.dtype, generator: torch.Generator) -> None:
    x, weight = torch.randn(2, 5, 12, generator=generator).to(dtype), torch.ones(12)
    normed, scale = rms_norm_and_scale(x, weight, 1e-3)
    assert scale.dtype == torch.promote_types(dtype, torch.float32)
    assert scale.shape == (2, 5, 1)
    assert distance(scale, inverse_rms_reference(x, 1e-3)) < 1e-6
    assert distance(normed.double(), rms_norm_reference(x, weight, 1e-3).double()) < 2**-6
    assert distance((x * scale).double(), normed.double()) < 2**-6


def test_norm_and_swiglu_pass_gradcheck(generator: torch.Generator) -> None:
    x = torch.randn(3, 2, 6, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(6, dtype=torch.float64, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-2), (x, weight))
    beside = weight.detach().expand_as(x).clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *given: rms_norm_beside(*given, 1e-2), (x, weight, beside, weight[2:3].detach().clone().requires_grad_())
    )
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm_and_scale(x, weight, 1e-2), (x, weight))
    assert torch.autograd.gradcheck(swiglu, (x,))


# ── loss ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(params=[1 << 24, 40, 1], ids=["one piece", "pieces of 3", "row by row"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(loss_module, "_LOGITS_AT_ONCE", request.param)
    return request.param


def loss_inputs(dtype: torch.dtype, generator: torch.Generator) -> Any:
    """hidden [10, 6], weight [13, 6], targets [10], of which three are IGNORE."""
    hidden = torch.randn(10, 6, generator=generator).to(dtype)
    weight = torch.randn(13, 6, generator=generator).to(dtype)
    targets = torch.randint(13, (10,), generator=generator)
    targets[[0, 4, 9]] = IGNORE
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_linear_cross_entropy_equals_pytorchs(pieces: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    hidden, weight, targets = loss_inputs(dtype, generator)
    ours = linear_cross_entropy(hidden, weight, targets)
    theirs = F.cross_entropy(hidden @ weight.T, targets, reduction="sum", ignore_index=IGNORE)
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    assert ours.dtype == dtype
    assert distance(ours, theirs) < tolerance
    ours_grad = torch.autograd.grad(0.37 * ours, (hidden, weight))
    theirs_grad = torch.autograd.grad(0.37 * theirs, (hidden, weight))
    assert all(distance(a, b) < 2 * tolerance for a, b in zip(ours_grad, theirs_grad, strict=True))
    assert not ours_grad[0][targets == IGNORE].any()


def test_linear_cross_entropy_passes_gradcheck(pieces: int, generator: torch.Generator) -> None:
    hidden, weight, targets = loss_inputs(torch.float64, generator)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets), (hidden, weight))


@pytest.mark.parametrize("needed", [(True, False), (False, True), (False, False)])
def test_linear_cross_entropy_gives_only_the_gradients_asked_for(
    needed: tuple[bool, bool], generator: torch.Generator
) -> None:
    hidden, weight, targets = loss_inputs(torch.float64, generator)
    both = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), (hidden, weight))
    hidden, weight = (x.detach().requires_grad_(need) for x, need in zip((hidden, weight), needed, strict=True))
    loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.requires_grad == any(needed)
    if any(needed):
        loss.backward()
    for x, need, expected in zip((hidden, weight), needed, both, strict=True):
        assert torch.equal(x.grad, expected) if need else x.grad is None


def test_linear_cross_entropy_of_bf16_sums_in_fp32(pieces: int, generator: torch.Generator) -> None:
    hidden, weight, targets = loss_inputs(torch.float32, generator)
    narrow = hidden.detach().bfloat16().requires_grad_()
    ours = linear_cross_entropy(narrow, weight, targets)
    wide: Any
    rounded: Any
    wide, rounded = narrow.detach().float().requires_grad_(), weight.detach().bfloat16().float().requires_grad_()
    theirs = F.cross_entropy(wide @ rounded.T, targets, reduction="sum")
    assert ours.dtype == torch.float32
    assert distance(ours, theirs) < 2**-7
    ours.backward()
    theirs.backward()
    assert (narrow.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)
    assert distance(narrow.grad.float(), wide.grad) < 2**-6
    assert distance(weight.grad, rounded.grad) < 2**-6


def test_nothing_to_predict_is_zero(generator: torch.Generator) -> None:
    hidden, weight, targets = loss_inputs(torch.float32, generator)
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORE))
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_token_losses_equal_pytorchs(pieces: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    hidden, weight, targets = loss_inputs(dtype, generator)
    ours = token_losses(hidden, weight, targets)
    theirs = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    assert distance(ours, theirs) < (1e-14 if dtype == torch.float64 else 1e-6)
    assert not ours[targets == IGNORE].any()
    assert not ours.requires_grad


# ── FP8 ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", [(576, 640), (128, 128), (130, 5), (1, 300)])
def test_fp8_blocks_equal_one_block_after_the_other(
    shape: tuple[int, int], power_of_two: bool, generator: torch.Generator
) -> None:
    values = torch.randn(shape, generator=generator) * torch.logspace(-3, 3, shape[1])
    codes, scales = quantised(values, power_of_two)
    ours = scales_of(values, power_of_two=power_of_two)
    assert ours.shape == scale_shape(*shape) == scales.shape
    assert torch.equal(ours, scales)
    assert torch.equal(quantise(values, ours).view(torch.uint8), codes.view(torch.uint8))
    expected = plain({"x.weight": codes, "x.weight_scale_inv": scales})["x.weight"]
    assert torch.equal(dequantise(codes, scales), expected)
    assert torch.equal(dequantise(codes, scales, torch.bfloat16), expected.bfloat16())


def test_fp8_of_v3s_ragged_matrix_has_the_published_shape() -> None:
    assert scale_shape(576, 7168) == (5, 56)


def test_fp8_scales_of_powers_of_two_never_overflow(generator: torch.Generator) -> None:
    values = torch.randn(300, 300, generator=generator)
    values[0, 0] = 448.0  # the border: scale 1 and not 2
    values[200, 200] = 448.0001
    scales = scales_of(values, power_of_two=True)
    assert torch.frexp(scales).mantissa.eq(0.5).all()
    assert (scales[0, 0], scales[1, 1]) == (1.0, 2.0)
    codes = quantise(values, scales).float()
    assert codes.isfinite().all()
    assert codes.abs().max() == 448


def test_fp8_is_off_by_at_most_half_a_step(generator: torch.Generator) -> None:
    values = torch.randn(256, 256, generator=generator)
    scales = scales_of(values)
    error = (dequantise(quantise(values, scales), scales) - values).abs()
    step = torch.maximum(values.abs() / 8, scales.repeat_interleave(128, 0).repeat_interleave(128, 1) * 2**-9)
    assert (error <= step / 2 * 1.0001).all()  # three binary digits after the first; denormals below


def test_fp8_every_code_has_the_value_of_its_cast() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).view(2, 128)
    sound = codes[codes.float().isfinite()].view(2, 127)
    one = torch.ones(1, 1)
    assert torch.equal(dequantise(sound, one), sound.float())
    assert torch.equal(dequantise(sound, one).signbit(), sound.float().signbit())
    assert torch.equal(dequantise(codes, one).isnan(), codes.float().isnan())


def test_fp8_of_zeros_is_zero() -> None:
    scales = scales_of(torch.zeros(130, 130))
    assert torch.equal(dequantise(quantise(torch.zeros(130, 130), scales), scales), torch.zeros(130, 130))


def test_fp8_every_code_comes_back_through_bf16(generator: torch.Generator) -> None:
    """What an export in BF16 rests on: rounding to BF16 never leads to another code, whatever the scale."""
    codes = torch.arange(256, dtype=torch.uint8).view(FP8)
    codes = codes[codes.float().isfinite()].repeat(128, 1)
    for scale in torch.rand(50, generator=generator).tolist():
        scales = torch.full(scale_shape(*codes.shape), scale * 1e-3)
        back = quantise(dequantise(codes, scales, torch.bfloat16), scales)
        assert torch.equal(back.view(torch.uint8), codes.view(torch.uint8))


def test_fp8_stacks_have_blocks_of_their_own(generator: torch.Generator) -> None:
    matrices = torch.randn(6, 70, 140, generator=generator)
    pairs = [(quantise(m, scales_of(m)), scales_of(m)) for m in matrices]
    stacked = torch.cat([codes for codes, _ in pairs]).view(3, 140, 140), torch.stack([scales for _, scales in pairs])
    expected = torch.cat([dequantise(*pair) for pair in pairs]).view(3, 140, 140)
    assert torch.equal(dequantise(*stacked), expected)
