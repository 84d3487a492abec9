"""A reward model (report §5.2.1): the trunk of a run that chats with one number for a head, learnt from preferences.

Bradley and Terry: that the chosen answer is the better one has the probability σ(its score − the other's). A chat's
score is read at its last token, the end of the last answer; only differences between answers to one question mean
anything. B rows · T tokens in a row.
"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from leanseek import checkpoint
from leanseek.config import BadInput, Config, ModelConfig, Piece, parse, to_toml
from leanseek.data.chats import fingerprint_of, longest_of
from leanseek.data.pairs import PairLoader, Pairs, open_pairs
from leanseek.data.tokenizer import Tokenizer
from leanseek.eval.statistics import interval
from leanseek.model.layers import Linear
from leanseek.model.transformer import Transformer
from leanseek.ops.loss import IGNORE
from leanseek.parallel.apply import before_micro_batch
from leanseek.parallel.mesh import ALONE, Ranks, divide, joined, lead, ranks_of, size_of, together
from leanseek.parallel.pipeline import Pipeline
from leanseek.plan.count import flops_per_token, parameters
from leanseek.post.sft import check_overrides, tokenizer_of, tuned
from leanseek.train.schedule import Knobs
from leanseek.train.setup import DTYPES, ready, take_up, train_and_bill
from leanseek.train.step import ANY, Limits, StepResult, update

EPOCHS = 1
BATCH_TOKENS = 8192  # chats that are scored together, padding included


class RewardModel(Transformer):
    """A Transformer without its head and its MTP modules, and `score` [1, D] instead."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config.model_copy(update={"num_nextn_predict_layers": 0}), dtype)
        self.lm_head = None
        self.score = Linear(config.hidden_size, 1)

    def scores(self, ids: Tensor, positions: Tensor, segments: Tensor | None = None) -> Tensor:
        """What each token's chat is worth up to there, all [B, T], in at least FP32."""
        hidden = self(ids, positions, segments)
        return self.score(hidden.to(torch.promote_types(hidden.dtype, torch.float32))).squeeze(-1)

    @torch.no_grad()
    def begin_with(self, model: Transformer) -> None:
        """Takes over another model's trunk; the scores begin at 0, undecided."""
        trunk = model.state_dict()
        self.load_state_dict({name: trunk.get(name, torch.zeros_like(own)) for name, own in self.state_dict().items()})


