"""The whole configuration: one frozen schema, read strictly from TOML and `section.key=value`.

`[model]` holds exactly the fields and values of the released `config.json`; keys of such a file that we do not know
rest in `model.verbatim` and leave again on export. What only training needs lives in the other sections. A misspelt key
is refused with the nearest one that exists, a value out of range with its place.
"""

import difflib
import itertools
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator


class BadInput(Exception):
    """A user's mistake, said in one line: what, where, what to do. The command line prints it and exits with 2."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _number_for_number(cls, value: Any, info: ValidationInfo) -> Any:
        wanted = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, (bool, str)) and {int, float} & {wanted, *get_args(wanted)}:
            raise ValueError(f"must be a number, got {value!r}")  # pydantic would take true for 1 and "5" for 5
        return value


# ── [model] ───────────────────────────────────────────────────────────────────────────────────────────────────────


class RopeScaling(Section):
    """YaRN as the released `rope_scaling` states it (report §4.3)."""

    type: Literal["yarn"] = "yarn"
    factor: float = Field(gt=0)
    original_max_position_embeddings: int = Field(gt=0)
    beta_fast: float = Field(32, gt=0)
    beta_slow: float = Field(1, gt=0)
    mscale: float = Field(1, ge=0)
    mscale_all_dim: float = Field(1, ge=0)


class ModelConfig(Section):
    """The released `config.json`, field for field (report §4.2). V2's gates are values of the same fields."""

    model_type: Literal["deepseek_v2", "deepseek_v3"] = "deepseek_v3"
    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    moe_intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_nextn_predict_layers: int = Field(0, ge=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int | None = None  # MLA has one latent for all heads; released files repeat the head count

    q_lora_rank: int | None = Field(None, gt=0)
    kv_lora_rank: int = Field(gt=0)
    qk_nope_head_dim: int = Field(gt=0)
    qk_rope_head_dim: int = Field(gt=0)
    v_head_dim: int = Field(gt=0)
    # What a token brings to every layer, beside the stream: a share of its embedding, which the FFN reads anew, and
    # values of its own, out of a second table, for all heads. Not V3's, but a V3 of wider matrices says the same, and
    # as that it is exported (`model/unfold.py`).
    embedding_shares: bool = False
    value_embeddings: bool = False

    n_routed_experts: int = Field(gt=0)
    n_shared_experts: int = Field(ge=0)
    num_experts_per_tok: int = Field(gt=0)
    first_k_dense_replace: int = Field(0, ge=0)
    moe_layer_freq: Literal[1] = 1
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    topk_method: Literal["noaux_tc", "greedy", "group_limited_greedy"] = "noaux_tc"
    n_group: int = Field(1, gt=0)
    topk_group: int = Field(1, gt=0)
    norm_topk_prob: bool = True
    routed_scaling_factor: float = Field(1.0, gt=0)

    rms_norm_eps: float = Field(1e-6, gt=0)
    rope_theta: float = Field(10000.0, gt=1)
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = Field(gt=0)

    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False
    attention_dropout: float = Field(0.0, ge=0, le=0)
    tie_word_embeddings: Literal[False] = False
    initializer_range: float = Field(0.02, gt=0)  # as released; training starts from train.init_std
    bos_token_id: int = Field(0, ge=0)
    eos_token_id: int = Field(1, ge=0)
    verbatim: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.num_key_value_heads not in (None, self.num_attention_heads):
            raise ValueError("num_key_value_heads must equal num_attention_heads: MLA shares one latent instead")
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ValueError(f"first_k_dense_replace is above num_hidden_layers {self.num_hidden_layers}")
        if self.qk_rope_head_dim % 2:
            raise ValueError("qk_rope_head_dim must be even: RoPE turns pairs")
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} is above n_routed_experts {self.n_routed_experts}"
            )
        if self.n_routed_experts % self.n_group:
            raise ValueError(f"n_group {self.n_group} does not divide n_routed_experts {self.n_routed_experts}")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group {self.topk_group} is above n_group {self.n_group}")
        if self.topk_method != "greedy":
            group = self.n_routed_experts // self.n_group
            if self.num_experts_per_tok > self.topk_group * group:
                raise ValueError(
                    f"num_experts_per_tok {self.num_experts_per_tok} is above the {self.topk_group * group} experts "
                    f"of topk_group {self.topk_group}"
                )
            if self.topk_method == "noaux_tc" and self.n_group > 1 and group < 2:
                raise ValueError("noaux_tc scores a group by its two best experts: n_group leaves only one in each")
        if max(self.bos_token_id, self.eos_token_id) >= self.vocab_size:
            raise ValueError("bos_token_id and eos_token_id must lie below vocab_size")
        return self

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def brings(self) -> bool:
        """Whether tokens bring anything of their own to every layer."""
        return self.embedding_shares or self.value_embeddings

    @property
    def value_width(self) -> int:
        """Values of all heads that a token has of its own: the width of the value embeddings, 0 without them."""
        return self.num_attention_heads * self.v_head_dim if self.value_embeddings else 0

    @property
    def latent_width(self) -> int:
        """What attention keeps of a token beside the rotary key: its latent and, if it has any, its own values."""
        return self.kv_lora_rank + self.value_width

    def is_moe(self, layer: int) -> bool:
        """Whether the layer's FFN is a mixture; MTP blocks, counted on from num_hidden_layers, always are."""
        return layer >= self.first_k_dense_replace


