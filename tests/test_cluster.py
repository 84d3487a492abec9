"""Rows cut over ranks, matrices cut over ranks: what they compute is what one process computes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from leanseek.config import BadInput, read_recipe
from leanseek.hub import export_release, import_release
from leanseek.model.transformer import Transformer
from leanseek.parallel import apply, context, tensor
from leanseek.parallel.context import Context, pieces_of
from leanseek.parallel.mesh import Division, divide, ranks_of
from leanseek.parallel.tensor import joined
from leanseek.plan.rows import v3_layout
from leanseek.serve.llm import LLM
from leanseek.serve.sampling import Sampling
from leanseek.train.setup import take_up
from leanseek.train.step import loss_sums
from tests import test_parallel
from tests.pool import Pool
from tests.runs import make_run, model_of, tokenizer
from tests.test_parallel import ADAMW, BRINGING, Learnt, alone, config_of, differs, held_against_one, learn
from tests.tiny import RECIPE, make_data

# ── rows cut over ranks ───────────────────────────────────────────────────────────────────────────────────────────

CUT: dict[str, tuple[int, tuple[str, ...]]] = {
    "cp 2": (2, ("mesh.cp=2",)),
    "cp 4, two MTP modules": (4, ("mesh.cp=4", "model.num_nextn_predict_layers=2")),
    "cp 2, tokens that bring": (2, ("mesh.cp=2", *BRINGING)),
    "cp × dp, accumulated": (4, ("mesh.cp=2", "train.micro_batch=2")),
}


@pytest.mark.parametrize("case", CUT)
def test_rows_cut_over_ranks(pool: Pool, case: str) -> None:
    world, overrides = CUT[case]
    held_against_one(pool, world, ADAMW, *overrides)


LONG = {
    "cp 4": (4, ("mesh.cp=4", "train.micro_batch=3")),
    "cp × ep": (4, ("mesh.cp=4", "mesh.ep=4")),
    "cp × ep × dp": (8, ("mesh.cp=4", "mesh.ep=2", "train.micro_batch=2")),
    "cp × ep, replicated, Muon": (4, ("mesh.cp=2", "mesh.replicate=2", "mesh.ep=2", "optimizer.name=muon")),
    "cp, all recomputed": (2, ("mesh.cp=2", "train.recompute=full")),
    "cp, recomputed as V3 does": (2, ("mesh.cp=2", "train.recompute=selective")),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", LONG)
def test_rows_cut_over_ranks_on_many_meshes(pool: Pool, case: str) -> None:
    world, overrides = LONG[case]
    held_against_one(pool, world, ADAMW, *overrides)


def gathers_for_itself(context: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return grad[dist.get_rank(context.group)], None, None


def without_order(self: Context, length: int, *rest: Any) -> None:
    WHOLE(self, length, *rest)
    self.place = torch.arange(length)


WHOLE = Context.__init__
FAULTS = {
    "balance loss of a rank's own tokens": (apply, "cut_rows", lambda model, group: model),
    "tokens in the order of the ranks": (Context, "__init__", without_order),
    "no gradient from the other ranks": (context._Gather, "backward", staticmethod(gathers_for_itself)),
}


def faulty(rank: int, world: int, fault: str, *how: Any) -> Learnt:
    """`learn` with a fault planted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*FAULTS[fault])
        return learn(rank, world, *how)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_cutting_rows_is_seen(pool: Pool, fault: str) -> None:
    how = (ADAMW, "mesh.cp=2"), 7, False, torch.float64
    many, one = pool.run(2, faulty, fault, *how), alone(*how)
    assert differs(many[0], one, 1e-10, 1e-8) is not None


# ── matrices cut over ranks ───────────────────────────────────────────────────────────────────────────────────────

HEADS = "model.num_attention_heads=4"
CUT_TOO = (ADAMW, HEADS, "model.embedding_shares=true")


