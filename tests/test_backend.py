"""The seam: what is chosen where, what reaches the chosen kernels, and what a table of measurements decides."""

import io
import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from leanseek.bench import workload
from leanseek.bench.kernels import bench_kernels
from leanseek.bench.workload import Shapes
from leanseek.config import BadInput, read_recipe
from leanseek.model.transformer import Transformer
from leanseek.ops import backend
from leanseek.ops.backend import PLAIN, Kernels, Measured, kernels_for
from leanseek.ops.fp8_linear import Fp8
from leanseek.serve.cache import Cache
from leanseek.serve.runner import Runner
from leanseek.train.precision import in_fp8
from leanseek.train.schedule import Knobs
from leanseek.train.setup import build
from leanseek.train.step import train_step
from tests.tiny import RECIPE

HERE = ["train.device=cpu", "train.dtype=fp32"]
TABLE = Measured("a GPU", (("dense", 4096, 4096, 7168, 1.6), ("dense", 64, 4096, 7168, 0.9)), grouped_by_triton=True)


def spied(kernels: Kernels, calls: list[str]) -> Kernels:
    """The same kernels, each telling its name when it is called."""

    def telling(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            calls.append(name)
            return function(*arguments, **named)

        return call

    functions = {field.name: getattr(kernels, field.name) for field in fields(kernels)}
    return replace(kernels, **{name: telling(name, f) for name, f in functions.items() if callable(f)})


def test_a_cpu_computes_by_plain_pytorch() -> None:
    cpu = torch.device("cpu")
    assert kernels_for(cpu) is PLAIN
    assert kernels_for(cpu, "reference", TABLE) is PLAIN
    with pytest.raises(BadInput, match="it runs on 'cpu'"):
        kernels_for(cpu, "triton")
    assert build(read_recipe(str(RECIPE), HERE))[0].kernels is PLAIN
    with pytest.raises(BadInput, match="kernels = 'triton'"):
        build(read_recipe(str(RECIPE), [*HERE, "train.kernels=triton"]))


def test_on_hopper_libraries_come_before_triton_and_older_gpus_get_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, capability, installed = torch.device("cuda"), (9, 0), {"triton"}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(backend, "find_spec", lambda name: True if name in installed else None)
    monkeypatch.setattr(backend, "import_module", lambda name: Kernels())  # anything that has functions of these names
    monkeypatch.setattr(backend, "_triton", lambda measured: replace(PLAIN, latent_decode=max, told="Triton"))
    assert kernels_for(gpu).told == "Triton"
    installed |= {"deep_gemm", "flash_mla"}
    best = kernels_for(gpu)
    assert best.told == "Triton, DeepGEMM for dense FP8, FlashMLA for decoding"
    assert (type(best.matmul).__name__, type(best.latent_decode).__name__) == ("_DeepGEMM", "_FlashMLA")
    assert kernels_for(gpu, "triton").told == "Triton"
    assert kernels_for(gpu, "reference") is PLAIN
    capability = (10, 0)
    assert kernels_for(gpu).told == "Triton"
    capability = (8, 0)
    assert kernels_for(gpu) is PLAIN
    with pytest.raises(BadInput, match="older than Hopper"):
        kernels_for(gpu, "triton")
    capability, installed = (9, 0), set()
    with pytest.raises(BadInput, match=r"pip install 'leanseek\[gpu\]'"):
        kernels_for(gpu, "triton")


def test_the_nearest_measured_shape_decides(tmp_path: Path) -> None:
    assert TABLE.fp8_pays("dense", 8192, 2048, 7168)
    assert not TABLE.fp8_pays("dense", 16, 24_576, 1536)
    assert TABLE.fp8_pays("grouped", 1, 1, 1)  # nothing was measured
    TABLE.write(tmp_path / "new" / "table.json")
    assert Measured.read(tmp_path / "new" / "table.json") == TABLE


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"),
        ("{", "not a table"),
        ('{"version": 1}', "not a table"),
        ('{"version": 0}', "measure again"),
        ("[]", "not a table"),
    ],
)
def test_what_is_no_table_is_refused(text: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BadInput, match=said):
        build(read_recipe(str(RECIPE), [*HERE, f"train.kernel_table={json.dumps(str(path))}"]))


