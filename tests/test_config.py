"""Strict reading: every mistake is one line that names its place; what is right comes back as it was written."""

from pathlib import Path
from typing import Any

import pytest

from leanseek.config import BadInput, Config, differences, parse, read_config, read_recipe, recipe_names, to_toml

# ── published shapes ──────────────────────────────────────────────────────────────────────────────────────────────

PUBLISHED = """
field                        v2-lite      v2                    v3
model_type                   deepseek_v2  deepseek_v2           deepseek_v3
vocab_size                   102400       102400                129280
hidden_size                  2048         5120                  7168
num_hidden_layers            27           60                    61
first_k_dense_replace        1            1                     3
intermediate_size            10944        12288                 18432
moe_intermediate_size        1408         1536                  2048
num_attention_heads          16           128                   128
num_key_value_heads          16           128                   128
q_lora_rank                  None         1536                  1536
kv_lora_rank                 512          512                   512
qk_nope_head_dim             128          128                   128
qk_rope_head_dim             64           64                    64
v_head_dim                   128          128                   128
n_routed_experts             64           160                   256
n_shared_experts             2            2                     1
num_experts_per_tok          6            6                     8
n_group                      1            8                     8
topk_group                   1            3                     4
topk_method                  greedy       group_limited_greedy  noaux_tc
scoring_func                 softmax      softmax               sigmoid
norm_topk_prob               False        False                 True
routed_scaling_factor        1.0          16.0                  2.5
num_nextn_predict_layers     0            0                     1
rms_norm_eps                 1e-06        1e-06                 1e-06
rope_theta                   10000.0      10000.0               10000.0
bos_token_id                 100000       100000                0
eos_token_id                 100001       100001                1
hidden_act                   silu         silu                  silu
attention_bias               False        False                 False
attention_dropout            0.0          0.0                   0.0
tie_word_embeddings          False        False                 False
moe_layer_freq               1            1                     1
initializer_range            0.02         0.02                  0.02
"""
COLUMNS = PUBLISHED.split("\n")[1].split()[1:]


@pytest.mark.parametrize("row", PUBLISHED.strip().split("\n")[1:], ids=lambda row: row.split()[0])
def test_recipes_have_the_published_shapes(row: str) -> None:
    field, *values = row.split()
    assert {name: str(getattr(read_recipe(name).model, field)) for name in COLUMNS} == dict(
        zip(COLUMNS, values, strict=True)
    )


def test_v3_trains_as_published() -> None:
    v3 = read_recipe("v3")
    assert v3.train.tokens == 14_800_000_000_000
    assert (v3.train.init_std, v3.train.balance_loss_alpha) == (0.006, 1e-4)
    assert (v3.optimizer.name, v3.optimizer.beta1, v3.optimizer.beta2) == ("adamw", 0.9, 0.95)
    assert (v3.optimizer.weight_decay, v3.optimizer.clip) == (0.1, 1.0)
    rate = [(piece.until, piece.value, piece.shape) for piece in v3.schedule.learning_rate]
    assert rate == [
        (25.2e9, 2.2e-4, "linear"),
        (10e12, 2.2e-4, "constant"),
        (14.3e12, 2.2e-5, "cosine"),
        (14.633e12, 2.2e-5, "constant"),
        (14.8e12, 7.3e-6, "constant"),
    ]
    ramp, flat = v3.schedule.batch_tokens
    assert (ramp.start, ramp.value, ramp.until, flat.value) == (3072 * 4096, 15360 * 4096, 469e9, 15360 * 4096)
    assert [(piece.until, piece.value) for piece in v3.schedule.bias_speed] == [(14.3e12, 0.001), (14.8e12, 0.0)]
    assert [(piece.until, piece.value) for piece in v3.schedule.mtp_weight] == [(10e12, 0.3), (14.8e12, 0.1)]
    assert (v3.data.fim_rate, v3.stages[0].sequence_length) == (0.1, 4096)


# ── writing and reading back ──────────────────────────────────────────────────────────────────────────────────────


def test_recipes_are_listed_smallest_first() -> None:
    assert recipe_names()[:2] == ["nano", "demo"]
    assert {"v2-lite", "v2", "v3"} < set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_what_is_written_reads_back_equal(name: str, tmp_path: Path) -> None:
    config = read_recipe(name)
    (tmp_path / "config.toml").write_text(to_toml(config), encoding="utf-8")
    assert read_config(tmp_path / "config.toml") == config
    assert read_recipe(str(tmp_path / "config.toml")) == config


def test_everything_optional_reads_back_equal() -> None:
    config = read_recipe(
        "nano",
        [
            "description=five % “quoted” \\ words",
            "model.rope_scaling={factor = 40, original_max_position_embeddings = 64, mscale = 0.707}",
            "model.verbatim={quantization_config = {fmt = 'e4m3', weight_block_size = [128, 128]}, ep_size = 1}",
            "model.q_lora_rank=null",
            "train.max_seconds=1.5",
            "optimizer.qk_clip=100",
            "stages.0.mixture={books = 2, 'a b' = 0.5}",
        ],
    )
    assert config.description == "five % “quoted” \\ words"
    assert parse(to_toml(config), "here") == config


