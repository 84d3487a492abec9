"""Is a reply right? One verifier for each kind of task, for evaluation and for RL (report §5.2.1) alike.

A verifier judges the answer that a reply settles on, not whatever else stands in it: what it boxes, else what follows
its last "####" or "the answer is", else its end. So a reply that names several answers is not right by naming the right
one among them. What a verifier is asked to compute for strangers (algebra, patterns, code) it computes in another
process with a limit of time, and a comparison that does not come back in time is told apart from a wrong answer.
"""

import ast
import re
import secrets
import signal
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from leanseek.config import BadInput, nearest
from leanseek.eval.sandbox import Limits, Sandbox
from leanseek.eval.worker import Hung, Worker

LIMITS = Limits()
KINDS = ("math", "exact", "regex", "choice", "countdown", "code")
EXPRESSION = re.compile(r"[0-9+\-*/() ]+")
LONGEST_EXPRESSION = 200  # characters; deeper nesting than this could hold would trouble the parser
LONGEST_FORMULA = 300  # characters; to parse a longer one may take minutes
LONGEST_ANSWER = 2000  # characters of a reply's end or marked answer that are looked at
SAYS = re.compile(
    r"story says\s*:|(?:answer|result)(?:\s+is|\s+would\s+be|\s*:|\s*=)+"
    r"|(?:答案|结果)(?:应该|应当)?(?:是|为|选|[:：])+",
    re.IGNORECASE,
)
NUMBER = re.compile(r"(?<![\w.])[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?(?![\w/])|(?<![\w.])[-+−]?\.\d+")
FENCE = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class Verdict:
    """`answer`: what the reply was taken to settle on; replies with the same one agree with each other.

    `hung`: the verifier did not come back in time, so nobody knows; it counts as not right.
    """

    right: bool
    answer: str | None
    hung: bool = False


class Verifier:
    """Judges replies; keeps the process in which algebra and patterns are computed. Close it, or use it in a `with`.

    seconds: how long one comparison may take. limits: of a program, tests included.
    """

    def __init__(self, seconds: float = 10.0, limits: Limits = LIMITS, sandbox: Sandbox | None = None) -> None:
        self.worker, self.limits, self._sandbox = Worker(seconds), limits, sandbox

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, *_: object) -> None:
        self.worker.close()

    @property
    def sandbox(self) -> Sandbox:
        """Raises BadInput where nothing isolates."""
        if self._sandbox is None:
            self._sandbox = Sandbox.find()
        return self._sandbox

    def __call__(self, reply: str, row: Mapping[str, Any]) -> Verdict:
        """Judges a reply by a row of a task that `check` found nothing wrong with. Raises BadInput."""
        try:
            match row["verify"]:
                case "math":
                    return self._math(reply, row["answer"])
                case "exact":
                    return exact(reply, row["answer"])
                case "regex":
                    said = reply[-LONGEST_ANSWER:].strip()
                    return Verdict(bool(self.worker.ask("regex", row["answer"], said)), said)
                case "choice":
                    return choice(reply, row["answer"], row["choices"])
                case "countdown":
                    return countdown(reply, row["answer"], row["numbers"])
                case "code":
                    return self._code(reply, row)
        except Hung:
            return Verdict(False, None, hung=True)
        raise BadInput(f"there is no verifier {row['verify']!r}{nearest(str(row['verify']), list(KINDS))}")

    def _math(self, reply: str, gold: str) -> Verdict:
        said = marked(reply)
        said = plain_math(_end_of_math(reply, "=" in gold) if said is None else said)
        wanted = plain_math(marked(gold) or gold)
        if not said or len(said) > LONGEST_FORMULA:
            return Verdict(False, None)
        if said == wanted:
            return Verdict(True, said)
        left, right = _rational(said), _rational(wanted)
        if left is not None and right is not None:
            return Verdict(left == right, str(left))
        return Verdict(bool(self.worker.ask("math", wanted, said)), said)

    def _code(self, reply: str, row: Mapping[str, Any]) -> Verdict:
        """Only a program that gets to the end of the tests can say so: it knows a word that is new each time."""
        word, code = secrets.token_hex(16), row.get("prefix", "") + code_of(reply)
        program = f"{TESTED}\n_examine({code!r}, {row.get('setup', '')!r}, {list(row['tests'])!r}, {word!r})"
        ran = self.sandbox.run(program, self.limits)
        return Verdict(
            ran.ended == "itself" and ran.stdout.endswith(f"\n{word}\n"),
            None,
            hung=ran.ended == "time" or ran.exit_code == -signal.SIGXCPU,
        )


