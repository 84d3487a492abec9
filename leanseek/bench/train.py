"""`bench train`: tokens per second of a training step beside transformers', and where the time of ours goes."""

import time
from collections.abc import Callable
from statistics import median

import torch
from rich.console import Console
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from leanseek.bench.peer import TheirStep
from leanseek.bench.turns import Rate, Row, fastest, in_turn, show
from leanseek.config import Config, read_recipe
from leanseek.model.transformer import Transformer
from leanseek.plan.count import flops_per_token
from leanseek.train.cpu import ready_cpu
from leanseek.train.optim import build_optimizers
from leanseek.train.peak import matmul_peak
from leanseek.train.schedule import Knobs
from leanseek.train.step import train_step

# Their third way, batched_mm, copies the weights of its experts for every token: 6 GB for each layer of this batch.
TRAINABLE = ("grouped_mm", "eager")
STEPS = 3  # of each in a round
WARM_UP = 2
# Which kind of work an operation is; the first word that begins its name decides.
KINDS = {
    "matmul": ("aten::mm", "aten::bmm", "aten::baddbmm", "aten::addmm", "aten::_grouped_mm", "aten::addmv"),
    "copy and cast": ("aten::copy_", "aten::cat", "aten::clone", "aten::contiguous"),
    "gather and sum rows": (
        "aten::index_select",
        "aten::_embedding_bag",
        "aten::embedding",
        "aten::index",
        "aten::gath",
    ),
    "softmax": ("aten::_softmax", "aten::exp", "aten::logsumexp", "aten::_log_softmax"),
    "optimizer": ("aten::_fused_adamw_",),
    "routing": ("aten::topk", "aten::sort", "aten::bincount", "aten::argsort", "aten::cumsum", "aten::sigmoid"),
}
REST = "norms, gates, sums"


class OurStep:
    """`train_step` with AdamW on the recipe's model."""

    def __init__(self, config: Config, dtype: torch.dtype, compiled: bool = False) -> None:
        self.config = config
        self.model = Transformer(config.model, dtype)
        self.model.initialise(config.train.init_std, torch.Generator().manual_seed(0))
        self.optimizers = build_optimizers(self.model, config.optimizer)
        self.knobs = Knobs(learning_rate=1e-3, batch_tokens=0, bias_speed=0.001, mtp_weight=0.0)
        if compiled:
            for block in self.model.layers.values():
                block.compile()

    def __call__(self, ids: Tensor) -> None:
        targets = ids.roll(-1, dims=1)
        train_step(self.model, self.optimizers, ids, targets, self.knobs, self.config)


def bench_train(rounds: int, compiled: bool, console: Console) -> list[Row]:
    """The row of the training step. `compiled` lets both sides try PyTorch's compiler too, which takes minutes."""
    ready_cpu()  # the peer shares the process, and gains by it as well
    config = read_recipe("bench-20m")
    batches = Batches(config)
    console.print(
        f"bench-20m, batch {batches.rows}×{batches.length}, AdamW, {torch.get_num_threads()} threads. Trying, tokens/s:"
    )

    def ours(dtype: torch.dtype, compiled: bool = False) -> Callable[[], Rate]:
        return lambda: batches.rate(OurStep(config, dtype, compiled))

    def theirs(experts: str, precision: str, compiled: bool = False) -> Callable[[], Rate]:
        return lambda: batches.rate(TheirStep(config.model, experts, precision, compiled))

    candidates = {"ours fp32": ours(torch.float32), "ours bf16": ours(torch.bfloat16)}
    if compiled:
        candidates["ours bf16 compiled"] = ours(torch.bfloat16, True)
        candidates["ours fp32 compiled"] = ours(torch.float32, True)
    our_name, our_rate = fastest(candidates, console.print)
    precisions = ("fp32", "autocast", "bf16")
    peers = {f"theirs {p} {e}": theirs(e, p) for p in precisions for e in TRAINABLE}
    if compiled:
        peers |= {f"theirs {p} grouped_mm compiled": theirs("grouped_mm", p, True) for p in ("fp32", "autocast")}
    peer_name, peer_rate = fastest(peers, console.print)
    row = in_turn(f"train: {our_name} ÷ {peer_name}", "tokens/s", our_rate, peer_rate, rounds)
    show(console, [row], "transformers")
    _explain(row, our_name, config, batches, console)
    return [row]


class Batches:
    """Random tokens of a Zipf distribution, as text has, the same for both sides."""

    def __init__(self, config: Config) -> None:
        self.length = config.stages[0].sequence_length
        self.rows = config.train.micro_batch
        weights = 1.0 / torch.arange(1, config.model.vocab_size + 1)
        draws = torch.multinomial(
            weights, 32 * self.rows * self.length, True, generator=torch.Generator().manual_seed(0)
        )
        self.ids = draws.view(32, self.rows, self.length)
        self.next = 0

    def take(self) -> Tensor:
        self.next += 1
        return self.ids[self.next % len(self.ids)]

    def rate(self, step: Callable[[Tensor], None]) -> Rate:
        """Tokens per second of a few steps; the first ones, which warm up, are done here."""
        for _ in range(WARM_UP):
            step(self.take())

        def measure() -> float:
            seconds = []
            for _ in range(STEPS):
                ids = self.take()
                begun = time.perf_counter()
                step(ids)
                seconds.append(time.perf_counter() - begun)
            return ids.numel() / median(seconds)

        return measure


def kind_of(operation: str) -> str:
    return next((kind for kind, words in KINDS.items() if operation.startswith(words)), REST)


def _explain(row: Row, name: str, config: Config, batches: Batches, console: Console) -> None:
    """The share of the matmul peak, and a profile of one step by kind of work."""
    per_token = flops_per_token(config.model, batches.length)
    peak = max(matmul_peak(torch.device("cpu"), dtype, 2048) for dtype in (torch.bfloat16, torch.float32))
    console.print(
        f"model FLOPs {per_token * row.ours / 1e9:,.0f} GFLOP/s of {peak / 1e9:,.0f} at best in a matmul here: "
        f"{per_token * row.ours / peak:.0%} of peak"
    )
    step = OurStep(config, torch.bfloat16 if "bf16" in name else torch.float32)
    for _ in range(2 * WARM_UP):
        step(batches.take())
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step(batches.take())
    spent: dict[str, float] = {}
    for event in profiled.key_averages():
        kind = kind_of(event.key)
        spent[kind] = spent.get(kind, 0.0) + event.self_cpu_time_total
    total = sum(spent.values())
    console.print(
        "where a step goes, not compiled (profiler's shares): "
        + " · ".join(f"{kind} {time / total:.0%}" for kind, time in sorted(spent.items(), key=lambda item: -item[1]))
    )
