"""What our Triton kernels take of a GPU: compiled ahead of time, at V3's shapes, on a machine that need not have one.

`python -m leanseek.bench.resources [sm_90 sm_100 …]` prints the table. The kernels are launched as they are always
launched, on tensors without memory (`meta`), by a driver that compiles and then does nothing: what is measured is what
would run.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from leanseek.config import BadInput
from leanseek.ops.experts import Layout
from leanseek.ops.fp8 import BLOCK, COLUMN, FP8, ROW, Quantised
from leanseek.ops.triton_kernels import decode, experts, fp8_matmul, grouped, loss, quantise, rope

SHARED = 232_448  # bytes that a block may have on Hopper and Blackwell
# Instructions that tell what does the work: tensor cores fed from shared memory, the engine that fills it.
ENGINES = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma.sync": "mma.sync", "TMA": "cp.async.bulk.tensor"}


@dataclass(frozen=True)
class Resources:
    launch: str
    kernel: str
    warps: int
    registers: int  # per thread
    shared: int  # bytes per block
    spilled: int  # bytes per thread
    engines: tuple[str, ...]


class _Compiler:
    """Stands where Triton's CUDA driver does; loads and runs nothing."""

    def __init__(self, capability: int) -> None:
        self.target, self.found = GPUTarget("cuda", capability, 32), list[tuple[str, bytes, int]]()
        self.utils = self

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *arguments: None

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        self.found.append((name, binary, shared))
        return 1, 1, 0, 0, 1024

    def unload_module(self, module: int) -> None: ...


def resources(capability: int, only: str = "") -> Iterator[Resources]:
    """One row per compiled kernel of the launches whose name begins with `only`.

    Raises BadInput under the interpreter.
    """
    if triton.knobs.runtime.interpret:
        raise BadInput("TRITON_INTERPRET is set: under the interpreter nothing is compiled")
    for name, launch in LAUNCHES.items():
        if name.startswith(only):
            with _compiled(capability) as found:
                launch()
            for kernel, binary, shared, ptx in found:
                yield _read(name, kernel, binary, shared, ptx)


@contextmanager
def _compiled(capability: int) -> Iterator[list[tuple[str, bytes, int, str]]]:
    """What is compiled within: name, cubin, shared memory, PTX."""
    compiler, texts, found = _Compiler(capability), list[str](), list[tuple[str, bytes, int, str]]()

    def remember(module: Any, function: Any, name: str, files: dict[str, str], digest: str) -> None:
        texts.append(Path(next(path for file, path in files.items() if file.endswith(".ptx"))).read_text())

    for module in (quantise, fp8_matmul, grouped, decode, experts, loss, rope):
        for kernel in vars(module).values():
            if isinstance(kernel, triton.runtime.JITFunction):
                kernel.device_caches.clear()  # of another target
    driver.set_active(compiler)
    triton.knobs.runtime.kernel_load_start_hook = remember
    try:
        yield found
        found += [(*each, text) for each, text in zip(compiler.found, texts, strict=True)]
    finally:
        triton.knobs.runtime.kernel_load_start_hook = None


def _read(launch: str, kernel: str, binary: bytes, shared: int, ptx: str) -> Resources:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        told = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    use = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", told.stdout)}
    threads = re.search(r"\.reqntid (\d+)", ptx)
    assert threads is not None
    engines = tuple(name for name, instruction in ENGINES.items() if instruction in ptx)
    # cuobjdump knows the static part of the shared memory only.
    return Resources(
        launch, kernel, int(threads[1]) // 32, use["REG"], shared + use["SHARED"], use["STACK"] + use["LOCAL"], engines
    )


# ── what is launched ──────────────────────────────────────────────────────────────────────────────────────────────
# V3: D 7168, experts of 2048, 4096 tokens with 8 experts each; of the 256 experts a device of the training mesh has 32.

