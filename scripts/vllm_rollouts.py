"""GRPO with answers from a real vLLM on this CPU and with our engine's: the same run, questions, steps and seeds.

    python -m scripts.vllm_rollouts FOLDER --vllm VENV/bin/vllm [--steps 10] [--dtype float32] [--faults]

Makes the model of scripts/rl_moves.py with the latent and rotary widths that vLLM's CPU kernels know, tunes it on
demonstrations, exports it, begins the server on the export and does the steps with each engine, one thread each. Prints
how far an engine's log-probabilities lie from the trainer's, the share of tokens that it sent to other experts, where
it tells, answers a second, and the CPU-seconds of a step, the server's among them.

--faults adds two servers that must be noticed: one that reads another folder than the one that is renewed, and one
without scripts/vllm_cpu_reload.py, as vLLM 0.32 comes.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from leanseek.config import read_recipe
from leanseek.data.prepare import prepare
from leanseek.hub import export_release
from leanseek.post.grpo import grpo
from leanseek.post.rl_log import read
from leanseek.post.sft import sft
from leanseek.train.pretrain import pretrain
from scripts.column_sums import main as write_tasks

SCRIPTS = Path(__file__).parent
HERE = ("train.device=cpu", "train.dtype=fp32")
SHAPES = ("model.kv_lora_rank=512", "model.qk_rope_head_dim=64")
OF_SFT = (*HERE, "train.tokens=500000", "schedule.batch_tokens=[{until=1,value=2048}]")
OF_GRPO = (
    *HERE, "grpo.max_tokens=16", "grpo.prompts=16", "grpo.group=8", "grpo.kl_weight=0", "grpo.importance_cap=2",
    "schedule.learning_rate=[{until=1,value=2e-5}]",
)  # fmt: skip
# CPU_MLA is vLLM's latent attention in FP32. Its own kernels are left out: that for RoPE without YaRN reads queries as
# if the heads' rotary parts lay side by side.
SERVED = (
    "--enable-scale-out", "--attention-backend", "CPU_MLA", "--compilation-config", '{"custom_ops": ["none"]}',
    "--enforce-eager", "--max-num-seqs", "256", "--kv-cache-memory-bytes", str(1 << 28),
)  # fmt: skip
REPACKED = ("--worker-extension-cls", "vllm_cpu_reload.Repacking")
PORT, PATIENCE = 8321, 600  # seconds that the server may take to begin
QUIET = {
    "VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "PYTHONPATH": str(SCRIPTS),
}  # fmt: skip


def small_run(folder: Path) -> Path:
    """Trains, once, a model that finds some sums."""
    if not (folder / "data").exists():
        write_tasks(folder / "task", 2000)
        prepare([str(folder / "task" / "text.jsonl")], folder / "data", vocab_size=276, workers=1)
    recipe = read_recipe(str(SCRIPTS / "column_sums.toml"), [*HERE, *SHAPES, "train.tokens=200000"])
    pretrain(recipe, folder / "data", folder / "base")
    sft(folder / "base", folder / "task" / "chats.jsonl", folder / "sft", OF_SFT)
    return folder / "sft"


@contextmanager
def served(vllm: Path, export: Path, more: tuple[str, ...], log: Path) -> Iterator[tuple[str, Callable[[], float]]]:
    """The address of a server that is ready, and what tells the CPU-seconds it has taken."""
    url = f"http://127.0.0.1:{PORT}"
    # Not `vllm serve`, which asks for its own version by the name of another package.
    program = (str(vllm.with_name("python")), "-m", "vllm.entrypoints.openai.api_server")
    command = [*program, "--model", str(export), "--port", str(PORT), *SERVED, *more]
    with log.open("wb") as file:
        server = subprocess.Popen(command, env=os.environ | QUIET, stdout=file, stderr=file, start_new_session=True)
        try:
            begun = time.monotonic()
            while not healthy(url):
                if server.poll() is not None or time.monotonic() - begun > PATIENCE:
                    sys.exit(f"vLLM does not begin: see {log}")
                time.sleep(1)
            yield url, lambda: cpu_seconds(server.pid)
        finally:
            server.terminate()
            server.wait()


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except OSError:
        return False


def cpu_seconds(session: int) -> float:
    """Of all processes of a session that are running."""
    ticks = 0
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        ticks += int(fields[11]) + int(fields[12]) if int(fields[3]) == session else 0
    return ticks / os.sysconf("SC_CLK_TCK")


def row_of(name: str, out: Path, servers: float) -> str:
    """A line of the table. Steps whose answers all earned the same compared nothing."""
    rows, _ = read(out)
    learnt = [row for row in rows if row["learnt_tokens"]]
    elsewhere = [row["experts_differ"] for row in learnt if row["experts_differ"] is not None]
    drawn = sum(row["answers"] for row in rows) / sum(row["rollout_seconds"] for row in rows)
    gaps = [row["logprob_gap"] for row in learnt]
    told = (
        f"{statistics.median(gaps):.1e}", f"{max(gaps):.1e}",
        f"{statistics.fmean(elsewhere):.2%}" if elsewhere else "not told",
        f"{statistics.fmean(row['reward'] for row in rows):.3f}",
        f"{drawn:.0f}", f"{(rows[-1]['cpu_seconds'] + servers) / len(rows):.2f}",
    )  # fmt: skip
    return f"| {name} | " + " | ".join(told) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vllm", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--faults", action="store_true")
    asked = parser.parse_args()
    folder: Path = asked.folder
    run, task, steps = small_run(folder), folder / "task" / "train.jsonl", f"grpo.steps={asked.steps}"
    shutil.rmtree(folder / "ours", ignore_errors=True)
    grpo(run, task, folder / "ours", (*OF_GRPO, steps))
    table = [row_of("our engine", folder / "ours", 0.0)]
    servers = {"vLLM": ("renewed", REPACKED)}
    if asked.faults:
        servers |= {"vLLM on a folder that is not renewed": ("another", REPACKED), "vLLM as it comes": ("renewed", ())}
    for name, (begun_on, more) in servers.items():
        for old in ("vllm", "renewed", "another"):
            shutil.rmtree(folder / old, ignore_errors=True)
        for export in ("renewed", "another"):
            export_release(run, folder / export)
        how = ("--dtype", asked.dtype, *more)
        with served(asked.vllm, folder / begun_on, how, folder / "vllm.log") as (url, spent):
            before = spent()
            its = ("rollout.engine=vllm", f"rollout.url={url}", f"rollout.export={folder / 'renewed'}")
            grpo(run, task, folder / "vllm", (*OF_GRPO, steps, *its))
            table.append(row_of(name, folder / "vllm", spent() - before))
    print("| | gap, median | gap, most | to other experts | reward | answers/s | CPU-s a step |\n" + "|---" * 7 + "|")
    print("\n".join(table))


if __name__ == "__main__":
    main()
