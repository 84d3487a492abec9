"""GRPO (report §5.2.2): a run that answers is rewarded for answers that earn more than others to the same question.

A step draws a group of answers to each of some questions, from the weights at hand; how far an answer's reward lies
from its group's mean is how much likelier it is to become. There is no critic. The run begins with another's weights,
and these are the reference that the KL term holds it near to.

On several ranks each draws the answers to its share of the questions, by an engine of its own, and rewards them; then
all are told all answers, and share the reading of them anew, by length. One process does the same.
"""

import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from leanseek import checkpoint
from leanseek.config import (
    BadInput,
    Config,
    DataConfig,
    GRPOConfig,
    MeshConfig,
    Piece,
    RolloutConfig,
    ScheduleConfig,
    parse,
    to_toml,
)
from leanseek.data.chats import fingerprint_of
from leanseek.data.loader import part_of
from leanseek.data.tokenizer import Tokenizer
from leanseek.eval.tasks import read_task
from leanseek.eval.verify import Verifier
from leanseek.model.transformer import Transformer
from leanseek.parallel.mesh import ALONE, Ranks, divide, joined, lead, ranks_of, size_of, together
from leanseek.parallel.parts import everywhere, parts
from leanseek.plan.count import flops_per_token, parameters
from leanseek.post.objective import all_equal
from leanseek.post.rewards import Correct, Earned, Reward, asked_for, earned
from leanseek.post.rl_log import RLLog, cut_samples, plot
from leanseek.post.rl_step import Learnt, learn
from leanseek.post.rollout import Answer, EngineRollouts, Interrupted, Question, Questions, Rollouts
from leanseek.post.sft import LARGE, check_overrides, peak_of, tokenizer_of
from leanseek.post.vllm import VLLMRollouts
from leanseek.train.loop import Clock, Ending, Progress, stop_signals
from leanseek.train.receipt import write_receipt
from leanseek.train.schedule import Knobs, knobs
from leanseek.train.setup import build, settled, take_up

PUBLISHED = 1e-6  # DeepSeekMath's rate, for models as large as those it was made for
RATE = 0.03  # of smaller ones: a share of the peak of the run that it begins with
WARM_UP = 0.05  # share of the steps
NOTHING = (
    "all answers to a question earned the same, whatever the question: nothing to learn from; "
    "other questions, a larger grpo.group or grpo.dynamic_sampling would help"
)


def grpo(
    run: Path,
    file: Path,
    out: Path,
    overrides: Sequence[str] = (),
    dev: Path | None = None,
    rewards: Sequence[Reward] = (),
) -> dict[str, Any]:
    """Trains OUT on a file of questions, from RUN's weights or from where OUT stopped; returns its receipt.

    dev: questions that are answered greedily every `train.eval_every` steps and never learnt from. rewards: beside
    those that the configuration asks for. Raises BadInput, OSError. Under torchrun every process calls it.
    """
    if out.resolve() == run.resolve():
        raise BadInput(f"{out}: it would train onto the run it begins with: take another folder")
    begun_with = checkpoint.read_run(run)
    config = parse(to_toml(tuned(begun_with)), f"grpo of {run}", list(overrides))
    _check(config, begun_with, run)
    tokenizer, chat = tokenizer_of(run, config), checkpoint.chats(run)
    with joined(config.mesh.timeout) as everyone, Verifier() as verifier, ExitStack() as stack:
        weights = lead(lambda: checkpoint.newest_weights(run), everyone)
        questions = together(lambda: _questions(file, config, tokenizer, chat), everyone)
        held_out = None if dev is None else together(lambda: _questions(dev, config, tokenizer, chat), everyone)
        lead(lambda: _warn(questions, held_out), everyone)
        if any(question.row["verify"] == "code" for question in questions.items):
            _ = together(lambda: verifier.sandbox, everyone)  # where there are no walls, nothing is asked in vain
        device = settled(config.train).device
        asked = together(lambda: asked_for(settings_of(config), verifier, tokenizer, device), everyone)
        world = divide(config, size_of(everyone)).world
        lead(lambda: stack.enter_context(checkpoint.lock(out)), everyone)
        given = config, fingerprint_of(file), run / "tokenizer", file
        config = lead(lambda: take_up(out, *given, chats=chat, begun_with=run, ranks=world), everyone)
        settings, ranks = settings_of(config), ranks_of(config)
        model, optimizers, _ = build(config, ranks, drawn=False)
        checkpoint.load_weights(weights, model, ranks)  # the optimizers begin anew
        rollouts = _rollouts(run, out, config, model, tokenizer, questions.stop, ranks)

        def validate() -> list[bool]:
            assert held_out is not None
            mine = [held_out.items[i] for i in part_of(0, len(held_out), ranks.place["dp"], ranks.division.dp)]

            def answered() -> list[bool]:
                answers = rollouts.draw(mine, [0] * len(mine), 0.0, lambda: False)
                return [*map(Correct(verifier).right, answers)]

            told = ranks.told(together(answered, everyone))
            return [right for theirs in told for right in theirs]

        with RLLog(out, settings.steps, silent=not ranks.first) as log:
            log.say(
                f"{out}: {settings.steps:,} steps of {settings.prompts} questions out of {len(questions):,} with "
                f"{settings.group} answers each, on {config.train.device} in {config.train.dtype}{ranks.named()}"
            )
            explorer = Explorer(questions, rollouts, [*asked, *rewards], settings, ranks)
            progress, ending = _train(
                out, config, model, optimizers, explorer, None if held_out is None else validate, weights, log, ranks
            )

        def billed() -> dict[str, Any]:
            if progress.step:
                plot(out)
            receipt = write_receipt(out, config, progress, ending, ranks.world)
            receipt |= {"answers": progress.answers, "reward": progress.reward, "dev": progress.dev}
            checkpoint.write_json(out / "receipt.json", receipt)
            return receipt

        return lead(billed, everyone)