# The matrices of a block, by the names of released files: what adapters may stand beside.
LINEAR = (
    *("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
)


# ── the training sections ─────────────────────────────────────────────────────────────────────────────────────────


class TrainConfig(Section):
    tokens: int = Field(gt=0)  # the whole budget, over all stages
    seed: int = Field(0, ge=0, lt=2**63)
    # auto: fp32 or bf16, whichever multiplies matrices faster here, frozen in the run
    dtype: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    compile: bool = False
    kernels: Literal["auto", "triton", "reference"] = "auto"  # auto: the best that is installed for the device
    kernel_table: str | None = None  # what `bench kernels` stored here: FP8 only for shapes where it was faster
    micro_batch: int = Field(16, gt=0)  # sequences per forward pass; the schedule's batch is reached by accumulation
    init_std: float = Field(0.006, gt=0)  # report §4.2
    embedding_std: float | None = Field(None, gt=0)  # of the embeddings; None: init_std, as V3
    zero_outputs: bool = False  # what writes into the residual stream, and the head, begin at zero: not V3
    balance_loss_alpha: float = Field(1e-4, ge=0)  # report eq. 17
    mtp_length: int | None = Field(None, gt=0)  # tokens at the beginning of each row that MTP learns from; None: all
    bias_centred: bool = False  # take the mean out of each bias update, so that the biases cannot drift together
    max_steps: int | None = Field(None, gt=0)
    max_seconds: float | None = Field(None, gt=0)
    checkpoint_every: int = Field(200, gt=0)  # optimizer steps
    keep_checkpoints: int = Field(2, gt=0)
    eval_every: int = Field(100, gt=0)  # optimizer steps
    eval_tokens: int = Field(131072, gt=0)  # validation text scored each time, always the same documents
    rollback_after: int = Field(3, gt=0)  # skipped steps in a row before the last checkpoint is taken up again
    # × the median of the last steps, above which a loss or gradient norm is a spike, and its step skipped like one that
    # is not finite
    spike: float | None = Field(None, gt=1)
    # What is computed again backward instead of being kept: `selective` as V3, the norms and MLA's up-projections
    # (report §3.2.3); `full`: each block.
    recompute: Literal["none", "selective", "full"] = "none"
    ema_decay: float | None = Field(None, gt=0, lt=1)  # per step, of an average of the weights kept in CPU memory
    background_saves: bool = False  # a checkpoint is written beside the next steps

    @field_validator("recompute", mode="before")
    @classmethod
    def _none_is_a_word_here(cls, value: Any) -> Any:
        return "none" if value is None else value  # in `key=none` it says that there is no value

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.dtype == "fp8" and self.device == "mps":
            raise ValueError("dtype fp8 is not to be had on mps: take bf16")
        return self


class OptimizerConfig(Section):
    name: Literal["adamw", "muon"] = "adamw"
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    moments: Literal["fp32", "bf16"] = "fp32"  # how they rest between steps
    weight_decay: float = Field(0.1, ge=0)
    embedding_rate: float = Field(1.0, gt=0)  # × the learning rate for the embeddings, which then do not decay
    clip: float = Field(1.0, gt=0)
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    muon_steps: int = Field(5, gt=0)
    qk_clip: float | None = Field(None, gt=0)  # largest attention logit tolerated; None leaves the heads alone


class Piece(Section):
    """One stretch of a curve: ends with `value` at `until`; begins with `start`, or where the one before ended."""

    until: float = Field(ge=0)
    value: float = Field(ge=0)
    shape: Literal["constant", "linear", "cosine", "sqrt"] = "constant"
    start: float | None = Field(None, ge=0)


class ScheduleConfig(Section):
    """Curves over tokens seen, in tokens or as fractions of `train.tokens`. A run's every knob is here."""

    unit: Literal["tokens", "fraction"] = "fraction"
    learning_rate: tuple[Piece, ...] = Field(min_length=1)
    batch_tokens: tuple[Piece, ...] = Field(min_length=1)
    bias_speed: tuple[Piece, ...] = Field((Piece(until=1, value=0.001),), min_length=1)
    mtp_weight: tuple[Piece, ...] = Field((Piece(until=1, value=0.3),), min_length=1)
    count_weight: tuple[Piece, ...] = Field((Piece(until=1, value=0.0),), min_length=1)  # share of the counts, 0 to 1
    layers: tuple[Piece, ...] = ()  # how many are awake, from the first, up to each `until`; after the last one all

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name in ("learning_rate", "batch_tokens", "bias_speed", "mtp_weight", "count_weight", "layers"):
            pieces = getattr(self, name)
            if any(a.until >= b.until for a, b in itertools.pairwise(pieces)):
                raise ValueError(f"{name}: `until` must grow from piece to piece")
            if self.unit == "fraction" and pieces and pieces[-1].until > 1:
                raise ValueError(f"{name}: with unit = 'fraction' `until` may not pass 1")
        if any(piece.value < 1 for piece in self.batch_tokens):
            raise ValueError("batch_tokens: a batch has at least one token")
        if any(piece.value > 1 for piece in self.count_weight):
            raise ValueError("count_weight: a share of the loss is at most 1")
        awake = [piece.value for piece in self.layers]
        whole = all(value >= 1 and value == int(value) for value in awake)
        if not whole or awake != sorted(awake) or any(piece.shape != "constant" for piece in self.layers):
            raise ValueError("layers: whole numbers from 1 that never fall, each held until the next")
        return self


class DataConfig(Section):
    packing: Literal["best_fit", "concat"] = "best_fit"
    fim_rate: float = Field(0.0, ge=0, le=1)
    split_rate: float = Field(0.0, ge=0, le=1)  # of the tokens that join punctuation and line breaks (report §4.1)
    most_epochs: float | None = Field(None, gt=0)  # how often any source may be read over the whole run


class Stage(Section):
    """A stretch of training with one sequence length and one mixture; `share` of the token budget."""

    sequence_length: int = Field(gt=1)
    share: float = Field(1.0, gt=0, le=1)
    mixture: dict[str, float] = Field(default_factory=dict)  # weight by source; empty: every row alike
    temperature: float | None = Field(None, ge=1)  # weights are multiplied by the source's tokens ^ (1 / temperature)

    @model_validator(mode="after")
    def _weights(self) -> Self:
        if any(weight < 0 for weight in self.mixture.values()) or (self.mixture and not sum(self.mixture.values())):
            raise ValueError("mixture: weights are at least 0 and not all 0")
        return self


class MeshConfig(Section):
    """How a run lies on its ranks, one device each: pp × dp × cp × tp of them (report §3.2; see `parallel.mesh`)."""

    pp: int = Field(1, gt=0)  # pipeline: layers
    dp: int | None = Field(None, gt=0)  # data: rows of the batch; None: all ranks that the other axes leave
    cp: int = Field(1, gt=0)  # context: tokens of a row
    tp: int = Field(1, gt=0)  # attention heads
    ep: int = Field(1, gt=0)  # experts, over ranks of dp × cp
    replicate: int = Field(1, gt=0)  # of dp: so many copies of all states; dp ÷ replicate ranks share each
    node: int = Field(
        1, gt=0
    )  # consecutive ranks in a machine: a token crosses to a machine once, whatever it has there
    shards: Literal["states", "all"] = "all"  # over dp: gradients and optimizer states as ZeRO-1, or the weights too
    most_load: float | None = Field(None, gt=1)  # × the even share of rows that a rank's experts may be sent at once
    schedule: Literal["1F1B", "Interleaved1F1B", "ZBV", "DualPipeV"] = "1F1B"
    chunks: int = Field(2, gt=1)  # stages of a rank under Interleaved1F1B
    cuts: tuple[int, ...] | None = None  # pieces in each stage, as `plan` counts them; None: as even as can be
    timeout: float = Field(600, gt=0)  # seconds that a collective may take


class TeacherConfig(Section):
    """A larger run of the same tokenizer to learn from: its `top_k` likeliest tokens at every place (report §5.4.1)."""

    run: str
    top_k: int = Field(64, gt=0)
    weight: float = Field(0.5, gt=0, le=1)  # of the divergence from it; the rest is the text's own cross-entropy


class CountsConfig(Section):
    """N-grams of the training text to learn from, with `schedule.count_weight` of the loss: not V3."""

    order: int = Field(4, ge=2)  # tokens of the longest n-gram
    tokens: int = Field(20_000_000, gt=0)  # of the text that are counted at most
    # Sampled softmax while counts teach: the loss is over the most frequent ids, one group of the others in turn, and
    # what must not be missing (`ops/sampled.py`); none: over all.
    frequent: int | None = Field(None, gt=0)
    groups: int = Field(4, gt=1)
    begin: bool = False  # embedding and head begin with what pairs of tokens say (`train/pairs.py`)

    def candidates(self, vocab_size: int) -> float:
        """Ids that a place's loss is over, beside those that the text and the counts have there."""
        if self.frequent is None or self.frequent >= vocab_size:
            return vocab_size
        return self.frequent + (vocab_size - self.frequent) / self.groups


class LoraConfig(Section):
    """Adapters of low rank beside frozen weights, which rest in 8 bits; V2-Lite is tuned on one GPU so."""

    rank: int = Field(gt=0)
    alpha: float = Field(32, gt=0)  # what an adapter says is scaled by alpha / rank
    modules: tuple[str, ...] = Field(LINEAR, min_length=1)
    experts: bool = False  # adapters of the routed experts too, one pair for each matrix
    # how the frozen weights rest; auto: FP8 where they came so, else INT8, frozen in the run
    base: Literal["auto", "fp8", "int8", "unchanged"] = "auto"

    @model_validator(mode="after")
    def _known(self) -> Self:
        for name in self.modules:
            if name not in LINEAR:
                raise ValueError(f"modules: no layer is called {name!r}{nearest(name, list(LINEAR))}")
        return self


class CostConfig(Section):
    device: str = "this machine"
    usd_per_device_hour: float = Field(0.1, ge=0)


class GRPOConfig(Section):
    """Reinforcement learning (report §5.2.2). A step draws `group` answers to each of `prompts` questions.

    Unless told it is GRPO as DeepSeekMath and V3 publish it; what was found amiss with that later is an option each.
    """

    steps: int = Field(200, gt=0)
    prompts: int = Field(32, gt=0)
    group: int = Field(16, gt=1)
    max_tokens: int = Field(256, gt=0)  # of one answer
    updates: int = Field(1, gt=0)  # optimizer steps that the answers of a step are divided among
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.2, gt=0)  # above clip_low: room for tokens that are rare yet
    kl_weight: float = Field(0.04, ge=0)  # β; 0 needs no reference model
    reference_every: int | None = Field(None, gt=0)  # steps after which the model at hand becomes the reference
    ratio: Literal["token", "sequence"] = "token"  # of probabilities: as DeepSeekMath has it, as V3's eq. 26 is written
    # what a token's term is divided by: its answer's length and the answers; all tokens; max_tokens and the answers
    normalise: Literal["answer", "token", "constant"] = "answer"
    divide_by_std: bool = True
    dynamic_sampling: bool = False  # questions whose answers all earn the same are replaced by others
    most_rounds: int = Field(4, gt=1)  # of questions that dynamic sampling may take for one step
    importance_cap: float | None = Field(None, gt=0)  # truncated weights for what trainer and engine see differently
    drop_cut: bool = False  # answers that max_tokens cut are not learnt from
    router_replay: bool = False  # train every token with the experts that it met when it was drawn
    correct: float = Field(1.0, ge=0)  # what a right answer earns
    format: float = Field(0.0, ge=0)  # what thoughts inside their tags, with an answer behind, earn
    language: float = Field(0.0, ge=0)  # what thoughts in the question's script earn, by their share of the words
    reward_model: str = ""  # a run of `leanseek reward` that scores every answer …
    reward_model_weight: float = Field(1.0, gt=0)
    judge_url: str = ""  # … and the base address of an OpenAI-compatible endpoint whose model grades it, 0 to 1
    judge_model: str = ""
    judge_weight: float = Field(1.0, gt=0)
    samples_shown: int = Field(2, ge=0)  # answers of a step that are kept as text


