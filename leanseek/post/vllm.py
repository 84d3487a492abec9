"""Answers from a vLLM server, which reads every step's weights from an export: for models that need its speed.

Begin it on an export of the run, with what makes it listen to us and, for router replay, tell its routing:

    leanseek export RUN DIR
    VLLM_SERVER_DEV_MODE=1 vllm serve DIR --enable-scale-out --enable-return-routed-experts
    leanseek grpo RUN --task TASK.jsonl --out RUN2 rollout.engine=vllm rollout.export=DIR

Every optimizer step replaces the weight files in DIR and has the server read them again, its cache of prompts emptied.
It computes otherwise than the trainer: see grpo.importance_cap and grpo.router_replay.
"""

import base64
import io
import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leanseek import checkpoint
from leanseek.config import BadInput, Config, RolloutConfig
from leanseek.data.tokenizer import Tokenizer
from leanseek.hub import export_release
from leanseek.model.transformer import Transformer
from leanseek.parallel.mesh import ALONE, Ranks, lead
from leanseek.post.rollout import Answer, Interrupted, Question
from leanseek.serve.writer import Writer

NOT_A_NUMBER = -9999.0  # what vLLM says of a log-probability that is none
NOT_AS_BEGUN = "is it vLLM, begun with VLLM_SERVER_DEV_MODE=1 and --enable-scale-out?"
PATIENCE = 1.0  # seconds between two looks whether somebody asked to stop


class VLLMRollouts:
    """`scratch`: a folder of our own, for the run that each step's weights are exported from. Raises BadInput."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        tokenizer_folder: Path,
        config: Config,
        max_tokens: int,
        stop: tuple[str, ...],
        scratch: Path,
        ranks: Ranks = ALONE,
    ) -> None:
        assert config.rollout is not None
        self.model, self.tokenizer, self.max_tokens, self.stop = model, tokenizer, max_tokens, stop
        self.how: RolloutConfig = config.rollout
        self.target, self.scratch, self.step, self.ranks = Path(self.how.export), scratch, 0, ranks
        self.replay = config.grpo is not None and config.grpo.router_replay
        self.unread = False  # an export that the server has not read
        if not self.how.export or not (self.target / "config.json").is_file():
            raise BadInput(f"rollout.export={self.how.export!r}: name the folder that vLLM was begun on")

        def begin() -> None:
            shutil.rmtree(scratch, ignore_errors=True)
            checkpoint.create_run(scratch / "run", config, "", tokenizer_folder, scratch)

        lead(begin, ranks.group("world"))

    @property
    def closed(self) -> Tensor:
        return torch.empty(0, dtype=torch.int64, device=next(self.model.parameters()).device)  # it may draw anything

    def refresh(self) -> None:
        """Writes the export; the server reads it when it is asked next."""
        self.step += 1
        self.unread = True
        checkpoint.save(self.scratch / "run", self.step, self.model, [], {}, 1, self.ranks)
        lead(self._send, self.ranks.group("world"))

    def _send(self) -> None:
        shutil.rmtree(self.scratch / "export", ignore_errors=True)
        export_release(self.scratch / "run", self.scratch / "export")
        for file in (self.scratch / "export").glob("*.safetensors*"):
            writing = self.target / f".writing-{file.name}"
            shutil.move(file, writing)
            writing.replace(self.target / file.name)  # at once: the server may have the old one mapped

    def _have_it_read(self) -> None:
        self._post("collective_rpc", {"method": "reload_weights"})
        if self._post("reset_prefix_cache", {}) != {"success": True}:
            raise BadInput(f"{self.how.url}: it keeps its cache of prompts: see whether somebody else asks it")

    def draw(
        self, questions: Sequence[Question], seeds: Sequence[int], temperature: float, asked_to_stop: Callable[[], bool]
    ) -> list[Answer]:
        if self.unread:
            lead(self._have_it_read, self.ranks.group("world"))
            self.unread = False
        with ThreadPoolExecutor(self.how.at_once) as pool:
            asked = [
                pool.submit(self._answer, question, seed, temperature)
                for question, seed in zip(questions, seeds, strict=True)
            ]
            open_ = set(asked)
            try:
                while open_:
                    done, open_ = wait(open_, PATIENCE, FIRST_COMPLETED)
                    for one in done:
                        one.result()
                    if asked_to_stop():
                        raise Interrupted
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
            return [one.result() for one in asked]

    def _answer(self, question: Question, seed: int, temperature: float) -> Answer:
        sampling = {
            "temperature": temperature,
            "seed": seed,
            "max_tokens": self.max_tokens,
            "logprobs": 0,
            "detokenize": bool(self.stop),
            "stop": list(self.stop),
            "skip_special_tokens": False,  # a stop string may be spelt by one
        }
        reply = self._post("inference/v1/generate", {"token_ids": question.prompt, "sampling_params": sampling})
        try:
            return self._read(question, reply["choices"][0])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise BadInput(f"{self.how.url}: its reply is not as vLLM 0.32 gives it ({error!r})") from None

    def _read(self, question: Question, choice: dict[str, Any]) -> Answer:
        told, ended = choice["logprobs"]["content"], choice["finish_reason"]
        tokens, logprobs = [each["token_id"] for each in told], [each["logprob"] for each in told]
        if ended not in ("stop", "length"):  # "abort" where it is shut down: the answer is not whole
            raise BadInput(f"{self.how.url}: an answer ended with {ended!r}: see whether vLLM is up, and its log")
        if min(logprobs) <= NOT_A_NUMBER:
            raise BadInput(f"{self.how.url}: it drew from what is not a number: see whether its weights are finite")
        writer = Writer(self.tokenizer, self.stop)
        spelt = [token for token in tokens if token < self.tokenizer.vocab_size and token != self.tokenizer.eos_id]
        text = "".join(map(writer.push, spelt)) + writer.finish()
        return Answer(question, text, tokens, logprobs, self._experts(question, choice, len(tokens)), ended == "length")

    def _experts(self, question: Question, choice: dict[str, Any], drawn: int) -> Tensor | None:
        """Where the token before each drawn one went."""
        if choice.get("routed_experts") is None:
            if self.replay:
                raise BadInput(
                    f"{self.how.url}: it does not tell where tokens went: begin it with --enable-return-routed-experts "
                    "or leave grpo.router_replay out"
                )
            return None
        packed = io.BytesIO(base64.b64decode(choice["routed_experts"]))
        routed = np.load(packed, allow_pickle=False).astype(np.int16)
        first, c = len(question.prompt) - 1, self.model.config
        if routed.shape != (first + drawn, c.num_hidden_layers, c.num_experts_per_tok):  # all tokens but the last
            raise ValueError(f"routed_experts of {routed.shape}")
        return torch.from_numpy(routed[first:, c.first_k_dense_replace :].copy())

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        url = f"{self.how.url.rstrip('/')}/{path}"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.how.seconds) as response:
                told = response.read()
        except urllib.error.HTTPError as error:
            with error:
                said = " ".join(error.read(2000).decode("utf-8", "replace").split())[:200]
            so = "see its log; what was learnt is saved" if error.code >= 500 else NOT_AS_BEGUN
            raise BadInput(f"{url}: HTTP {error.code} {said}: {so}") from None
        except (OSError, HTTPException) as error:
            raise BadInput(f"{url}: {error}: see whether vLLM is up; what was learnt is saved") from None
        try:
            return json.loads(told) if told else None
        except ValueError:
            raise BadInput(f"{url}: answers with what is not JSON: is it vLLM?") from None