def tuned(config: Config) -> Config:
    """A configuration of another stage turned into one for GRPO.

    A checkpoint after every step is the default: beside hundreds of answers it costs little, and then a kill costs the
    step at hand and no more. MTP modules, which no reward reaches, rest as they are, and so does the routers' bias.
    """
    peak = max(max(piece.value, piece.start or 0.0) for piece in config.schedule.learning_rate)
    if config.grpo is None:  # else it goes on with what was rewarded before
        peak = PUBLISHED if parameters(config.model).activated >= LARGE else RATE * peak_of(config.schedule)
    begin, then = Piece(until=WARM_UP, value=peak, shape="linear"), Piece(until=1, value=peak)
    schedule = ScheduleConfig(
        unit="fraction",
        learning_rate=(begin, then),
        batch_tokens=(Piece(until=1, value=1),),  # counted in questions: grpo.prompts
        bias_speed=(Piece(until=1, value=0),),
        mtp_weight=(Piece(until=1, value=0),),
    )
    here: dict[str, Any] = {"dtype": "auto", "device": "auto", "max_steps": None, "max_seconds": None}
    here |= {"balance_loss_alpha": 0.0, "mtp_length": None}
    often = {"checkpoint_every": 1, "eval_every": 10}
    return config.model_copy(
        update={
            "train": config.train.model_copy(update=here | often),
            "optimizer": config.optimizer.model_copy(
                update={"name": "adamw", "weight_decay": 0.0, "embedding_rate": 1.0}
            ),
            "schedule": schedule,
            "data": DataConfig(),
            "mesh": MeshConfig(),
            "stages": (config.stages[-1].model_copy(update={"share": 1.0, "mixture": {}}),),
            "teacher": None,
            "counts": None,
            "lora": None,
            "grpo": GRPOConfig(),
            "rollout": RolloutConfig(),
        }
    )


def settings_of(config: Config) -> GRPOConfig:
    assert config.grpo is not None
    return config.grpo


# ── a step's answers ──────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Explored:
    """What a step learns from, whole groups one behind the other, and what was seen on the way to it."""

    answers: list[Answer] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    every: list[Answer] = field(default_factory=list)  # those without anything to learn among them
    totals: list[float | None] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    by_source: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    place: int = 0  # behind the last question
    equal_groups: int = 0
    unjudged: int = 0  # answers to which a reward said None; their groups are left out


