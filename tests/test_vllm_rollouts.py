"""Answers from a server that speaks as vLLM 0.32 does and, like it, knows the weights only from the export's files.

How the real one speaks was looked up in its own replies: `python -m scripts.vllm_rollouts`.
"""

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

from leanseek import checkpoint
from leanseek.config import BadInput, Config, RolloutConfig
from leanseek.hub import export_release, import_release
from leanseek.model.transformer import Transformer
from leanseek.post.grpo import grpo
from leanseek.post.policy import differ, judge, padded
from leanseek.post.rl_log import read
from leanseek.post.rollout import EngineRollouts, Interrupted, Question
from leanseek.post.vllm import VLLMRollouts
from leanseek.serve.llm import load_model
from tests.pool import Pool
from tests.runs import config_of, make_run, model_of, tokenizer
from tests.test_grpo_run import QUIET, Letters, write


class Server:
    """Draws with our engine, from the weights that it read last."""

    def __init__(self, folder: Path, work: Path) -> None:
        self.folder, self.work, self.reads, self.lock = folder, work, 0, threading.Lock()
        self.asked: list[str] = []
        self.tells_routing, self.reads_again, self.reads_left = True, True, 1000
        self.ends: str | None = None  # why answers end, whatever became of them
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
                    self.reads_left -= 1
                    if self.reads_left < 0:
                        raise ConnectionAbortedError
                    if self.reads_again:
                        self.read()
                    return {"results": [None]}
                case "/reset_prefix_cache":
                    return {"success": True}
                case "/inference/v1/generate":
                    return {"choices": [self.draw(body["token_ids"], body["sampling_params"])]}
        raise AssertionError(path)

    def draw(self, prompt: list[int], sampling: dict[str, Any]) -> dict[str, Any]:
        # It looks for stop strings in what it spells: nothing without "detokenize", no "<think>" unless told to.
        assert sampling["detokenize"] or not sampling["stop"]
        assert sampling["skip_special_tokens"] is False
        rollouts = EngineRollouts(self.model, tokenizer(), sampling["max_tokens"], tuple(sampling["stop"]), 1)
        rollouts.engine.closed = torch.empty(0, dtype=torch.int64)  # vLLM may draw anything
        (found,) = rollouts.draw([Question(prompt, {}, "")], [sampling["seed"]], sampling["temperature"], lambda: False)
        assert found.experts is not None
        # It tells of every token that it read, the prompt's too and the last one not, and of every layer.
        layers, k = self.model.config.num_hidden_layers, self.model.config.num_experts_per_tok
        routed = np.zeros((len(prompt) + len(found.tokens) - 1, layers, k), np.uint8)
        routed[len(prompt) - 1 :, self.model.config.first_k_dense_replace :] = found.experts.numpy()
        packed = io.BytesIO()
        np.save(packed, routed)
        drawn = [{"token_id": t, "logprob": p, "rank": 1} for t, p in zip(found.tokens, found.logprobs, strict=True)]
        return {
            "index": 0,
            "finish_reason": self.ends or ("length" if found.cut else "stop"),
            "stop_reason": None,
            "token_ids": found.tokens,
            "routed_experts": base64.b64encode(packed.getvalue()).decode() if self.tells_routing else None,
            "logprobs": {"content": [{**each, "top_logprobs": [each]} for each in drawn]},
        }


class Handler(BaseHTTPRequestHandler):
    server_of: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            told = self.server_of.answer(self.path, body)
        except ConnectionAbortedError:
            self.close_connection = True
            return
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


def rollouts_of(
    server: Server, run: Path, model: Transformer, scratch: Path, stop: tuple[str, ...] = ()
) -> VLLMRollouts:
    how = RolloutConfig(engine="vllm", url=server.url, export=str(server.folder), at_once=2)
    config: Config = config_of(model).model_copy(update={"rollout": how})
    return VLLMRollouts(model, tokenizer(), run / "tokenizer", config, 6, stop, scratch)


def asked_of(server: Server, *more: str) -> tuple[str, ...]:
    return (*QUIET, "rollout.engine=vllm", f"rollout.url={server.url}", f"rollout.export={server.folder}", *more)


def foxes(folder: Path) -> Path:
    rows = [{"prompt": f"A fox {i}", "verify": "exact", "answer": "b"} for i in range(4)]
    return write(folder / "task.jsonl", rows)