class Scorer:
    """A reward model with its tokenizer, on one device."""

    def __init__(self, model: RewardModel, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer

    @classmethod
    def load(cls, run: Path, device: str = "cpu") -> "Scorer":
        """The newest checkpoint of a run that `leanseek reward` made. Raises BadInput."""
        config = checkpoint.read_run(run)
        if not checkpoint.scores(run):
            raise BadInput(f"{run}: not a reward model: make one with leanseek reward {run} --data PAIRS.jsonl --out …")
        model = RewardModel(config.model, DTYPES.get(config.train.dtype, torch.float32))
        checkpoint.load_newest(run, model)
        return cls(model.to(device), Tokenizer.load(run / "tokenizer"))

    def score(self, chats: Sequence[list[dict[str, Any]]]) -> list[float]:
        """The worth of the last answer of each chat of messages. Raises BadInput for one without an answer.

        Of a chat longer than the context its end is read.
        """
        encoded = self.tokenizer.encode_chat_turns(chats)
        if any(not answers for _, answers in encoded):
            raise BadInput("a chat to be scored has no message of the assistant")
        return self.score_ids([ids for ids, _ in encoded])

    @torch.no_grad()
    def score_ids(self, texts: Sequence[Sequence[int] | np.ndarray]) -> list[float]:
        """The same of chats that are encoded already, to the EOS of their last answer."""
        device, context = self.model.score.weight.device, self.model.config.max_position_embeddings
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        found = [0.0] * len(texts)
        first = 0
        while first < len(order):
            longest = min(len(texts[order[first]]), context)
            some = order[first : first + max(1, BATCH_TOKENS // longest)]
            ids = torch.zeros((len(some), longest), dtype=torch.int64)
            for row, i in enumerate(some):  # padding is on the right, where causal attention cannot see it
                own = torch.as_tensor(np.asarray(texts[i][-longest:], np.int64))
                ids[row, : len(own)] = own
            scores = self.model.scores(ids.to(device), torch.arange(longest, device=device).expand_as(ids))
            for row, i in enumerate(some):
                found[i] = scores[row, min(len(texts[i]), longest) - 1].item()
            first += len(some)
        return found


def preference_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """−Σ ln σ(chosen − rejected), scores [N] of N pairs, a scalar."""
    return -F.logsigmoid(chosen - rejected).sum()


def reward(run: Path, file: Path, out: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Trains OUT, a reward model, on a file of pairs, from RUN's weights or from where OUT stopped.

    Returns its receipt, whose `accuracy` is that on held-out pairs. Raises BadInput, OSError. Under torchrun every
    process calls it.
    """
    if out.resolve() == run.resolve():
        raise BadInput(f"{out}: it would train onto the run it begins with: take another folder")
    begun_with = checkpoint.read_run(run)
    config = parse(to_toml(for_pairs(begun_with)), f"reward of {run}", list(overrides))
    check_overrides(config, begun_with, f"reward of {run}")
    _check(config, f"reward of {run}")
    tokenizer = tokenizer_of(run, config)
    with joined(config.mesh.timeout) as everyone, ExitStack() as held:
        longest = longest_of(config.stages)
        training, held_out, too_long, same = together(lambda: open_pairs(file, tokenizer, longest), everyone)
        lead(lambda: _warn((too_long, "longer than a row"), (same, "of the same chat twice")), everyone)
        if not any(override.partition("=")[0].strip() == "train.tokens" for override in overrides):
            width = config.stages[0].sequence_length
            rows = len(PairLoader(training, config.stages, 1, 0, 0).rows(0))
            train = config.train.model_copy(update={"tokens": EPOCHS * 2 * rows * width})
            config = config.model_copy(update={"train": train})
        world = divide(config, size_of(everyone)).world
        lead(lambda: held.enter_context(checkpoint.lock(out)), everyone)
        given = config, fingerprint_of(file), run / "tokenizer", file
        config = lead(lambda: take_up(out, *given, begun_with=run, ranks=world, scores=True), everyone)
        ranks = ranks_of(config)
        base = Transformer(config.model)
        checkpoint.load_newest(run, base)
        model = RewardModel(config.model, DTYPES[config.train.dtype])
        model.begin_with(base)
        del base
        size = sum(parameter.numel() for parameter in model.parameters())
        _, optimizers, _ = ready(config, model, ranks)
        loader = PairLoader(training, config.stages, config.train.tokens, config.train.seed, tokenizer.pad_id)
        scorer = Scorer(model, tokenizer)
        length = round(float(np.square(training.lengths).sum() / training.lengths.sum()))
        flops = flops_per_token(model.config, length) - 6.0 * parameters(config.model).head
        what = f"{len(training):,} pairs, {len(held_out):,} held out"
        receipt = train_and_bill(
            out, config, model, optimizers, loader, lambda _: _mean(right(scorer, held_out)), lambda *_: flops, what,
            ranks, step=reward_step, measure="accuracy",
        )  # fmt: skip
        counted: dict[str, float] = {"params_total": size, "params_mtp": 0}
        counted["params_activated"] = parameters(config.model).activated - parameters(config.model).head
        if receipt["ended"] != "interrupted":
            _, low, high = interval(right(scorer, held_out))
            counted |= {"pairs": len(training), "held_out": len(held_out), "accuracy_low": low, "accuracy_high": high}
        lead(lambda: checkpoint.write_json(out / "receipt.json", receipt | counted), everyone)
        return receipt | counted


def _check(config: Config, where: str) -> None:
    if config.teacher is not None or config.lora is not None:
        raise BadInput(f"{where}: neither a teacher nor adapters here: leave teacher.* and lora.* out")
    if config.mesh.pp > 1 or config.mesh.cp > 1:
        raise BadInput(f"{where}: every rank reads whole chats through the whole model: take mesh.dp and mesh.ep")


def _warn(*left_out: tuple[int, str]) -> None:
    for count, what in left_out:
        if count:
            print(f"warning: left out {count:,} pairs {what}", file=sys.stderr)


def for_pairs(config: Config) -> Config:
    """A configuration turned into one for preferences: as for chats, both sides of a pair in the batch's tokens."""
    config = tuned(config)
    batch = max(config.schedule.batch_tokens[0].value / 2, config.stages[0].sequence_length)
    schedule = config.schedule.model_copy(update={"batch_tokens": (Piece(until=1, value=batch),)})
    return config.model_copy(update={"schedule": schedule})


def reward_step(
    model: Transformer,
    optimizers: list[Optimizer],
    ids: Tensor,
    targets: Tensor,
    knobs: Knobs,
    config: Config,
    positions: Tensor | None = None,
    segments: Tensor | None = None,
    ranks: Ranks = ALONE,
    limits: Limits = ANY,
    pipeline: Pipeline | None = None,
) -> StepResult:
    """One optimizer step on double rows [B, T] as `PairLoader` makes them; the loss is nats per pair."""
    assert isinstance(model, RewardModel)
    assert positions is not None
    assert pipeline is None
    model.train()
    pairs = int(ranks.total((targets != IGNORE).sum())) // 2
    at_once = 2 * max(1, config.train.micro_batch // 2)
    micro_batches = -(-int(ranks.largest(torch.tensor(ids.shape[0], device=ids.device))) // at_once)
    total = torch.zeros((), dtype=torch.float64, device=ids.device)
    for number in range(micro_batches):
        before_micro_batch(model, number == micro_batches - 1, config)
        rows = slice(number * at_once, (number + 1) * at_once)
        scores = model.scores(ids[rows], positions[rows], None if segments is None else segments[rows])
        ends = targets[rows] != IGNORE  # the same number in both rows of a pair, in the same order
        loss = preference_loss(scores[::2][ends[::2]], scores[1::2][ends[1::2]])
        (loss / pairs).backward()
        total += loss.detach()
    return update(model, optimizers, [ranks.total(total).item() / pairs], knobs, config, ranks, limits)


def right(scorer: Scorer, pairs: Pairs) -> list[float]:
    """For each pair 1 where the chosen chat has the higher score, ½ where the two are equal, else 0."""
    was_training = scorer.model.training
    scorer.model.eval()
    scores = scorer.score_ids([*pairs.chosen, *pairs.rejected])
    scorer.model.train(was_training)
    return [(np.sign(a - b) + 1) / 2 for a, b in zip(scores, scores[len(pairs) :], strict=False)]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