class RolloutConfig(Section):
    """Who answers: our engine on the weights at hand, or a vLLM server that reads every step's export."""

    engine: Literal["leanseek", "vllm"] = "leanseek"
    at_once: int = Field(256, gt=0)  # answers that are drawn side by side
    url: str = "http://127.0.0.1:8000"  # of vLLM
    export: str = ""  # the folder that vLLM was started on
    seconds: float = Field(3600.0, gt=0)  # that one answer of the server may take


class Config(Section):
    description: str = ""
    model: ModelConfig
    train: TrainConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig
    data: DataConfig = DataConfig()
    stages: tuple[Stage, ...] = Field(min_length=1)
    mesh: MeshConfig = MeshConfig()
    grpo: GRPOConfig | None = None
    rollout: RolloutConfig | None = None
    cost: CostConfig = CostConfig()
    teacher: TeacherConfig | None = None
    counts: CountsConfig | None = None
    lora: LoraConfig | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if abs(sum(stage.share for stage in self.stages) - 1) > 1e-6:
            raise ValueError("stages: the shares must sum to 1")
        longest = max(stage.sequence_length for stage in self.stages)
        if longest > self.model.max_position_embeddings:
            raise ValueError(f"stages: sequence_length {longest} is above model.max_position_embeddings")
        if self.model.num_nextn_predict_layers >= min(stage.sequence_length for stage in self.stages):
            raise ValueError("model.num_nextn_predict_layers must be below the sequence length")
        if self.train.mtp_length is not None:
            if self.model.num_nextn_predict_layers >= self.train.mtp_length:
                raise ValueError("train.mtp_length must be above model.num_nextn_predict_layers")
            if self.mesh.pp > 1 or self.mesh.cp > 1:
                raise ValueError("train.mtp_length cuts whole rows: mesh.pp=1 and mesh.cp=1, or train.mtp_length=none")
        if self.counts is None and any(piece.value for piece in self.schedule.count_weight):
            raise ValueError("schedule.count_weight has nothing to weigh: set counts.order, or leave it out")
        awake = self.schedule.layers
        if awake and not self.train.zero_outputs:
            raise ValueError(
                "schedule.layers: a layer that wakes must be silent: train.zero_outputs=true, or schedule.layers=[]"
            )
        if awake and self.mesh.pp > 1:
            raise ValueError("schedule.layers: ranks whose layers sleep would wait: mesh.pp=1, or schedule.layers=[]")
        if self.model.brings and self.mesh.pp > 1:
            raise ValueError(
                "only the first stage of a pipeline has the tokens: mesh.pp=1, or model.value_embeddings=false "
                "model.embedding_shares=false"
            )
        if self.counts is not None and (self.mesh.pp > 1 or self.mesh.cp > 1 or self.teacher is not None):
            raise ValueError("counts go with whole rows on one rank, and with no teacher: mesh.pp=1, mesh.cp=1")
        return self


