"""What tokens bring to every layer: what is exported says it as a plain V3, in transformers and here, MTP included."""

import json
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from torch import Tensor
from transformers import AutoModelForCausalLM

import leanseek.model.unfold as unfold
from leanseek import load_model
from leanseek.config import BadInput, read_recipe
from leanseek.gguf import export_gguf
from leanseek.hub import export_release, import_release
from leanseek.model.transformer import Transformer
from leanseek.parallel.tensor import check
from leanseek.serve.llm import LLM
from tests.oracle import distance, sample, tiny
from tests.releases import read
from tests.runs import make_run, model_of, tokenizer
from tests.test_serve import greedy
from tests.tiny import RECIPE

BOTH = {"value_embeddings": True, "embedding_shares": True}
OWN = BOTH | {"num_nextn_predict_layers": 1, "first_k_dense_replace": 1, "num_hidden_layers": 3}
SHAPES: dict[str, dict[str, object]] = {
    "V3": OWN | {"n_group": 4, "topk_group": 2},
    "queries not compressed": OWN | {"q_lora_rank": None},
    "values alone": OWN | {"embedding_shares": False},
    "embedding alone": OWN | {"value_embeddings": False},
    "large epsilon": OWN | {"rms_norm_eps": 0.03},
    "V2's gates": OWN
    | {"model_type": "deepseek_v2", "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False},
}


EVERY_EXPERT: dict[str, object] = {"n_routed_experts": 4, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1}


@pytest.fixture(params=SHAPES)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Transformer, Path]:
    """A model with value embeddings, of unit scale, and the run that holds it."""
    vocabulary = tokenizer()
    model = model_of(vocabulary, **SHAPES[request.param])
    return model.eval(), make_run(tmp_path / "run", model, vocabulary)


@torch.no_grad()
def states(model: Transformer) -> tuple[Tensor, Tensor]:
    """Logits of the main model and of its MTP module."""
    assert model.lm_head is not None
    ids, positions = sample(model.config, tokens=24)
    hidden = model.eval()(ids, positions)
    return model.lm_head(hidden), model.lm_head(model.predict_further(hidden, ids, positions)[0])


def imported(run: Path, folder: Path, dtype: str = "fp32") -> Transformer:
    export_release(run, folder / "out", dtype)
    import_release(folder / "out", folder / "again")
    return load_model(folder / "again")


def test_what_is_exported_is_a_plain_v3_that_says_the_same(made: tuple[Transformer, Path], tmp_path: Path) -> None:
    model, run = made
    wide = imported(run, tmp_path)
    told = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert not told.keys() & BOTH
    columns, values = 32 if model.config.embedding_shares else 0, 24 if model.config.value_embeddings else 0
    assert (told["hidden_size"], told["kv_lora_rank"]) == (32 + columns + values, 16 + values)
    assert not wide.config.brings
    for ours, theirs in zip(states(wide), states(model), strict=True):
        assert theirs.std() > 0.5
        assert distance(ours, theirs) < 1e-4


def test_transformers_computes_it_too(made: tuple[Transformer, Path], tmp_path: Path) -> None:
    model, run = made
    export_release(run, tmp_path / "out", "fp32")
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, attn_implementation="eager")
    ids, positions = sample(model.config, tokens=20)
    with torch.no_grad():
        expected = oracle.eval()(input_ids=ids, position_ids=positions, use_cache=False).logits
        assert model.lm_head is not None
        assert distance(model.lm_head(model(ids, positions)), expected) < 1e-4


def test_its_engine_writes_the_same_text(made: tuple[Transformer, Path], tmp_path: Path) -> None:
    """And here the draft of the MTP module is in it, whose values come by way of `eh_proj`."""
    _, run = made
    imported(run, tmp_path)
    texts = [LLM.load(folder).generate("the fox said", greedy(30)).token_ids for folder in (run, tmp_path / "again")]
    assert len(texts[0]) > 5
    assert texts[0] == texts[1]


def test_what_tokens_bring_matters_in_every_layer(made: tuple[Transformer, Path]) -> None:
    """What is equal above would be so without them, if they did nothing."""
    model, _ = made
    before = states(model)
    shares = [parameter for name, parameter in model.named_parameters() if name.endswith("_share")]
    layers, both = model.config.num_hidden_layers, model.config
    assert len(shares) == layers * both.embedding_shares + (layers + 1) * both.value_embeddings
    for share in shares:
        kept = share.detach().clone()
        with torch.no_grad():
            share.zero_()
            assert max(distance(now, then) for now, then in zip(states(model), before, strict=True)) > 0.02
            share.copy_(kept)


FAULTS = {
    "too large to be unnoticed": ("SMALL", 0.5),
    "widths not made up for": ("math.sqrt", lambda ratio: 1.0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, value = FAULTS[fault]
    vocabulary = tokenizer()
    model = model_of(vocabulary, **SHAPES["V3"])
    run = make_run(tmp_path / "run", model, vocabulary)
    monkeypatch.setattr(f"leanseek.model.unfold.{name}", value)
    wide = imported(run, tmp_path)
    assert distance(states(wide)[0], states(model)[0]) > 0.01


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_narrow_formats_cost_it_no_more_than_another_v3(dtype: str, tmp_path: Path) -> None:
    """A block of FP8 must not hold numbers of the size of 1 / SMALL beside others; all experts, for none changes."""
    vocabulary, off = tokenizer(), []
    for own in (True, False):
        model = model_of(vocabulary, **SHAPES["V3"] | EVERY_EXPERT | dict.fromkeys(BOTH, own))
        folder = tmp_path / str(own)
        folder.mkdir()
        again = imported(make_run(folder / "run", model, vocabulary), folder, dtype)
        again.dtype = torch.float32
        a, b = states(again)[0], states(model)[0]
        off.append(((a - b).norm() / b.norm()).item())
    assert off[0] < 1.5 * off[1]


def test_gguf_has_the_wide_matrices(tmp_path: Path) -> None:
    vocabulary = tokenizer()
    run = make_run(tmp_path / "run", model_of(vocabulary, **SHAPES["V3"]), vocabulary)
    export_gguf(run, tmp_path / "gguf", "fp32")
    export_release(run, tmp_path / "out", "fp32")
    released = read(tmp_path / "out")
    reader = GGUFReader(tmp_path / "gguf" / "model-fp32.gguf")
    assert reader.fields["deepseek2.embedding_length"].parts[-1][0] == 2 * 32 + 24
    assert reader.fields["deepseek2.attention.kv_lora_rank"].parts[-1][0] == 16 + 24
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    assert torch.equal(found["token_embd.weight"], released["model.embed_tokens.weight"])
    values = released["model.layers.0.self_attn.kv_b_proj.weight"].unflatten(0, (2, -1))[:, 8:]
    assert torch.equal(found["blk.0.attn_v_b.weight"], values)


def test_where_it_does_not_go() -> None:
    for what in BOTH:
        with pytest.raises(BadInput, match=r"mesh\.pp=1"):
            read_recipe(str(RECIPE), [f"model.{what}=true", "mesh.pp=2"])
    with pytest.raises(BadInput, match=r"mesh\.tp 2: value embeddings"):
        check(tiny(value_embeddings=True), 2)


def test_where_tokens_bring_nothing_there_is_nothing_to_unfold() -> None:
    config = tiny()
    assert unfold.unfolded(config) is config