def check(row: Mapping[str, Any]) -> str | None:
    """What is wrong with a task's row, in a few words; None when it can be asked and judged."""
    for name in ("prompt", "verify"):
        if not isinstance(row.get(name), str):
            return f"has no text {name!r}"
    kind = row["verify"]
    if kind not in KINDS:
        return f"verify names no verifier: {kind!r}{nearest(kind, list(KINDS))}"
    if kind == "code":
        tests = row.get("tests")
        return None if tests and _texts(tests) else "has no list 'tests' of programs"
    if not isinstance(row.get("answer"), str) or not row["answer"].strip():
        return "has no text 'answer'"
    if kind == "regex":
        try:
            re.compile(row["answer"])
        except re.error as error:
            return f"answer is no regular expression ({error})"
    if kind == "countdown":
        numbers = row.get("numbers")
        if not isinstance(numbers, list) or not numbers or not all(type(number) is int for number in numbers):
            return "has no list 'numbers' of whole numbers"
        if _rational(row["answer"]) is None:
            return f"answer is no number: {row['answer']!r}"
    if kind == "choice":
        choices = row.get("choices")
        if not isinstance(choices, list) or len(choices) < 2 or not _texts(choices):
            return "has no list 'choices' of at least two texts"
        if len(set(choices)) < len(choices):
            return "has the same choice twice"
        if key_of(row["answer"], choices) is None:
            return f"answer names no choice: {row['answer']!r} of {len(choices)}"
    return None


def _texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) and value.strip() for value in values)


# ── what a reply settles on ───────────────────────────────────────────────────────────────────────────────────────


def marked(reply: str) -> str | None:
    """The answer that a reply marks as its own: in its last \\boxed{…}, else behind its last "####" or "answer is"."""
    start = max(reply.rfind("\\boxed{"), reply.rfind("\\fbox{"))
    if start >= 0:
        begin = reply.index("{", start) + 1
        depth = 1
        for place in range(begin, min(len(reply), begin + LONGEST_ANSWER)):
            depth += {"{": 1, "}": -1}.get(reply[place], 0)
            if not depth:
                return reply[begin:place].strip()
    after = max((reply.rfind("####") + 4) if "####" in reply else 0, *(m.end() for m in SAYS.finditer(reply)), 0)
    if not after:
        return None
    line = reply[after : after + LONGEST_ANSWER].strip().split("\n", 1)[0]
    # A sentence ends at a full stop that no digit follows.
    return re.split(r"[.。](?=\s|$)", line, maxsplit=1)[0].strip(" *`\"'")


def _last_line(reply: str) -> str:
    lines = [line.strip() for line in reply[-LONGEST_ANSWER:].splitlines() if line.strip()]
    return lines[-1] if lines else ""


def code_of(reply: str) -> str:
    """The last fenced block of a reply, else all of it."""
    blocks = FENCE.findall(reply)
    return blocks[-1] if blocks else reply


# ── math ──────────────────────────────────────────────────────────────────────────────────────────────────────────

WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
UNITS = re.compile(
    r"(?<=[\d}])\s*(?:\\?%|\\?°|\^\{?\\circ\}?|degrees?|dollars?|cents?|hours?|minutes?|seconds?|days?|weeks?|months?|"
    r"years?|miles?|meters?|metres?|feet|foot|inch(?:es)?|units?|square|cubic|cm|mm|km|kg|mph|people|apples?)"
    r"(?:\^?\{?[23]\}?)?\.?$",
    re.IGNORECASE,
)


def _end_of_math(reply: str, equation: bool) -> str:
    """What an unmarked reply ends in: its last formula, its last line where that has no words, else its last number.

    Of an equation what is behind the last sign, unless an equation is asked for.
    """
    line, begin = _last_line(reply), 0 if equation else 2
    formulas = [one or other for one, other in re.findall(r"\$([^$]+)\$|\\\((.+?)\\\)", line)]
    if formulas and not WORD.search(formulas[-1]):  # "$5 and $6" is none
        return "".join(formulas[-1].rpartition("=")[begin:])
    if not WORD.search(plain_math(line)):
        return "".join(line.rpartition("=")[begin:])
    numbers = NUMBER.findall(line)
    return numbers[-1] if numbers else line


