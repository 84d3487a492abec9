"""Weights that travel: releases in and out without a bit lost, read by other tools, refused when they are not whole."""

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV2ForCausalLM, DeepseekV3ForCausalLM

import leanseek
import leanseek.hub as hub
import leanseek.weightfiles as weightfiles
from leanseek import checkpoint, load_model
from leanseek.cli import main
from leanseek.config import BadInput, ModelConfig, read_recipe
from leanseek.eval.harness import evaluate
from leanseek.gguf import export_gguf
from leanseek.hub import export_release, import_release, layout
from leanseek.model.transformer import Transformer
from leanseek.ops.fp8 import dequantise
from leanseek.post.sft import sft
from leanseek.serve.sampling import Sampling
from leanseek.train.pretrain import pretrain
from tests.oracle import distance, sample
from tests.releases import FP8_CONFIG, PUBLISHED, SCALED, Release, differing, in_fp8, plain, read, release, shapes
from tests.tiny import RECIPE, make_data

FAMILIES = list(SCALED)
IN_FP8 = [name for name in FAMILIES if "quantization_config" in SCALED[name]]


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Release]:
    """Each family as released; nobody may write there."""
    folder = tmp_path_factory.mktemp("releases")
    return {name: release(name, folder / name) for name in FAMILIES}


