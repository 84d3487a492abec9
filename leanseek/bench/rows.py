"""The rows of the ledger: the controls, V3 as published, ours. Any further recipe is one more line."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from leanseek.bench import controls
from leanseek.bench.controls import Control
from leanseek.config import BadInput, Config, nearest, parse, read_recipe, to_toml
from leanseek.plan.count import parameters
from leanseek.train.grow import mean_flops_per_token
from leanseek.train.schedule import knobs, scaled

EVALUATIONS = 24  # per full run
WHOLE = 1 << 40  # tokens of validation text: all of it


@dataclass(frozen=True)
class Row:
    """A control, or a recipe with `overrides`. `rates` are learning rates to search; none: as the recipe has it."""

    name: str
    about: str
    tokens: int
    rates: tuple[float, ...] = ()
    control: Control | None = None
    recipe: str = ""
    overrides: tuple[str, ...] = ()
    budget: int | None = None  # of full runs, where it is not `tokens`, of which a search trains a share

    @property
    def full_tokens(self) -> int:
        return self.tokens if self.budget is None else self.budget


ORDINARY, BEST = "ordinary", "best-dense"
OURS = "nano"
ROWS = (
    Row(
        ORDINARY,
        "GPT-2-style dense model, AdamW, warm-up and cosine, as nanoGPT trains it",
        13_107_200,
        (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
        Control("ordinary", 13_107_200, 2e-3, 8192),
    ),
    Row(
        BEST,
        "dense model with the speedruns' practice: QK-norm, squared ReLU, value embeddings, Muon, decay to zero; and "
        "with our long decay and sampled softmax",
        3_300_000,
        (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2),
        Control(
            "best", 3_300_000, 1.6e-2, 4096, vocab_size=6144, layers=3, width=128, heads=2, decay=0.7, sampled=0.85
        ),
        budget=3_500_000,  # the rate was searched for 3.3M, which ended above the target
    ),
    Row(
        "faithful-v3",
        "V3's architecture, AdamW and V3's schedules: warm-up, constant, cosine to a tenth, batch ramp",
        8_000_000,
        (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
        recipe="nano",
        overrides=(
            *("model.num_hidden_layers=4", "model.hidden_size=256", "model.intermediate_size=704"),
            *("model.num_attention_heads=4", "model.n_routed_experts=16", "model.q_lora_rank=96"),
            *("model.vocab_size=4096", "model.embedding_shares=false", "model.value_embeddings=false"),
            *("train.micro_batch=16", "train.init_std=0.02", "train.embedding_std=none", "train.zero_outputs=false"),
            *("train.mtp_length=none", "optimizer.beta1=0.9", "optimizer.embedding_rate=1", "counts=none"),
            "optimizer.weight_decay=0.1",
            *("stages=[{sequence_length=256}]", "schedule.layers=[]", "schedule.count_weight=[{until=1.0, value=0.0}]"),
            'optimizer.name="adamw"',
            "schedule.learning_rate=[{until=0.02, value=2e-3, shape='linear'}, {until=0.676, value=2e-3}, "
            "{until=0.966, value=2e-4, shape='cosine'}, {until=0.989, value=2e-4}, {until=1.0, value=6.6e-5}]",
            "schedule.batch_tokens=[{until=0.032, start=1024, value=4096, shape='linear'}, {until=1.0, value=4096}]",
            "schedule.bias_speed=[{until=0.966, value=0.001}, {until=1.0, value=0.0}]",
            "schedule.mtp_weight=[{until=0.676, value=0.3}, {until=1.0, value=0.1}]",
        ),
    ),
    Row(OURS, "LeanSeek's recipe nano, as shipped", 2_000_000, recipe="nano"),
)


# ── rows ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def chosen_rows(
    names: str | None, recipe: str | None = None, tokens: Sequence[str] = (), rows: tuple[Row, ...] = ROWS
) -> tuple[Row, ...]:
    """The rows asked for, the user's own recipe behind them, with `ROW=N` token budgets. Raises BadInput."""
    if recipe is not None:
        name = Path(recipe).stem if recipe.endswith(".toml") else recipe
        if name in [row.name for row in rows]:
            raise BadInput(f"--recipe {recipe}: there is a row {name!r} already: give the file another name")
        config = read_recipe(recipe)
        rows = (*rows, Row(name, config.description, config.train.tokens, recipe=recipe))
    budgets = {}
    for text in tokens:
        name, _, number = text.partition("=")
        _known(name, rows)
        try:
            budgets[name] = int(float(number))
        except (ValueError, OverflowError):
            budgets[name] = 0
        if budgets[name] < 1:
            raise BadInput(f"--tokens {text}: write ROW=NUMBER, a positive number")
    rows = tuple(replace(row, budget=budgets.get(row.name, row.budget)) for row in rows)
    if names is None:
        return rows
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        _known(name, rows)
    return tuple(row for row in rows if row.name in wanted or (recipe is not None and row is rows[-1]))