def plain_math(text: str) -> str:
    """An answer without what does not change its value: dollars, units, commas between thousands, words of LaTeX."""
    text = text.strip().replace("−", "-").replace("\\!", "").replace("\\,", "").replace("\\left", "")
    text = text.replace("\\right", "").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\\$", "$")
    text = re.sub(r"^(?:\\\(|\\\[|\$+)|(?:\\\)|\\\]|\$+)$", "", text.strip())
    text = re.sub(r"(?<=\d)\s*\\(?:text|mathrm|mbox)\s*\{[^{}]*\}(?:\^\{?[23]\}?)?\s*$", "", text)  # a unit
    text = re.sub(r"^\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}$", r"\1", text)  # all of it a word
    text = text.strip().lstrip("$£€").strip()
    if re.fullmatch(r"[-+]?\$?\d{1,3}(?:,(?:\\!)?\d{3})+(?:\.\d+)?(?:\D*)", text):
        text = text.replace(",", "").replace("$", "")
    while (shorter := UNITS.sub("", text).rstrip()) != text:
        text = shorter
    return re.sub(r"^\+(?=\d)|\s+$|(?<!\d)\.$|(?<=\d)\.$", "", text)


def _rational(text: str) -> Fraction | None:
    """Its exact value where it is a plain number: 12, -1.50, 3/4, \\frac{3}{4}."""
    found = re.fullmatch(r"(-?)\\frac\{?(-?\d+)\}?\{?(\d+)\}?", text.strip())
    if found:
        text = f"{found[1]}{found[2]}/{found[3]}".replace("--", "")
    text = text.replace(" ", "")
    if len(text) > 100 or not re.fullmatch(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+|\d+/\d+)", text):
        return None
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None


# ── exact, choice ─────────────────────────────────────────────────────────────────────────────────────────────────


def plain(text: str) -> str:
    """Without case, and without space and marks around it or between its words."""
    return " ".join(text.casefold().split()).strip(" .,:;!?\"'*`()[]{}$。，")


def exact(reply: str, answer: str) -> Verdict:
    """The same words; or the same number, where the answer is one."""
    said = marked(reply)
    number = _rational(plain_math(answer))
    if number is not None:
        found = NUMBER.findall(said if said is not None else _last_line(reply))
        # Several numbers in a marked answer are several answers; a line may count up to the last.
        told = _rational(plain_math(found[-1])) if found and (said is None or len(set(found)) == 1) else None
        return Verdict(told == number, None if told is None else str(told))
    told_words = plain(said if said is not None else _first_line(reply))
    # An answer of marks alone, brackets that are to be closed, is compared as it is.
    if not plain(answer):
        bare = " ".join((said if said is not None else _first_line(reply)).split())
        return Verdict(bare == " ".join(answer.split()), bare or None)
    return Verdict(told_words == plain(answer), told_words or None)


def _first_line(reply: str) -> str:
    return reply.strip().split("\n", 1)[0][:LONGEST_ANSWER]


def key_of(answer: str, choices: Sequence[str]) -> frozenset[int] | None:
    """The choices that an answer key names: by a letter, "B" or "(B)", else by its text, else by letters, "ACD".

    None when it names none. A letter comes first: choices may be letters themselves, in another order.
    """
    letters = re.fullmatch(r"\(?([A-Z]+)[.):]?\)?", answer.strip())
    places = [string.ascii_uppercase.index(letter) for letter in letters[1]] if letters else []
    known = bool(places) and len(set(places)) == len(places) and max(places) < len(choices)
    if answer in choices and not (known and len(places) == 1):
        return frozenset({choices.index(answer)})
    return frozenset(places) if known else None