@pytest.fixture(scope="module")
def runs(releases: dict[str, Release], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each family imported."""
    folder = tmp_path_factory.mktemp("runs")
    for name, made in releases.items():
        import_release(made.folder, folder / name)
    return {name: folder / name for name in releases}


def model_config(config: dict[str, Any]) -> ModelConfig:
    return hub.model_config(dict(config), Path("config.json"))


def theirs(made: Release, folder: Path) -> Any:
    """transformers' own model of a release, loaded by transformers, its FP8 weights multiplied out beforehand."""
    config = {key: value for key, value in made.config.items() if key not in ("quantization_config", "auto_map")}
    kind = DeepseekV2ForCausalLM if config["model_type"] == "deepseek_v2" else DeepseekV3ForCausalLM
    config["model_type"] = kind.config_class.model_type
    folder.mkdir()
    Release(folder, config, plain(made.tensors)).write()
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def logits_of(model: Transformer, tokens: int = 24) -> Tensor:
    ids, positions = sample(model.config, tokens=tokens)
    model.dtype = torch.float32  # an imported BF16 or FP8 model computes in BF16 otherwise
    assert model.lm_head is not None
    return model.eval().lm_head(model(ids, positions))


# ── names ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_layout_names_every_tensor_of_the_published_shapes(name: str) -> None:
    places = layout(model_config(PUBLISHED[name]))
    assert {name: place.shape for name, place in places.items()} == shapes(PUBLISHED[name])


def test_every_place_is_taken_once_but_by_the_copies_of_mtp_modules() -> None:
    places = layout(model_config(SCALED["V3"]))
    taken: dict[tuple[str, int], list[str]] = {}
    for released, place in places.items():
        taken.setdefault((place.name, place.part), []).append(released)
    assert [names for names in taken.values() if len(names) > 1] == [
        ["model.embed_tokens.weight", "model.layers.3.embed_tokens.weight"],
        ["lm_head.weight", "model.layers.3.shared_head.head.weight"],
    ]
    for name, shape in hub.our_shapes(model_config(SCALED["V3"])).items():
        parts = {place.part for place in places.values() if place.name == name}
        size = sum(
            torch.Size(place.shape).numel() for place in {p.part: p for p in places.values() if p.name == name}.values()
        )
        assert parts == set(range(len(parts)))
        assert size == torch.Size(shape).numel()


# ── in and out ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", FAMILIES)
def test_import_then_export_returns_every_bit(
    releases: dict[str, Release], runs: dict[str, Path], name: str, tmp_path: Path
) -> None:
    made, out = releases[name], tmp_path / "out"
    export_release(runs[name], out)
    assert differing(made.tensors, read(out)) == []
    told = json.loads((out / "config.json").read_bytes())
    assert {key: told.get(key) for key in made.config} == made.config
    assert (told["moe_layer_freq"], told["rope_theta"]) == (1, made.config["rope_theta"])
    for file in made.folder.iterdir():
        if file.suffix != ".safetensors" and file.name not in ("config.json", "model.safetensors.index.json"):
            assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    written = {file.name for file in out.iterdir()} - {file.name for file in made.folder.iterdir()}
    assert written <= {"leanseek.json", "model-00001-of-00001.safetensors"}


@pytest.mark.parametrize("name", FAMILIES)
def test_an_imported_model_computes_what_transformers_computes(
    releases: dict[str, Release], runs: dict[str, Path], name: str, tmp_path: Path
) -> None:
    oracle = theirs(releases[name], tmp_path / "plain")
    ours = load_model(runs[name])
    # Of 24 tokens one of Moonlight's has two experts as good as each other, to the last digit.
    ids, positions = sample(ours.config, tokens=20)
    with torch.no_grad():
        expected = oracle(input_ids=ids, position_ids=positions, use_cache=False).logits
    assert expected.std() > 0.5
    assert distance(logits_of(ours, 20), expected) < 1e-4


def test_the_mtp_module_arrives_where_it_belongs(releases: dict[str, Release], runs: dict[str, Path]) -> None:
    released, state = plain(releases["V3"].tensors), load_model(runs["V3"]).state_dict()
    module = "model.layers.3"
    pairs = {
        "mtp.3.norm.weight": "shared_head.norm.weight",
        "mtp.3.eh_proj.weight": "eh_proj.weight",
        "mtp.3.enorm.weight": "enorm.weight",
        "mtp.3.hnorm.weight": "hnorm.weight",
        "mtp.3.block.self_attn.o_proj.weight": "self_attn.o_proj.weight",
        "mtp.3.block.mlp.gate.e_score_correction_bias": "mlp.gate.e_score_correction_bias",
    }
    for ours, theirs_ in pairs.items():
        assert torch.equal(state[ours], released[f"{module}.{theirs_}"]), ours
    for expert in range(8):
        both = state["mtp.3.block.mlp.experts.gate_up_proj"][expert]
        gate, up = (released[f"{module}.mlp.experts.{expert}.{kind}_proj.weight"] for kind in ("gate", "up"))
        assert torch.equal(both, torch.cat((gate, up)))


def test_what_transformers_saves_comes_in(runs: dict[str, Path], releases: dict[str, Release], tmp_path: Path) -> None:
    made = releases["Kimi-K2"]
    bare = {key: value for key, value in made.config.items() if key not in ("topk_method", "scoring_func")}
    oracle = theirs(Release(made.folder, bare, made.tensors), tmp_path / "plain")
    oracle.save_pretrained(tmp_path / "saved")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(made.folder / file, tmp_path / "saved")
    told = json.loads((tmp_path / "saved" / "config.json").read_bytes())
    assert "rope_parameters" in told
    assert "topk_method" not in told
    import_release(tmp_path / "saved", tmp_path / "run")
    assert torch.equal(logits_of(load_model(tmp_path / "run")), logits_of(load_model(runs["Kimi-K2"])))


def test_a_folder_of_links_is_a_release(releases: dict[str, Release], tmp_path: Path) -> None:
    """As download caches lay them out."""
    (tmp_path / "snapshot").mkdir()
    for file in releases["Kimi-K2"].folder.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    import_release(tmp_path / "snapshot", tmp_path / "run")
    export_release(tmp_path / "run", tmp_path / "out")
    assert differing(releases["Kimi-K2"].tensors, read(tmp_path / "out")) == []
    assert not [file for file in (tmp_path / "run").rglob("*") if file.is_symlink()]


def test_frequencies_that_a_release_holds_travel_along(releases: dict[str, Release], tmp_path: Path) -> None:
    made = copy_of(releases["Moonlight"], tmp_path / "release")
    made.tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.arange(12.0)
    made.write()
    import_release(made.folder, tmp_path / "run")
    export_release(tmp_path / "run", tmp_path / "out")
    assert differing(made.tensors, read(tmp_path / "out")) == []


# ── precision ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_export_in_another_precision_has_the_values(
    releases: dict[str, Release], runs: dict[str, Path], name: str, dtype: str, tmp_path: Path
) -> None:
    export_release(runs[name], tmp_path / "out", dtype)
    wanted, out = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype], read(tmp_path / "out")
    expected = {name: values.to(wanted) for name, values in plain(releases[name].tensors).items()}
    for tensor in expected:
        if tensor.endswith("e_score_correction_bias"):
            expected[tensor] = releases[name].tensors[tensor]  # FP32 always
    assert differing(expected, out) == []
    told = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert "quantization_config" not in told
    assert told["torch_dtype"] == {"fp32": "float32", "bf16": "bfloat16"}[dtype]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", IN_FP8)
def test_an_untouched_copy_becomes_fp8_again_with_the_same_bits(
    releases: dict[str, Release], runs: dict[str, Path], name: str, dtype: str, tmp_path: Path
) -> None:
    export_release(runs[name], tmp_path / "copy", dtype)
    import_release(tmp_path / "copy", tmp_path / "run")
    assert "fp8" not in str({t.dtype for t in read(tmp_path / "copy").values()})
    export_release(tmp_path / "run", tmp_path / "out", "fp8")
    assert differing(releases[name].tensors, read(tmp_path / "out")) == []
    told = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert told["quantization_config"] == releases[name].config["quantization_config"]