# ── overrides ─────────────────────────────────────────────────────────────────────────────────────────────────────


def value_at(config: Config, key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        if isinstance(node, dict):
            node = node[part]
        else:
            node = node[int(part)] if isinstance(node, tuple) else getattr(node, part)
    return node


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.seed=7", 7),
        (" train.seed = 7 ", 7),
        ("train.tokens=1e6", 1_000_000),
        ("train.compile=true", True),
        ("train.dtype=bf16", "bf16"),
        ("train.dtype='bf16'", "bf16"),
        ("train.max_steps=null", None),
        ("model.q_lora_rank=none", None),
        ("model.rms_norm_eps=1e-5", 1e-5),
        ("description=two words = more", "two words = more"),
        ("schedule.learning_rate.1.value=0.5", 0.5),
        ("schedule.learning_rate.2.shape=cosine", "cosine"),
        ("stages.0.sequence_length=64", 64),
        ("stages.0.mixture.books=0.25", 0.25),
        ("model.verbatim.ep_size=1", 1),
    ],
)
def test_an_override_lands_where_it_says(override: str, value: object) -> None:
    plain, config = read_recipe("nano"), read_recipe("nano", [override])
    key = override.partition("=")[0].strip()
    assert value_at(config, key) == value
    assert type(value_at(config, key)) is type(value)
    assert {line.partition(":")[0] for line in differences(plain, config)} <= {key, key.rpartition(".")[0]}


def test_a_whole_list_can_be_laid_over() -> None:
    stages = "stages=[{sequence_length = 32, share = 0.75}, {sequence_length = 256, share = 0.25}]"
    assert [stage.sequence_length for stage in read_recipe("nano", [stages]).stages] == [32, 256]
    later = read_recipe("nano", [stages, "stages.1.sequence_length=128"])
    assert [stage.sequence_length for stage in later.stages] == [32, 128]


def test_differences_name_key_and_both_values() -> None:
    ours, theirs = read_recipe("nano", ["train.seed=1", "stages.1.sequence_length=128"]), read_recipe("nano")
    assert differences(ours, theirs) == ["stages.1.sequence_length: 128, 256", "train.seed: 1, 0"]
    assert differences(ours, ours) == []


# ── mistakes ──────────────────────────────────────────────────────────────────────────────────────────────────────

MISSPELT = [
    ("modle.hidden_size=3", "'modle'", "'model'"),
    ("model.hiden_size=3", "'model.hiden_size'", "'hidden_size'"),
    ("train.sed=3", "'train.sed'", "'seed'"),
    ("model.rope_scaling.factr=3", "'model.rope_scaling.factr'", "'factor'"),
    ("optimizer.wieght_decay=3", "'optimizer.wieght_decay'", "'weight_decay'"),
    ("schedule.learning_rates=[]", "'schedule.learning_rates'", "'learning_rate'"),
    ("schedule.learning_rate.1.shap=linear", "'schedule.learning_rate.1.shap'", "'shape'"),
    ("schedule.bias_speed.0.untill=1", "'schedule.bias_speed.0.untill'", "'until'"),
    ("stages.0.sequence_lenght=3", "'stages.0.sequence_lenght'", "'sequence_length'"),
    ("data.fimrate=0.1", "'data.fimrate'", "'fim_rate'"),
    ("cost.usd_per_hour=1", "'cost.usd_per_hour'", "'usd_per_device_hour'"),
]


def refused(*overrides: str, name: str = "nano") -> str:
    with pytest.raises(BadInput) as error:
        read_recipe(name, list(overrides))
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("override", "place", "meant"), MISSPELT)
def test_a_misspelt_key_is_refused_with_the_nearest(override: str, place: str, meant: str) -> None:
    assert refused(override) == f"recipe nano: unknown key {place} (did you mean {meant}?)"


@pytest.mark.parametrize("key", ["hidden_size", "tokens", "learning_rate", "until", "sequence_length"])
def test_a_required_key_misspelt_in_a_file_is_named_rather_than_missed(key: str) -> None:
    text = to_toml(read_recipe("nano")).replace(f"{key} = ", f"{key[:-1]} = ")
    with pytest.raises(BadInput, match=rf"^here: unknown key '.*{key[:-1]}' \(did you mean '{key}'\?\)$"):
        parse(text, "here")


def test_a_key_like_no_other_is_refused_without_a_guess() -> None:
    assert refused("train.zzz=1") == "recipe nano: unknown key 'train.zzz'"


