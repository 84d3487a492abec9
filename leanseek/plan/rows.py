"""Published training speeds of DeepSeek-V3 (671B): one fits each stack's constant, the others check it.

Layouts as the sources state them. Megatron's rows force the experts' loads even; all train at 4,096 tokens with MTP,
whose FLOPs per token (TFLOPS ÷ tokens/s = 260.6 GFLOPs) are those of `count`.
"""

from dataclasses import dataclass, replace
from statistics import median

from leanseek.config import ModelConfig, read_recipe
from leanseek.plan.estimate import STACKS, Stack, estimate
from leanseek.plan.hardware import find
from leanseek.plan.layout import Layout


@dataclass(frozen=True)
class Row:
    name: str
    stack: str
    hardware: str
    layout: Layout
    tokens_per_second: float  # per device, as published
    source: str
    fits: bool = False  # the row that the stack's constant is fitted on
    mtp: bool = True


BRIDGE = "Megatron Bridge, performance summary and perf_recipes"
TITAN = "pytorch.org/blog, MXFP8 and DeepEP for DeepSeek-V3 on B200; mesh: nebius/ml-cookbook, pytorch-dsv3-mxfp8"

# H100: embedding and a layer, thirty times two, MTP and head. Blackwell: four layers a stage, one with MTP and head.
_H100 = Layout(
    1024, pp=8, ep=64, tp=2, schedule="Interleaved1F1B", chunks=4, batch=8192, recompute="selective",
    cuts=(2, *[2] * 30, 2),
)  # fmt: skip
_BLACKWELL = Layout(
    256, pp=8, ep=32, schedule="Interleaved1F1B", chunks=2, batch=4096, precision="fp8", recompute="selective",
    overlaps=True, moment_bytes=2, cuts=(5, *[4] * 14, 3),
)  # fmt: skip
_TITAN = Layout(
    256, pp=2, ep=32, tp=2, schedule="Interleaved1F1B", chunks=2, batch=4096, length=8192, recompute="full",
    shards="all", by_node=False, fp8_of="experts",
)  # fmt: skip

ROWS = (
    Row("Megatron, 1,024 H100, BF16", "megatron", "h100", replace(_H100, batch=16384), 1061, f"{BRIDGE}", fits=True),
    Row("Megatron, 1,024 H100, FP8", "megatron", "h100", replace(_H100, precision="fp8"), 1297, f"{BRIDGE} 25.09"),
    Row("Megatron, 256 B200, MXFP8", "megatron", "b200", _BLACKWELL, 3328, f"{BRIDGE} 26.04.01"),
    Row(
        "Megatron, 256 GB200, MXFP8", "megatron", "gb200", replace(_BLACKWELL, pp=4, ep=64, chunks=4), 4912,
        f"{BRIDGE} 26.08",
    ),
    Row(
        "Megatron, 256 GB300, MXFP8", "megatron", "gb300",
        replace(_BLACKWELL, pp=2, ep=32, chunks=8, recompute="none", fp8_attention=True), 6288, f"{BRIDGE} 26.08",
    ),
    Row("torchtitan, 256 B200, BF16", "torchtitan", "b200", _TITAN, 651, TITAN, fits=True, mtp=False),
    Row(
        "torchtitan, 256 B200, BF16, DeepEP", "torchtitan", "b200", replace(_TITAN, by_node=True), 859, TITAN,
        mtp=False,
    ),
    Row(
        "torchtitan, 256 B200, MXFP8 experts, DeepEP", "torchtitan", "b200",
        replace(_TITAN, by_node=True, precision="fp8"), 918, TITAN, mtp=False,
    ),
)  # fmt: skip


def model_of(row: Row) -> ModelConfig:
    model = read_recipe("v3").model
    longer = {"max_position_embeddings": max(row.layout.length, model.max_position_embeddings)}
    return model.model_copy(update=longer | ({} if row.mtp else {"num_nextn_predict_layers": 0}))


def predicted(row: Row, stack: Stack | None = None) -> float:
    """Tokens per second and device that the planner gives for a row's layout."""
    model = model_of(row)
    return estimate(model, row.layout, find(row.hardware), stack or STACKS[row.stack]).tokens_per_second


def error(row: Row) -> float:
    """Predicted ÷ published − 1."""
    return predicted(row) / row.tokens_per_second - 1


def median_error() -> float:
    """Median absolute error of the rows that nothing was fitted on."""
    return median(abs(error(row)) for row in ROWS if not row.fits)


def fitted(stack: str) -> float:
    """The efficiency with which a stack's one row comes out as published, by bisection."""
    row = next(row for row in ROWS if row.fits and row.stack == stack)
    low, high = 0.05, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if predicted(row, Stack(stack, middle, "")) < row.tokens_per_second:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def v3_layout() -> Layout:
    """DeepSeek-V3's own (report §3.2, §4.2): 16-way pipeline, 64-way experts over 8 nodes, ZeRO-1, DualPipe, FP8."""
    return Layout(
        2048, pp=16, ep=64, schedule="DualPipe", batch=15360, precision="fp8", recompute="selective", overlaps=True,
        dispatch_bytes=1, moment_bytes=2,
    )  # fmt: skip
