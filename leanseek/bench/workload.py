"""What `bench kernels` measures: V3's operations with what they cost, at its shapes on a GPU and smaller ones on a CPU.

Work counts what must be done in any case: 2·M·N·K operations of a product, each operand read and each result written
once.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import torch
from torch import Tensor

from leanseek.ops import experts
from leanseek.ops.backend import PLAIN, Kernels
from leanseek.ops.elementwise import rms_norm, swiglu
from leanseek.ops.fp8 import BLOCK, COLUMN, ROW, Tile
from leanseek.ops.heads import apply_rope
from leanseek.ops.loss import linear_cross_entropy

PAGE = 64  # tokens
ENOUGH = 0.02  # seconds that a measurement lasts at least
BY_TRITON = "grouped by Triton"
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Work:
    """A call, and how much it does, in its unit."""

    call: Callable[[], object]
    amount: float
    unit: str

    def rate(self) -> float:
        return self.amount / seconds(self.call)


def operations(count: float, call: Callable[[], object]) -> Work:
    gpu = torch.cuda.is_available()
    return Work(call, count / (1e12 if gpu else 1e9), "TFLOP/s" if gpu else "GFLOP/s")


def moving(count: float, call: Callable[[], object]) -> Work:
    return Work(call, count / 1e9, "GB/s")


@dataclass(frozen=True)
class Case:
    """Work, measured against another: a ceiling by its name, or the same work done otherwise."""

    name: str
    ours: Work
    against: str | Work
    peer: str = ""  # the name of that other work
    product: tuple[str, int, int, int] | None = None  # dense or grouped, M, N, K, where the row says what FP8 gains
    result: Callable[[], Tensor] | None = None  # what the call makes, if that is to be checked,
    twin: Callable[[], Tensor] | None = None  # and the same by the plain implementation


@dataclass(frozen=True)
class Shapes:
    tokens: int
    width: int
    expert: int  # width within
    experts: int  # an expert-parallel rank's share of them
    chosen: int  # of each token
    vocabulary: int
    latent: int
    rope: int
    texts: int  # decoded at once
    context: int
    heads: tuple[int, ...]
    products: tuple[tuple[int, int, int], ...]  # M, N, K


# V3's matrices: queries up, keys and values down, output, gate and up of an expert and its down, gate and up of a dense
# layer. 4096 rows in training, 64 in decoding.
_WEIGHTS = ((24_576, 1536), (2112, 7168), (7168, 16_384), (4096, 7168), (7168, 2048), (36_864, 7168))
LARGE = Shapes(
    4096, 7168, 2048, 32, 8, 129_280, 512, 64, 128, 4096, (128, 16),
    tuple((rows, n, k) for rows in (4096, 64) for n, k in _WEIGHTS),
)  # fmt: skip
SMALL = Shapes(1024, 512, 128, 16, 4, 8192, 64, 16, 8, 512, (16,), ((1024, 512, 512),))
TINY = Shapes(128, 256, 64, 8, 2, 1024, 32, 16, 2, 128, (4,), ((128, 256, 256),))


def ceilings(device: torch.device, quick: bool) -> dict[str, Work]:
    """What nothing on this device is faster than: a copy, and square products that stay in its fastest arithmetic."""
    gpu = device.type == "cuda"
    size = 8192 if gpu else 512 if quick else 1024
    source = torch.zeros(1 << (28 if gpu else 23), device=device)
    target = torch.empty_like(source)
    found = {"copy": moving(2 * source.nbytes, lambda: target.copy_(source))}
    for dtype, name in NAMES.items():
        x = torch.randn(size, size, device=device).to(dtype)
        found[f"matmul {name}"] = operations(2 * size**3, partial(torch.matmul, x, x))
    if gpu and torch.cuda.get_device_capability(device) >= (9, 0):
        one, codes = torch.ones((), device=device), torch.randn(size, size, device=device).to(torch.float8_e4m3fn)
        found["matmul fp8"] = operations(
            2 * size**3, lambda: torch._scaled_mm(codes, codes.T, one, one, out_dtype=torch.bfloat16)
        )
    return found


def cases(device: torch.device, kernels: Kernels, s: Shapes) -> Iterator[Case]:
    """Every operation of the seam by these kernels, checked where they are not the plain ones."""
    yield from _of_memory(device, kernels, s)
    yield from _of_fp8(device, kernels, s)
    yield from _of_experts(device, kernels, s)
    yield from _of_the_head(device, kernels, s)
    yield from _of_decoding(device, kernels, s)


def seconds(call: Callable[[], object]) -> float:
    """One call's time: after a first, the mean of as many as take long enough."""
    call()
    calls = 1
    while True:
        _wait()
        begun = time.perf_counter()
        for _ in range(calls):
            call()
        _wait()
        spent = time.perf_counter() - begun
        if spent >= ENOUGH:
            return spent / calls
        calls = math.ceil(calls * min(1.2 * ENOUGH / spent, 100))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _normal(device: torch.device, *shape: int) -> Tensor:
    """On a CPU in FP32, where BF16 only adds casts."""
    return torch.randn(shape, device=device, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16)


