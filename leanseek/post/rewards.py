"""What answers earn (report §5.2.1): rules wherever there are any, as they cannot be talked round.

A reward is anything with a name that takes answers and returns a number for each, or None where it could not tell.
Code is run in the sandbox of `eval/sandbox.py`, and nowhere else.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from leanseek.config import BadInput, GRPOConfig
from leanseek.data.tokenizer import THINK
from leanseek.eval.verify import Verifier
from leanseek.post.rollout import Answer

THOUGHTS = re.compile(rf"\s*{THINK[0]}(?P<thoughts>.*?){THINK[1]}(?P<answer>.*)", re.DOTALL)


class Reward(Protocol):
    @property
    def name(self) -> str:
        """Under which it is logged."""

    @property
    def weight(self) -> float: ...

    def __call__(self, answers: Sequence[Answer]) -> Sequence[float | None]: ...


@dataclass(frozen=True)
class Correct:
    """1 where the verifier finds the answer right. Thoughts are not judged; those without an end are no answer."""

    verifier: Verifier
    weight: float = 1.0
    name: str = "correct"

    def __call__(self, answers: Sequence[Answer]) -> list[float | None]:
        return [float(self.right(answer)) for answer in answers]

    def right(self, answer: Answer) -> bool:
        text = answer.text
        if text.lstrip().startswith(THINK[0]):
            found = THOUGHTS.fullmatch(text)
            if found is None:
                return False
            text = found["answer"]
        return self.verifier(text, answer.question.row).right


@dataclass(frozen=True)
class Format:
    """1 for an answer that thinks once, inside the tags, says something behind them, and ends of itself (R1 §2.2.2)."""

    weight: float = 1.0
    name: str = "format"

    def __call__(self, answers: Sequence[Answer]) -> list[float | None]:
        return [float(self.kept(answer)) for answer in answers]

    @staticmethod
    def kept(answer: Answer) -> bool:
        found = THOUGHTS.fullmatch(answer.text)
        if found is None or answer.cut:
            return False
        inside, behind = found["thoughts"].strip(), found["answer"].strip()
        return bool(inside and behind) and not any(tag in inside + behind for tag in THINK)


def rules(config: GRPOConfig, verifier: Verifier) -> list[Reward]:
    """The rewards that the configuration asks for. Raises BadInput where it asks for none."""
    wanted: list[Reward] = [Correct(verifier, config.correct), Format(config.format)]
    wanted = [reward for reward in wanted if reward.weight]
    if not wanted:
        raise BadInput("grpo.correct and grpo.format are both 0: nothing would earn anything")
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
