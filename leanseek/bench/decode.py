"""`bench decode`: the engine beside transformers' generate, greedy, on the same weights; and what drafts gain.

Decoding is timed from the first token on, on both sides; prompts are read before the clock runs. The time to the first
token is that of a prompt that nothing of is in the cache.
"""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import nn

from leanseek.bench.peer import EXPERTS, same_weights
from leanseek.bench.turns import Rate, Row, fastest, in_turn, read_bandwidth, show
from leanseek.config import BadInput, read_recipe
from leanseek.data.storyworld import story
from leanseek.data.tokenizer import Tokenizer
from leanseek.model.layers import Linear
from leanseek.model.moe import Experts
from leanseek.model.transformer import Transformer
from leanseek.plan.count import cache_bytes_per_token, parameters
from leanseek.serve.engine import Engine, Request
from leanseek.serve.llm import load_model
from leanseek.serve.sampling import Sampling
from leanseek.train.cpu import ready_cpu

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BATCHES = (1, 16)


@dataclass(frozen=True)
class Work:
    """Tokens: of a prompt, decoded behind it, and of the prompt whose first answer is waited for."""

    prompt: int = 64
    new: int = 64
    long_prompt: int = 512


def bench_decode(run: Path | None, rounds: int, compiled: bool, console: Console, work: Work = Work()) -> list[Row]:
    """Rows for one text, for sixteen, for the first token, and for drafts where the model has an MTP module.

    RUN's weights, or else random ones in the shapes of `bench-20m`. `compiled` lets transformers try PyTorch's compiler
    over a cache of fixed size too, a minute for each try; ours has nothing to compile.
    """
    ready_cpu()
    subject = _of_run(run) if run is not None else _random("bench-20m")
    long_prompt = min(work.long_prompt, subject.config.max_position_embeddings - 1)
    if work.prompt + work.new > long_prompt:
        raise BadInput(f"{subject.name}: its context of {long_prompt + 1} tokens is too short to be timed")
    threads = sorted({1, torch.get_num_threads()})
    ours = {
        f"ours {name} {count} threads": _Ours(subject, dtype, count)
        for name, dtype in DTYPES.items()
        for count in threads
    }
    theirs = {
        f"theirs {name} {experts} {count} threads": _Theirs(subject, dtype, experts, count)
        for name, dtype in DTYPES.items()
        for experts in EXPERTS
        for count in threads
    }
    if compiled:
        theirs |= {
            f"theirs {name} {experts} compiled": _Theirs(subject, dtype, experts, threads[-1], compiled=True)
            for name, dtype in DTYPES.items()
            for experts in EXPERTS[:2]
        }
    rows = []
    for batch in BATCHES:
        console.print(f"{subject.name}, {batch} at once, {work.new} tokens after {work.prompt}. Trying, tokens/s:")
        our_name, our_rate = fastest({n: partial(s.decoding, batch, work) for n, s in ours.items()}, console.print)
        their_name, their_rate = fastest(
            {n: partial(s.decoding, batch, work) for n, s in theirs.items()}, console.print
        )
        what = f"decode batch {batch}: {our_name} ÷ {their_name}"
        rows.append(in_turn(what, "tokens/s", our_rate, their_rate, rounds))
        _say_what_is_read(subject, batch, rows[-1].ours, 2 if "bf16" in our_name else 4, work, console)
    console.print(f"{subject.name}, the first token after {long_prompt}. Trying, 1/s:")
    our_name, our_rate = fastest({n: partial(s.reading, long_prompt) for n, s in ours.items()}, console.print)
    their_name, their_rate = fastest({n: partial(s.reading, long_prompt) for n, s in theirs.items()}, console.print)
    our_wait, their_wait = partial(_milliseconds, our_rate), partial(_milliseconds, their_rate)
    rows.append(in_turn(f"first token of {long_prompt}: {our_name} ÷ {their_name}", "ms", our_wait, their_wait, rounds))
    for side in (ours[our_name], theirs[their_name]):
        console.print(f"cache of {side.name}: {side.cache_bytes_per_token() / 1e3:,.1f} MB for 1,000 tokens")
    if subject.config.num_nextn_predict_layers:
        rows += [_drafts(subject, batch, rounds, work, console) for batch in BATCHES]
    show(console, rows, "peer")
    return rows


