"""A model that talks: prompt in, text out, over the latent cache (report §2.1.1).

The prompt goes through the model in one pass; every further token is one step of the runner.
"""

import sys
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from leanseek.checkpoint import load_model_weights, newest, read_run
from leanseek.config import BadInput
from leanseek.data.tokenizer import Tokenizer
from leanseek.model.layers import Linear
from leanseek.model.moe import Experts
from leanseek.model.transformer import Transformer
from leanseek.serve.cache import Cache
from leanseek.serve.runner import Runner
from leanseek.serve.sampling import Sampling, sample

AS_IT_IS = Sampling()


@dataclass(frozen=True)
class Completion:
    """What came of a prompt.

    `token_ids` are all tokens drawn, without the end of the text, and with those that a stop string cut from `text`.
    `finish_reason`: "stop" at the model's end of text or a stop string, "length" at max_tokens or the end of the
    context. `tokens_per_second`: tokens drawn over the seconds spent on them, the prompt's included.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: Literal["stop", "length"]
    tokens_per_second: float


Pieces = Generator[str, None, Completion]  # text as it comes; what the generator returns is the whole


class LLM:
    """A model with its tokenizer. Raises BadInput when the two do not belong together."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer, self.config = model.eval(), tokenizer, model.config
        if tokenizer.vocab_size > self.config.vocab_size:
            raise BadInput(
                f"the tokenizer has {tokenizer.vocab_size} ids, the model's vocab_size is {self.config.vocab_size}: "
                "they do not belong together"
            )
        ends, known = (tokenizer.bos_id, tokenizer.eos_id), (self.config.bos_token_id, self.config.eos_token_id)
        if ends != known:
            raise BadInput(f"the tokenizer's BOS and EOS are {ends}, the model's {known}: they do not belong together")
        self.runner = Runner(self.model)
        # Never drawn: rows of the embedding that no token has, and tokens that cannot follow anything.
        self.closed = torch.arange(self.config.vocab_size) >= tokenizer.vocab_size
        self.closed[[number for number in (tokenizer.bos_id, tokenizer.pad_id) if number != tokenizer.eos_id]] = True

    @classmethod
    def load(cls, run: Path | str, device: str = "auto", dtype: torch.dtype | None = None) -> Self:
        """The newest checkpoint of RUN, on `device`, computing in `dtype`, else in what it was trained in.

        Raises BadInput when RUN is no run, has no whole checkpoint, or holds a tokenizer that is not the model's.
        """
        model = load_model(run, device, dtype)
        # Matrices rest in the precision they are multiplied in; norms and routers compute in FP32 and stay as they are.
        for module in model.modules():
            if isinstance(module, (Linear, Experts, nn.Embedding)):
                module.to(model.dtype)
        try:
            return cls(model, Tokenizer.load(Path(run) / "tokenizer"))
        except BadInput as error:
            raise BadInput(f"{run}: {error}") from None

    # ── text in, text out ─────────────────────────────────────────────────────────────────────────────────────────

    def generate(self, prompt: str, sampling: Sampling = AS_IT_IS) -> Completion:
        """Continue a text. Raises BadInput, as all four do, for a prompt that cannot be served."""
        return _drain(self.stream(prompt, sampling))

    def stream(self, prompt: str, sampling: Sampling = AS_IT_IS) -> Pieces:
        """`generate`, the text in pieces as they come: never half a character, never what a stop string may cut."""
        return self._begin([self.tokenizer.bos_id, *self.tokenizer.encode(prompt)], sampling)

    def chat(self, messages: list[dict[str, Any]], sampling: Sampling = AS_IT_IS) -> Completion:
        """The assistant's answer to [{"role": …, "content": …}, …] through the chat template."""
        return _drain(self.stream_chat(messages, sampling))

    def stream_chat(self, messages: list[dict[str, Any]], sampling: Sampling = AS_IT_IS) -> Pieces:
        """`chat`, in pieces as they come."""
        return self._begin(self.tokenizer.encode_chat(messages), sampling)

    def generate_many(self, prompts: list[str], sampling: Sampling = AS_IT_IS) -> list[Completion]:
        """`generate` for several prompts side by side, each as it would be alone; the rate is that of all together."""
        return self._run_many([[self.tokenizer.bos_id, *ids] for ids in self.tokenizer.encode_batch(prompts)], sampling)

    def chat_many(self, chats: list[list[dict[str, Any]]], sampling: Sampling = AS_IT_IS) -> list[Completion]:
        """`chat` for several conversations side by side."""
        return self._run_many([self.tokenizer.encode_chat(messages) for messages in chats], sampling)

    # ── the engine ────────────────────────────────────────────────────────────────────────────────────────────────

    def _begin(self, prompt: list[int], sampling: Sampling) -> Pieces:
        """Checks now and generates later: a mistake shows at the call, not at the first piece."""
        self._check_length(prompt)
        return self._run(prompt, sampling)

    def _check_length(self, prompt: list[int]) -> None:
        context = self.config.max_position_embeddings
        if len(prompt) > context:
            raise BadInput(f"the prompt has {len(prompt)} tokens, the model's context holds {context}: shorten it")

    @torch.inference_mode()
    def _run_many(self, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        """All rows step together, each at its own position, until the last is done."""
        for prompt in prompts:
            self._check_length(prompt)
        device = next(self.model.parameters()).device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        context = self.config.max_position_embeddings
        most = [min(sampling.max_tokens, context - len(prompt) + 1) for prompt in prompts]
        longest = int(lengths.max())
        capacity = max(len(prompt) + new - 1 for prompt, new in zip(prompts, most, strict=True))
        cache = Cache(self.config, len(prompts), capacity, self.runner.dtype, device)
        generators = [torch.Generator().manual_seed(sampling.seed) for _ in prompts]
        drawn: list[list[int]] = [[] for _ in prompts]
        reasons: list[Literal["stop", "length"] | None] = [None] * len(prompts)
        began, draws = time.perf_counter(), 0
        # Padding is on the right, where causal attention cannot see it; later tokens take its place in the cache.
        padded = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)
        hidden = self.model(padded, torch.arange(longest, device=device).expand_as(padded), cache=cache.layers)
        hidden = hidden[torch.arange(len(prompts), device=device), lengths - 1]  # [B, D]
        cache.ragged(lengths)
        assert self.model.lm_head is not None
        logits = self.model.lm_head(hidden)
        writers = [Writer(self.tokenizer, sampling.stop) for _ in prompts]
        said = [""] * len(prompts)
        while True:
            tokens = self._draw(logits, sampling, generators)
            for row, token in enumerate(tokens):
                if reasons[row] is not None:
                    continue
                draws += 1
                if token == self.tokenizer.eos_id:
                    reasons[row] = "stop"
                    continue
                drawn[row].append(token)
                said[row] += writers[row].push(token)
                if writers[row].stopped:
                    reasons[row] = "stop"
                elif len(drawn[row]) == most[row]:
                    reasons[row] = "length"
            if all(reasons):
                break
            # A row that is done goes on behind its own end, unread.
            logits = self.runner.step(torch.tensor(tokens, device=device), cache)
        rate = draws / (time.perf_counter() - began)
        completions = []
        for text, writer, ids, prompt, reason in zip(said, writers, drawn, prompts, reasons, strict=True):
            assert reason is not None
            text += writer.finish()
            completions.append(Completion(text, ids, len(prompt), "stop" if writer.stopped else reason, rate))
        return completions

    def _draw(self, logits: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> list[int]:
        """logits [B, V] → a token for each row, each from its own source of chance."""
        logits = logits.float().cpu().masked_fill_(self.closed, float("-inf"))
        if sampling.temperature == 0:
            return logits.argmax(dim=-1).tolist()
        return [int(sample(row, sampling, generator)) for row, generator in zip(logits, generators, strict=True)]

    def _run(self, prompt: list[int], sampling: Sampling) -> Pieces:
        # The last token of all is drawn but never read, so it needs no position.
        most = min(sampling.max_tokens, self.config.max_position_embeddings - len(prompt) + 1)
        device = next(self.model.parameters()).device
        cache = Cache(self.config, 1, len(prompt) + most - 1, self.runner.dtype, device)
        generator = torch.Generator().manual_seed(sampling.seed)
        writer = Writer(self.tokenizer, sampling.stop)
        drawn: list[int] = []
        said: list[str] = []
        reason: Literal["stop", "length"] = "length"
        seconds, draws = 0.0, 0
        unread = prompt
        while draws < most:
            began = time.perf_counter()
            token = int(sample(self._logits(unread, cache), sampling, generator))
            seconds += time.perf_counter() - began
            draws += 1
            if token == self.tokenizer.eos_id:
                reason = "stop"
                break
            drawn.append(token)
            unread = [token]
            if piece := writer.push(token):
                said.append(piece)
                yield piece
            if writer.stopped:
                break
        if piece := writer.finish():
            said.append(piece)
            yield piece
        if writer.stopped:
            reason = "stop"
        return Completion("".join(said), drawn, len(prompt), reason, draws / seconds)

    @torch.inference_mode()
    def _logits(self, ids: list[int], cache: Cache) -> Tensor:
        """The next token's logits [V] after `ids`, which continue what the cache holds.

        They come to the CPU, so that a seed means the same draws on every device.
        """
        device = cache.values.device
        if cache.length and len(ids) == 1:
            logits = self.runner.step(torch.tensor(ids, device=device), cache)[0]
        else:
            positions = torch.arange(cache.length, cache.length + len(ids), device=device)[None]
            hidden = self.model(torch.tensor([ids], device=device), positions, cache=cache.layers)  # [1, T, D]
            assert self.model.lm_head is not None
            logits = self.model.lm_head(hidden[0, -1])
        return logits.float().cpu().masked_fill_(self.closed, float("-inf"))


class Writer:
    """Tokens to text that may be shown: whole characters, and nothing that a stop string may yet cut."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self.decoder, self.held = tokenizer.decode_stream(), StopStrings(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended the text."""
        return self.held.found

    def push(self, token: int) -> str:
        return self.held.push(self.decoder.push(token))

    def finish(self) -> str:
        """What is left when no more tokens come."""
        return "" if self.stopped else self.held.push(self.decoder.finish()) + self.held.finish()


class StopStrings:
    """Passes text on but for the end that may yet become a stop string; the first to be complete cuts it there.

    The result does not depend on how the text came in pieces.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self.stop = stop
        self.pending = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is now certain; nothing more once a stop string was `found`."""
        if self.found:
            return ""
        self.pending += text
        starts = [(self.pending.find(stop), len(stop)) for stop in self.stop]
        complete = [(start + length, start) for start, length in starts if start >= 0]
        if complete:
            self.found = True
            return self._release(min(complete)[1])
        return self._release(len(self.pending) - max((_overlap(self.pending, stop) for stop in self.stop), default=0))

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        return "" if self.found else self._release(len(self.pending))

    def _release(self, count: int) -> str:
        text, self.pending = self.pending[:count], self.pending[count:]
        return text


def load_model(run: Path | str, device: str = "auto", dtype: torch.dtype | None = None) -> Transformer:
    """The newest checkpoint of RUN as a model, weights as they are stored. Raises BadInput."""
    run = Path(run)
    config = read_run(run)
    place = _device(device)
    checkpoint = newest(run, lambda line: print(f"warning: {line}", file=sys.stderr))
    if checkpoint is None:
        raise BadInput(f"{run}: has no checkpoint yet: train it first")
    if dtype is None:
        dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
    model = Transformer(config.model, dtype)
    load_model_weights(checkpoint.model, model)
    return model.to(place)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda", "mps"):
        raise BadInput(f"device must be auto, cpu, cuda or mps, got {name!r}")
    if name != "cpu" and not getattr(torch, name).is_available():
        raise BadInput(f"device {name!r}: there is no such device here")
    return torch.device(name)


def _drain(pieces: Pieces) -> Completion:
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            completion: Completion = end.value
            return completion


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
