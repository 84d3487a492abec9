"""`bench decode`: tokens per second of greedy decoding beside transformers' generate, and the memory it reads."""

import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from leanseek.bench.peer import EXPERTS, transformers_model
from leanseek.bench.turns import Rate, Row, fastest, in_turn, read_bandwidth, show
from leanseek.config import read_recipe
from leanseek.model.layers import Linear
from leanseek.model.moe import Experts
from leanseek.model.transformer import Transformer
from leanseek.plan.count import cache_bytes_per_token, parameters
from leanseek.serve.cache import Cache
from leanseek.serve.runner import Runner
from leanseek.train.cpu import ready_cpu

PROMPT, NEW = 64, 64  # tokens


def bench_decode(rounds: int, compiled: bool, console: Console) -> list[Row]:
    """A row for one sequence and a row for sixteen. Prompts are read before the clock runs, on both sides.

    `compiled` lets transformers try PyTorch's compiler over a cache of fixed size too, a minute for each try; ours has
    nothing to compile.
    """
    ready_cpu()
    config = read_recipe("bench-20m").model
    rows = []
    for batch in (1, 16):
        prompt = torch.randint(5, config.vocab_size, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
        console.print(f"bench-20m, batch {batch}, {NEW} tokens after {PROMPT}. Trying, tokens/s:")
        candidates = {
            f"ours {name} {threads} threads": _ours(dtype, prompt, threads)
            for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
            for threads in sorted({1, torch.get_num_threads()})
        }
        our_name, our_rate = fastest(candidates, console.print)
        peers = {
            f"theirs {name} {experts} {threads} threads": _theirs(dtype, experts, prompt, threads)
            for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
            for experts in EXPERTS
            for threads in sorted({1, torch.get_num_threads()})
        }
        if compiled:
            peers |= {
                f"theirs {name} {experts} compiled": _theirs(dtype, experts, prompt, torch.get_num_threads(), True)
                for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
                for experts in ("grouped_mm", "batched_mm")
            }
        peer_name, peer_rate = fastest(peers, console.print)
        row = in_turn(f"decode batch {batch}: {our_name} ÷ {peer_name}", "tokens/s", our_rate, peer_rate, rounds)
        rows.append(row)
        size = 2 if "bf16" in our_name else 4
        count = parameters(config)
        # One token reads the experts it visits, sixteen nearly all of them; the embedding is only looked up.
        weights = (count.activated if batch == 1 else count.total) - count.embedding
        cached = batch * (PROMPT + NEW / 2) * cache_bytes_per_token(config, size)
        touched = weights * size + cached
        bandwidth = read_bandwidth(int(touched))
        console.print(
            f"a step reads {touched / 1e6:,.1f} MB: {touched * row.ours / batch / bandwidth:.0%} of the "
            f"{bandwidth / 1e9:.1f} GB/s at which one matrix of that size is read; the rest is the cost of many "
            "small operations"
        )
    show(console, rows, "transformers")
    return rows


def _ours(dtype: torch.dtype, prompt: Tensor, threads: int) -> Callable[[], Rate]:
    def build() -> Rate:
        config = read_recipe("bench-20m")
        model = Transformer(config.model, dtype)
        model.initialise(config.train.init_std, torch.Generator().manual_seed(0))
        for module in model.eval().modules():
            if isinstance(module, (Linear, Experts, nn.Embedding)):
                module.to(dtype)
        runner = Runner(model)

        @torch.inference_mode()
        def measure() -> float:
            with _Threads(threads):
                cache = Cache(config.model, len(prompt), PROMPT + NEW, runner.dtype)
                hidden = model(prompt, torch.arange(PROMPT).expand_as(prompt), cache=cache.layers)[:, -1]
                assert model.lm_head is not None
                tokens = model.lm_head(hidden).argmax(dim=-1)
                begun = time.perf_counter()
                for _ in range(NEW):
                    tokens = runner.step(tokens, cache).argmax(dim=-1)
                return NEW * len(prompt) / (time.perf_counter() - begun)

        measure()
        return measure

    return build


def _theirs(
    dtype: torch.dtype, experts: str, prompt: Tensor, threads: int, compiled: bool = False
) -> Callable[[], Rate]:
    def build() -> Rate:
        model = transformers_model(read_recipe("bench-20m").model, experts, dtype).eval()
        model.generation_config.eos_token_id = None  # random weights must not end the text
        model.generation_config.pad_token_id = 0
        if compiled:
            model.forward = torch.compile(model.forward)
            model.generation_config.cache_implementation = "static"

        def seconds(tokens: int) -> float:
            begun = time.perf_counter()
            model.generate(prompt, max_new_tokens=tokens, do_sample=False)
            return time.perf_counter() - begun

        def measure() -> float:
            with _Threads(threads):
                first = seconds(1)  # the prompt and a token: not what is measured
                return NEW * len(prompt) / (seconds(NEW + 1) - first)

        seconds(2)
        return measure

    return build


class _Threads:
    def __init__(self, count: int) -> None:
        self.count, self.before = count, torch.get_num_threads()

    def __enter__(self) -> None:
        torch.set_num_threads(self.count)

    def __exit__(self, *_: Any) -> None:
        torch.set_num_threads(self.before)
