"""Sums and countdown puzzles as task rows: a prompt, how a reply is verified, and the answer.

Puzzle number n is a function of (seed, n) alone.
"""

import random
from dataclasses import dataclass
from typing import Any

SUMS = ("What is {sum}?", "Calculate {sum}.", "{sum} = ?", "How much is {sum}?", "Work out {sum}.", "{sum} =")
COUNTDOWNS = (
    "Use the numbers {numbers}, each exactly once, with + - * / to make {target}. Answer with the expression.",
    "Make {target} from the numbers {numbers}. Use each exactly once, with + - * / and parentheses.",
    "Using the numbers {numbers}, each exactly once, and + - * /, write an expression equal to {target}.",
)


@dataclass(frozen=True)
class Sum:
    left: int
    sign: str
    right: int

    def __str__(self) -> str:
        return f"{self.left} {self.sign} {self.right}"

    @property
    def result(self) -> int:
        match self.sign:
            case "+":
                return self.left + self.right
            case "-":
                return self.left - self.right
        return self.left * self.right


def sum_of(seed: int, number: int) -> Sum:
    """Sum number `number`: + and - of one to three digits, * of at most three and one or two and two."""
    rng = random.Random(f"sum:{seed}:{number}")
    digits = rng.choices((1, 2, 3), (3, 5, 2))[0]
    sign = rng.choices("+-*", (4, 4, 3))[0]
    left = rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)
    if sign == "*":
        right = rng.randrange(0, 100 if digits == 2 and rng.random() < 0.3 else 10)
        return Sum(left, sign, right)
    right = rng.randrange(0, 10**digits)
    return Sum(max(left, right), sign, min(left, right)) if sign == "-" else Sum(left, sign, right)


def arithmetic(seed: int, number: int) -> dict[str, Any]:
    """Task row of one sum; its result is never negative."""
    rng = random.Random(f"arithmetic:{seed}:{number}")
    asked = sum_of(seed, number)
    prompt = rng.choice(SUMS).format(sum=asked)
    return {"prompt": prompt, "verify": "exact", "answer": str(asked.result)}


def countdown(seed: int, number: int) -> dict[str, Any]:
    """Task row of one countdown puzzle with three or four numbers, and a solution of it.

    The solution is made first, so that there is one: two of the values become one, with a sign that leaves a whole
    number, until one value is left.
    """
    rng = random.Random(f"countdown:{seed}:{number}")
    while True:
        numbers = [rng.randrange(1, 26) for _ in range(rng.choices((3, 4), (3, 2))[0])]
        values = [(value, str(value)) for value in numbers]
        while len(values) > 1:
            i, j = sorted(rng.sample(range(len(values)), 2))
            (b, right), (a, left) = values.pop(j), values.pop(i)
            if a < b:
                a, b, left, right = b, a, right, left
            left, right = _grouped(left), _grouped(right)
            signs = ["+", "+", "-", "-", "*"] + (["/", "/"] if b and a % b == 0 else [])
            sign = rng.choice(signs)
            result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b else 0}[sign]
            values.append((result, f"{left} {sign} {right}"))
        target, solution = values[0]
        if 1 <= target <= 200 and target not in numbers:
            break
    listed = ", ".join(map(str, numbers))
    prompt = rng.choice(COUNTDOWNS).format(numbers=listed, target=target)
    return {
        "prompt": prompt, "verify": "countdown", "answer": str(target), "numbers": numbers, "solution": solution,
    }  # fmt: skip


def _grouped(expression: str) -> str:
    return f"({expression})" if " " in expression else expression