# ── reading and writing ───────────────────────────────────────────────────────────────────────────────────────────


def recipe_names() -> list[str]:
    """The shipped recipes, smallest first."""
    order = ["nano", "demo", "mix", "bench-20m", "small", "v2-lite", "v2", "v3"]
    found = [item.name[:-5] for item in resources.files("leanseek.recipes").iterdir() if item.name.endswith(".toml")]
    return sorted(found, key=lambda name: (order.index(name) if name in order else len(order), name))


def read_recipe(name: str, overrides: tuple[str, ...] | list[str] = ()) -> Config:
    """A shipped recipe or a `.toml` file, with `section.key=value` laid over it. Raises BadInput."""
    if name in recipe_names():
        text = (resources.files("leanseek.recipes") / f"{name}.toml").read_text(encoding="utf-8")
        where = f"recipe {name}"
    elif name.endswith(".toml"):
        text, where = _read_text(Path(name)), name
    else:
        raise BadInput(f"no recipe {name!r}{nearest(name, recipe_names())}; shipped: {', '.join(recipe_names())}")
    return parse(text, where, overrides)


def read_config(path: Path) -> Config:
    """The resolved configuration stored with a run. Raises BadInput."""
    return parse(_read_text(path), str(path))


def parse(text: str, where: str, overrides: tuple[str, ...] | list[str] = ()) -> Config:
    """TOML text to a checked Config; `where` names it in errors. Raises BadInput."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"{where}: not TOML: {error}") from None
    for override in overrides:
        _lay_over(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise BadInput(f"{where}: {explain(error, Config)}") from None


def to_toml(config: Config) -> str:
    """The resolved configuration as TOML; reading it back gives an equal Config. Unset (None) keys are left out."""
    return tomli_w.dumps(config.model_dump(exclude_none=True))


def differences(ours: Config, theirs: Config) -> list[str]:
    """`section.key: ours, theirs` for every value in which two configurations differ."""
    a, b = _flat(ours.model_dump()), _flat(theirs.model_dump())
    return [f"{key}: {a.get(key)!r}, {b.get(key)!r}" for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]


def nearest(word: str, words: list[str]) -> str:
    """` (did you mean …?)` when a known word is close, else nothing."""
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def explain(error: ValidationError, schema: type[BaseModel]) -> str:
    """One complaint of a ValidationError in one line: an unknown key, with the nearest known one, else the first."""
    complaints = error.errors()  # a required key misspelt is both missing and unknown: the latter says what to mend
    first = next((item for item in complaints if item["type"] == "extra_forbidden"), complaints[0])
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown key {place!r}{nearest(str(first['loc'][-1]), _fields_at(schema, first['loc'][:-1]))}"
    if first["type"] == "missing":
        return f"key {place!r} is missing"
    message = first["msg"].removeprefix("Value error, ")
    got = "" if first["type"] == "value_error" else f", got {first['input']!r}"
    return f"{place}: {message}{got}" if place else message


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise BadInput(f"{path}: not a UTF-8 text file") from None


def _lay_over(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise BadInput(f"override {override!r}: write section.key=value")
    *path, last = key.strip().split(".")
    node: Any = tree
    try:
        for part in path:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        if isinstance(node, list):
            node[int(last)] = _value(text)
        else:
            node[last] = _value(text)
    except (ValueError, IndexError, AttributeError, TypeError):
        raise BadInput(f"override {override!r}: there is no place {key.strip()!r}") from None


def _value(text: str) -> Any:
    text = text.strip()
    if text in ("null", "none"):
        return None
    try:
        tree = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return tree["value"] if len(tree) == 1 else text


def _fields_at(schema: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    for part in path:
        if isinstance(part, int):
            continue
        for candidate in _models_in(schema.model_fields[part].annotation):
            schema = candidate
    return list(schema.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict) and tree:
        return {k: v for key, part in tree.items() for k, v in _flat(part, f"{prefix}{key}.").items()}
    if isinstance(tree, (list, tuple)) and tree:
        return {k: v for i, part in enumerate(tree) for k, v in _flat(part, f"{prefix}{i}.").items()}
    return {prefix[:-1]: tree}
