"""GRPO with answers from a real vLLM on this CPU, and with our engine's: the same run, questions, steps and seeds.

    python -m scripts.vllm_rollouts FOLDER --vllm VLLM_EXECUTABLE [--steps 10] [--dtype float32] [--port 8321]

Makes the model of scripts/rl_moves.py with the latent and rotary widths that vLLM's CPU kernels know, tunes it on
demonstrations, exports it, starts the server on the export (one thread) and does the steps with each engine. Prints for
both how far its log-probabilities lie from the trainer's, the share of tokens that it sent to other experts, where it
tells, and what a step took. With --stale the server is begun on a copy of the export, so that the weights it reads
again are always the first: what the gap would be if reading them did nothing.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from leanseek.config import read_recipe
from leanseek.data.prepare import prepare
from leanseek.hub import export_release
from leanseek.post.grpo import grpo
from leanseek.post.rl_log import read
from leanseek.post.sft import sft
from leanseek.train.pretrain import pretrain
from scripts.column_sums import main as write_tasks

RECIPE = Path(__file__).with_name("column_sums.toml")
HERE = ("train.device=cpu", "train.dtype=fp32")
SHAPES = ("model.kv_lora_rank=512", "model.qk_rope_head_dim=64")
OF_GRPO = (
    *HERE, "grpo.max_tokens=16", "grpo.prompts=16", "grpo.group=8", "grpo.kl_weight=0", "grpo.importance_cap=2",
    "schedule.learning_rate=[{until=1,value=1e-4}]",
)  # fmt: skip
# CPU_MLA is vLLM's latent attention in FP32. Its own kernels are left out: that for RoPE without YaRN reads queries as if
# the heads' rotary parts lay side by side.
SERVED = (
    "--attention-backend", "CPU_MLA", "--compilation-config", '{"custom_ops": ["none"]}', "--enforce-eager",
    "--max-num-seqs", "256", "--kv-cache-memory-bytes", str(1 << 28),
)  # fmt: skip
PATIENCE = 600  # seconds that the server may take to begin


def small_run(folder: Path) -> Path:
    """Trains, once, a model that finds some sums."""
    if not (folder / "data").exists():
        write_tasks(folder / "task", 2000)
        prepare([str(folder / "task" / "text.jsonl")], folder / "data", vocab_size=276, workers=1)
    pretrain(read_recipe(str(RECIPE), [*HERE, *SHAPES, "train.tokens=200000"]), folder / "data", folder / "base")
    asked = (*HERE, "train.tokens=200000", "schedule.batch_tokens=[{until=1,value=2048}]")
    sft(folder / "base", folder / "task" / "chats.jsonl", folder / "sft", asked)
    return folder / "sft"


@contextmanager
def served(vllm: Path, export: Path, dtype: str, port: int, log: Path) -> Iterator[str]:
    """The address of a server that is ready."""
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_SERVER_DEV_MODE": "1"}
    one_thread = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    command = [str(vllm), "serve", str(export), "--dtype", dtype, "--port", str(port), *SERVED]
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as file:
        server = subprocess.Popen(command, env=os.environ | quiet | one_thread, stdout=file, stderr=file)
        try:
            begun = time.monotonic()
            while not healthy(url):
                if server.poll() is not None or time.monotonic() - begun > PATIENCE:
                    sys.exit(f"vLLM does not begin: see {log}")
                time.sleep(1)
            yield url
        finally:
            server.terminate()
            server.wait()


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def told(out: Path) -> dict[str, Any]:
    """The columns of the table; a run's first step is not timed."""
    rows, _ = read(out)
    elsewhere = [row["experts_differ"] for row in rows if row["experts_differ"] is not None]
    timed = rows[1:]
    return {
        "gap, median": f"{statistics.median(row['logprob_gap'] for row in rows):.1e}",
        "gap, last step": f"{rows[-1]['logprob_gap']:.1e}",
        "experts differ": f"{statistics.fmean(elsewhere):.2%}" if elsewhere else "not told",
        "reward": f"{rows[-1]['reward']:.3f}",
        "answers/s": f"{sum(row['answers'] for row in timed) / sum(row['rollout_seconds'] for row in timed):.0f}",
        "s a step": f"{statistics.fmean(row['rollout_seconds'] + row['learning_seconds'] for row in timed):.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vllm", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--port", type=int, default=8321)
    parser.add_argument("--stale", action="store_true")
    asked = parser.parse_args()
    folder: Path = asked.folder
    run, task = small_run(folder), folder / "task"
    rows = {}
    for engine in ("leanseek", "vllm"):
        shutil.rmtree(folder / engine, ignore_errors=True)
        how: tuple[str, ...] = (*OF_GRPO, f"grpo.steps={asked.steps}")
        if engine == "leanseek":
            grpo(run, task / "train.jsonl", folder / engine, how)
        else:
            shutil.rmtree(folder / "export", ignore_errors=True)
            shutil.rmtree(folder / "served", ignore_errors=True)
            export_release(run, folder / "export")
            shutil.copytree(folder / "export", folder / "served")
            of_vllm = folder / ("served" if asked.stale else "export")
            with served(asked.vllm, of_vllm, asked.dtype, asked.port, folder / "vllm.log") as url:
                more = ("rollout.engine=vllm", f"rollout.url={url}", f"rollout.export={folder / 'export'}")
                grpo(run, task / "train.jsonl", folder / engine, (*how, *more))
        rows[engine] = told(folder / engine)
    print("| | " + " | ".join(rows["vllm"]) + " |")
    print("|---" * (1 + len(rows["vllm"])) + "|")
    for engine, row in rows.items():
        print(f"| {engine} | " + " | ".join(row.values()) + " |")


if __name__ == "__main__":
    main()