def learn_cut(rank: int, world: int, rows: int, fault: bool = False) -> Learnt:
    """`learn`, of matrices that are cut over all ranks; the weights are this rank's shares."""
    shares: dict[str, Tensor] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_parallel, "gathered", lambda state, *rest: shares.update(state) or {})
        if fault:
            patch.setattr(tensor._Spread, "backward", staticmethod(lambda context, grad: (grad, None)))
        told, loads, _ = learn(rank, world, (*CUT_TOO, f"mesh.tp={world}"), rows, False, torch.float64)
    return told, loads, {name: share.detach().numpy() for name, share in shares.items()}


def test_matrices_cut_over_ranks(pool: Pool) -> None:
    for world in (2, 4):
        many = pool.run(world, learn_cut, 7)
        one = alone(CUT_TOO, 7, False, torch.float64)
        assert differs(joined_weights(many), one, 1e-10, 1e-8) is None


def test_a_fault_in_cutting_matrices_is_seen(pool: Pool) -> None:
    many = pool.run(2, learn_cut, 7, True)
    assert differs(joined_weights(many), alone(CUT_TOO, 7, False, torch.float64), 1e-10, 1e-8) is not None


def joined_weights(many: list[Learnt]) -> Learnt:
    """The first rank's answer, with the weights that the ranks' shares are of."""
    names = many[0][2]
    whole = {name: joined(name, [torch.from_numpy(each[2][name]) for each in many]).numpy() for name in names}
    return many[0][0], many[0][1], whole


# ── serving on several ranks ──────────────────────────────────────────────────────────────────────────────────────

PROMPTS = ["A small fox", "Later the rain came, and the fox slept", "the"]


def says(rank: int, world: int, run: str) -> list[list[int]]:
    ranks = ranks_of(config_of(f"mesh.tp={world}", "model.num_attention_heads=4"))
    llm = LLM.load(run, dtype=torch.float64, ranks=ranks)
    assert llm.model.layers["0"].self_attn.heads == 4 // world
    drawn = llm.generate_many(PROMPTS, Sampling(temperature=0.7, max_tokens=20, seed=3))
    return [completion.token_ids for completion in drawn]


@pytest.mark.parametrize("resting", ["fp32", "fp8"])
def test_ranks_with_shares_of_the_weights_say_what_one_process_says(pool: Pool, tmp_path: Path, resting: str) -> None:
    vocabulary = tokenizer()
    run = make_run(
        tmp_path / "run", model_of(vocabulary, num_attention_heads=4, num_nextn_predict_layers=1), vocabulary
    )
    if resting == "fp8":
        export_release(run, tmp_path / "released", "fp8")
        import_release(tmp_path / "released", run := tmp_path / "imported")
    llm = LLM.load(run, dtype=torch.float64)
    alone = [c.token_ids for c in llm.generate_many(PROMPTS, Sampling(temperature=0.7, max_tokens=20, seed=3))]
    assert len({tuple(tokens) for tokens in alone}) == len(PROMPTS)
    for world in (2, 4):
        assert pool.run(world, says, str(run)) == [alone] * world


def generated(*starter: str, run: Path) -> dict[str, Any]:
    wanted = ("generate", str(run), "--prompt", PROMPTS[0], "--max-tokens", "12", "--json", "--raw")
    told: dict[str, Any] = json.loads(subprocess.check_output([sys.executable, *starter, "-m", "leanseek", *wanted]))
    return told


@pytest.mark.slow
def test_the_verb_under_torchrun_says_it_once_and_the_same(tmp_path: Path) -> None:
    vocabulary = tokenizer()
    run = make_run(tmp_path / "run", model_of(vocabulary, num_attention_heads=4), vocabulary)
    alone = generated(run=run)
    many = generated("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", run=run)
    assert many["token_ids"] == alone["token_ids"]


# ── the shipped layouts and launchers ─────────────────────────────────────────────────────────────────────────────