WRONG = [
    ("model.hidden_size=-1", "model.hidden_size: ", "greater than 0, got -1"),
    ("model.hidden_size=1.5", "model.hidden_size: ", "integer"),
    ("model.hidden_size=wide", "model.hidden_size: ", "must be a number, got 'wide'"),
    ("model.hidden_size=true", "model.hidden_size: ", "must be a number, got True"),
    ("train.tokens='5'", "train.tokens: ", "must be a number, got '5'"),
    ("train.tokens=", "train.tokens: ", "must be a number, got ''"),
    ("train.tokens=3\nseed=4", "train.tokens: ", "must be a number"),
    ("train.max_seconds=inf", "train.max_seconds: ", "finite number, got inf"),
    ("model.routed_scaling_factor=nan", "model.routed_scaling_factor: ", "finite number, got nan"),
    ("stages.0.mixture.web=nan", "stages.0.mixture.web: ", "finite number, got nan"),
    ("train.dtype=fp61", "train.dtype: ", "'auto', 'fp32', 'bf16' or 'fp8', got 'fp61'"),
    ("train={tokens=1,dtype='fp8',device='mps'}", "train: ", "dtype fp8 is not to be had on mps: take bf16"),
    ("train=3", "train: ", "got 3"),
    ("data.fim_rate=1.5", "data.fim_rate: ", "less than or equal to 1, got 1.5"),
    ("optimizer.beta2=1", "optimizer.beta2: ", "less than 1, got 1"),
    ("model.num_experts_per_tok=17", "model: ", "num_experts_per_tok 17 is above n_routed_experts 16"),
    ("model.num_experts_per_tok=9", "model: ", "num_experts_per_tok 9 is above the 8 experts of topk_group 2"),
    ("model.n_group=3", "model: ", "n_group 3 does not divide n_routed_experts 16"),
    ("model.topk_group=5", "model: ", "topk_group 5 is above n_group 4"),
    ("model.n_group=16", "model: ", "n_group leaves only one"),
    ("model.num_key_value_heads=3", "model: ", "num_key_value_heads must equal num_attention_heads"),
    ("model.qk_rope_head_dim=31", "model: ", "qk_rope_head_dim must be even"),
    ("model.first_k_dense_replace=5", "model: ", "first_k_dense_replace is above num_hidden_layers 3"),
    ("model.eos_token_id=6144", "model: ", "must lie below vocab_size"),
    ("model.tie_word_embeddings=true", "model.tie_word_embeddings: ", "False"),
    ("stages.0.share=0.5", "stages: ", "the shares must sum to 1"),
    ("stages.0.share=1.5", "stages.0.share: ", "less than or equal to 1"),
    ("stages=[]", "stages: ", "at least 1 item"),
    ("stages.0.sequence_length=257", "stages: ", "257 is above model.max_position_embeddings"),
    ("stages.0.mixture={books = -1}", "stages.0: ", "mixture: weights are at least 0"),
    ("stages.0.mixture={books = 0}", "stages.0: ", "not all 0"),
    ("model.num_nextn_predict_layers=256", "", "num_nextn_predict_layers must be below the sequence length"),
    ("schedule.learning_rate.1.until=0.01", "schedule: ", "learning_rate: `until` must grow"),
    ("schedule.learning_rate.2.until=2", "schedule: ", "`until` may not pass 1"),
    ("schedule.learning_rate.0.shape=square", "schedule.learning_rate.0.shape: ", "got 'square'"),
    ("schedule.batch_tokens.0.value=0", "schedule: ", "a batch has at least one token"),
    ("schedule.batch_tokens=[]", "schedule.batch_tokens: ", "at least 1"),
    ("schedule.mtp_weight=[]", "schedule.mtp_weight: ", "at least 1"),
]


@pytest.mark.parametrize(("override", "place", "what"), WRONG, ids=[override for override, *_ in WRONG])
def test_a_wrong_value_is_refused_with_its_place(override: str, place: str, what: str) -> None:
    message = refused(override)
    assert message.startswith(f"recipe nano: {place}")
    assert what in message


@pytest.mark.parametrize("override", ["train", "=3", "train.seed", ""])
def test_an_override_without_key_or_value_is_refused(override: str) -> None:
    assert refused(override) == f"override {override!r}: write section.key=value"


@pytest.mark.parametrize("key", ["stages.2.share", "stages.x.share", "description.x", "stages.7"])
def test_an_override_of_no_place_is_refused(key: str) -> None:
    assert refused(f"{key}=3") == f"override '{key}=3': there is no place '{key}'"


def test_an_unknown_recipe_is_refused_with_the_nearest() -> None:
    assert refused(name="nanno").startswith("no recipe 'nanno' (did you mean 'nano'?); shipped: nano, demo, ")
    assert refused(name="qqqq").startswith("no recipe 'qqqq'; shipped: nano, demo, ")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"[model\nhidden_size = 1", "not TOML: "),
        (b"a = 1\na = 2", "not TOML: "),
        (b"\xff\xfe\x00", "not a UTF-8 text file"),
        (b"", "key 'model' is missing"),
        (b"[model]\nvocab_size = 4", "key 'model.hidden_size' is missing"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: bytes, what: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    assert refused(name=str(path)).startswith(f"{path}: {what}")
    with pytest.raises(BadInput, match=what):
        read_config(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    assert refused(name=str(tmp_path / "no.toml")) == f"{tmp_path / 'no.toml'}: no such file"
    folder = tmp_path / "folder.toml"
    folder.mkdir()
    assert refused(name=str(folder)) == f"{folder}: not a UTF-8 text file"


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        read_recipe("nano").train.seed = 1  # type: ignore[misc]