def _known(name: str, rows: tuple[Row, ...]) -> None:
    names = [row.name for row in rows]
    if name not in names:
        raise BadInput(f"no row {name!r}{nearest(name, names)}; there are: {', '.join(names)}")


def control_of(row: Row, tokens: int, rate: float | None) -> Control:
    assert row.control is not None
    return replace(row.control, tokens=tokens, learning_rate=rate or row.control.learning_rate)


def config_of(row: Row, tokens: int, rate: float | None, seed: int, evaluations: int = EVALUATIONS) -> Config:
    """The recipe with its budget, its peak learning rate and evaluations of the whole validation text."""
    config = read_recipe(row.recipe, row.overrides)
    if rate is not None:
        peak = max(piece.value for piece in config.schedule.learning_rate)
        pieces = scaled(config.schedule.learning_rate, rate / peak)
        config = config.model_copy(update={"schedule": config.schedule.model_copy(update={"learning_rate": pieces})})
    train = {"tokens": tokens, "seed": seed, "eval_tokens": WHOLE}
    config = config.model_copy(update={"train": config.train.model_copy(update=train)})
    every = max(1, steps_of(config) // evaluations)
    return config.model_copy(update={"train": config.train.model_copy(update={"eval_every": every})})


def steps_of(config: Config) -> int:
    """Optimizer steps of a run, its batch growing as scheduled."""
    seen, steps = 0, 0
    while seen < config.train.tokens:
        seen += max(knobs(config.schedule, seen, config.train.tokens).batch_tokens, 1)
        steps += 1
    return steps


def vocabulary(row: Row) -> int:
    return row.control.vocab_size if row.control else config_of(row, row.tokens, None, 0).model.vocab_size


def shape(row: Row) -> tuple[int, float]:
    """Parameters, MTP included, and training FLOPs per token."""
    if row.control:
        return controls.parameter_count(row.control), controls.flops_per_token(row.control)
    config = config_of(row, row.tokens, None, 0)
    return parameters(config.model).total_with_mtp, mean_flops_per_token(config)


def settings_of(row: Row, tokens: int, rate: float | None) -> dict[str, Any]:
    """What a receipt keeps of a row, and is compared by: everything but the seed and what this machine decides."""
    if row.control:
        return asdict(control_of(row, tokens, rate))
    return {"recipe": to_toml(config_of(row, tokens, rate, 0)), "tokens": tokens, "learning_rate": rate}


def same_settings(row: Row, receipt: dict[str, Any], tokens: int | None = None) -> bool:
    """Whether a receipt is of the row as it is now; of any budget and learning rate unless `tokens` says which."""
    stored = receipt["settings"]
    if tokens is not None and stored.get("tokens") != tokens:
        return False
    try:
        now = settings_of(row, stored["tokens"], stored["learning_rate"])
        if row.control:
            return Control(**stored) == Control(**now)  # settings that came later have their default in old receipts
        return _comparable(stored["recipe"]) == _comparable(now["recipe"])
    except (BadInput, TypeError, KeyError):
        return False


def _comparable(recipe: str) -> Config:
    """A recipe without what changes no weight."""
    config = parse(recipe, "receipt")
    plain = {"eval_every": 1, "eval_tokens": 1, "checkpoint_every": 1, "keep_checkpoints": 1}
    train = config.train.model_copy(update=plain)
    return config.model_copy(update={"train": train, "description": "", "cost": type(config.cost)()})