def test_a_changed_tensor_gets_fresh_scales_and_the_others_keep_theirs(
    releases: dict[str, Release], runs: dict[str, Path], tmp_path: Path
) -> None:
    export_release(runs["V3"], tmp_path / "copy", "bf16")
    changed = Release(
        tmp_path / "copy", json.loads((tmp_path / "copy" / "config.json").read_bytes()), read(tmp_path / "copy")
    )
    names = ["model.layers.1.mlp.experts.5.up_proj.weight", "model.layers.0.self_attn.o_proj.weight"]
    changed.tensors[names[0]] = (changed.tensors[names[0]].float() * 1.7 + 0.001).bfloat16()
    changed.tensors[names[1]][3, 3] *= -3
    changed.write()
    import_release(tmp_path / "copy", tmp_path / "run")
    export_release(tmp_path / "run", tmp_path / "out", "fp8")
    out = read(tmp_path / "out")
    scales = [name.replace(".weight", ".weight_scale_inv") for name in names]
    assert set(differing(releases["V3"].tensors, out)) <= {*names, *scales}
    assert {*names, *scales} <= set(differing(releases["V3"].tensors, out))
    for name in names:
        _near(plain(out)[name], changed.tensors[name].float(), 2**-4)  # a code has four binary digits


@pytest.mark.parametrize("name", IN_FP8)
def test_without_the_scales_it_came_with_values_stay_within_a_256th_of_the_block(
    releases: dict[str, Release], runs: dict[str, Path], name: str, tmp_path: Path
) -> None:
    export_release(runs[name], tmp_path / "copy", "bf16")
    shutil.rmtree(tmp_path / "copy" / "scales")
    import_release(tmp_path / "copy", tmp_path / "run")
    export_release(tmp_path / "run", tmp_path / "out", "fp8")
    before, after = plain(releases[name].tensors), plain(read(tmp_path / "out"))
    assert before.keys() == after.keys()
    for tensor in before:
        if before[tensor].ndim == 2:
            _near(after[tensor], before[tensor], 2**-8)
    if name == "V3.1":
        scales = [tensor for found, tensor in read(tmp_path / "out").items() if found.endswith("_scale_inv")]
        assert all(torch.frexp(tensor).mantissa.eq(0.5).all() for tensor in scales)


def _near(a: Tensor, b: Tensor, share: float) -> None:
    """Equal within a share of the largest magnitude of each block of b."""
    for rows_a, rows_b in zip(a.split(128), b.split(128), strict=True):
        for block_a, block_b in zip(rows_a.split(128, 1), rows_b.split(128, 1), strict=True):
            assert (block_a - block_b).abs().max() <= share * block_b.abs().max()


# ── planted faults ────────────────────────────────────────────────────────────────────────────────────────────────


def copy_of(made: Release, folder: Path) -> Release:
    shutil.copytree(made.folder, folder)
    return Release(folder, dict(made.config), dict(made.tensors))


def _swap_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = hub.layout

    def swapped(config: ModelConfig) -> dict[str, hub.Place]:
        places = sound(config)
        a, b = (f"model.layers.1.mlp.experts.{e}.down_proj.weight" for e in (0, 1))
        return places | {a: places[b], b: places[a]}

    monkeypatch.setattr(hub, "layout", swapped)


