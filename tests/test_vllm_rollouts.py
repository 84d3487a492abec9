"""Answers from a server that speaks as vLLM 0.32 does and, like it, knows the weights only from the export's files."""

import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from leanseek.config import BadInput, Config, RolloutConfig
from leanseek.hub import export_release, import_release
from leanseek.model.transformer import Transformer
from leanseek.post.grpo import grpo
from leanseek.post.policy import differ, judge, padded
from leanseek.post.rl_log import read
from leanseek.post.rollout import EngineRollouts, Interrupted, Question
from leanseek.post.vllm import VLLMRollouts
from leanseek.serve.llm import load_model
from tests.runs import config_of, make_run, model_of, tokenizer
from tests.test_grpo_run import QUIET, Letters, write


class Server:
    """Draws with our engine, from the weights that it read last."""

    def __init__(self, folder: Path, work: Path) -> None:
        self.folder, self.work, self.reads, self.lock = folder, work, 0, threading.Lock()
        self.asked: list[str] = []
        self.read()
        handler = type("Handler", (Handler,), {"server_of": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}"

    def read(self) -> None:
        self.reads += 1
        import_release(self.folder, self.work / f"read-{self.reads}")
        self.model = load_model(self.work / f"read-{self.reads}", "cpu", torch.float32)

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        with self.lock:
            self.asked.append(path)
            match path:
                case "/collective_rpc":
                    assert body["method"] == "reload_weights"
                    self.read()
                    return {"results": [None]}
                case "/reset_prefix_cache":
                    return {"success": True}
                case "/inference/v1/generate":
                    return {"choices": [self.draw(body["token_ids"], body["sampling_params"])]}
        raise AssertionError(path)

    def draw(self, prompt: list[int], sampling: dict[str, Any]) -> dict[str, Any]:
        rollouts = EngineRollouts(self.model, tokenizer(), sampling["max_tokens"], (), 1)
        rollouts.engine.closed = torch.empty(0, dtype=torch.int64)  # vLLM may draw anything
        (found,) = rollouts.draw([Question(prompt, {}, "")], [sampling["seed"]], sampling["temperature"], lambda: False)
        assert found.experts is not None
        # vLLM tells of every token that it read, the prompt's too, and of every layer.
        layers, k = self.model.config.num_hidden_layers, self.model.config.num_experts_per_tok
        routed = np.zeros((len(prompt) + len(found.tokens) - 1, layers, k), np.uint8)
        routed[len(prompt) - 1 :, self.model.config.first_k_dense_replace :] = found.experts.numpy()
        packed = io.BytesIO()
        np.save(packed, routed)
        content = [{"token_id": t, "logprob": p} for t, p in zip(found.tokens, found.logprobs, strict=True)]
        return {
            "index": 0,
            "finish_reason": "length" if found.cut else "stop",
            "token_ids": found.tokens,
            "logprobs": {"content": content},
            "routed_experts": base64.b64encode(packed.getvalue()).decode(),
        }


class Handler(BaseHTTPRequestHandler):
    server_of: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        told = self.server_of.answer(self.path, body)
        content = b"" if told is None else json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vocabulary = tokenizer()
    shape = {"first_k_dense_replace": 1, "num_hidden_layers": 3, "vocab_size": vocabulary.vocab_size}
    model = model_of(vocabulary, **shape)
    return make_run(tmp_path_factory.mktemp("begun") / "run", model, vocabulary)


@pytest.fixture
def server(run: Path, tmp_path: Path) -> Iterator[Server]:
    export_release(run, tmp_path / "export")
    server = Server(tmp_path / "export", tmp_path)
    yield server
    server.http.shutdown()
    server.http.server_close()


def rollouts_of(server: Server, run: Path, model: Transformer, scratch: Path) -> VLLMRollouts:
    how = RolloutConfig(engine="vllm", url=server.url, export=str(server.folder), at_once=2)
    config: Config = config_of(model).model_copy(update={"rollout": how})
    return VLLMRollouts(model, tokenizer(), run / "tokenizer", config, 6, (), scratch)


def test_a_run_whose_answers_come_from_the_server(run: Path, server: Server, tmp_path: Path) -> None:
    task = write(
        tmp_path / "task.jsonl", [{"prompt": f"A fox {i}", "verify": "exact", "answer": "b"} for i in range(4)]
    )
    asked = (*QUIET, "grpo.steps=2", "rollout.engine=vllm", f"rollout.url={server.url}")
    asked = (*asked, f"rollout.export={server.folder}", "grpo.router_replay=true", "grpo.importance_cap=2.0")
    grpo(run, task, tmp_path / "out", asked, None, (Letters(),))
    steps, _ = read(tmp_path / "out")
    # The exported weights are the trainer's, after an optimizer step too, and so is the routing that was told.
    assert all(row["logprob_gap"] < 1e-4 for row in steps)
    assert all(row["experts_differ"] == 0 for row in steps)
    assert server.reads == 1 + 3  # its own start, the run's start, two steps
    assert [path for path in server.asked if "generate" not in path] == ["/collective_rpc", "/reset_prefix_cache"] * 3


def test_new_weights_reach_the_server(run: Path, server: Server, tmp_path: Path) -> None:
    model = load_model(run, "cpu", torch.float32)
    rollouts = rollouts_of(server, run, model, tmp_path / "scratch")
    question = Question([tokenizer().bos_id, *tokenizer().encode("The fox")], {}, "")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.02)

    def gap() -> tuple[float, float]:
        answers = rollouts.draw([question] * 3, [1, 2, 3], 1.0, lambda: False)
        rows = padded(answers, torch.device("cpu"))
        assert rows.experts is not None
        with torch.no_grad():
            here = judge(model, rows, rollouts.closed)
        assert here.experts is not None
        other = differ(rows.experts[rows.mask], here.experts).double().mean().item()
        return ((here.logprobs - rows.drawn) * rows.mask).abs().max().item(), other

    assert gap()[0] > 1e-2
    rollouts.refresh()
    assert gap() == (pytest.approx(0, abs=1e-4), 0.0)
    with pytest.raises(Interrupted):
        rollouts.draw([question] * 3, [1, 2, 3], 1.0, lambda: True)


def test_servers_that_are_none_are_named(run: Path, server: Server, tmp_path: Path) -> None:
    model = load_model(run, "cpu", torch.float32)
    how = RolloutConfig(engine="vllm", export=str(tmp_path / "nowhere"))
    config = config_of(model).model_copy(update={"rollout": how})
    with pytest.raises(BadInput, match="name the folder that vLLM was begun on"):
        VLLMRollouts(model, tokenizer(), run / "tokenizer", config, 6, (), tmp_path / "scratch")
    rollouts = rollouts_of(server, run, model, tmp_path / "scratch")
    rollouts.how = rollouts.how.model_copy(update={"url": "http://127.0.0.1:9"})
    with pytest.raises(BadInput, match="see whether vLLM is up"):
        rollouts.draw([Question([0], {}, "")], [0], 1.0, lambda: False)