def _milliseconds(rate: Rate) -> float:
    return 1000 / rate()


def _say_what_is_read(subject: "Subject", batch: int, rate: float, size: int, work: Work, console: Console) -> None:
    count = parameters(subject.config)
    # One token reads the experts it visits, sixteen nearly all of them; the embedding is only looked up.
    weights = (count.activated if batch == 1 else count.total) - count.embedding
    touched = weights * size + batch * (work.prompt + work.new / 2) * cache_bytes_per_token(subject.config, size)
    bandwidth = read_bandwidth(int(touched))
    console.print(
        f"a step takes {1e3 * batch / rate:.2f} ms and reads {touched / 1e6:,.1f} MB: "
        f"{touched * rate / batch / bandwidth:.0%} of the {bandwidth / 1e9:.1f} GB/s at which one matrix of that size "
        "is read; the rest is the cost of many small operations"
    )


def _drafts(subject: "Subject", batch: int, rounds: int, work: Work, console: Console) -> Row:
    """With drafts against without: the gain, and what the share of right drafts and the costs let one expect of it."""
    best = max(DTYPES, key=lambda name: _Ours(subject, DTYPES[name], torch.get_num_threads()).decoding(batch, work)())
    sides = [_Ours(subject, DTYPES[best], torch.get_num_threads(), speculate=speculate) for speculate in (True, False)]
    with_drafts, without = (side.decoding(batch, work) for side in sides)
    for side in sides:
        side.costs.clear()
    row = in_turn(f"drafts, batch {batch}: {best}, with ÷ without", "tokens/s", with_drafts, without, rounds)
    right = median(cost.right for cost in sides[0].costs)
    plain = median(cost.step for cost in sides[1].costs)
    verify, draft = (median(getattr(cost, part) for cost in sides[0].costs) / plain for part in ("step", "draft"))
    expected = (1 + right) / (verify + draft)
    console.print(
        f"drafts, batch {batch}: {right:.0%} right; a step that verifies one costs {verify:.2f} plain ones, the draft "
        f"{draft:.2f}: (1 + {right:.2f}) / ({verify:.2f} + {draft:.2f}) = {expected:.2f} expected, "
        f"{row.ratio_median:.2f} measured"
    )
    return row


# ── what is timed ─────────────────────────────────────────────────────────────────────────────────────────────────


class Subject:
    """One model's weights, for both sides."""

    def __init__(self, name: str, model: Transformer, tokenizer: Tokenizer) -> None:
        self.name, self.model, self.tokenizer, self.config = name, model, tokenizer, model.config

    def copy(self, dtype: torch.dtype) -> Transformer:
        """Ours, resting and computing in `dtype`."""
        model = Transformer(self.config, dtype)
        model.load_state_dict(self.model.state_dict())
        for module in model.eval().modules():
            if isinstance(module, (Linear, Experts, nn.Embedding)):
                module.to(dtype)
        return model

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """Begun at random and gone on by the model itself, so that its drafts are as right as on its own texts."""
        engine = Engine(self.model, self.tokenizer, speculate=False)
        engine.closed = _never_ending(engine)
        sampling = [Sampling(max_tokens=length - 1, seed=seed) for seed in range(count)]
        requests = [engine.submit([self.tokenizer.bos_id], one) for one in sampling]
        while engine.busy:
            engine.step()
        return [[*request.prompt, *request.drawn] for request in requests]

    def random_prompt(self, length: int, chance: random.Random) -> list[int]:
        return [self.tokenizer.bos_id, *(chance.randrange(3, self.tokenizer.vocab_size) for _ in range(length - 1))]


def _of_run(run: Path) -> Subject:
    return Subject(run.name, load_model(run, "cpu").eval(), Tokenizer.load(run / "tokenizer"))


def _random(recipe: str) -> Subject:
    config = read_recipe(recipe)
    model = Transformer(config.model)
    model.initialise(config.train.init_std, torch.Generator().manual_seed(0))
    tokenizer = Tokenizer.train((str(story(0, number)) for number in range(4_000)), config.model.vocab_size)
    return Subject(recipe, model.eval(), tokenizer)


@dataclass(frozen=True)
class Cost:
    """Seconds of a step and of a draft, and the share of drafts that were right."""

    step: float
    draft: float
    right: float