def _gate_after_up(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = hub.layout

    def swapped(config: ModelConfig) -> dict[str, hub.Place]:
        places = sound(config)
        a, b = (f"model.layers.2.mlp.experts.3.{kind}_proj.weight" for kind in ("gate", "up"))
        return places | {a: places[b], b: places[a]}

    monkeypatch.setattr(hub, "layout", swapped)


def _round_the_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = weightfiles.Stored.read

    def rounded(self: weightfiles.Stored, part: int = 0, parts: int = 1) -> Tensor:
        tensor = sound(self, part, parts)
        return tensor.bfloat16().float() if self.shape == (8,) else tensor

    monkeypatch.setattr(weightfiles.Stored, "read", rounded)


def _neighbours_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    def neighbours(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return dequantise(codes, scales.roll(1, -1), dtype)

    monkeypatch.setattr(checkpoint, "dequantise", neighbours)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "experts swapped": _swap_experts,
    "up before gate": _gate_after_up,
    "bias rounded to BF16": _round_the_bias,
    "scale of the neighbour block": _neighbours_scale,
}


@pytest.fixture(scope="module")
def expected(releases: dict[str, Release], tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """transformers' logits of the V3 release."""
    oracle = theirs(releases["V3"], tmp_path_factory.mktemp("oracle") / "plain")
    ids, positions = sample(model_config(releases["V3"].config))
    with torch.no_grad():
        return oracle(input_ids=ids, position_ids=positions, use_cache=False).logits


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_both_directions_does_not_stay_hidden(
    releases: dict[str, Release], expected: Tensor, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong in import and export alike comes back whole: the logits tell, or the released bits."""
    FAULTS[fault](monkeypatch)
    made = releases["V3"]
    import_release(made.folder, tmp_path / "run")
    export_release(tmp_path / "run", tmp_path / "out")
    apart = distance(logits_of(load_model(tmp_path / "run")), expected)
    assert apart > 1e-4 or differing(made.tensors, read(tmp_path / "out")), fault
    if fault == "bias rounded to BF16":
        assert differing(made.tensors, read(tmp_path / "out")) == [
            name for name in sorted(made.tensors) if name.endswith("e_score_correction_bias")
        ]
    else:
        assert apart > 1e-3


# ── bad input ─────────────────────────────────────────────────────────────────────────────────────────────────────

EXPERT = "model.layers.1.mlp.experts.4.down_proj.weight"


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def _missing_shard(made: Release) -> str:
    (made.folder / "model-00002-of-00002.safetensors").unlink()
    return "model-00002-of-00002.safetensors"


def _index_names_absent(made: Release) -> str:
    index = made.folder / "model.safetensors.index.json"
    told = json.loads(index.read_bytes())
    told["weight_map"]["model.layers.9.extra.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(told))
    return "model.layers.9.extra.weight"


def _index_forgets(made: Release) -> str:
    index = made.folder / "model.safetensors.index.json"
    told = json.loads(index.read_bytes())
    del told["weight_map"][EXPERT]
    index.write_text(json.dumps(told))
    return EXPERT


def _index_leads_outside(made: Release) -> str:
    index = made.folder / "model.safetensors.index.json"
    told = json.loads(index.read_bytes())
    told["weight_map"][EXPERT] = "../elsewhere.safetensors"
    index.write_text(json.dumps(told))
    return "../elsewhere.safetensors"


def _index_is_garbage(made: Release) -> str:
    (made.folder / "model.safetensors.index.json").write_text("[1, 2]")
    return "model.safetensors.index.json"


def _truncated(made: Release) -> str:
    file = made.folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return "model-00002-of-00002.safetensors: truncated"


def _cut_in_the_header(made: Release) -> str:
    file = made.folder / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    return "model-00001-of-00002.safetensors"


def _header_is_garbage(made: Release) -> str:
    file = made.folder / "model-00001-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[8:20] = b"{{{{{{{{{{{{"
    file.write_bytes(bytes(content))
    return "header is damaged"


def _wrong_shape(made: Release) -> str:
    made.tensors[EXPERT] = made.tensors[EXPERT][:-1].contiguous()
    made.write()
    return f"wrong shape of {EXPERT} ([159, 136], by the config [160, 136])"


def _unknown_model_type(made: Release) -> str:
    made.config["model_type"] = "llama"
    made.write()
    return "config.json: model_type 'llama'"


def _unknown_choice(made: Release) -> str:
    made.config["topk_method"] = "random"
    made.write()
    return "config.json: topk_method"


def _unknown_rope(made: Release) -> str:
    made.config["rope_scaling"] = {"type": "linear", "factor": 2}
    made.write()
    return "config.json: rope_scaling"


def _without_scales(made: Release) -> str:
    del made.tensors[EXPERT.replace(".weight", ".weight_scale_inv")]
    made.write()
    return f"FP8 without scales: {EXPERT}"


def _scales_of_another_shape(made: Release) -> str:
    name = EXPERT.replace(".weight", ".weight_scale_inv")
    made.tensors[name] = torch.ones(1, 1)
    made.write()
    return f"wrong shape of {name}"


def _nobody_claims(made: Release) -> str:
    made.tensors["model.layers.1.self_attn.indexer.wk.weight"] = torch.ones(3, 3)
    made.write()
    return "nobody claims model.layers.1.self_attn.indexer.wk.weight"


def _dropped_mtp_tensor(made: Release) -> str:
    del made.tensors["model.layers.3.enorm.weight"]
    made.write()
    return "missing model.layers.3.enorm.weight"


def _dropped_mtp_module(made: Release) -> str:
    made.tensors = {name: t for name, t in made.tensors.items() if not name.startswith("model.layers.3.")}
    made.write()
    return "set num_nextn_predict_layers to 0"


def _mtp_head_differs(made: Release) -> str:
    made.tensors["model.layers.3.shared_head.head.weight"] = made.tensors["lm_head.weight"] * 1.01
    made.write()
    return "model.layers.3.shared_head.head.weight differs from lm_head.weight"


def _mixed_experts(made: Release) -> str:
    made.tensors[EXPERT] = made.tensors[EXPERT].to(torch.bfloat16)
    del made.tensors[EXPERT.replace(".weight", ".weight_scale_inv")]
    made.write()
    return EXPERT


def _pickled(made: Release) -> str:
    (made.folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(made.folder.parent / "exploded")))
    return "pytorch_model.bin: a pickled file"


def _pickle_called_safetensors(made: Release) -> str:
    file = made.folder / "model-00001-of-00002.safetensors"
    file.write_bytes(pickle.dumps(Bomb(made.folder.parent / "exploded")))
    return "model-00001-of-00002.safetensors: not readable as safetensors"


def _tiktoken(made: Release) -> str:
    (made.folder / "tokenizer.json").rename(made.folder / "tiktoken.model")
    return "tiktoken.model is not read here: put one beside"


def _no_tokenizer(made: Release) -> str:
    (made.folder / "tokenizer.json").unlink()
    return "has no tokenizer.json"


def _other_tokenizer(made: Release) -> str:
    made.config["eos_token_id"] = 7
    made.write()
    return "they do not belong together"


def _scales_of_two_kinds(made: Release) -> str:
    name = EXPERT.replace(".weight", ".weight_scale_inv")
    made.tensors[name] = made.tensors[name].bfloat16()
    made.write()
    return f"{name} is in torch.bfloat16, model.layers.1.mlp.experts.0.down_proj.weight_scale_inv in torch.float32"


def _quantised_otherwise(made: Release) -> str:
    made.config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    made.write()
    return "only FP8 in blocks of 128 × 128 is read here"


def _rope_is_garbage(made: Release) -> str:
    made.config["rope_parameters"] = [1]
    made.write()
    return "config.json: rope_scaling"


def _no_weights(made: Release) -> str:
    for file in made.folder.glob("*.safetensors*"):
        file.unlink()
    return "there is no safetensors file in it"


def _no_config(made: Release) -> str:
    (made.folder / "config.json").unlink()
    return "config.json: no such file"


def _config_is_garbage(made: Release) -> str:
    (made.folder / "config.json").write_text("{")
    return "config.json: damaged"


def _half_precision_of_another_kind(made: Release) -> str:
    made.tensors["model.norm.weight"] = made.tensors["model.norm.weight"].to(torch.complex64)
    made.write()
    return "model.norm.weight has dtype C64"


BAD = [
    value
    for name, value in list(globals().items())
    if name.startswith("_") and getattr(value, "__annotations__", {}).get("made") is Release
]


@pytest.mark.parametrize("spoil", BAD, ids=lambda spoil: spoil.__name__.strip("_"))
def test_a_bad_release_is_one_line_and_leaves_nothing(
    releases: dict[str, Release], spoil: Callable[[Release], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = copy_of(releases["V3"], tmp_path / "release")
    said = spoil(made)
    with pytest.raises(SystemExit) as end:
        main(["import", str(made.folder), str(tmp_path / "run")])
    err = capsys.readouterr().err
    assert end.value.code == 2
    assert err.count("\n") == 1, err
    assert said in err
    assert [entry.name for entry in tmp_path.iterdir()] == ["release"]


def test_a_folder_with_something_in_it_is_left_alone(
    runs: dict[str, Path], tmp_path: Path, releases: dict[str, Release]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").touch()
    for call in (
        lambda: export_release(runs["V3"], tmp_path / "full"),
        lambda: import_release(releases["V3"].folder, tmp_path / "full"),
        lambda: export_release(runs["V3"], tmp_path / "full" / "note"),
    ):
        with pytest.raises(BadInput, match="not an empty folder"):
            call()
    assert [entry.name for entry in (tmp_path / "full").iterdir()] == ["note"]
    (tmp_path / "empty").mkdir()
    export_release(runs["V3"], tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


# ── streaming ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_whatever_is_stopped_goes_on_where_it_was(
    releases: dict[str, Release], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "FILE_BYTES", 200_000)
    sound, run = weightfiles.Stored.read, tmp_path / "run"
    reads: list[str] = []

    def stopped_after(count: int) -> None:
        reads.clear()

        def read(self: weightfiles.Stored, part: int = 0, parts: int = 1) -> Tensor:
            reads.append(self.file.name)
            if len(reads) > count:
                raise KeyboardInterrupt
            return sound(self, part, parts)

        monkeypatch.setattr(weightfiles.Stored, "read", read)

    def stopped(call: Callable[[], None], target: Path) -> dict[str, int]:
        """The whole files that stand after a stop, and when they were written."""
        stopped_after(90)
        with pytest.raises(KeyboardInterrupt):
            call()
        assert not target.exists()
        writing = target.with_name(f".writing-{target.name}")
        whole = {p.name: p.stat().st_mtime_ns for p in writing.rglob("model-*.safetensors")}
        assert whole
        return whole

    for call, target in (
        (lambda: import_release(releases["V3"].folder, run), run),
        (lambda: export_release(run, tmp_path / "out"), tmp_path / "out"),
    ):
        before = stopped(call, target)
        stopped_after(10**9)
        call()
        after = {p.name: p.stat().st_mtime_ns for p in target.rglob("model-*.safetensors")}
        assert before.items() <= after.items()
        assert len(after) > len(before)
        assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]
        monkeypatch.setattr(weightfiles.Stored, "read", sound)
    assert differing(releases["V3"].tensors, read(tmp_path / "out")) == []

    stopped(lambda: export_release(run, tmp_path / "c"), tmp_path / "c")
    monkeypatch.setattr(weightfiles.Stored, "read", sound)
    monkeypatch.setattr(hub, "FILE_BYTES", 300_000)  # another division: nothing of the first one stays
    export_release(run, tmp_path / "c")
    assert differing(releases["V3"].tensors, read(tmp_path / "c")) == []

    stopped(lambda: export_release(run, tmp_path / "b", "bf16"), tmp_path / "b")
    monkeypatch.setattr(weightfiles.Stored, "read", sound)
    export_release(run, tmp_path / "b", "fp32")  # another wish: what was begun is of no use
    assert {t.dtype for t in read(tmp_path / "b").values()} == {torch.float32}


def test_a_bar_shows_where_somebody_watches(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    export_release(runs["V3"], tmp_path / "out")
    assert "export V3" in capsys.readouterr().err
    monkeypatch.undo()
    export_release(runs["V3"], tmp_path / "again")
    assert capsys.readouterr().err == ""


def test_two_processes_do_not_write_one_folder(runs: dict[str, Path], tmp_path: Path) -> None:
    with weightfiles.staged(tmp_path / "out", "x", 0):
        second = weightfiles.staged(tmp_path / "out", "x", 0)
        with pytest.raises(BadInput, match="by another process"):
            second.__enter__()


def test_a_disk_without_room_is_said_before_anything_is_written(
    releases: dict[str, Release], runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    for call in (
        lambda: import_release(releases["V3"].folder, tmp_path / "out"),
        lambda: export_release(runs["V3"], tmp_path / "out"),
        lambda: export_gguf(runs["V3"], tmp_path / "out"),
    ):
        with pytest.raises(BadInput, match=r"out: needs 0\.00 GB, and the disk has 0\.00 GB left"):
            call()
    assert list(tmp_path.iterdir()) == []


STREAM = """
import sys
from pathlib import Path
from leanseek.hub import export_release, import_release

def memory(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(what)).split()[1])

folder, run, out = map(Path, sys.argv[1:])
import_release(Path(str(folder) + "-small"), Path(str(run) + "-small"))
export_release(Path(str(run) + "-small"), Path(str(out) + "-small"), "bf16")
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before = memory("VmRSS")
import_release(folder, run)
export_release(run, out, "bf16")
print(memory("VmHWM") - before)
"""


def test_memory_holds_tensors_and_not_the_model(tmp_path: Path) -> None:
    """A release of 200 MB in FP8 whose largest tensor has 2 MB, imported and exported in BF16."""
    wide = SCALED["V3"] | {
        "hidden_size": 1024,
        "moe_intermediate_size": 512,
        "n_routed_experts": 64,
        "num_hidden_layers": 2,
        "vocab_size": 352,
    }
    for suffix, config in (("-small", wide | {"n_routed_experts": 8}), ("", wide)):
        made = release("V3", tmp_path / f"release{suffix}")
        made.config = config
        made.tensors = {
            name: torch.zeros(shape).to(torch.float8_e4m3fn if in_fp8(name) else torch.bfloat16)
            for name, shape in shapes(config).items()
        }
        for name in list(made.tensors):
            if in_fp8(name):
                rows, columns = made.tensors[name].shape
                blocks = torch.ones(-(-rows // 128), -(-columns // 128))
                made.tensors[name.replace(".weight", ".weight_scale_inv")] = blocks
        made.write()
    command = [sys.executable, "-c", STREAM, *(str(tmp_path / name) for name in ("release", "run", "out"))]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    size = sum(file.stat().st_size for file in (tmp_path / "release").glob("*.safetensors"))
    assert size > 200e6
    assert grown < 20e6  # a few tensors of at most 2 MB, and no stack of experts, of which some have 67 MB


# ── a run, trained here ───────────────────────────────────────────────────────────────────────────────────────────

PROMPTS = ("Ada found", "The old map", "Ben hid the red boat", "Gus", "Hana sold some bread at the market.")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt something: its greedy text is far from a tie at nearly every token."""
    run = tmp_path_factory.mktemp("trained") / "run"
    pretrain(read_recipe(str(RECIPE), TRAINING), data, run)
    return run


TRAINING = ("train.dtype=fp32", "train.tokens=60000", "model.max_position_embeddings=128", "train.eval_every=1000")


@pytest.fixture(scope="module")
def exports(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    for dtype in ("fp32", "bf16", "fp8"):
        export_release(trained, folder / dtype, dtype)
    return {dtype: folder / dtype for dtype in ("fp32", "bf16", "fp8")}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
def test_transformers_loads_what_a_run_exports(exports: dict[str, Path], dtype: str, tmp_path: Path) -> None:
    """In FP8 the weights are multiplied out first: transformers' own way takes blocks for equal in size."""
    import_release(exports[dtype], tmp_path / "run")
    ours = load_model(tmp_path / "run")
    folder = exports[dtype]
    if dtype == "fp8":
        told = json.loads((folder / "config.json").read_bytes())
        del told["quantization_config"]
        (tmp_path / "plain").mkdir()
        Release(tmp_path / "plain", told, plain(read(folder))).write()
        folder = tmp_path / "plain"
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids, positions = sample(ours.config)
    with torch.no_grad():
        expected = oracle(input_ids=ids, position_ids=positions, use_cache=False).logits
    assert (logits_of(ours) - expected).abs().max() < 1e-4
    bias = oracle.model.layers[1].mlp.gate.e_score_correction_bias
    assert torch.equal(bias, ours.layers["1"].mlp.gate.e_score_correction_bias)
    assert bias.abs().max() > 0


def test_transformers_writes_the_same_greedy_text(trained: Path, exports: dict[str, Path]) -> None:
    """64 tokens for every prompt; where the two best are closer than 1e-3 either may win, and then it is counted."""
    llm = leanseek.load(trained)
    tokenizer = AutoTokenizer.from_pretrained(exports["fp32"])
    oracle = AutoModelForCausalLM.from_pretrained(exports["fp32"], dtype=torch.float32).eval()
    ties = 0
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        assert ids[0].tolist() == [llm.tokenizer.bos_id, *llm.tokenizer.encode(prompt)]
        for _ in range(64):
            with torch.no_grad():
                logits = oracle(ids).logits[0, -1].index_fill(-1, llm.engine.closed, -torch.inf)
            best = logits.topk(2)
            request = llm.engine.submit(ids[0].tolist(), Sampling(temperature=0, max_tokens=1))
            llm.engine.step()
            ours = (request.drawn or [llm.tokenizer.eos_id])[0]
            if ours != best.indices[0]:
                assert best.values[0] - best.values[1] < 1e-3
                ties += 1
            ids = torch.cat((ids, torch.tensor([[ours]])), dim=1)
    assert ties <= 3


def test_config_of_an_export_says_what_other_tools_ask_for(exports: dict[str, Path]) -> None:
    told = {dtype: json.loads((folder / "config.json").read_bytes()) for dtype, folder in exports.items()}
    for config in told.values():
        assert config["architectures"] == ["DeepseekV3ForCausalLM"]
        assert (config["model_type"], config["topk_method"], config["scoring_func"]) == (
            "deepseek_v3",
            "noaux_tc",
            "sigmoid",
        )
        assert (config["rope_theta"], config["moe_layer_freq"], config["num_nextn_predict_layers"]) == (10000.0, 1, 1)
        assert config["num_key_value_heads"] == config["num_attention_heads"]
        assert "verbatim" not in config
    assert [told[dtype]["torch_dtype"] for dtype in told] == ["float32", "bfloat16", "bfloat16"]
    assert told["fp8"]["quantization_config"] == FP8_CONFIG
    assert "quantization_config" not in told["bf16"]
    biases = [t for name, t in read(exports["bf16"]).items() if name.endswith("e_score_correction_bias")]
    assert {t.dtype for t in biases} == {torch.float32}


def test_a_run_goes_out_and_comes_back(trained: Path, exports: dict[str, Path], tmp_path: Path) -> None:
    back = tmp_path / "back"
    import_release(exports["fp32"], back)
    export_release(back, tmp_path / "again")
    assert differing(read(exports["fp32"]), read(tmp_path / "again")) == []
    ours, theirs_ = checkpoint.read_run(trained), checkpoint.read_run(back)
    same = {"verbatim": {}, "num_key_value_heads": None}
    assert theirs_.model.model_copy(update=same) == ours.model.model_copy(update=same)
    assert theirs_.model_copy(update={"model": ours.model}) == ours
    greedy = Sampling(temperature=0, max_tokens=30)
    texts = [leanseek.load(run).generate(PROMPTS[0], greedy).text for run in (trained, back)]
    assert texts[0] == texts[1]
    assert not checkpoint.chats(back)


def test_training_goes_on_from_an_import(
    trained: Path, exports: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    back = tmp_path / "back"
    import_release(exports["fp32"], back)
    with pytest.raises(BadInput, match=r"has no data of its own: give --text"):
        evaluate(back, ["bpb"])
    other = read_recipe(str(RECIPE), ("model.hidden_size=48",))
    with pytest.raises(BadInput, match=r"an imported model of another shape: take .*config\.toml for a recipe"):
        pretrain(other, data, back)
    (tmp_path / "elsewhere").mkdir()
    foreign = make_data(tmp_path / "elsewhere", seed=9, documents=60)
    recipe = read_recipe(
        str(RECIPE), (*TRAINING, "train.tokens=2048", "schedule.learning_rate=[{until=1.0,value=1e-5}]")
    )
    with pytest.raises(BadInput, match=r"keeps its tokenizer: prepare the data with --tokenizer"):
        pretrain(recipe, foreign, back)
    before = checkpoint.read_run(back).model
    with monkeypatch.context() as patch:  # stopped while the import becomes a run with data
        patch.setattr(checkpoint, "_write_facts", stopped)
        with pytest.raises(KeyboardInterrupt):
            pretrain(recipe, data, back)
    receipt = pretrain(recipe, data, back)
    assert receipt["steps"] == 8
    assert abs(receipt["bpb"] - evaluate(trained, ["bpb"])["bpb"]["bpb"]) < 0.02  # it began where the run had ended
    assert checkpoint.read_run(back).model == before
    assert pretrain(recipe, data, back)["steps"] == 8  # the same command again resumes, and finds it complete
    assert evaluate(back, ["bpb"])["bpb"]["bytes"] > 0
    again = tmp_path / "again"
    import_release(exports["fp32"], again)
    assert pretrain(read_recipe(str(again / "config.toml"), ["train.tokens=512"]), data, again)["steps"] == 2


def test_an_fp8_import_is_tuned_served_and_exported(runs: dict[str, Path], tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    lines = [{"prompt": f"Where is fox {n}?", "response": "Under the wall."} for n in range(40)]
    chats.write_text("".join(json.dumps(line) + "\n" for line in lines))
    still = ["schedule.learning_rate=[{until=1.0,value=0.0}]", "schedule.batch_tokens=[{until=1.0,value=256}]"]
    brief = ["train.max_steps=1", "train.dtype=fp32", "train.device=cpu", "stages=[{sequence_length=64}]"]
    sft(runs["V3.1"], chats, tmp_path / "tuned", [*still, *brief])
    assert checkpoint.chats(tmp_path / "tuned")
    assert checkpoint.chats(runs["V3.1"])  # its tokenizer brought a template
    question = [{"role": "user", "content": "Where?"}]
    for run in (runs["V3.1"], tmp_path / "tuned"):
        assert leanseek.load(run).chat(question, Sampling(max_tokens=3)).prompt_tokens > 3
    # At a rate of zero every weight is as it came, but for the sign of zeros, which a step does not keep.
    export_release(runs["V3.1"], tmp_path / "before")
    export_release(tmp_path / "tuned", tmp_path / "after", "fp8")
    before, after = read(tmp_path / "before"), read(tmp_path / "after")
    assert {name: t.dtype for name, t in before.items()} == {name: t.dtype for name, t in after.items()}
    assert [name for name in before if not torch.equal(before[name].float(), after[name].float())] == []
    for file in ("README.md", "generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / "after" / file).read_bytes() == (tmp_path / "before" / file).read_bytes()


def test_the_verbs(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ("export", trained, tmp_path / "out", "--dtype", "bf16"),
        ("import", tmp_path / "out", tmp_path / "run"),
        ("generate", tmp_path / "run", "--prompt", "Ada", "--max-tokens", "3"),
        ("export", tmp_path / "run", tmp_path / "file", "--format", "gguf"),
    ):
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        assert end.value.code == 0
    assert [file.name for file in (tmp_path / "file").iterdir()] == ["model-bf16.gguf"]
    for wrong, said in (
        (("export", tmp_path / "none", tmp_path / "x"), "not a run"),
        (("import", tmp_path / "none", tmp_path / "x"), "no such folder"),
        (("export", trained, tmp_path / "x", "--dtype", "fp4"), "fp4"),
        (("export", trained, tmp_path / "x", "--dtype", "fp8", "--format", "gguf"), "GGUF has no FP8"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in wrong])
        err = capsys.readouterr().err
        assert end.value.code == 2
        assert said in err
        assert err.count("\n") == 1
        assert not (tmp_path / "x").exists()
