"""GRPO (report §5.2.2): a run that answers is rewarded for answers that earn more than others to the same question.

A step draws a group of answers to each of some questions, from the weights at hand; how far an answer's reward lies
from its group's mean is how much likelier it is to become. There is no critic. The run begins with another's weights,
and these are the reference that the KL term holds it near to.
"""

import copy
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import save_file
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
from leanseek.data.tokenizer import Tokenizer
from leanseek.eval.tasks import read_task
from leanseek.eval.verify import Verifier
from leanseek.model.transformer import Transformer
from leanseek.parallel.mesh import refuse_many
from leanseek.plan.count import flops_per_token, parameters
from leanseek.post.objective import all_equal
from leanseek.post.rewards import Correct, Reward, asked_for, earned
from leanseek.post.rl_log import RLLog, cut_samples, plot
from leanseek.post.rl_step import Learnt, learn
from leanseek.post.rollout import Answer, EngineRollouts, Interrupted, Questions, Rollouts
from leanseek.post.sft import LARGE, check_overrides, tokenizer_of
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
    those that the configuration asks for. Raises BadInput, OSError.
    """
    refuse_many("grpo")
    if out.resolve() == run.resolve():
        raise BadInput(f"{out}: it would train onto the run it begins with: take another folder")
    begun_with = checkpoint.read_run(run)
    config = parse(to_toml(tuned(begun_with)), f"grpo of {run}", list(overrides))
    _check(config, begun_with, run)
    tokenizer, chat = tokenizer_of(run, config), checkpoint.chats(run)
    if checkpoint.newest(run, _warn) is None:
        raise BadInput(f"{run}: there is no checkpoint in it yet: train it first")
    questions = _questions(file, config, tokenizer, chat)
    held_out = None if dev is None else _questions(dev, config, tokenizer, chat)
    with Verifier() as verifier, ExitStack() as stack:
        if any(question.row["verify"] == "code" for question in questions.items):
            _ = verifier.sandbox  # where there are no walls, nothing shall be asked in vain
        device = settled(config.train).device
        every = [*asked_for(settings_of(config), verifier, tokenizer, device), *rewards]
        stack.enter_context(checkpoint.lock(out))
        config = take_up(out, config, fingerprint_of(file), run / "tokenizer", file, chats=chat, begun_with=run)
        settings = settings_of(config)
        model, optimizers, _ = build(config)
        checkpoint.load_newest(run, model)  # the optimizers begin anew
        rollouts = _rollouts(run, out, config, model, tokenizer, questions.stop)

        def validate() -> list[bool]:
            assert held_out is not None
            answers = rollouts.draw(held_out.items, [0] * len(held_out), 0.0, lambda: False)
            return [*map(Correct(verifier).right, answers)]

        with RLLog(out, settings.steps) as log:
            log.say(
                f"{out}: {settings.steps:,} steps of {settings.prompts} questions out of {len(questions):,} with "
                f"{settings.group} answers each, on {config.train.device} in {config.train.dtype}"
            )
            explorer = Explorer(questions, rollouts, every, settings)
            progress, ending = _train(
                out, config, model, optimizers, explorer, None if held_out is None else validate, run, log
            )
            if progress.step:
                plot(out)
        receipt = write_receipt(out, config, progress, ending)
        receipt |= {"answers": progress.answers, "reward": progress.reward, "dev": progress.dev}
        checkpoint.write_json(out / "receipt.json", receipt)
        return receipt


def tuned(config: Config) -> Config:
    """A configuration of another stage turned into one for GRPO.

    A checkpoint after every step is the default: beside hundreds of answers it costs little, and then a kill costs the
    step at hand and no more. MTP modules, which no reward reaches, rest as they are, and so does the routers' bias.
    """
    peak = max(max(piece.value, piece.start or 0.0) for piece in config.schedule.learning_rate)
    if config.grpo is None:  # else it goes on with what was rewarded before
        peak = PUBLISHED if parameters(config.model).activated >= LARGE else RATE * peak
    begin, then = Piece(until=WARM_UP, value=peak, shape="linear"), Piece(until=1, value=peak)
    schedule = ScheduleConfig(
        unit="fraction",
        learning_rate=(begin, then),
        batch_tokens=(Piece(until=1, value=1),),  # counted in questions: grpo.prompts
        bias_speed=(Piece(until=1, value=0),),
        mtp_weight=(Piece(until=1, value=0),),
    )
    here = {"dtype": "auto", "device": "auto", "max_steps": None, "max_seconds": None, "balance_loss_alpha": 0.0}
    often = {"checkpoint_every": 1, "eval_every": 10}
    return config.model_copy(
        update={
            "train": config.train.model_copy(update=here | often),
            "optimizer": config.optimizer.model_copy(update={"name": "adamw", "weight_decay": 0.0}),
            "schedule": schedule,
            "data": DataConfig(),
            "mesh": MeshConfig(),
            "stages": (config.stages[-1].model_copy(update={"share": 1.0, "mixture": {}}),),
            "teacher": None,
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
        answers = self.rollouts.draw(asked, seeds, 1.0, asked_to_stop)
        found = earned(self.rewards, answers)
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
    begun_with: Path,
    log: RLLog,
) -> tuple[RLProgress, Ending]:
    """Steps until there have been enough, a limit or a signal; returns where it got to and why it ended.

    The same call on the same RUN goes on from the newest whole checkpoint. Raises BadInput where a reward fails and
    where steps are not finite again and again; what was learnt until then is saved.
    """
    settings = explorer.settings
    progress = _resume(run, model, optimizers, log)
    explorer.rollouts.refresh()
    reference = _reference(run, progress, model, begun_with) if settings.kl_weight else None
    clock = Clock(progress)
    saved: RLProgress | None = None if progress.step == 0 else replace(progress)
    bad = 0  # steps in a row whose loss or gradient was not finite

    def save() -> None:
        nonlocal saved
        if saved != progress:
            clock.stamp(progress)
            checkpoint.save(run, progress.step, model, optimizers, asdict(progress), config.train.keep_checkpoints)
            saved = replace(progress)
            _forget_references(run, progress.reference)

    with stop_signals() as signals:
        while True:
            ending = _ending(config, settings, progress, clock, signals)
            due = ending in ("complete", "max_steps", "max_seconds") or progress.step % config.train.eval_every == 0
            if validate is not None and due and not signals and progress.dev_step != progress.step:
                right = validate()
                progress.dev, progress.dev_step = fmean(right), progress.step
                log.answered(progress.step, progress.dev, len(right))
            if ending is not None or progress.step % config.train.checkpoint_every == 0:
                save()
            if ending is not None:
                break

            begun = time.monotonic()
            try:
                seen = explorer.explore(progress.sample, lambda: bool(signals))
            except Interrupted:
                continue
            except BadInput:
                save()
                raise
            drawn = time.monotonic()
            now = knobs(config.schedule, progress.step + 0.5, settings.steps)
            learnt = Learnt()
            if seen.equal_groups * settings.group < len(seen.answers) or (seen.answers and reference is not None):
                rewards = torch.tensor(seen.rewards, dtype=torch.float64)
                closed = explorer.rollouts.closed
                learnt = learn(model, optimizers, reference, seen.answers, rewards, closed, now, config, settings)
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
                _renew_reference(run, progress, model, reference)
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
    config: Config, settings: GRPOConfig, progress: RLProgress, clock: Clock, signals: list[int]
) -> Ending | None:
    if progress.step >= settings.steps:
        return "complete"
    if signals:
        return "interrupted"
    if config.train.max_steps is not None and progress.step >= config.train.max_steps:
        return "max_steps"
    if config.train.max_seconds is not None and clock.seconds() >= config.train.max_seconds:
        return "max_seconds"
    return None


def _resume(run: Path, model: Transformer, optimizers: list[Optimizer], log: RLLog) -> RLProgress:
    newest = checkpoint.newest(run, log.say)
    if newest is None or not newest.state():
        return RLProgress()
    progress = RLProgress(**checkpoint.load(newest, model, optimizers))
    spent = checkpoint.cut_metrics(run, progress.step, progress.dev_step)  # with what was lost since the checkpoint
    cut_samples(run, progress.step)
    progress.seconds = max(progress.seconds, spent["seconds"])
    progress.cpu_seconds = max(progress.cpu_seconds, spent["cpu_seconds"])
    progress.flops = max(progress.flops, spent["flops"])
    log.dev = progress.dev
    if progress.step:
        log.say(f"goes on from step {progress.step}")
    return progress


# ── the reference ─────────────────────────────────────────────────────────────────────────────────────────────────


def _reference(run: Path, progress: RLProgress, model: Transformer, begun_with: Path) -> Transformer:
    reference = copy.deepcopy(model).requires_grad_(False).eval()
    if progress.reference == 0:
        checkpoint.load_newest(begun_with, reference)
    else:
        checkpoint.load_model_weights(_reference_folder(run, progress.reference), reference)
    return reference


def _renew_reference(run: Path, progress: RLProgress, model: Transformer, reference: Transformer) -> None:
    """The model at hand becomes the reference, and is kept: a run that goes on needs the same."""
    reference.load_state_dict(model.state_dict())
    progress.reference = progress.step
    folder = _reference_folder(run, progress.reference)
    writing = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(writing, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    writing.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, writing / "model.safetensors")
    writing.rename(folder)


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


def _questions(file: Path, config: Config, tokenizer: Tokenizer, chat: bool) -> Questions:
    task, settings = read_task(file), settings_of(config)
    if task.left_out:
        _warn(f"{file}: left out {len(task.left_out)} rows; the first, {task.left_out[0]}")
    context = config.model.max_position_embeddings
    questions = Questions(task, tokenizer, chat, context, settings.max_tokens, config.train.seed)
    if questions.too_long:
        _warn(
            f"{file}: left out {questions.too_long:,} questions that leave no room for {settings.max_tokens} tokens of "
            f"answer in the context of {context}"
        )
    return questions


def _rollouts(
    run: Path, out: Path, config: Config, model: Transformer, tokenizer: Tokenizer, stop: tuple[str, ...]
) -> Rollouts:
    most, how = settings_of(config).max_tokens, config.rollout
    assert how is not None
    match how.engine:
        case "leanseek":
            return EngineRollouts(model, tokenizer, most, stop, how.at_once)
        case "vllm":
            return VLLMRollouts(model, tokenizer, run / "tokenizer", config, most, stop, out / "rollout")


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)