def test_where_fp8_loses_a_product_stays_as_it_was() -> None:
    x, weight = torch.randn(3, 40), torch.randn(24, 40)
    for gain, plain in ((0.9, True), (1.1, False)):
        table = Measured("a GPU", (("dense", 4, 24, 40, gain),), grouped_by_triton=False)
        out = Fp8(kernels=replace(PLAIN, measured=table)).linear(x, weight)
        assert torch.equal(out, x @ weight.T) is plain


def test_a_training_step_goes_through_the_kernels_that_the_model_was_given() -> None:
    config = read_recipe(str(RECIPE), HERE)
    ids = torch.randint(config.model.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    reached: dict[str, set[str]] = {}
    losses = []
    for precision in ("plain", "plain, spied", "fp8"):
        model, optimizers, _ = build(config)
        calls: list[str] = []
        if precision != "plain":
            model.use(spied(PLAIN, calls))
        if precision == "fp8":
            in_fp8(model)
        losses.append(train_step(model, optimizers, ids, ids.roll(-1, 1), Knobs(1e-3, 0, 0.001, 0.3), config).loss)
        reached[precision] = set(calls)
    assert losses[0] == losses[1]
    moved = {"permute", "unpermute", "losses_and_error"}
    assert reached["plain, spied"] == {*moved, "grouped_linear"}
    products = {"matmul", "grouped_matmul", "grouped_wgrad"}
    assert reached["fp8"] == {*moved, *products, "quantised", "quantised_by_expert", "quantised_swiglu"}


def by_page(
    q: Tensor,
    kept: Tensor,
    table: Tensor,
    limits: Tensor,
    heads: int,
    latent: int,
    size: int,
    scale: float,
    longest: int,
) -> Tensor:
    """`Kernels.latent_decode` in the open."""
    slots = (table[:, :, None] * size + torch.arange(size)).flatten(1)
    seen = kept[slots][:, :longest]  # [B, S, C + R]
    limit = limits.repeat_interleave(heads, dim=1)[:, :, None]
    scores = (q @ seen.mT * scale).masked_fill(torch.arange(longest) >= limit, float("-inf"))
    return scores.softmax(dim=-1) @ seen[..., :latent]


def test_a_runner_attends_by_the_kernel_and_says_the_same() -> None:
    config = read_recipe(str(RECIPE), HERE).model
    model = Transformer(config)
    model.initialise(0.2, torch.Generator().manual_seed(0))
    held, new = [5, 37, 60], 2  # tokens of each row, and new ones
    pages, calls = [[1], [3, 2, 5], [4, 7, 8, 6]], list[str]()
    told = []
    for kernels in (PLAIN, spied(replace(PLAIN, latent_decode=by_page), calls)):
        model.use(kernels)
        runner, cache = Runner(model.eval()), Cache(config, 8, torch.float32)
        cache.values.normal_(generator=torch.Generator().manual_seed(1))
        for counts in ([new] * 3, [1] * 3):
            now = runner.at(cache.at(pages, held, counts))
            tokens = torch.arange(3 * max(counts)).view(3, -1)
            told.append(runner.step(tokens, cache, now))
    assert set(calls) == {"latent_decode"}
    for plain, ours in zip(told[:2], told[2:], strict=True):
        assert torch.allclose(plain, ours, rtol=1e-4, atol=1e-4)


def test_bench_kernels_measures_every_operation_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workload, "ENOUGH", 0.0)
    least = Shapes(16, 64, 32, 4, 2, 64, 16, 8, 2, 64, (2,), ((16, 32, 64),))
    console = Console(file=io.StringIO(), width=200)
    rows = bench_kernels(1, True, tmp_path / "table.json", console, least)
    names = [row.name for row in rows]
    assert names[:3] == ["copy ÷ copy", "matmul fp32 ÷ matmul fp32", "matmul bf16 ÷ matmul bf16"]
    assert {row.unit for row in rows} == {"GB/s", "GFLOP/s"}
    assert all(row.ours > 0 and row.peer > 0 and row.ratio_min <= row.ratio_median <= row.ratio_max for row in rows)
    for operation in ("quantise", "fp8 matmul", "grouped", "fp8 grouped Wgrad", "permute", "cross-entropy", "decode"):
        assert any(name.startswith(operation) for name in names), operation
    assert not (tmp_path / "table.json").exists()  # nothing to decide on a CPU
