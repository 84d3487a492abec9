"""A model that talks: prompt in, text out."""

import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import nn

from leanseek.checkpoint import load_shares, load_weights, newest_weights, read_run, scores
from leanseek.config import BadInput
from leanseek.data.tokenizer import Tokenizer
from leanseek.model.layers import Linear
from leanseek.model.moe import Experts
from leanseek.model.transformer import Transformer
from leanseek.ops.backend import kernels_for
from leanseek.parallel.mesh import ALONE, Ranks
from leanseek.parallel.tensor import cut_matrices
from leanseek.serve.engine import Engine, Request
from leanseek.serve.sampling import Sampling

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
    """A model with its tokenizer, on an engine of its own; `options` are the engine's. Raises BadInput as that does."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, **options: Any) -> None:
        self.engine = Engine(model, tokenizer, **options)
        self.model, self.tokenizer, self.config = model, tokenizer, model.config

    @classmethod
    def load(
        cls,
        run: Path | str,
        device: str = "auto",
        dtype: torch.dtype | None = None,
        ranks: Ranks = ALONE,
        averaged: bool = False,
        **options: Any,
    ) -> Self:
        """The newest checkpoint of RUN, on `device`, computing in `dtype`, else in what it was trained in.

        Where `ranks` has a tp axis, each of its ranks holds a share of the matrices; all must then be asked the same,
        and all give the same answer.

        Raises BadInput when RUN is no run, has no whole checkpoint, or holds a tokenizer that is not the model's.
        """
        model = load_model(run, device, dtype, ranks, averaged)
        # Matrices rest in the precision they are multiplied in; norms and routers compute in FP32 and stay as they are.
        for module in model.modules():
            if isinstance(module, (Linear, Experts, nn.Embedding)):
                module.to(model.dtype)
        try:
            return cls(model, Tokenizer.load(Path(run) / "tokenizer"), ranks=ranks, **options)
        except BadInput as error:
            raise BadInput(f"{run}: {error}") from None

    def generate(self, prompt: str, sampling: Sampling = AS_IT_IS) -> Completion:
        """Continue a text. Raises BadInput, as all here do, for a prompt that cannot be served."""
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

    def _begin(self, prompt: list[int], sampling: Sampling) -> Pieces:
        """Submits now and steps later: a mistake shows at the call, not at the first piece."""
        return self._pieces(self.engine.submit(prompt, sampling))

    def _pieces(self, request: Request) -> Pieces:
        said: list[str] = []
        seconds = 0.0
        try:
            while request.finish_reason is None:
                began = time.perf_counter()
                self.engine.step()
                seconds += time.perf_counter() - began
                if piece := request.read():
                    said.append(piece)
                    yield piece
        finally:  # nobody listens any more
            self.engine.cancel(request)
        return _completed(request, "".join(said), request.draws / max(seconds, 1e-9))

    def _run_many(self, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        requests: list[Request] = []
        began = time.perf_counter()
        try:
            for prompt in prompts:
                requests.append(self.engine.submit(prompt, sampling))
            while any(request.finish_reason is None for request in requests):
                self.engine.step()
        finally:
            for request in requests:
                self.engine.cancel(request)
        rate = sum(request.draws for request in requests) / (time.perf_counter() - began)
        return [_completed(request, request.read(), rate) for request in requests]


def _completed(request: Request, text: str, rate: float) -> Completion:
    reason: Literal["stop", "length"] = "length" if request.finish_reason == "length" else "stop"
    return Completion(text, list(request.drawn), len(request.prompt), reason, rate)


def _drain(pieces: Pieces) -> Completion:
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            completion: Completion = end.value
            return completion


def load_model(
    run: Path | str,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    ranks: Ranks = ALONE,
    averaged: bool = False,
) -> Transformer:
    """The newest checkpoint of RUN as a model, weights as they are stored, or their moving average. Raises BadInput.

    Where `ranks` has a tp axis, this rank's share of it: `parallel.tensor`.
    """
    run = Path(run)
    config = read_run(run)
    if scores(run):
        raise BadInput(f"{run}: is a reward model, which scores answers and writes none")
    place = _device(device)
    if dtype is None:
        dtype = torch.bfloat16 if config.train.dtype in ("bf16", "fp8") else torch.float32
    weights, group = newest_weights(run, averaged), ranks.group("tp")
    if group is None:
        model = Transformer(config.model, dtype)
        load_weights(weights, model)
        model.use(kernels_for(place))
        return model.to(place)
    if weights.lora is not None:
        raise BadInput(f"{run}: holds adapters, which one process merges: export it, and serve the import of that")
    with torch.device("meta"):  # the whole model may be more than this machine holds
        model = Transformer(config.model, dtype)
    cut_matrices(model, group).to_empty(device=ranks.device)
    for buffer in model.buffers():
        buffer.zero_()
    load_shares(weights.folder, model, group.rank(), group.size())
    return model


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda", "mps"):
        raise BadInput(f"device must be auto, cpu, cuda or mps, got {name!r}")
    if name != "cpu" and not getattr(torch, name).is_available():
        raise BadInput(f"device {name!r}: there is no such device here")
    return torch.device(name)