def test_a_run_whose_answers_come_from_the_server(run: Path, server: Server, tmp_path: Path) -> None:
    asked = asked_of(server, "grpo.steps=2", "grpo.router_replay=true", "grpo.importance_cap=2.0")
    grpo(run, foxes(tmp_path), tmp_path / "out", asked, None, (Letters(),))
    steps, _ = read(tmp_path / "out")
    # The exported weights are the trainer's, after an optimizer step too, and so is the routing that was told.
    assert all(row["logprob_gap"] < 1e-4 for row in steps)
    assert all(row["experts_differ"] == 0 for row in steps)
    assert server.reads == 1 + 2  # its own start, and before each step
    assert [path for path in server.asked if "generate" not in path] == ["/collective_rpc", "/reset_prefix_cache"] * 2


def asks(rank: int, world: int, run: Path, task: Path, out: Path, *overrides: str) -> None:
    grpo(run, task, out, overrides, None, (Letters(),))


def test_ranks_share_a_server(pool: Pool, run: Path, server: Server, tmp_path: Path) -> None:
    asked = asked_of(server, "grpo.steps=2", "grpo.router_replay=true", "mesh.ep=2")
    pool.run(2, asks, run, foxes(tmp_path), tmp_path / "out", *asked)
    steps, _ = read(tmp_path / "out")
    assert all(row["logprob_gap"] < 1e-4 for row in steps)
    assert all(row["experts_differ"] == 0 for row in steps)
    assert [path for path in server.asked if "generate" not in path] == ["/collective_rpc", "/reset_prefix_cache"] * 2


def test_a_server_that_does_not_read_again_is_seen(run: Path, server: Server, tmp_path: Path) -> None:
    server.reads_again = False
    rate = "schedule.learning_rate=[{until=1,value=1e-2}]"
    grpo(run, foxes(tmp_path), tmp_path / "out", asked_of(server, "grpo.steps=2", rate), None, (Letters(),))
    (first, second), _ = read(tmp_path / "out")
    assert first["logprob_gap"] < 1e-4
    assert second["logprob_gap"] > 1e-2


@pytest.mark.parametrize("with_dev", [False, True])
def test_a_server_that_dies_costs_the_step_at_hand(run: Path, server: Server, tmp_path: Path, with_dev: bool) -> None:
    server.reads_left = 2
    task = foxes(tmp_path)
    often = ("train.checkpoint_every=100", "train.eval_every=1")
    with pytest.raises(BadInput, match="see whether vLLM is up; what was learnt is saved"):
        grpo(run, task, tmp_path / "out", asked_of(server, *often), task if with_dev else None, (Letters(),))
    steps, _ = read(tmp_path / "out")
    newest = checkpoint.newest(tmp_path / "out", print)
    assert newest is not None
    assert (len(steps), newest.state()["step"]) == (2, 2)  # of four
    server.reads_left = 1000
    grpo(run, task, tmp_path / "out", asked_of(server, *often), task if with_dev else None, (Letters(),))
    assert [row["step"] for row in read(tmp_path / "out")[0]] == [1, 2, 3, 4]


def test_stop_strings_and_the_end_of_text_end_answers(run: Path, server: Server, tmp_path: Path) -> None:
    model, vocabulary = load_model(run, "cpu", torch.float32), tokenizer()
    questions = [Question([vocabulary.bos_id, *vocabulary.encode(f"The fox {word}")], {}, "") for word in ("", "was")]
    for stop in ((), ("e",), ("<think>", "o")):
        ours = EngineRollouts(model, vocabulary, 6, stop, 2)
        ours.engine.closed = torch.empty(0, dtype=torch.int64)
        theirs = rollouts_of(server, run, model, tmp_path / "scratch", stop)
        wanted, found = (each.draw(questions * 8, range(16), 1.0, lambda: False) for each in (ours, theirs))
        assert [(a.tokens, a.text, a.cut) for a in found] == [(a.tokens, a.text, a.cut) for a in wanted]


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
    question = Question([0], {}, "")
    server.ends = "abort"
    with pytest.raises(BadInput, match="an answer ended with 'abort'"):
        rollouts.draw([question], [0], 1.0, lambda: False)
    server.ends, server.tells_routing, rollouts.replay = None, False, True
    with pytest.raises(BadInput, match="begin it with --enable-return-routed-experts"):
        rollouts.draw([question], [0], 1.0, lambda: False)
    rollouts.how = rollouts.how.model_copy(update={"url": "http://127.0.0.1:9"})
    with pytest.raises(BadInput, match="see whether vLLM is up"):
        rollouts.draw([Question([0], {}, "")], [0], 1.0, lambda: False)