def choice(reply: str, answer: str, choices: Sequence[str]) -> Verdict:
    """The letters that a reply settles on, or the text of one choice: no more and no fewer than the key names."""
    letters = string.ascii_uppercase[: len(choices)]
    said = marked(reply)
    said = _first_line(reply) if said is None else said
    said = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", said).strip(" *\"'`")
    texts = [place for place, text in enumerate(choices) if plain(said) and plain(text) == plain(said)]
    in_brackets = re.findall(rf"[(（]([{letters}])[)）]", said)
    first = re.match(rf"([{letters}])(?:[.:：)）]|\s*$)", said)
    alone = set(re.findall(rf"(?<![A-Za-z'])([{letters}])(?![A-Za-z'])", said))
    if (bare := said.strip("()（）[].:。 ")) in tuple(letters):
        settled = frozenset({letters.index(bare)})
    elif len(texts) == 1:
        settled = frozenset(texts)
    elif re.fullmatch(rf"[{letters}(（)）,，、;\s.]+|(?:[(（]?[{letters}][)）]?(?:\s*(?:,|and|和)\s*)?)+", said):
        listed = re.findall(f"[{letters}]", said)
        settled = frozenset(map(letters.index, listed)) if len(set(listed)) == len(listed) else frozenset()
    elif len(set(in_brackets)) == 1:
        settled = frozenset({letters.index(in_brackets[0])})
    elif first and alone <= {first[1], "A"}:  # "B. a fox" settles on B, "B. or C" on nothing; A is also an article
        settled = frozenset({letters.index(first[1])})
    else:
        settled = frozenset()
    told = "".join(letters[place] for place in sorted(settled))
    return Verdict(bool(settled) and settled == key_of(answer, choices), told or None)


# ── countdown ─────────────────────────────────────────────────────────────────────────────────────────────────────


def countdown(reply: str, target: str, numbers: Sequence[int]) -> Verdict:
    """An expression in + - * / and parentheses that uses each number exactly once and makes the target exactly."""
    said = marked(reply)
    said = _last_line(reply) if said is None else said
    said = re.sub(r"\\(?:times|cdot)\b|[×·]", "*", said).replace("\\div", "/").replace("÷", "/").replace("−", "-")
    left, equals, right = said.strip(" $`*.").rpartition("=")
    if equals:  # only the target may stand behind an equals sign
        if _rational(right.strip()) != _rational(target):
            return Verdict(False, None)
        said = left
    said = said.strip(" $`")
    if not EXPRESSION.fullmatch(said) or len(said) > LONGEST_EXPRESSION:
        return Verdict(False, None)
    used: list[int] = []
    try:
        value = _value(ast.parse(said, mode="eval").body, used)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return Verdict(False, None)
    return Verdict(Counter(used) == Counter(numbers) and value == _rational(target), said)


def _value(node: ast.expr, used: list[int]) -> Fraction:
    match node:
        case ast.Constant(value=int(number)):
            used.append(number)
            return Fraction(number)
        case ast.BinOp(left, ast.Add(), right):
            return _value(left, used) + _value(right, used)
        case ast.BinOp(left, ast.Sub(), right):
            return _value(left, used) - _value(right, used)
        case ast.BinOp(left, ast.Mult(), right):
            return _value(left, used) * _value(right, used)
        case ast.BinOp(left, ast.Div(), right):
            return _value(left, used) / _value(right, used)
    raise ValueError("not one of + - * /")


# ── code ──────────────────────────────────────────────────────────────────────────────────────────────────────────

# Runs in the sandbox. What the candidate prints goes nowhere, an exit is a failure, and an object of the candidate's
# own cannot declare itself equal to everything.
TESTED = """
def _examine(code, setup, tests, word):
    import ast, os, sys
    out, print_, exit_ = os.dup(1), os.write, os._exit
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1), os.dup2(silence, 2)
    class Strict(ast.NodeTransformer):
        def visit_Compare(self, node):
            self.generic_visit(node)
            if len(node.ops) == 1 and isinstance(node.ops[0], (ast.Eq, ast.NotEq)):
                call = ast.Call(ast.Name("_same_", ast.Load()), [node.left, node.comparators[0]], [])
                node = call if isinstance(node.ops[0], ast.Eq) else ast.UnaryOp(ast.Not(), call)
            return node
    def same(left, right, type=type, str=str):
        if type(left) is not type(right) and "candidate" in (type(left).__module__, type(right).__module__):
            return False
        return left == right
    space = {"__name__": "candidate"}
    try:
        exec(compile(setup, "<setup>", "exec"), space)
        exec(compile(code, "<candidate>", "exec"), space)
        for test in tests:
            tree = ast.fix_missing_locations(Strict().visit(ast.parse(test)))
            space["_same_"] = same
            exec(compile(tree, "<test>", "exec"), space)
    except BaseException:
        exit_(1)
    print_(out, ("\\n" + word + "\\n").encode())
    exit_(0)
"""
