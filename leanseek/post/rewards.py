"""What answers earn (report §5.2.1): rules wherever there are any, as they cannot be talked round; else a reward model.

A reward is anything with a name and a weight that takes answers and returns a number for each, or None where it could
not tell. Code is run in the sandbox of `eval/sandbox.py`, and nowhere else.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from leanseek.config import BadInput, GRPOConfig
from leanseek.data.tokenizer import Tokenizer
from leanseek.eval.verify import Verifier
from leanseek.post import judge
from leanseek.post.replies import language_share, parts_of
from leanseek.post.reward_model import Scorer
from leanseek.post.rollout import Answer


class Reward(Protocol):
    @property
    def name(self) -> str:
        """Under which it is logged."""

    @property
    def weight(self) -> float: ...

    def __call__(self, answers: Sequence[Answer]) -> Sequence[float | None]: ...


@dataclass(frozen=True)
class Correct:
    """1 where the verifier finds the answer right. Thoughts are not judged, and those without an end are no answer."""

    verifier: Verifier
    weight: float = 1.0
    name: str = "correct"

    def __call__(self, answers: Sequence[Answer]) -> list[float | None]:
        return [float(self.right(answer)) for answer in answers]

    def right(self, answer: Answer) -> bool:
        parts = parts_of(answer.text)
        return parts is not None and self.verifier(parts.answer, answer.question.row).right


@dataclass(frozen=True)
class Format:
    """1 for an answer that thinks once, inside the tags, says something behind them, and ends of itself (R1 §2.2.2)."""

    weight: float = 1.0
    name: str = "format"

    def __call__(self, answers: Sequence[Answer]) -> list[float | None]:
        parts = (None if answer.cut else parts_of(answer.text) for answer in answers)
        return [float(part is not None and bool(part.thoughts)) for part in parts]


@dataclass(frozen=True)
class Language:
    """The share of the thoughts' words that are in the script of the question (R1 §2.3.2)."""

    weight: float = 1.0
    name: str = "language"

    def __call__(self, answers: Sequence[Answer]) -> list[float | None]:
        found: list[float | None] = []
        for answer in answers:
            parts = parts_of(answer.text)
            share = 0.0 if parts is None else language_share(parts.thoughts or "", answer.question.row["prompt"])
            found.append(share)
        return found


@dataclass(frozen=True)
class Preferred:
    """A reward model's score: any number, so that only differences in a group mean something."""

    scorer: Scorer
    weight: float = 1.0
    name: str = "preferred"

    def __call__(self, answers: Sequence[Answer]) -> list[float | None]:
        return list(self.scorer.score_ids([answer.question.prompt + answer.tokens for answer in answers]))


@dataclass(frozen=True)
class Graded:
    """A judge's grade, from 0 to 1; None where it gave none. It sees what is behind the thoughts."""

    judge: judge.Judge
    weight: float = 1.0
    name: str = "graded"

    def __call__(self, answers: Sequence[Answer]) -> list[float | None]:
        asked = []
        for answer in answers:
            parts, row = parts_of(answer.text), answer.question.row
            asked.append(judge.Question(row["prompt"], parts.answer if parts else answer.text, row.get("answer")))
        return self.judge(asked)


def asked_for(config: GRPOConfig, verifier: Verifier, tokenizer: Tokenizer, device: str) -> list[Reward]:
    """The rewards that the configuration asks for. Raises BadInput where it asks for none, or in vain."""
    rules: list[Reward] = [Correct(verifier, config.correct), Format(config.format), Language(config.language)]
    wanted = [reward for reward in rules if reward.weight]
    if config.reward_model:
        scorer = Scorer.load(Path(config.reward_model), device)
        if scorer.tokenizer.fingerprint != tokenizer.fingerprint:
            raise BadInput(f"{config.reward_model}: its tokenizer is not the run's: the two must come of one model")
        wanted.append(Preferred(scorer, config.reward_model_weight))
    if config.judge_url:
        wanted.append(Graded(judge.Judge(config.judge_url, config.judge_model), config.judge_weight))
    if not wanted:
        raise BadInput("grpo.correct, format and language are 0, and nobody else judges: nothing would earn anything")
    return wanted


@dataclass(frozen=True)
class Earned:
    """By answer: the weighted sum, and each reward's part by its name. None where a reward could not tell."""

    total: list[float | None]
    parts: dict[str, list[float | None]]


def earned(rewards: Sequence[Reward], answers: Sequence[Answer]) -> Earned:
    """What each answer earns. Raises BadInput for a reward that fails, or whose numbers are none."""
    parts: dict[str, list[float | None]] = {}
    for reward in rewards:
        try:
            values = list(reward(answers))
        except BadInput:
            raise
        except Exception as error:
            raise BadInput(f"reward {reward.name!r} failed with {type(error).__name__}: {error}") from error
        if len(values) != len(answers):
            raise BadInput(f"reward {reward.name!r} gave {len(values)} numbers for {len(answers)} answers")
        for value, answer in zip(values, answers, strict=True):
            if value is not None and not math.isfinite(value):
                prompt = str(answer.question.row.get("prompt"))[:60]
                raise BadInput(
                    f"reward {reward.name!r} gave {value} for an answer to {prompt!r}: give numbers, or None"
                )
        parts[reward.name] = values
    total = []
    for each in zip(*parts.values(), strict=True):
        known = [value for value in each if value is not None]
        weighted = sum(reward.weight * value for reward, value in zip(rewards, known, strict=False))
        total.append(weighted if len(known) == len(each) else None)
    return Earned(total, parts)