def _matmul_ceiling(device: torch.device) -> str:
    return "matmul fp32" if device.type == "cpu" else "matmul bf16"


def _fp8_ceiling(kernels: Kernels) -> str:
    return "matmul fp32" if kernels is PLAIN else "matmul fp8"  # the plain one multiplies the values


def _counts(s: Shapes, device: torch.device) -> Tensor:
    """As uneven as a router that balances leaves them."""
    chosen = torch.randint(s.experts, (s.tokens * s.chosen,), generator=torch.Generator().manual_seed(0))
    return torch.bincount(chosen, minlength=s.experts).to(device)


def _of_memory(device: torch.device, kernels: Kernels, s: Shapes) -> Iterator[Case]:
    x, gate_up = _normal(device, s.tokens, s.width), _normal(device, s.tokens, 2 * s.expert)
    weight = _normal(device, s.width)
    yield Case("rms_norm", moving(2 * x.nbytes, lambda: rms_norm(x, weight, 1e-6)), "copy")
    yield Case("swiglu", moving(1.5 * gate_up.nbytes, lambda: swiglu(gate_up)), "copy")
    yield from (_quantising(kernels, x, *kind) for kind in (("rows", ROW), ("columns", COLUMN), ("blocks", BLOCK)))
    yield Case(
        "quantise swiglu",
        moving(gate_up.nbytes + gate_up.numel() / 2, lambda: kernels.quantised_swiglu(gate_up)),
        "copy",
        result=lambda: kernels.quantised_swiglu(gate_up).values(),
        twin=lambda: PLAIN.quantised_swiglu(gate_up).values(),
    )
    if kernels is PLAIN:
        return
    rope, quantise = (import_module(f"leanseek.ops.triton_kernels.{name}") for name in ("rope", "quantise"))
    key, angle = _normal(device, s.tokens, s.heads[0], s.rope), torch.rand(s.tokens, s.rope // 2, device=device)
    turn = partial(rope.rope, key, angle.cos(), angle.sin())
    plain = partial(apply_rope, key, angle.cos()[:, None], angle.sin()[:, None])
    yield Case("rope", moving(2 * key.nbytes, turn), "copy", result=turn, twin=plain)
    norm = moving(x.nbytes + x.numel(), lambda: quantise.quantised_norm(x, weight, 1e-6))
    yield Case(
        "quantise rms_norm",
        norm,
        "copy",
        result=lambda: quantise.quantised_norm(x, weight, 1e-6)[0].values(),
        twin=lambda: PLAIN.quantised(rms_norm(x, weight, 1e-6), ROW).values(),
    )


def _quantising(kernels: Kernels, x: Tensor, name: str, tile: Tile) -> Case:
    return Case(
        f"quantise {name}",
        moving(x.nbytes + x.numel(), partial(kernels.quantised, x, tile)),
        "copy",
        result=lambda: kernels.quantised(x, tile).values(),
        twin=lambda: PLAIN.quantised(x, tile).values(),
    )


def _of_fp8(device: torch.device, kernels: Kernels, s: Shapes) -> Iterator[Case]:
    for m, n, k in s.products:
        yield from _product(kernels, _normal(device, m, k), _normal(device, n, k))


def _product(kernels: Kernels, x: Tensor, w: Tensor) -> Iterator[Case]:
    """x wᵀ in FP8: against the ceiling, then against BF16, alone and with what quantising the activations costs."""
    (m, k), n = x.shape, w.shape[0]
    a, b = PLAIN.quantised(x, ROW), PLAIN.quantised(w, BLOCK)
    name, count = f"fp8 matmul {m}×{n}×{k}", 2 * m * n * k
    multiply, ceiling = partial(kernels.matmul, a, b, x.dtype), _fp8_ceiling(kernels)
    ours = operations(count, multiply)
    yield Case(name, ours, ceiling, result=multiply, twin=partial(PLAIN.matmul, a, b, x.dtype))
    if kernels is PLAIN:
        return
    in_bf16 = operations(count, lambda: x @ w.T)
    whole = operations(count, lambda: kernels.matmul(kernels.quantised(x, ROW), b, x.dtype))
    yield Case(name, ours, in_bf16, "cuBLAS bf16")
    yield Case(f"quantise, {name}", whole, in_bf16, "cuBLAS bf16", product=("dense", m, n, k))
    products = import_module("leanseek.ops.triton_kernels.fp8_matmul")
    for tile in products.TRIED:  # is the one that is taken the best?
        tried = operations(count, partial(products.matmul, a, b, x.dtype, tile))
        yield Case(f"{name} in tiles of {tile.rows}×{tile.columns}, {tile.stages} at once", tried, ceiling)


def _of_experts(device: torch.device, kernels: Kernels, s: Shapes) -> Iterator[Case]:
    rows, n, k, counts = s.tokens * s.chosen, 2 * s.expert, s.width, _counts(s, device)
    work = 2 * rows * n * k
    x, w, grad = _normal(device, rows, k), _normal(device, s.experts, n, k), _normal(device, rows, n)
    in_bf16 = operations(work, lambda: experts.grouped_linear(x, w, counts))
    yield Case("grouped", in_bf16, _matmul_ceiling(device))
    a, b = PLAIN.quantised(x, ROW), PLAIN.quantised(w, BLOCK)
    multiply, plain = (partial(which.grouped_matmul, a, b, counts, x.dtype) for which in (kernels, PLAIN))
    in_fp8 = operations(work, multiply)
    yield Case("fp8 grouped", in_fp8, _fp8_ceiling(kernels), result=multiply, twin=plain)

    def weight_gradient(which: Kernels) -> Tensor:
        return which.grouped_wgrad(*columns[which], counts)

    columns = {
        which: (which.quantised_by_expert(grad, counts), which.quantised_by_expert(x, counts))
        for which in (kernels, PLAIN)
    }
    yield Case(
        "fp8 grouped Wgrad",
        operations(work, partial(weight_gradient, kernels)),
        _fp8_ceiling(kernels),
        result=partial(weight_gradient, kernels),
        twin=partial(weight_gradient, PLAIN),
    )
    if kernels is not PLAIN:
        grouped = import_module("leanseek.ops.triton_kernels.grouped")
        whole = operations(work, lambda: kernels.grouped_matmul(kernels.quantised(x, ROW), b, counts, x.dtype))
        yield Case("fp8 grouped", in_fp8, in_bf16, "grouped bf16")
        yield Case("quantise, fp8 grouped", whole, in_bf16, "grouped bf16", product=("grouped", rows, n, k))
        for name, call, twin in (
            (BY_TRITON, partial(grouped.forward, x, w, counts), partial(experts.grouped_linear, x, w, counts)),
            (
                "grouped Dgrad by Triton",
                partial(grouped.input_gradient, grad, w, counts),
                partial(experts.grouped_linear, grad, w.mT, counts),
            ),
        ):
            peer = operations(work, twin)
            yield Case(name, operations(work, call), peer, "PyTorch's", result=call, twin=twin)
    chosen = torch.rand(s.tokens, 8 * s.chosen, device=device).topk(s.chosen).indices
    layout = experts.lay_out(chosen, 8 * s.chosen)
    tokens, weights = _normal(device, s.tokens, s.width), torch.rand(s.tokens, s.chosen, device=device)
    moved = kernels.permute(tokens, layout)
    both = moving(tokens.nbytes + moved.nbytes, lambda: kernels.permute(tokens, layout))
    back = moving(tokens.nbytes + moved.nbytes, lambda: kernels.unpermute(moved, layout, weights))
    yield Case(
        "permute",
        both,
        "copy",
        result=lambda: kernels.permute(tokens, layout),
        twin=lambda: PLAIN.permute(tokens, layout),
    )
    yield Case(
        "unpermute", back, "copy",
        result=lambda: kernels.unpermute(moved, layout, weights), twin=lambda: PLAIN.unpermute(moved, layout, weights),
    )  # fmt: skip


def _of_the_head(device: torch.device, kernels: Kernels, s: Shapes) -> Iterator[Case]:
    """With both gradients: three products."""
    hidden, weight = _normal(device, s.tokens, s.width).requires_grad_(), _normal(device, s.vocabulary, s.width)
    targets = torch.randint(s.vocabulary, (s.tokens,), device=device)
    weight.mul_(s.width**-0.5).requires_grad_()

    def gradient(which: Kernels) -> Tensor:
        loss = linear_cross_entropy(hidden, weight, targets, which.losses_and_error)
        return torch.autograd.grad(loss, (hidden, weight))[0]

    work = operations(6 * s.tokens * s.width * s.vocabulary, partial(gradient, kernels))
    yield Case(
        "cross-entropy", work, _matmul_ceiling(device), result=partial(gradient, kernels), twin=partial(gradient, PLAIN)
    )


def _of_decoding(device: torch.device, kernels: Kernels, s: Shapes) -> Iterator[Case]:
    """Few heads read more than they multiply, many multiply more than they read."""
    width = s.latent + s.rope
    pages = s.context // PAGE
    kept = _normal(device, (1 + s.texts * pages) * PAGE, width)
    table = 1 + torch.randperm(s.texts * pages, device=device).view(s.texts, pages)
    limits = torch.full((s.texts, 1), s.context, device=device)
    for heads in s.heads:
        q, scale = _normal(device, s.texts, heads, width), width**-0.5

        def plain(q: Tensor = q, scale: float = scale) -> Tensor:
            seen = kept.view(-1, PAGE * width).index_select(0, table.flatten()).view(s.texts, -1, width)
            weights = (torch.bmm(q, seen.mT).float() * scale).softmax(dim=-1)
            return weights.to(q.dtype) @ seen[..., : s.latent]

        ours = plain
        if kernels.latent_decode is not None:
            ours = partial(kernels.latent_decode, q, kept, table, limits, heads, s.latent, PAGE, scale, s.context)
        size = f"decode {heads} heads"
        count = 2 * s.texts * s.context * heads * (width + s.latent)
        yield Case(size, operations(count, ours), _matmul_ceiling(device), result=ours, twin=plain)
        yield Case(size, moving(s.texts * s.context * width * kept.itemsize, ours), "copy")
