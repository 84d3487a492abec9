"""LoRA: adapted is merged, frozen is frozen, and PEFT reads what we write."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import DeepseekV3ForCausalLM

import leanseek
import leanseek.peft
from leanseek import checkpoint
from leanseek.config import BadInput, LoraConfig, read_recipe
from leanseek.hub import export_release, import_release
from leanseek.model.lora import A, Adapted, B, Frozen, adapt, adapted_name, delta, merge
from leanseek.model.transformer import Transformer
from leanseek.ops.experts import grouped_linear
from leanseek.ops.fp8 import FP8, dequantise, quantise, scales_of
from leanseek.ops.frozen import at_rest, frozen_linear, wide
from leanseek.peft import adapter_config, write_adapter
from leanseek.plan.count import adaptation, adapted_bytes
from leanseek.plan.memory import trainer_bytes
from leanseek.post.sft import sft
from leanseek.train.pretrain import pretrain
from tests.oracle import ours, sample, tiny
from tests.pool import Pool
from tests.runs import make_run, model_of
from tests.runs import tokenizer as small_tokenizer
from tests.tiny import RECIPE, make_data

ALL = LoraConfig(rank=3, alpha=6, experts=True, base="unchanged")
SHAPES: dict[str, dict[str, Any]] = {
    "V3": {"num_nextn_predict_layers": 1, "first_k_dense_replace": 1},
    "V2-Lite": {
        "model_type": "deepseek_v2",
        "q_lora_rank": None,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "first_k_dense_replace": 1,
    },
    "tokens that bring": {"value_embeddings": True, "embedding_shares": True, "num_nextn_predict_layers": 1},
}


# ── weights at rest ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape", [(200, 300), (128, 256), (3, 150, 20)])
def test_codes_are_the_nearest_ones(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.rand(shape[-1])
    for dtype in (FP8, torch.int8):
        codes, scales = at_rest(values, dtype)
        assert codes.dtype == dtype
        back = wide(codes, scales, torch.float32)
        spread = torch.stack([s.repeat_interleave(128, 0)[: shape[-2]].repeat_interleave(128, 1)[:, : shape[-1]]
                              for s in scales.view(-1, *scales.shape[-2:])]).view(shape)  # fmt: skip
        if dtype == torch.int8:
            assert ((back - values).abs() <= 0.5001 * spread).all()
        else:  # half a unit in the last of three places, or of the smallest there is
            assert ((back - values).abs() <= (values.abs() / 16).clamp(min=spread * 2**-10) * 1.001).all()
    if len(shape) == 2:  # the same codes and scales as released weights have
        codes, scales = at_rest(values, FP8)
        assert torch.equal(scales, scales_of(values))
        assert torch.equal(codes.view(torch.uint8), quantise(values, scales).view(torch.uint8))
        assert torch.equal(wide(codes, scales, torch.float32), dequantise(codes, scales))
    assert not at_rest(torch.zeros(4, 4), torch.int8)[0].any()


def test_scales_by_matrix_of_a_stack_are_read_as_released_files_join_them() -> None:
    gates = [torch.randn(130, 20) for _ in range(4)]  # gate and up of two experts
    codes, scales = zip(*(at_rest(gate, FP8) for gate in gates), strict=True)
    stack = torch.cat(codes).view(2, 260, 20)
    each = [dequantise(*pair) for pair in zip(codes, scales, strict=True)]
    assert torch.equal(wide(stack, torch.stack(scales), torch.float32), torch.cat(each).view(2, 260, 20))


@pytest.mark.parametrize("stack", [False, True])
def test_a_frozen_product_is_the_wide_one_and_keeps_the_codes_alone(stack: bool) -> None:
    dice = torch.Generator().manual_seed(1)
    values = torch.randn((4, 24, 16) if stack else (24, 16), generator=dice)
    codes, scales = at_rest(values, torch.int8)
    weight = wide(codes, scales, torch.float32)
    counts = torch.tensor([3, 0, 5, 2]) if stack else None
    x = torch.randn(10, 16, generator=dice, requires_grad=True)
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append((tensor.dtype, *tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = frozen_linear(x, codes, scales, counts)
    assert kept[0] == (torch.int8, *codes.shape)
    assert all(dtype != torch.float32 or shape == list(scales.shape) for dtype, *shape in kept)
    wanted = F.linear(x, weight) if counts is None else grouped_linear(x, weight, counts)
    torch.testing.assert_close(y, wanted, rtol=1e-6, atol=1e-5)
    ours_, theirs = (torch.autograd.grad((out * y.detach()).sum(), x)[0] for out in (y, wanted))
    torch.testing.assert_close(ours_, theirs, rtol=1e-5, atol=1e-4)


# ── the model ─────────────────────────────────────────────────────────────────────────────────────────────────────


def adapted_of(model: Transformer, config: LoraConfig, on_meta: bool = False) -> Transformer:
    """Another model with the same weights, adapted; its adapters say something."""
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.device("meta" if on_meta else "cpu"):
        other = Transformer(model.config, model.dtype)
    adapt(other, config, lambda name: (own[name], None), torch.Generator().manual_seed(0))
    dice = torch.Generator().manual_seed(5)
    for name, parameter in other.named_parameters():
        if name.endswith(B):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=dice, dtype=model.dtype)
        elif name.endswith(A):
            parameter.data = parameter.data.to(model.dtype)
    return other


def outputs(model: Transformer) -> Tensor:
    ids, positions = sample(model.config, 2, 12)
    assert model.lm_head is not None
    with torch.no_grad():
        hidden = model.eval()(ids, positions)
        states = [hidden, *model.predict_further(hidden, ids, positions)]
        return torch.cat([model.lm_head(state).flatten() for state in states])


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("base", ["unchanged", "fp8", "int8"])
def test_merged_is_adapted(name: str, base: str) -> None:
    plain = ours(tiny(**SHAPES[name]), dtype=torch.float64)
    lora = ALL.model_copy(update={"base": base})
    adapted = adapted_of(plain, lora, on_meta=True)
    before = outputs(plain)
    for frozen_name, module in adapted.named_modules():  # what rests in 8 bits is what the plain model shall have too
        if isinstance(module, Frozen):
            own = frozen_name.removesuffix(".frozen")
            plain.get_parameter(adapted_name(own)).data = wide(module.codes, module.scales, torch.float64).clone()
    at_base = outputs(plain)
    merge_in_double(plain, dict(adapted.state_dict()), lora)
    after = outputs(plain)
    torch.testing.assert_close(outputs(adapted), after, rtol=1e-9, atol=1e-9)
    assert (after - at_base).abs().max() > 0.1  # the adapters say something
    assert torch.equal(before, at_base) == (base == "unchanged")


def merge_in_double(model: Transformer, adapters: dict[str, Tensor], lora: LoraConfig) -> None:
    for name, a in adapters.items():
        if name.endswith(A):
            model.get_parameter(adapted_name(name)).data += lora.alpha / lora.rank * (adapters[name[: -len(A)] + B] @ a)


def test_merging_is_that_sum_in_fp32() -> None:
    plain, twin = (ours(tiny(**SHAPES["V3"])) for _ in range(2))
    adapters = dict(adapted_of(plain, ALL).state_dict())
    merge(plain, adapters, ALL)
    merge_in_double(twin, adapters, ALL)
    for name, tensor in twin.state_dict().items():
        torch.testing.assert_close(plain.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_only_adapters_learn_and_only_they_are_saved(name: str) -> None:
    plain = ours(tiny(**SHAPES[name]))
    for lora in (ALL, ALL.model_copy(update={"experts": False, "modules": ("o_proj", "up_proj"), "base": "int8"})):
        adapted = adapted_of(plain, lora).train()
        trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
        assert trained == set(adapted.state_dict())
        assert {n.rpartition(".")[2] for n in trained} == {A[1:], B[1:]}
        parts = adaptation(plain.config, lora)
        counted = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        assert counted == parts.adapters
        codes = [m.codes for m in adapted.modules() if isinstance(m, Frozen)]
        assert sum(tensor.numel() for tensor in codes) == parts.frozen
        ids, positions = sample(adapted.config, 2, 12)
        assert adapted.lm_head is not None
        hidden = adapted(ids, positions)
        states = [hidden, *adapted.predict_further(hidden, ids, positions)]
        sum(adapted.lm_head(state).logsumexp(-1).sum() for state in states).backward()  # type: ignore[union-attr]
        still = [n for n, p in adapted.named_parameters() if p.requires_grad and not p.grad.abs().sum() > 0]  # type: ignore[union-attr]
        assert still == []
        assert all(p.grad is None for p in adapted.parameters() if not p.requires_grad)
        assert any(isinstance(m, Adapted) for m in adapted.modules())


def test_gradients_are_those_of_the_merged_weights() -> None:
    """dL/dA = s Bᵀ G and dL/dB = s G Aᵀ, where G is the gradient of the merged matrix; for stacks expert by expert."""
    plain = ours(tiny(**SHAPES["V3"]), dtype=torch.float64)
    adapted = adapted_of(plain, ALL)
    adapters = dict(adapted.state_dict())
    merge_in_double(plain, adapters, ALL)
    ids, positions = sample(plain.config, 2, 12)
    for model in (plain, adapted):
        assert model.lm_head is not None
        model.train()
        hidden = model(ids, positions)
        states = [hidden, *model.predict_further(hidden, ids, positions)]
        sum(model.lm_head(state).logsumexp(-1).sum() for state in states).backward()  # type: ignore[union-attr]
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            whole = plain.get_parameter(adapted_name(name)).grad
            own = name.removesuffix(A).removesuffix(B)
            a, b = adapters[own + A], adapters[own + B]
            wanted = b.mT @ whole if name.endswith(A) else whole @ a.mT
            torch.testing.assert_close(parameter.grad, 2 * wanted, rtol=1e-8, atol=1e-8)


def test_memory_is_what_the_planner_says() -> None:
    config = read_recipe("v2-lite", ("train.dtype=bf16", "train.micro_batch=1", "lora.rank=16", "lora.base=int8"))
    assert config.lora is not None
    held = adapted_bytes(config.model, config.lora)
    assert 16e9 < held < 17.5e9
    small = config.model_copy(update={"stages": (config.stages[0].model_copy(update={"sequence_length": 1024}),)})
    long = config.model_copy(update={"stages": (config.stages[0].model_copy(update={"sequence_length": 8192}),)})
    assert trainer_bytes(small).total < 24e9
    assert trainer_bytes(long).total < 80e9
    model = adapted_of(ours(tiny(**SHAPES["V3"])), ALL)
    parts = adaptation(model.config, ALL)
    there = sum(t.nbytes for m in model.modules() for t in (*m.parameters(recurse=False), *m.buffers(recurse=False)))
    routers = sum(t.nbytes for r in model.routers().values() for t in (r.load, r.balance_weight, r.balance_loss))
    assert adapted_bytes(model.config, ALL, wide=4) == there - routers + 12 * parts.adapters


# ── a run ─────────────────────────────────────────────────────────────────────────────────────────────────────────

WORDS = ("small", "fox", "walked", "over", "the", "long", "wall", "and", "said", "nothing", "rain", "came", "slept")
QUICK = (
    "train.eval_every=1000",
    "train.dtype=fp32",
    "optimizer.name=adamw",
    "schedule.batch_tokens=[{until=1,value=96}]",
    "train.tokens=960",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vocabulary = small_tokenizer()
    changes = {"num_nextn_predict_layers": 1, "first_k_dense_replace": 1}
    return make_run(tmp_path_factory.mktemp("base") / "run", model_of(vocabulary, **changes), vocabulary)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = [{"prompt": f"{i}", "response": " ".join(WORDS[i % 7 : i % 7 + 4])} for i in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def tuned_run(base: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "run"
    receipt = sft(base, chats, out, (*QUICK, "lora.rank=4", "lora.experts=true", "stages.0.sequence_length=48"))
    assert receipt["ended"] == "complete"
    assert receipt["after"]["bpb"] < receipt["before"]["bpb"]
    lora = checkpoint.read_run(out).lora
    assert lora is not None
    assert lora.base == "int8"
    assert receipt["params_trained"] == adaptation(checkpoint.read_run(out).model, lora).adapters
    return out


def test_a_checkpoint_holds_the_adapters_alone_and_loading_merges_them(base: Path, tuned_run: Path) -> None:
    newest = checkpoint.newest(tuned_run, pytest.fail)
    assert newest is not None
    stored = load_file(next(newest.model.glob("*.safetensors")))
    assert all(name.endswith((A, B)) for name in stored)
    assert any(".experts." in name for name in stored)
    model, before = leanseek.load_model(tuned_run), leanseek.load_model(base)
    lora = checkpoint.read_run(tuned_run).lora
    assert lora is not None
    for name, tensor in before.state_dict().items():
        adapter = next((n for n in stored if n.endswith(A) and adapted_name(n) == name), None)
        if adapter is not None:
            tensor = tensor + delta(stored[adapter], stored[adapter[: -len(A)] + B], lora)
            assert not torch.equal(tensor, before.state_dict()[name])
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=1e-6)


def test_adapters_where_tokens_bring_something_are_merged_on_export(chats: Path, tmp_path: Path) -> None:
    """The base is exported wider than the adapters are, so that there are none for PEFT."""
    vocabulary = small_tokenizer()
    base = make_run(tmp_path / "base", model_of(vocabulary, **SHAPES["tokens that bring"]), vocabulary)
    sft(base, chats, tmp_path / "tuned", (*QUICK, "lora.rank=4", "lora.base=unchanged", "stages.0.sequence_length=48"))
    assert not (tmp_path / "tuned" / "adapter").exists()
    export_release(tmp_path / "tuned", tmp_path / "merged", "fp32")
    model, before = (leanseek.load_model(run).eval() for run in (tmp_path / "tuned", base))
    ids, positions = sample(model.config, 2, 20)
    assert model.lm_head is not None
    assert before.lm_head is not None
    with torch.no_grad():
        merged = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(ids).logits
        wanted, untuned = model.lm_head(model(ids, positions)), before.lm_head(before(ids, positions))
    assert (wanted - untuned).abs().max() > 1e-3 * wanted.abs().max()
    assert (merged - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers so
def test_export_merges_and_peft_on_the_base_agrees(base: Path, tuned_run: Path, tmp_path: Path) -> None:
    export_release(tuned_run, tmp_path / "merged", "fp32")
    export_release(base, tmp_path / "base", "fp32")
    model = leanseek.load_model(tuned_run).eval()
    ids, positions = sample(model.config, 2, 20)
    assert model.lm_head is not None
    with torch.no_grad():
        wanted, before = (m.lm_head(m(ids, positions)) for m in (model, leanseek.load_model(base).eval()))
        merged = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(ids).logits
        theirs = peft_logits(tmp_path / "base", tuned_run / "adapter", ids)
    scale = wanted.abs().max()
    assert (wanted - before).abs().max() > 1e-3 * scale  # it learnt something
    assert (merged - wanted).abs().max() < 1e-5 * scale  # FP32, sums in another order
    assert (theirs - wanted).abs().max() < 1e-5 * scale
    import_release(tmp_path / "merged", tmp_path / "back")
    assert checkpoint.read_run(tmp_path / "back").lora is None
    state = leanseek.load_model(tmp_path / "back").state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    for dtype in ("bf16", "fp8"):
        export_release(tuned_run, tmp_path / dtype, dtype)
        import_release(tmp_path / dtype, tmp_path / f"{dtype}-run")
        state = leanseek.load_model(tmp_path / f"{dtype}-run").state_dict()
        near = max(
            float((state[n].float() - t).abs().max() / t.abs().max()) for n, t in model.state_dict().items() if t.any()
        )
        assert near < {"bf16": 2**-8, "fp8": 2**-4}[dtype]


def peft_logits(base: Path, adapter: Path, ids: Tensor) -> Tensor:
    model = DeepseekV3ForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(model, adapter)(ids).logits


def _experts_slowest(adapter: str, tensor: Tensor, right: Any = leanseek.peft._their_shape) -> Tensor:
    swapped = tensor.ndim == 3 and adapter.endswith(B)
    return tensor.permute(1, 0, 2).flatten(1).contiguous() if swapped else right(adapter, tensor)


def _not_scaled(lora: LoraConfig, base: str) -> dict[str, Any]:
    return adapter_config(lora, base) | {"lora_alpha": lora.rank}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("fault", [None, ("_their_shape", _experts_slowest), ("adapter_config", _not_scaled)])
def test_faults_in_the_layout_are_seen(
    fault: Any, base: Path, tuned_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_release(base, tmp_path / "base", "fp32")
    shutil.copytree(tuned_run, tmp_path / "tuned")
    if fault is not None:
        monkeypatch.setattr(leanseek.peft, *fault)
    adapter = write_adapter(tmp_path / "tuned", base)
    model = leanseek.load_model(tuned_run).eval()
    ids, positions = sample(model.config, 2, 20)
    assert model.lm_head is not None
    with torch.no_grad():
        wanted = model.lm_head(model(ids, positions))
    apart = (peft_logits(tmp_path / "base", adapter, ids) - wanted).abs().max() / wanted.abs().max()
    assert (apart < 1e-5) == (fault is None)


def test_stopping_changes_nothing_and_the_base_must_stay(base: Path, chats: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    asked = (*QUICK, "lora.rank=2", "lora.base=fp8", "stages.0.sequence_length=48")
    sft(copy, chats, tmp_path / "whole", asked)
    for limit in (4, "none"):
        sft(copy, chats, tmp_path / "parts", (*asked, f"train.max_steps={limit}"))
    ours_, theirs = (leanseek.load_model(tmp_path / name).state_dict() for name in ("parts", "whole"))
    assert [name for name in theirs if not torch.equal(ours_[name], theirs[name])] == []
    with pytest.raises(BadInput, match="holds adapters itself: export it"):
        sft(tmp_path / "whole", chats, tmp_path / "again", asked)
    sft(tmp_path / "whole", chats, tmp_path / "all", (*QUICK, "stages.0.sequence_length=48", "train.max_steps=1"))
    with pytest.raises(BadInput, match="holds no adapters"):
        write_adapter(tmp_path / "all", copy)
    sft(copy, chats, tmp_path / "half", (*asked, "train.max_steps=2"))
    make_run(tmp_path / "other", model_of(small_tokenizer(), first_k_dense_replace=1), small_tokenizer())
    shutil.rmtree(copy / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints", copy / "checkpoints")  # the base was trained on, or is another
    with pytest.raises(BadInput, match=r"holds adapters of .* no longer there as it was"):
        sft(copy, chats, tmp_path / "half", asked)
    shutil.rmtree(copy)
    with pytest.raises(BadInput, match=r"holds adapters of .* no longer there as it was"):
        leanseek.load_model(tmp_path / "whole")


def tunes(rank: int, world: int, base: Path, chats: Path, out: Path, *overrides: str) -> dict[str, Any]:
    asked = ("lora.rank=4", "lora.experts=true", "stages.0.sequence_length=48", "train.micro_batch=2", *overrides)
    return sft(base, chats, out, (*QUICK, *asked))


def test_ranks_train_the_adapters_that_one_process_trains(pool: Pool, base: Path, chats: Path, tmp_path: Path) -> None:
    smooth = "optimizer.eps=1e-3"  # else AdamW makes whole steps of gradients that are nothing but rounding
    one = tunes(0, 1, base, chats, tmp_path / "one", smooth)
    many = pool.run(3, tunes, base, chats, tmp_path / "many", smooth)
    assert many[0]["params_trained"] == one["params_trained"]
    assert many[0]["bpb"] == pytest.approx(one["bpb"], rel=1e-4)
    ours, theirs = (adapters_of(tmp_path / name) for name in ("many", "one"))
    learnt = max(float(tensor.abs().max()) for name, tensor in theirs.items() if name.endswith(B))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-3 * learnt, msg=name)
    written = [load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("many", "one")]
    assert {name: t.shape for name, t in written[0].items()} == {name: t.shape for name, t in written[1].items()}
    pool.run(3, tunes, base, chats, tmp_path / "stopped", smooth, "train.max_steps=2")
    pool.run(3, tunes, base, chats, tmp_path / "stopped", smooth)
    stopped = adapters_of(tmp_path / "stopped")
    assert all(torch.equal(tensor, stopped[name]) for name, tensor in ours.items())


def adapters_of(run: Path) -> dict[str, Tensor]:
    newest = checkpoint.newest(run, pytest.fail)
    assert newest is not None
    return {name: tensor for file in newest.model.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_adapters_are_for_trained_weights(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="beside weights that are trained already"):
        pretrain(read_recipe(str(RECIPE), ("lora.rank=4",)), make_data(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("lora.rank=0", "lora.rank"),
        ("lora.alpha=4", "lora.rank"),
        ('lora.modules=["oproj"]', "no layer is called 'oproj' (did you mean 'o_proj'?)"),
        ("schedule.bias_speed=[{until=1,value=0.001}]", "beside adapters nothing changes"),
        ("optimizer.qk_clip=100", "beside adapters nothing changes"),
        ("mesh.ep=2", "take mesh.dp alone"),
    ],
)
def test_adapters_that_make_no_sense_are_refused(
    override: str, error: str, base: Path, chats: Path, tmp_path: Path
) -> None:
    asked = () if override == "lora.alpha=4" else ("lora.rank=4",)
    with pytest.raises(BadInput) as told:
        sft(base, chats, tmp_path / "out", (*asked, override))
    assert error in str(told.value)
    assert not (tmp_path / "out").exists()