TOKENS, WIDTH, EXPERT, LOCAL, CHOSEN = 4096, 7168, 2048, 32, 8


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _fp8(*shape: int, tile: tuple[int, int] = ROW) -> Quantised:
    rows, columns = -(-shape[-2] // tile[0]), -(-shape[-1] // tile[1])
    scales = _meta(*shape[:-2], columns, rows, dtype=torch.float32).mT
    return Quantised(_meta(*shape, dtype=FP8), scales if tile == ROW else scales.contiguous(), tile)


def _counts() -> Tensor:
    return _meta(LOCAL, dtype=torch.int64)


def _there_and_back() -> None:
    layout = Layout(
        _meta(TOKENS, CHOSEN, dtype=torch.int64),
        _meta(TOKENS * CHOSEN, dtype=torch.int64),
        _meta(256, dtype=torch.int64),
    )
    rows = experts.permute(_meta(TOKENS, WIDTH).requires_grad_(), layout)
    weights = _meta(TOKENS, CHOSEN, dtype=torch.float32).requires_grad_()
    experts.unpermute(rows, layout, weights).backward(_meta(TOKENS, WIDTH))


def _decode(rows: int, heads: int, page: int, tokens: int = 4096) -> None:
    decode.latent_decode(
        _meta(rows, heads, 576), _meta((rows + 1) * tokens, 576), _meta(rows, tokens // page, dtype=torch.int64),
        _meta(rows, 1, dtype=torch.int64), heads, 512, page, 0.1, tokens,
    )  # fmt: skip


def _many() -> Quantised:
    return _fp8(TOKENS * CHOSEN, WIDTH)


LAUNCHES: dict[str, Callable[[], object]] = {
    "quantise rows": lambda: quantise.quantised(_meta(TOKENS, WIDTH), ROW),
    "quantise columns": lambda: quantise.quantised(_meta(TOKENS, WIDTH), COLUMN),
    "quantise columns by expert": lambda: quantise.quantised_by_expert(_meta(TOKENS * CHOSEN, WIDTH), _counts()),
    "quantise blocks": lambda: quantise.quantised(_meta(WIDTH, EXPERT), BLOCK),
    "quantise SwiGLU": lambda: quantise.quantised_swiglu(_meta(TOKENS, 2 * EXPERT)),
    "quantise RMSNorm": lambda: quantise.quantised_norm(
        _meta(TOKENS, WIDTH), _meta(WIDTH, dtype=torch.float32), 1e-6, keep=True
    ),
    "FP8 matmul": lambda: fp8_matmul.matmul(_fp8(TOKENS, WIDTH), _fp8(2 * EXPERT, WIDTH, tile=BLOCK), torch.bfloat16),
    "FP8 matmul, 64 rows": lambda: fp8_matmul.matmul(
        _fp8(64, WIDTH), _fp8(2 * EXPERT, WIDTH, tile=BLOCK), torch.bfloat16
    ),
    "FP8 matmul, Wgrad": lambda: fp8_matmul.matmul(_fp8(2 * EXPERT, TOKENS), _fp8(WIDTH, TOKENS)),
    "FP8 grouped": lambda: fp8_matmul.grouped_matmul(
        _many(), _fp8(LOCAL, 2 * EXPERT, WIDTH, tile=BLOCK), _counts(), torch.bfloat16
    ),
    "FP8 grouped, in slots": lambda: fp8_matmul.slotted_matmul(
        _fp8(LOCAL, 128, WIDTH), _fp8(LOCAL, 2 * EXPERT, WIDTH, tile=BLOCK), _counts(), torch.bfloat16
    ),
    "FP8 grouped, Wgrad": lambda: fp8_matmul.grouped_wgrad(
        _fp8(2 * EXPERT, TOKENS * CHOSEN).mT, _fp8(WIDTH, TOKENS * CHOSEN).mT, _counts()
    ),
    "BF16 grouped": lambda: grouped.forward(_meta(TOKENS * CHOSEN, WIDTH), _meta(LOCAL, 2 * EXPERT, WIDTH), _counts()),
    "BF16 grouped, Dgrad": lambda: grouped.input_gradient(
        _meta(TOKENS * CHOSEN, 2 * EXPERT), _meta(LOCAL, 2 * EXPERT, WIDTH), _counts()
    ),
    "BF16 grouped, Wgrad": lambda: grouped.weight_gradient(
        _meta(TOKENS * CHOSEN, 2 * EXPERT), _meta(TOKENS * CHOSEN, WIDTH), _counts(), torch.float32
    ),
    "permute, unpermute, there and back": _there_and_back,
    "cross-entropy": lambda: loss.losses_and_error(_meta(1024, 129_280), _meta(1024, dtype=torch.int64), True),
    "RoPE": lambda: rope.rope(_meta(TOKENS, 1, 64), *[_meta(TOKENS, 32, dtype=torch.float32)] * 2),
    "decode, 128 heads": lambda: _decode(128, 128, 64),
    "decode, 128 heads, one text": lambda: _decode(1, 128, 64),
    "decode, 16 heads": lambda: _decode(128, 16, 64),
    "decode, 16 heads, small pages": lambda: _decode(8, 16, 16),
}


def table(rows: list[Resources], capability: int) -> Table:
    told = Table(box=None, header_style="bold", pad_edge=False, title=f"sm_{capability}", title_justify="left")
    for head in ("launch", "kernel", "warps", "registers", "shared", "spilled", "by"):
        told.add_column(head, justify="left" if head in ("launch", "kernel", "by") else "right")
    for row in rows:
        told.add_row(
            row.launch, row.kernel, str(row.warps), str(row.registers), f"{row.shared:,}", str(row.spilled),
            " ".join(row.engines),
        )  # fmt: skip
    return told


if __name__ == "__main__":
    for target in sys.argv[1:] or ["sm_90", "sm_100"]:
        number = int(target.removeprefix("sm_"))
        Console(width=140).print(table(list(resources(number)), number))
