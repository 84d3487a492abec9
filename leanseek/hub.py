"""Released checkpoints in and out: DeepSeek-V2, V3, R1 and what shares their architecture.

A release is a folder: `config.json`, a tokenizer, and sharded safetensors. `layout` says of each of its tensors which
of ours it is, or which part of one: experts are single matrices there and stacks here. Both directions go along this
table tensor by tensor, so that memory holds a tensor and not a model; nothing is rounded unless another precision is
asked for.

FP8 weights rest as they came, codes and scales. An export in another precision brings their scales along in `scales/`,
a run keeps them in `released/`: a tensor that they still represent exactly becomes FP8 again with the same bits.
"""

import hashlib
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor

from leanseek import checkpoint
from leanseek.config import BadInput, Config, ModelConfig, explain
from leanseek.data.tokenizer import Tokenizer
from leanseek.model.lora import A, B, delta
from leanseek.model.transformer import Transformer
from leanseek.model.unfold import unfolded, widen
from leanseek.ops.fp8 import FP8, SCALE, dequantise, quantise, scale_shape, scales_of
from leanseek.weightfiles import INDEX, Planned, Stored, open_folder, staged, write_folder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": FP8}
FILE_BYTES = 5_000_000_000

# model_type of a release → its fields here that need not be in its config.json, our own model_type among them.
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        "model_type": "deepseek_v2",
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "norm_topk_prob": False,
    },
    "deepseek_v3": {"model_type": "deepseek_v3"},
    "kimi_k2": {"model_type": "deepseek_v3"},
}
OURS = ("verbatim", "embedding_shares", "value_embeddings")  # of our fields those that no release has
ARCHITECTURES = {"deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}

# What an FP8 release quantises, in its spelling: attention, dense FFN and experts, but no gate, norm or `eh_proj`.
QUANTISED = re.compile(r".*\.(self_attn|mlp|shared_experts|experts\.\d+)\.\w+_proj(_with_mqa)?\.weight")
FP8_BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
QUANTIZATION_CONFIG = {"activation_scheme": "dynamic"} | FP8_BLOCKS
DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # some releases hold what the config says

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHT_FILES = (".safetensors", ".safetensors.index.json")
TOKENIZER_FILES = re.compile(
    r"(tokenizer|special_tokens|added_tokens|vocab|merges|chat_template|tokenization_).*|.*\.model"
)
LARGEST_SIDE_FILE = 64 << 20  # bytes
NOTES = "leanseek.json"  # what a release cannot say of a run; other tools do not look at it

# How an imported model is trained until told otherwise: at the rate V3's pre-training ended with (report §4.2).
TRAINING: dict[str, Any] = {
    "train": {"tokens": 10_000_000, "micro_batch": 1},
    "schedule": {
        "learning_rate": [{"until": 1.0, "value": 7.3e-6}],
        "batch_tokens": [{"until": 1.0, "value": 65536}],
        "bias_speed": [{"until": 1.0, "value": 0.0}],
        "mtp_weight": [{"until": 1.0, "value": 0.1}],
    },
}
LONGEST_ROW = 4096


# ── names ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Place:
    """Where a released tensor is among ours: the only part of a tensor, or one of the matrices of a stack."""

    name: str
    part: int
    parts: int
    shape: tuple[int, ...]  # of the released tensor


def our_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of our model by name, in the model's order; none is allocated."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Transformer(config).state_dict().items()}


def layout(config: ModelConfig) -> dict[str, Place]:
    """Released name → place, for every tensor of a release.

    MTP modules are numbered on from the layers. Each brings a copy of embedding and head, which it shares with the main
    model here: two released tensors then have one place.
    """
    shapes = our_shapes(config)
    places: dict[str, Place] = {}
    for name, shape in shapes.items():
        if stack := re.fullmatch(r"(.+\.experts)\.(gate_up|down)_proj", name):
            matrices = ("gate_proj", "up_proj") if stack[2] == "gate_up" else ("down_proj",)
            parts = shape[0] * len(matrices)
            matrix_shape = (math.prod(shape[:-1]) // parts, shape[-1])
            for part in range(parts):
                expert, matrix = divmod(part, len(matrices))
                released = f"{released_name(stack[1])}.{expert}.{matrices[matrix]}.weight"
                places[released] = Place(name, part, parts, matrix_shape)
        else:
            places[released_name(name)] = Place(name, 0, 1, shape)
    for depth in range(config.num_nextn_predict_layers):
        module = f"model.layers.{config.num_hidden_layers + depth}"
        places[f"{module}.embed_tokens.weight"] = places["model.embed_tokens.weight"]
        places[f"{module}.shared_head.head.weight"] = places["lm_head.weight"]
    return places


def released_name(name: str) -> str:
    """One of our names in released spelling; of a stack of experts, what its matrices' names begin with."""
    name = re.sub(r"^mtp\.(\d+)\.norm\.", r"layers.\1.shared_head.norm.", name)
    name = re.sub(r"^mtp\.(\d+)\.(block\.)?", r"layers.\1.", name)
    return name if name.startswith("lm_head.") else f"model.{name}"


# ── config.json ───────────────────────────────────────────────────────────────────────────────────────────────────


def model_config(released: dict[str, Any], file: Path) -> ModelConfig:
    """The model that a release's config.json describes; keys that mean nothing here are kept. Raises BadInput."""
    family = FAMILIES.get(str(released.get("model_type")))
    if family is None:
        raise BadInput(
            f"{file}: model_type {released.get('model_type')!r} is not read here, only {', '.join(FAMILIES)}"
        )
    released |= _rope(released)
    fields = {name: released[name] for name in ModelConfig.model_fields if name in released and name not in OURS}
    if not fields.get("q_lora_rank"):
        fields["q_lora_rank"] = None  # some write 0
    verbatim = {key: value for key, value in released.items() if key not in fields and value is not None}
    if released["model_type"] != family["model_type"]:
        verbatim["model_type"] = released["model_type"]
    quantization = verbatim.get("quantization_config", QUANTIZATION_CONFIG)
    if not isinstance(quantization, dict) or any(
        quantization.get(key, wanted) != wanted for key, wanted in FP8_BLOCKS.items()
    ):
        raise BadInput(f"{file}: quantization_config: only FP8 in blocks of 128 × 128 is read here")
    try:
        return ModelConfig.model_validate(family | fields | {"model_type": family["model_type"], "verbatim": verbatim})
    except ValidationError as error:
        raise BadInput(f"{file}: {explain(error, ModelConfig)}") from None


def _rope(released: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, also from transformers' newer `rope_parameters`, which leaves."""
    newer = released.pop("rope_parameters", None)
    scaling = released.get("rope_scaling") if newer is None else newer
    if not isinstance(scaling, dict):
        return {"rope_scaling": scaling}
    theta = {} if newer is None else {"rope_theta": scaling.pop("rope_theta", 10000.0)}
    kind = scaling.pop("rope_type", None) or scaling.get("type")
    if kind == "default":
        return theta | {"rope_scaling": None}
    # Whoever reads these files takes an absent mscale for 1 and an absent mscale_all_dim for 0.
    return theta | {"rope_scaling": {"mscale": 1.0, "mscale_all_dim": 0.0} | scaling | {"type": kind}}


def released_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a model whose matrices are stored in `dtype`."""
    fields = config.model_dump(exclude=set(OURS)) | {"num_key_value_heads": config.num_attention_heads}
    released: dict[str, Any] = {"architectures": [ARCHITECTURES[config.model_type]], "use_cache": True}
    released |= fields | config.verbatim
    quantization = QUANTIZATION_CONFIG | released.pop("quantization_config", {})
    computed_in = torch.bfloat16 if dtype == FP8 else dtype
    released["dtype" if "dtype" in released else "torch_dtype"] = str(computed_in).removeprefix("torch.")
    return released | ({"quantization_config": quantization} if dtype == FP8 else {})


# ── import ────────────────────────────────────────────────────────────────────────────────────────────────────────


def import_release(folder: Path, run: Path) -> None:
    """Make RUN from a release: its weights as they are, as a checkpoint of step 0.

    The same call goes on where it was stopped. Raises BadInput, and leaves nothing, for a release that is not whole or
    is not what its config.json says.
    """
    side_files = _side_files(folder)
    config = model_config(_read_json(folder / "config.json"), folder / "config.json")
    tensors, places = open_folder(folder), layout(config)
    kept = {name: stored for name, stored in tensors.items() if name.endswith(SCALE) or DERIVED.fullmatch(name)}
    if (folder / "scales").is_dir():
        kept |= open_folder(folder / "scales")
    _check(folder, config, tensors, places, kept)
    notes = _read_json(folder / NOTES) if (folder / NOTES).is_file() else {}

    needed = sum(stored.nbytes for stored in [*tensors.values(), *kept.values()])
    with staged(run, _fingerprint(folder, tensors), needed) as writing:
        for name in side_files:
            place = "tokenizer" if TOKENIZER_FILES.fullmatch(name) else "released"
            (writing / place).mkdir(exist_ok=True)
            shutil.copyfile(folder / name, writing / place / name)
        _check_tokenizer(folder, config, Tokenizer.load(writing / "tokenizer"))
        with progress(f"import {folder.name}", needed) as advance:
            write_folder(writing / checkpoint.IMPORTED, _ours(config, tensors, places), FILE_BYTES, advance)
            if kept:
                write_folder(writing / "released", _as_they_are(kept), FILE_BYTES, advance)
        chats = bool(notes["chats"]) if "chats" in notes else _has_template(folder)
        checkpoint.create_import(writing, _configuration(folder, config, tensors, notes), chats)


def _ours(config: ModelConfig, tensors: dict[str, Stored], places: dict[str, Place]) -> list[Planned]:
    """Our tensors, put together from the released ones that are their parts; FP8 ones with their scales.

    The scales of a stack of n matrices are [n, r, c].
    """
    parts: dict[str, dict[int, str]] = {}
    for released, place in places.items():
        parts.setdefault(place.name, {}).setdefault(place.part, released)  # of copies the first
    planned = []
    for name, shape in our_shapes(config).items():
        pieces = [parts[name][part] for part in range(len(parts[name]))]
        planned.append(_joined(name, shape, [tensors[piece] for piece in pieces]))
        if planned[-1].dtype == FP8:
            blocks = scale_shape(*places[pieces[0]].shape)
            stack = blocks if len(pieces) == 1 else (len(pieces), *blocks)
            planned.append(_joined(name + SCALE, stack, [tensors[piece + SCALE] for piece in pieces]))
    return planned


def _joined(name: str, shape: tuple[int, ...], pieces: list[Stored]) -> Planned:
    return Planned(name, pieces[0].dtype, shape, [piece.read for piece in pieces])


def _as_they_are(tensors: dict[str, Stored]) -> list[Planned]:
    return [_joined(name, stored.shape, [stored]) for name, stored in tensors.items()]


def _configuration(folder: Path, model: ModelConfig, tensors: dict[str, Stored], notes: dict[str, Any]) -> Config:
    """The configuration of an imported run: training as our own export noted it, else as TRAINING."""
    if "quantization_config" in notes:
        model = model.model_copy(
            update={"verbatim": {"quantization_config": notes["quantization_config"]} | model.verbatim}
        )
    dtype = "fp32" if tensors["lm_head.weight"].dtype == torch.float32 else "bf16"
    sections = {
        "description": f"imported from {folder.resolve().name}",
        "stages": [{"sequence_length": min(LONGEST_ROW, model.max_position_embeddings)}],
        **TRAINING,
        "train": {**TRAINING["train"], "dtype": dtype},
    }
    noted = notes.get("training")
    try:
        return Config.model_validate((noted if isinstance(noted, dict) else sections) | {"model": model.model_dump()})
    except ValidationError as error:
        raise BadInput(f"{folder}: {explain(error, Config)}") from None


def _has_template(folder: Path) -> bool:
    template = "chat_template" in _read_json(folder / "tokenizer_config.json")
    return template or (folder / "chat_template.jinja").is_file()


# ── what an import refuses ────────────────────────────────────────────────────────────────────────────────────────


def _side_files(folder: Path) -> list[str]:
    """The files of a release that hold neither weights nor the model's shape. Raises BadInput."""
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder")
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith("."))
    for name in names:
        if name.endswith(PICKLED):
            raise BadInput(
                f"{folder / name}: a pickled file, which can run code when it is read, and is never opened here: take "
                "the safetensors of this release and remove it"
            )
    if "tokenizer.json" not in names:
        found = next((name for name in ("tiktoken.model", "tokenizer.model", "vocab.json") if name in names), None)
        raise BadInput(
            f"{folder}: has no tokenizer.json"
            + (f", and {found} is not read here" if found else "")
            + ": put one beside the weights (transformers.convert_slow_tokenizer converts the other kinds)"
        )
    mine = ("config.json", NOTES)
    return [
        name
        for name in names
        if name not in mine and not name.endswith(WEIGHT_FILES) and (folder / name).stat().st_size <= LARGEST_SIDE_FILE
    ]


def _check(
    folder: Path, config: ModelConfig, tensors: dict[str, Stored], places: dict[str, Place], kept: dict[str, Stored]
) -> None:
    """Every tensor that the layout names is there, with its shape, its dtype and its scales, and no other one."""
    missing = [name for name in places if name not in tensors]
    modules = tuple(f"model.layers.{config.num_hidden_layers + k}." for k in range(config.num_nextn_predict_layers))
    if missing and missing == [name for name in places if name.startswith(modules)]:
        raise BadInput(
            f"{folder}: the MTP module is missing ({modules[0]}*): to do without, set num_nextn_predict_layers to 0 in "
            "its config.json"
        )
    _refuse(folder, "missing", missing)
    scales = {name + SCALE for name in places if tensors[name].dtype == FP8}
    _refuse(folder, "FP8 without scales:", [name.removesuffix(SCALE) for name in scales if name not in tensors])
    claimed = {*places, *scales}
    _refuse(folder, "nobody claims", [name for name in tensors if name not in claimed and not DERIVED.fullmatch(name)])
    shapes = {name: place.shape for name, place in places.items()}
    for name in kept:
        if name.endswith(SCALE):
            weight = shapes.get(name.removesuffix(SCALE), ())
            shapes[name] = scale_shape(*weight) if len(weight) == 2 else ()
    there = tensors | kept
    wrong = [
        (name, list(there[name].shape), list(shape)) for name, shape in shapes.items() if there[name].shape != shape
    ]
    _refuse(folder, "wrong shape of", [f"{name} ({found}, by the config {wanted})" for name, found, wanted in wrong])
    first: dict[str, str] = {}
    for name, place in places.items():
        other = first.setdefault(place.name, name)
        for a, b in ((name, other), (name + SCALE, other + SCALE)):
            if a in tensors and b in tensors and tensors[a].dtype != tensors[b].dtype:
                raise BadInput(f"{folder}: {a} is in {tensors[a].dtype}, {b} in {tensors[b].dtype}: not the same")
        if place == places[other] and name != other and not tensors[name].same_bits(tensors[other]):
            raise BadInput(f"{folder}: {name} differs from {other}, of which it should be a copy")


def _check_tokenizer(folder: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
    theirs, ends = (tokenizer.bos_id, tokenizer.eos_id), (config.bos_token_id, config.eos_token_id)
    if tokenizer.vocab_size > config.vocab_size or theirs != ends:
        raise BadInput(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} ids, with BOS and EOS {theirs}; its config.json says "
            f"{config.vocab_size}, with {ends}: they do not belong together: mend the one that is wrong"
        )


def _refuse(folder: Path, what: str, names: Iterable[str]) -> None:
    if names := sorted(names):
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise BadInput(f"{folder}: {what} {', '.join(names[:3])}{more}")


# ── export ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Weights:
    """The newest weights of a run, or their average, in released pieces, one at a time, adapters merged.

    Raises BadInput.
    """

    def __init__(self, run: Path, averaged: bool = False) -> None:
        self.run, self.config = run, checkpoint.read_run(run)
        if checkpoint.scores(run):
            raise BadInput(f"{run}: is a reward model, which other tools have no place for: export what it began with")
        found = checkpoint.newest_weights(run, averaged)
        self.adapters, self.lora = found.adapters, found.lora
        self.tensors = open_folder(found.folder)
        self.model = unfolded(self.config.model)  # as it is released
        self.shapes = {name: place.shape for name, place in layout(self.model).items()}
        self.places = {name: place for name, place in layout(self.config.model).items() if name in self.shapes}
        self.kept = open_folder(run / "released") if (run / "released" / INDEX).is_file() else {}
        quantization = self.config.model.verbatim.get("quantization_config", {})
        self.power_of_two = quantization.get("scale_fmt") == "ue8m0"
        self._in_fp8 = lru_cache(maxsize=1)(self._quantised)  # codes and scales are asked for one after the other

    def dtype(self, released: str) -> torch.dtype:
        """As the tensor is stored."""
        return self.tensors[self.places[released].name].dtype

    def read(self, released: str, suffix: str = "") -> Tensor:
        """The tensor in the precision it is stored in, or with SCALE the scales beside it."""
        if not suffix and (self._adapted(released) or self.config.model.brings):
            return self.values(released, self.dtype(released))
        return self._stored(released, suffix)

    def values(self, released: str, dtype: torch.dtype) -> Tensor:
        """The tensor in FP32 or BF16, whatever it is stored in."""
        values, adapter = self._stored(released), self._adapter(released)
        if self.dtype(released) == FP8:
            values = dequantise(values, self._stored(released, SCALE), torch.float32 if adapter else dtype)
        if adapter:
            assert self.lora is not None
            values = values.float() + delta(*adapter, self.lora)
        if self.config.model.brings:
            ours = self.places[released].name
            values = widen(ours, values.float(), self.config.model, lambda name: self.tensors[name].read().float())
        return values.to(dtype)

    def codes(self, released: str) -> Tensor:
        """The tensor in FP8."""
        return self._in_fp8(released)[0]

    def scales(self, released: str, dtype: torch.dtype) -> Tensor:
        """The scales that belong to `codes`."""
        return self._in_fp8(released)[1].to(dtype)

    def _stored(self, released: str, suffix: str = "") -> Tensor:
        place = self.places[released]
        return self.tensors[place.name + suffix].read(place.part, place.parts)

    def _adapted(self, released: str) -> bool:
        return self.places[released].name.removesuffix(".weight") + A in self.adapters

    def _adapter(self, released: str) -> tuple[Tensor, Tensor] | None:
        """A [r, in] and B [out, r] of the tensor, of a stack those of its part; None where it has no adapter."""
        if not self._adapted(released):
            return None
        place = self.places[released]
        name = place.name.removesuffix(".weight")
        experts = math.prod(self.adapters[name + A].shape[:-2])
        a = self.adapters[name + A].read(place.part * experts // place.parts, experts)
        b = self.adapters[name + B].read(place.part, place.parts)
        return a.view(-1, a.shape[-1]), b.view(-1, b.shape[-1])

    def _quantised(self, released: str) -> tuple[Tensor, Tensor]:
        """With the scales the tensor came with where they still represent every value, else with fresh ones."""
        if self.dtype(released) == FP8 and not self._adapted(released):
            return self._stored(released), self._stored(released, SCALE)
        values = self.values(released, torch.float32)
        if carried := self.kept.get(released + SCALE):
            scales = carried.read()
            codes = quantise(values, scales)
            exact = dequantise(codes, scales)
            if torch.equal(values, exact) or torch.equal(values, exact.bfloat16().float()):
                return codes, scales
        scales = scales_of(values, power_of_two=self.power_of_two)
        return quantise(values, scales), scales


def export_release(run: Path, folder: Path, dtype: str | None = None, averaged: bool = False) -> None:
    """Write a run's newest checkpoint, or its average, as a release, as it is stored or in `dtype`: fp32, bf16 or fp8.

    The same call goes on where it was stopped. The router's bias is FP32 in all of them. Raises BadInput.
    """
    weights = Weights(run, averaged)
    model = weights.config.model
    stored = {weights.dtype(name) for name in weights.places}
    wanted = DTYPES[dtype] if dtype else FP8 if FP8 in stored else weights.dtype("lm_head.weight")
    planned = _released(weights, wanted, as_stored=dtype is None)
    scales = {} if wanted == FP8 else {name: kept for name, kept in weights.kept.items() if name.endswith(SCALE)}
    needed = sum(tensor.nbytes for tensor in planned) + sum(kept.nbytes for kept in scales.values())
    with staged(folder, f"{_fingerprint(run, weights.tensors | weights.adapters)} {dtype}", needed) as writing:
        with progress(f"export {run.name}", needed) as advance:
            write_folder(writing, planned, FILE_BYTES, advance)
            if scales:
                write_folder(writing / "scales", _as_they_are(scales), FILE_BYTES, advance)
        for kept_in in (run / "released", run / "tokenizer"):
            for file in kept_in.iterdir() if kept_in.is_dir() else ():
                if file.is_file() and not file.name.endswith(WEIGHT_FILES):
                    shutil.copyfile(file, writing / file.name)
        _write_json(writing / "config.json", released_config(weights.model, wanted))
        training = weights.config.model_dump(mode="json", exclude={"model", "lora", "teacher"})
        notes = {"chats": checkpoint.chats(run), "training": training}
        if "quantization_config" in model.verbatim:
            notes["quantization_config"] = model.verbatim["quantization_config"]
        _write_json(writing / NOTES, notes)


def _released(weights: Weights, wanted: torch.dtype, as_stored: bool) -> list[Planned]:
    """Every tensor of the release, converted when its turn comes."""
    came_in_fp8 = {name.removesuffix(SCALE) for name in weights.kept if name.endswith(SCALE)}
    planned = []
    for name, shape in weights.shapes.items():
        stored = weights.dtype(name)
        if as_stored:
            dtype = stored
        elif name.endswith(".e_score_correction_bias"):
            dtype = torch.float32  # steps of 0.001 vanish in BF16
        elif wanted == FP8:
            quantised = name in came_in_fp8 if came_in_fp8 else QUANTISED.fullmatch(name)
            dtype = FP8 if quantised else torch.bfloat16
        else:
            dtype = wanted
        if dtype == FP8:
            scale_dtype = weights.kept[name + SCALE].dtype if came_in_fp8 else torch.float32
            blocks, scales = scale_shape(*shape), partial(weights.scales, name, scale_dtype)
            planned.append(Planned(name, FP8, shape, [partial(weights.codes, name)]))
            planned.append(Planned(name + SCALE, scale_dtype, blocks, [scales]))
        else:
            read = partial(weights.read, name) if dtype == stored else partial(weights.values, name, dtype)
            planned.append(Planned(name, dtype, shape, [read]))
    return planned + _as_they_are({name: kept for name, kept in weights.kept.items() if DERIVED.fullmatch(name)})


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _fingerprint(folder: Path, tensors: dict[str, Stored]) -> str:
    """Changes when the files of these tensors do."""
    files = {stored.file for stored in tensors.values()}
    facts = sorted((str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return hashlib.sha256(json.dumps([str(folder), facts]).encode()).hexdigest()


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over bytes, where somebody watches."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=total)
        yield lambda amount: bar.advance(task, amount)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise BadInput(f"{file}: no such file") from None
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise BadInput(f"{file}: damaged: not a JSON object")
    return content


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