class _Ours:
    def __init__(self, subject: Subject, dtype: torch.dtype, threads: int, speculate: bool = False) -> None:
        self.name = "ours"
        self.subject, self.dtype, self.threads, self.speculate = subject, dtype, threads, speculate
        self.costs: list[Cost] = []
        self.built: Engine | None = None

    def engine(self) -> Engine:
        if self.built is None:
            model = self.subject.copy(self.dtype)
            self.built = Engine(model, self.subject.tokenizer, chunk=4096, speculate=self.speculate)
            self.built.closed = _never_ending(self.built)
        return self.built

    def decoding(self, batch: int, work: Work) -> Rate:
        """Tokens per second."""
        engine, prompts = self.engine(), self.subject.prompts(batch, work.prompt)

        def measure() -> float:
            with _threads(self.threads):
                requests = [engine.submit(prompt, Sampling(0, max_tokens=work.new + 1)) for prompt in prompts]
                while not all(request.drawn for request in requests):
                    engine.step()
                drawn, before = _drawn(requests), asdict(engine.metrics)
                begun = time.perf_counter()
                while engine.busy:
                    engine.step()
                seconds = time.perf_counter() - begun
                now = asdict(engine.metrics)
                steps = now["steps"] - before["steps"]
                self.costs.append(
                    Cost(
                        (now["step_seconds"] - before["step_seconds"]) / steps,
                        (now["draft_seconds"] - before["draft_seconds"]) / steps,
                        (now["accepted"] - before["accepted"]) / max(now["drafted"] - before["drafted"], 1),
                    )
                )
                return (_drawn(requests) - drawn) / seconds

        measure()
        return measure

    def reading(self, length: int) -> Rate:
        """Prompts per second, each to its first token."""
        engine, chance = self.engine(), random.Random(0)

        def measure() -> float:
            with _threads(self.threads):
                begun = time.perf_counter()
                engine.submit(self.subject.random_prompt(length, chance), Sampling(0, max_tokens=1))
                while engine.busy:
                    engine.step()
                return 1 / (time.perf_counter() - begun)

        measure()
        return measure

    def cache_bytes_per_token(self) -> float:
        return self.engine().cache.bytes_per_token


class _Theirs:
    def __init__(
        self, subject: Subject, dtype: torch.dtype, experts: str, threads: int, compiled: bool = False
    ) -> None:
        self.name = "transformers"
        self.subject, self.dtype, self.experts, self.threads, self.compiled = subject, dtype, experts, threads, compiled
        self.built: Any = None

    def model(self) -> Any:
        if self.built is None:
            self.built = same_weights(self.subject.model, self.experts, self.dtype).eval()
            self.built.generation_config.eos_token_id = None  # nothing ends before its time
            self.built.generation_config.pad_token_id = 0
            if self.compiled:
                self.built.forward = torch.compile(self.built.forward)
                self.built.generation_config.cache_implementation = "static"
        return self.built

    def decoding(self, batch: int, work: Work) -> Rate:
        model, prompts = self.model(), torch.tensor(self.subject.prompts(batch, work.prompt))

        def measure() -> float:
            with _threads(self.threads):
                first = self._seconds(model, prompts, 1)  # the prompt and a token: not what is measured
                return batch * work.new / (self._seconds(model, prompts, work.new + 1) - first)

        measure()
        return measure

    def reading(self, length: int) -> Rate:
        model, chance = self.model(), random.Random(0)

        def measure() -> float:
            with _threads(self.threads):
                prompt = torch.tensor([self.subject.random_prompt(length, chance)])
                return 1 / self._seconds(model, prompt, 1)

        measure()
        return measure

    def cache_bytes_per_token(self) -> float:
        prompt = torch.tensor(self.subject.prompts(1, 32))
        with torch.inference_mode():
            kept = self.model()(prompt, use_cache=True).past_key_values
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in kept.layers) / prompt.shape[1]

    def _seconds(self, model: Any, prompts: torch.Tensor, tokens: int) -> float:
        begun = time.perf_counter()
        model.generate(prompts, max_new_tokens=tokens, do_sample=False)
        return time.perf_counter() - begun


def _never_ending(engine: Engine) -> torch.Tensor:
    return torch.cat((engine.closed, torch.tensor([engine.tokenizer.eos_id])))


def _drawn(requests: list[Request]) -> int:
    return sum(len(request.drawn) for request in requests)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