@dataclass(frozen=True)
class Explorer:
    questions: Questions
    rollouts: Rollouts
    rewards: Sequence[Reward]
    settings: GRPOConfig
    ranks: Ranks = ALONE

    def explore(self, place: int, asked_to_stop: Callable[[], bool]) -> Explored:
        """Answers and rewards for the questions from `place` on: a function of the weights and of that alone.

        Raises Interrupted, and BadInput for a reward that fails.
        """
        seen, settings = Explored(place=place), self.settings
        for _ in range(settings.most_rounds if settings.dynamic_sampling else 1):
            missing = settings.prompts - len(seen.answers) // settings.group
            if missing:
                self._round(seen, missing, asked_to_stop)
        return seen

    def _round(self, seen: Explored, count: int, asked_to_stop: Callable[[], bool]) -> None:
        """Draws a group of answers to each of the next `count` questions."""
        group, asked, seeds = self.settings.group, [], []
        for place in range(seen.place, seen.place + count):
            asked += [self.questions.at(place)] * group
            seeds += self.questions.seeds(place, group)
        answers, found = self._answered(asked, seeds, asked_to_stop)
        seen.place += count
        seen.every += answers
        seen.totals += found.total
        for name, values in found.parts.items():
            seen.parts[name] += [value for value in values if value is not None]
        for answer, value in zip(answers, found.total, strict=True):
            if value is not None:
                seen.by_source[answer.question.source].append(value)
        for first in range(0, len(answers), group):
            rewards = [value for value in found.total[first : first + group] if value is not None]
            if len(rewards) < group:
                seen.unjudged += group - len(rewards)
                continue
            equal = bool(all_equal(torch.tensor(rewards), group))
            seen.equal_groups += equal
            if not (equal and self.settings.dynamic_sampling):
                seen.answers += answers[first : first + group]
                seen.rewards += rewards

    def _answered(
        self, asked: Sequence[Question], seeds: Sequence[int], asked_to_stop: Callable[[], bool]
    ) -> tuple[list[Answer], Earned]:
        """All answers and what they earn; every rank draws and rewards those to its share of the questions."""
        group, place, ways = self.settings.group, self.ranks.place["dp"], self.ranks.division.dp
        groups = part_of(0, len(asked) // group, place, ways)
        mine = slice(groups.start * group, groups.stop * group)

        def work() -> tuple[list[Answer], Earned] | None:
            try:
                answers = self.rollouts.draw(asked[mine], seeds[mine], 1.0, asked_to_stop)
            except Interrupted:
                return None
            return answers, earned(self.rewards, answers)

        told = self.ranks.told(together(work, self.ranks.group("world")))
        of_ranks = [each for each in told if each is not None]
        if len(of_ranks) < len(told):
            raise Interrupted
        answers, found = [], Earned([], {reward.name: [] for reward in self.rewards})
        for some, theirs in of_ranks:
            answers += some
            found.total.extend(theirs.total)
            for name, values in theirs.parts.items():
                found.parts[name].extend(values)
        return answers, found


# ── the loop ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class RLProgress(Progress):
    """`sample` is the place behind the last question; `tokens` are the answers', prompts not counted."""

    answers: int = 0
    reward: float | None = None  # of the newest step
    dev: float | None = None
    dev_step: int | None = None
    reference: int = 0  # the step whose weights are the reference; 0: those that the run began with


def _train(
    run: Path,
    config: Config,
    model: Transformer,
    optimizers: list[Optimizer],
    explorer: Explorer,
    validate: Callable[[], list[bool]] | None,
    begun_with: checkpoint.Weights,
    log: RLLog,
    ranks: Ranks,
) -> tuple[RLProgress, Ending]:
    """Steps until there have been enough, a limit or a signal; returns where it got to and why it ended.

    The same call on the same RUN goes on from the newest whole checkpoint. All `ranks` call it and agree on everything.
    Raises BadInput where a reward fails and where steps are not finite again and again; what was learnt until then is
    saved.
    """
    settings = explorer.settings
    progress = _resume(run, model, optimizers, log, ranks)
    explorer.rollouts.refresh()
    reference = _reference(run, progress, config, begun_with, ranks) if settings.kl_weight else None
    clock = Clock(progress, ranks)
    saved: RLProgress | None = None if progress.step == 0 else replace(progress)
    bad = 0  # steps in a row whose loss or gradient was not finite

    def save() -> None:
        nonlocal saved
        if saved != progress:
            clock.stamp(progress)
            keep = config.train.keep_checkpoints
            checkpoint.save(run, progress.step, model, optimizers, asdict(progress), keep, ranks)
            saved = replace(progress)
            lead(lambda: _forget_references(run, progress.reference), ranks.group("world"))

    @contextmanager
    def answers_or_saved() -> Iterator[None]:
        try:
            yield
        except BadInput:
            save()
            raise

    with stop_signals() as signals:
        while True:
            asked_to_stop = ranks.any(bool(signals))
            ending = _ending(config, settings, progress, clock, asked_to_stop)
            due = ending in ("complete", "max_steps", "max_seconds") or progress.step % config.train.eval_every == 0
            if validate is not None and due and not asked_to_stop and progress.dev_step != progress.step:
                with answers_or_saved():
                    right = validate()
                progress.dev, progress.dev_step = fmean(right), progress.step
                log.answered(progress.step, progress.dev, len(right))
            if ending is not None or progress.step % config.train.checkpoint_every == 0:
                save()
            if ending is not None:
                break

            begun = time.monotonic()
            try:
                with answers_or_saved():
                    seen = explorer.explore(progress.sample, lambda: bool(signals))
            except Interrupted:
                continue
            drawn = time.monotonic()
            now = knobs(config.schedule, progress.step + 0.5, settings.steps)
            learnt = Learnt()
            if seen.equal_groups * settings.group < len(seen.answers) or (seen.answers and reference is not None):
                rewards = torch.tensor(seen.rewards, dtype=torch.float64)
                closed = explorer.rollouts.closed
                given = seen.answers, rewards, closed, now, config, settings, ranks
                learnt = learn(model, optimizers, reference, *given)
                explorer.rollouts.refresh()
            if seen.equal_groups * settings.group >= len(seen.answers):
                log.say(f"step {progress.step + 1}: {NOTHING}")

            progress.sample = seen.place
            progress.flops += _flops(config, seen, reference is not None)
            if not learnt.finite:
                bad += 1
                progress.skipped_steps += 1
                log.say(f"step {progress.step + 1}: loss or gradient is not finite; step skipped")
                if bad == config.train.rollback_after:
                    save()
                    raise BadInput(f"{run}: {bad} steps in a row were not finite: lower schedule.learning_rate")
                continue
            bad = 0
            progress.step += 1
            progress.tokens += sum(len(answer.tokens) for answer in seen.answers)
            progress.answers += len(seen.every)
            progress.reward = _mean([value for value in seen.totals if value is not None])
            if reference is not None and settings.reference_every and progress.step % settings.reference_every == 0:
                _renew_reference(run, progress, model, reference, ranks)
            clock.stamp(progress)
            seconds = {"rollout_seconds": drawn - begun, "learning_seconds": time.monotonic() - drawn}
            log.explored(_row(progress, now, seen, learnt, settings) | seconds, time.monotonic() - begun)
            shown = slice(0, settings.samples_shown)
            log.samples(progress.step, seen.every[shown], seen.totals[shown])
    return progress, ending


def _row(progress: RLProgress, now: Knobs, seen: Explored, learnt: Learnt, settings: GRPOConfig) -> dict[str, Any]:
    """A step's line in metrics.jsonl."""
    lengths = [len(answer.tokens) for answer in seen.every]
    groups = len(seen.every) // settings.group
    row: dict[str, Any] = {"step": progress.step, "tokens": progress.tokens, "reward": progress.reward}
    row |= {f"reward_{name}": _mean(values) for name, values in sorted(seen.parts.items())}
    row |= {f"reward_of_{source}": _mean(values) for source, values in sorted(seen.by_source.items())}
    row |= {
        "length": fmean(lengths),
        "cut": fmean(answer.cut for answer in seen.every),
        "equal_groups": seen.equal_groups / groups,
        "unjudged": seen.unjudged,
        "answers": len(seen.every),
        "lr": now.learning_rate,
    }
    row |= asdict(learnt) | {"learnt_tokens": learnt.tokens, "tokens": progress.tokens}
    return row | {"seconds": progress.seconds, "cpu_seconds": progress.cpu_seconds, "flops": progress.flops}


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else 0.0


def _flops(config: Config, seen: Explored, with_reference: bool) -> float:
    """What a step costs: every answer is drawn, those that are learnt from are read again, forth and back."""
    model = config.model.model_copy(update={"num_nextn_predict_layers": 0})  # which GRPO neither trains nor asks
    drawn = [len(answer.question.prompt) + len(answer.tokens) for answer in seen.every]
    read = sum(len(answer.question.prompt) + len(answer.tokens) for answer in seen.answers)
    forth = flops_per_token(model, round(fmean(drawn))) / 3
    again = settings_of(config).updates > 1
    return forth * (sum(drawn) + read * (3 + with_reference + again))


def _ending(
    config: Config, settings: GRPOConfig, progress: RLProgress, clock: Clock, asked_to_stop: bool
) -> Ending | None:
    if progress.step >= settings.steps:
        return "complete"
    if asked_to_stop:
        return "interrupted"
    if config.train.max_steps is not None and progress.step >= config.train.max_steps:
        return "max_steps"
    if config.train.max_seconds is not None and clock.any_past(config.train.max_seconds):
        return "max_seconds"
    return None


def _resume(run: Path, model: Transformer, optimizers: list[Optimizer], log: RLLog, ranks: Ranks) -> RLProgress:
    everyone = ranks.group("world")
    newest = lead(lambda: checkpoint.newest(run, log.say), everyone)
    if newest is None or not newest.state():
        return RLProgress()
    progress = RLProgress(**checkpoint.load(newest, model, optimizers, ranks))
    step, answered = progress.step, progress.dev_step
    spent = lead(lambda: checkpoint.cut_metrics(run, step, answered), everyone)  # with what was lost since then
    lead(lambda: cut_samples(run, step), everyone)
    progress.seconds = max(progress.seconds, spent["seconds"])
    progress.cpu_seconds = max(progress.cpu_seconds, spent["cpu_seconds"])
    progress.flops = max(progress.flops, spent["flops"])
    log.dev = progress.dev
    if progress.step:
        log.say(f"goes on from step {progress.step}")
    return progress


# ── the reference ─────────────────────────────────────────────────────────────────────────────────────────────────


def _reference(
    run: Path, progress: RLProgress, config: Config, begun_with: checkpoint.Weights, ranks: Ranks
) -> Transformer:
    reference = build(config, ranks, drawn=False)[0].requires_grad_(False).eval()
    if progress.reference == 0:
        checkpoint.load_weights(begun_with, reference, ranks)
    else:
        checkpoint.load_model_weights(_reference_folder(run, progress.reference), reference, ranks=ranks)
    return reference


def _renew_reference(run: Path, progress: RLProgress, model: Transformer, reference: Transformer, ranks: Ranks) -> None:
    """The model at hand becomes the reference, and is kept: a run that goes on needs the same."""
    reference.load_state_dict(model.state_dict())
    progress.reference = progress.step
    checkpoint.save_weights(_reference_folder(run, progress.reference), model, ranks)


def _forget_references(run: Path, kept: int) -> None:
    folder = run / "reference"
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry != _reference_folder(run, kept):
            shutil.rmtree(entry)


def _reference_folder(run: Path, step: int) -> Path:
    return run / "reference" / f"step-{step:08d}"


# ── what it is begun with ─────────────────────────────────────────────────────────────────────────────────────────


def _check(config: Config, begun_with: Config, run: Path) -> None:
    where = f"grpo of {run}"
    check_overrides(config, begun_with, where)
    if config.teacher is not None or config.lora is not None:
        raise BadInput(f"{where}: neither a teacher nor adapters here: leave teacher.* and lora.* out")
    if config.train.balance_loss_alpha or any(piece.value for piece in config.schedule.bias_speed):
        raise BadInput(f"{where}: experts are not balanced here: leave balance_loss_alpha and bias_speed out")
    if config.grpo is None or config.rollout is None:
        raise BadInput(f"{where}: [grpo] and [rollout] cannot be left out")
    if config.train.compile:
        raise BadInput(f"{where}: train.compile does not go with answers of every length: leave it out")
    if config.mesh.pp > 1 or config.mesh.cp > 1:
        raise BadInput(f"{where}: every rank reads whole answers through the whole model: take mesh.dp and mesh.ep")


def _questions(file: Path, config: Config, tokenizer: Tokenizer, chat: bool) -> Questions:
    context, most = config.model.max_position_embeddings, settings_of(config).max_tokens
    return Questions(read_task(file), tokenizer, chat, context, most, config.train.seed)


def _rollouts(
    run: Path,
    out: Path,
    config: Config,
    model: Transformer,
    tokenizer: Tokenizer,
    stop: tuple[str, ...],
    ranks: Ranks,
) -> Rollouts:
    most, how = settings_of(config).max_tokens, config.rollout
    assert how is not None
    match how.engine:
        case "leanseek":
            if ranks.world == 1:
                return EngineRollouts(model, tokenizer, most, stop, how.at_once)
            whole = Transformer(config.model, model.dtype).to(ranks.device).requires_grad_(False)
            whole.use(model.kernels)

            def trained() -> Iterator[tuple[str, Tensor]]:
                return everywhere(model.state_dict(), parts(model, ranks), ranks)

            return EngineRollouts(whole, tokenizer, most, stop, how.at_once, trained)
        case "vllm":
            return VLLMRollouts(model, tokenizer, run / "tokenizer", config, most, stop, out / "rollout", ranks)


def _warn(*asked: Questions | None) -> None:
    for line in (line for questions in asked if questions is not None for line in questions.left_out):
        print(f"warning: {line}", file=sys.stderr)