def test_v3_lies_on_2048_devices_as_the_report_and_the_planner_have_it() -> None:
    division, theirs = divide(read_recipe("v3"), 2048), v3_layout()
    assert division == Division(pp=16, dp=128, ep=64, node=8)
    assert (division.pp, division.dp, division.ep, division.shard // division.ep) == (
        theirs.pp, theirs.dp, theirs.ep, theirs.expert_dp,
    )  # fmt: skip
    assert division.ep // division.local == 8  # machines of an expert group


def test_v2_and_v2_lite_lie_on_machines_of_eight() -> None:
    assert divide(read_recipe("v2"), 128) == Division(pp=16, dp=8, ep=8, node=8)
    assert divide(read_recipe("v2-lite"), 8) == Division(dp=8, ep=8, node=8)
    with pytest.raises(BadInput, match=r"does not divide the 1 ranks.*mesh\.ep=1"):
        divide(read_recipe("v2-lite"), 1)


LAUNCH = Path(__file__).parent.parent / "launch"
TOOLS = {  # Slurm on one machine: a task for each node, side by side
    "scontrol": "#!/bin/sh\necho localhost\n",
    "srun": '#!/bin/sh\nshift\nfor _ in $(seq "$SLURM_NNODES"); do "$@" & done\nwait\n',
}


@pytest.mark.slow
def test_slurm_starts_two_nodes_that_train_together(tmp_path: Path) -> None:
    for name, text in TOOLS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    of_slurm = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "a", "DEVICES": "1", "PORT": str(port)}
    of_slurm |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable}
    of_slurm["SLURM_SUBMIT_DIR"] = str(LAUNCH.parent)
    run, data = tmp_path / "run", make_data(tmp_path)
    job = ["pretrain", str(RECIPE), "--data", str(data), "--out", str(run), "train.device=cpu", "train.max_steps=2"]
    script = ["bash", str(LAUNCH / "slurm.sbatch"), *job]
    done = subprocess.run(script, env=os.environ | of_slurm, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 ranks: dp 2" in done.stderr
    assert json.loads((run / "receipt.json").read_text())["steps"] == 2


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("mesh.tp=2",), r"mesh\.tp cuts weights for serving"),
        (("mesh.cp=2", "mesh.pp=2"), r"mesh\.cp: the stages of a pipeline take whole rows"),
    ],
)
def test_training_refuses_what_it_cannot_do(tmp_path: Path, overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        take_up(tmp_path / "run", config_of(*overrides), "", tmp_path, tmp_path)
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_cut_is_said_in_a_line() -> None:
    assert pieces_of(16, 1, 2).tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    assert pieces_of(16, 0, 2).tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    with pytest.raises(BadInput, match=r"mesh\.cp 3: rows of 16 tokens are not cut evenly into 6 pieces"):
        pieces_of(16, 0, 3)
    with pytest.raises(BadInput, match=r"mesh\.tp 3: does not divide the 2 attention heads"):
        tensor.check(config_of().model, 3)
    config = config_of()
    ids = torch.zeros(1, 16, dtype=torch.int64)
    whole = Context.__new__(Context)  # it is not looked at
    with pytest.raises(BadInput, match=r"mesh\.cp: rows of samples that may not see each other"):
        loss_sums(Transformer(config.model), ids, ids, ids, ids, whole)


def test_kubernetes_asks_for_what_the_recipe_is_divided_over() -> None:
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    spec = job["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    told = {each["name"]: each["value"] for each in container["env"]}
    machines, devices = int(told["NODES"]), int(told["DEVICES"])
    assert machines == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert devices == container["resources"]["limits"]["nvidia.com/gpu"]
    verb, recipe, *_ = arguments = container["args"]
    assert divide(read_recipe(recipe), machines * devices).world == machines * devices
    assert (verb, arguments[2::2]) == ("pretrain", ["--data", "--out"])
    # the pods' names, where they meet
    host, _, port = told["RENDEZVOUS"].partition(":")
    assert host == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert port.isdigit()
    assert spec["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    mounted = {each["mountPath"] for each in container["volumeMounts"]}
    assert all(any(path.startswith(f"{mount}/") for mount in mounted) for path in arguments[3::2])
