"""Every verifier on answers that are right, wrong, tricky and hostile; all answers are made for these tests."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from leanseek.config import BadInput
from leanseek.data.puzzles import arithmetic, countdown
from leanseek.eval import verify
from leanseek.eval.sandbox import Limits, Sandbox
from leanseek.eval.verify import Verdict, Verifier, check, code_of, marked, plain_math


@pytest.fixture(scope="module")
def judge() -> Iterator[Verifier]:
    with Verifier(seconds=20) as verifier:
        yield verifier


def row(kind: str, answer: str = "", **more: Any) -> dict[str, Any]:
    return {"prompt": "?", "verify": kind, "answer": answer} | more


MATH_RIGHT = [
    ("944", "944"),
    ("944", "308 + 636 = 944"),
    ("944", "First 308 and 600 make 908. The answer is 944."),
    ("944", "The answer is 944. I am sure of it, 100%!"),
    ("1/2", "0.5"),
    ("1/2", "\\boxed{\\frac12}"),
    ("\\frac{1}{2}", "\\frac{2}{4}"),
    ("\\frac{3}{4}", "so it is \\(\\dfrac{3}{4}\\)"),
    ("0.75", "$\\tfrac{3}{4}$"),
    ("12345", "12,345"),
    ("12,345", "$12{,}345$"),
    ("1000", "She earns $1,000"),
    ("1000", "#### 1,000"),
    ("12", "12 apples"),
    ("12", "The answer is 12 dollars."),
    ("12", "\\boxed{12\\text{ cm}}"),
    ("12", "\\boxed{12 \\text{ cm}^2}"),
    ("90", "\\boxed{90^\\circ}"),
    ("50\\%", "50%"),
    ("\\text{even}", "even"),
    ("1-x", "\\boxed{1 - x}"),
    ("x+1", "1+x"),
    ("x^2+2x+1", "(x+1)^2"),
    ("2\\sqrt{2}", "\\sqrt{8}"),
    ("(1,2)", "(1, 2)"),
    ("5", "$x = 5$"),
    ("-3", "−3"),
    ("1234", "1,234.00"),
    ("17", "The final answer is **17**."),
    ("17", "it is \\boxed{\\boxed{17}}"),
    ("17", "Ida says: I have 5. With 12 more it is 17"),
    ("18", "#### 18\n\nQuestion: What is 20 + 1?"),
    ("4", "答案是4。"),
    ("$2x+y+1=0$", "the line is $2x+y+1=0$"),
]


@pytest.mark.parametrize(("gold", "reply"), MATH_RIGHT)
def test_math_that_is_right(gold: str, reply: str, judge: Verifier) -> None:
    assert judge(reply, row("math", gold)).right


MATH_WRONG = [
    ("944", "945"),
    ("944", ""),
    ("944", "   \n "),
    ("944", "944 is wrong, so it is 945"),
    ("944", "The answer is 944 or 945"),
    ("944", "\\boxed{944, 945}"),
    ("944", "\\boxed{944} no, \\boxed{945}"),
    ("944", "\\boxed{944"),
    ("944", "-944"),
    ("944", "9440"),
    ("944", "0.944"),
    ("944", "943.9999999"),
    ("5", "x = 5 \\text{ or } x = 6"),
    ("5", "\\boxed{x = 5 \\text{ or } x = 6}"),
    ("5", "1 2 3 4 5 6 7 8 9"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "1"),
    ("1234", "1,2,3,4"),
    ("1234", "12,34"),
    ("\\frac{1}{2}", "\\frac{1}{0}"),
    ("1/2", "1/3"),
    ("x+1", "x-1"),
    ("2x+y+1=0", "2x+y=0"),
    ("2x+y+1=0", "0"),
    ("12", "import os; os.system('true')"),
    ("12", "\\boxed{\\input{/etc/passwd}}"),
    ("12", "\\boxed{" * 300 + "12"),
    ("12", "(" * 5000),
]


@pytest.mark.parametrize(("gold", "reply"), MATH_WRONG, ids=lambda text: text[:30])
def test_math_that_is_wrong(gold: str, reply: str, judge: Verifier) -> None:
    verdict = judge(reply, row("math", gold))
    assert not verdict.right
    assert not verdict.hung


def test_a_comparison_that_hangs_is_told_and_the_next_goes_on() -> None:
    with Verifier(seconds=2) as judge:
        assert judge("x+1", row("math", "1+x")).right  # the imports have been waited for
        tower = judge("\\boxed{9^{9^{9^{9}}}}", row("math", "10"))
        assert tower == Verdict(False, None, hung=True)
        pattern = row("regex", r"(a+)+$")
        assert judge("a" * 60 + "b", pattern) == Verdict(False, None, hung=True)
        assert judge("aaa", pattern).right
        assert judge("x+1", row("math", "1+x")).right


def test_the_worker_is_gone_when_it_is_closed() -> None:
    with Verifier() as judge:
        assert judge("a", row("regex", "a")).right
        assert judge.worker.process is not None
        pid = judge.worker.process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_math_verify_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('not here')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    with Verifier() as judge:
        assert judge("12", row("math", "12")).right  # numbers need no algebra
        with pytest.raises(BadInput, match=r"math-verify: pip install 'leanseek\[eval\]'"):
            judge("x+1", row("math", "1+x"))


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("$1,000", "1000"),
        ("3.50 dollars", "3.50"),
        ("1,2", "1,2"),
        ("(1,234)", "(1,234)"),
        ("\\dfrac{1}{2}", "\\frac{1}{2}"),
        ("+5", "5"),
        ("7.", "7"),
        ("12 km/h", "12 km/h"),
    ],
)
def test_what_does_not_change_a_value_goes(text: str, plain: str) -> None:
    assert plain_math(text) == plain


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("The answer is B. Because A is not.", "B"),
        ("the answer is 3.5.", "3.5"),
        ("a \\boxed{x^{2}} b", "x^{2}"),
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("so\n#### 7\nmore", "7"),
        ("nothing is said", None),
        ("", None),
    ],
)
def test_what_a_reply_marks_as_its_answer(reply: str, answer: str | None) -> None:
    assert marked(reply) == answer


# ── exact, regex ──────────────────────────────────────────────────────────────────────────────────────────────────

EXACT = [
    ("944", "944", True),
    ("944", " 944.", True),
    ("944", "308 + 636 = 944", True),
    ("944", "It is 944", True),
    ("1944", "1,944", True),
    ("-7", "2 - 9 = -7", True),
    ("944", "9 4 4", False),
    ("944", "944 or 945", False),
    ("944", "The answer is 944 or 945", False),
    ("944", "", False),
    ("True", "true", True),
    ("(B)", "B", True),
    ("(B)", "So the answer is (B).", True),
    ("(B)", "(A) (B)", False),
    ("valid", "invalid", False),
    ("valid", "valid or invalid", False),
    ("black cat dog", "black  cat dog\nbecause", True),
    ("black cat dog", "cat black dog", False),
    ("] )", "] )", True),
    ("] )", ") ]", False),
    ("tiny loaf", "The story says: tiny loaf.", True),
    ("tiny loaf", "The story says: tiny loaf or red boat.", False),
    ("是", "是", True),
    ("是", "不是", False),
]


@pytest.mark.parametrize(("answer", "reply", "right"), EXACT)
def test_exact(answer: str, reply: str, right: bool, judge: Verifier) -> None:
    assert judge(reply, row("exact", answer)).right == right


def test_regex(judge: Verifier) -> None:
    assert judge("It was in 1987.", row("regex", r"\b19\d\d\b")).right
    assert not judge("It was in 2087.", row("regex", r"\b19\d\d\b")).right
    assert not judge("", row("regex", r"^x$")).right


# ── choice ────────────────────────────────────────────────────────────────────────────────────────────────────────

ANIMALS = ["a red fox", "a blue whale", "an old owl", "none of them"]
CHOICE_RIGHT = [
    "B", "(B)", "B.", "B) a blue whale", "B. a blue whale", "a blue whale", "A blue whale.", "**B**", "\\boxed{B}",
    "\\boxed{\\text{B}}", "The answer is B", "The answer is (B).", "The answer is: B. A fox is red.", "答案是B。",
    "答案：（B）", "It must be (B), for whales are large", "B\n\nQuestion: next? A",
]  # fmt: skip
CHOICE_WRONG = [
    "", "A", "(A) (B)", "A B C D", "ABCD", "A or B", "(A) or (B)", "The answer is A or B", "A, B", "b", "Bravo", "BB",
    "A blue fox", "A good idea", "\\boxed{A} \\boxed{C}", "B. or C", "Not B. The answer is C", "E", "a whale",
    "\\boxed{A,B,C,D}", "the answer is", "B" * 10_000,
]  # fmt: skip


@pytest.mark.parametrize("reply", CHOICE_RIGHT)
def test_a_choice_that_is_right(reply: str, judge: Verifier) -> None:
    assert judge(reply, row("choice", "B", choices=ANIMALS)).right
    assert not judge(reply, row("choice", "C", choices=ANIMALS)).right


@pytest.mark.parametrize("reply", [*CHOICE_WRONG, "(" * 5000], ids=lambda text: text[:20])
def test_a_choice_that_is_not(reply: str, judge: Verifier) -> None:
    assert not judge(reply, row("choice", "B", choices=ANIMALS)).right


def test_a_letter_is_a_place_also_among_letters(judge: Verifier) -> None:
    vitamins = row("choice", "C", choices=["A", "C", "D", "E"])
    assert judge("C", vitamins).answer == "C"
    assert judge("C", vitamins).right
    assert judge("The answer is (C).", vitamins).right
    assert not judge("D", vitamins).right
    assert judge("E", row("choice", "E", choices=["A", "C", "E"])).right  # no fifth choice: the text is meant


def test_several_are_right_together_only(judge: Verifier) -> None:
    several = row("choice", "AC", choices=ANIMALS)
    for reply, right in (("AC", True), ("A, C", True), ("The answer is A and C.", True), ("A", False), ("ABC", False)):
        assert judge(reply, several).right == right


# ── countdown ─────────────────────────────────────────────────────────────────────────────────────────────────────

NUMBERS = [8, 11, 7, 9]
COUNTDOWN_RIGHT = [
    "((11 * 9) - 7) - 8", "11*9-7-8", "11 * 9 - (7 + 8) = 84", "The answer is 11*9-7-8.",
    "\\boxed{11 \\times 9 - 7 - 8}", "Let me see.\n99 - 15\n11 × 9 − 7 − 8 = 84", "$11*9-8-7$",
]  # fmt: skip
COUNTDOWN_WRONG = [
    "84", "", "11*9-7", "11*9-7-8-0", "11*9-7-8+8-8", "7*8+9+11", "11*9-7-8=85", "11**9-7-8", "11*9//1-7-8",
    "eleven", "__import__('os')", "(" * 150 + "84" + ")" * 150, "9**9**9**9", "11*9-7-(8", "8/(9-9)+11+7", "11*9-(7,8)",
    "-(-(11*9))-7-8", "11*9-7-8 = 84 = 85", "1_1*9-7-8", "११*9-7-8", "84 = 11*9-7-8", "lambda:84", "11*9-7-8 or 84",
]  # fmt: skip


@pytest.mark.parametrize("reply", COUNTDOWN_RIGHT)
def test_a_countdown_that_is_right(reply: str, judge: Verifier) -> None:
    assert judge(reply, row("countdown", "84", numbers=NUMBERS)).right


@pytest.mark.parametrize("reply", COUNTDOWN_WRONG, ids=lambda text: text[:20])
def test_a_countdown_that_is_not(reply: str, judge: Verifier) -> None:
    assert not judge(reply, row("countdown", "84", numbers=NUMBERS)).right


def test_fractions_in_between_are_exact(judge: Verifier) -> None:
    assert judge("8 / (3 - 8/3)", row("countdown", "24", numbers=[8, 3, 8, 3])).right


def test_the_puzzles_we_make_are_solved_by_their_solutions(judge: Verifier) -> None:
    for number in range(200):
        puzzle, sum_ = countdown(0, number), arithmetic(0, number)
        assert check(puzzle) is None
        assert judge(puzzle["solution"], puzzle).right
        assert not judge(puzzle["answer"], puzzle).right
        assert check(sum_) is None
        assert judge(f"It is {sum_['answer']}.", sum_).right


# ── code ──────────────────────────────────────────────────────────────────────────────────────────────────────────

DOUBLE = row("code", tests=["assert double(2) == 4", "assert double('a') == 'aa'"])
CODE_RIGHT = [
    "def double(x):\n    return x + x",
    "Here it is:\n```python\ndef double(x):\n    return 2 * x\n```\nIt doubles.",
    "```\nno\n```\nBetter:\n```py\ndouble = lambda x: x * 2\n```",
    "def double(x):\n    print('noise', 10**5)\n    return x + x",
]
CODE_WRONG = [
    "def double(x):\n    return x",
    "def double(x):\n    return 4",
    "",
    "def double(x:",
    "import sys\nsys.exit(0)",
    "import os\nos._exit(0)",
    "raise SystemExit",
    "def double(x):\n    import os\n    os._exit(0)",
    "class Yes:\n    def __eq__(self, other): return True\ndef double(x):\n    return Yes()",
    "def double(x):\n    raise AssertionError",
    "import builtins\nbuiltins.AssertionError = None",
    "print('\\n' + '0' * 32 + '\\n')\nimport os\nos.kill(os.getpid(), 9)",
    "import os\nos.kill(os.getppid(), 9)",
]


@pytest.fixture(scope="module")
def tester() -> Verifier:
    """Skips where nothing isolates; with CI set that is a failure."""
    try:
        return Verifier(limits=Limits(seconds=20), sandbox=Sandbox.find())
    except BadInput as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize("reply", CODE_RIGHT)
def test_code_that_passes(reply: str, tester: Verifier) -> None:
    assert tester(reply, DOUBLE).right


@pytest.mark.parametrize("reply", CODE_WRONG, ids=lambda text: text[:40])
def test_code_that_does_not(reply: str, tester: Verifier) -> None:
    verdict = tester(reply, DOUBLE)
    assert not verdict.right
    assert not verdict.hung


def test_code_that_hangs_is_told(tester: Verifier) -> None:
    quick = Verifier(limits=Limits(seconds=1), sandbox=tester.sandbox)
    assert quick("while True: pass", DOUBLE) == Verdict(False, None, hung=True)


def test_setup_and_beginning_belong_to_the_program(tester: Verifier) -> None:
    begun = row("code", tests=["assert thrice(2) == BASE"], setup="BASE = 6", prefix="def thrice(x):\n")
    assert tester("    return 3 * x\n", begun).right
    assert not tester("    return 2 * x\n", begun).right


def test_without_isolation_code_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify.Sandbox, "find", classmethod(lambda cls: (_ for _ in ()).throw(BadInput("no walls"))))
    with pytest.raises(BadInput, match="no walls"):
        Verifier()("def double(x): return x + x", DOUBLE)


def test_the_last_block_is_the_program() -> None:
    assert code_of("```python\na\n```\n```py\nb\n```\n") == "b\n"
    assert code_of("x = 1") == "x = 1"
    assert code_of("```python\nopen") == "open"


# ── rows ──────────────────────────────────────────────────────────────────────────────────────────────────────────

BAD_ROWS = [
    ({"verify": "math", "answer": "1"}, "has no text 'prompt'"),
    ({"prompt": "?", "answer": "1"}, "has no text 'verify'"),
    (row("maths", "1"), r"verify names no verifier: 'maths' (did you mean 'math'?)"),
    (row("math"), "has no text 'answer'"),
    (row("exact", "  "), "has no text 'answer'"),
    ({"prompt": "?", "verify": "math", "answer": 5}, "has no text 'answer'"),
    (row("regex", "(a"), "answer is no regular expression"),
    (row("choice", "B"), "has no list 'choices'"),
    (row("choice", "B", choices=["a"]), "has no list 'choices'"),
    (row("choice", "B", choices=["a", " "]), "has no list 'choices'"),
    (row("choice", "E", choices=ANIMALS), "answer names no choice: 'E' of 4"),
    (row("choice", "a green fox", choices=ANIMALS), "answer names no choice"),
    (row("choice", "A", choices=["x", "x"]), "has the same choice twice"),
    (row("countdown", "84"), "has no list 'numbers'"),
    (row("countdown", "many", numbers=[1]), "answer is no number"),
    (row("countdown", "1", numbers=[True]), "has no list 'numbers'"),
    (row("code", tests=[]), "has no list 'tests'"),
    (row("code"), "has no list 'tests'"),
]


@pytest.mark.parametrize(("bad", "says"), BAD_ROWS, ids=lambda value: json.dumps(value)[:30])
def test_a_bad_row_is_named(bad: dict[str, Any], says: str) -> None:
    wrong = check(bad)
    assert wrong is not None
    assert says in wrong


def test_good_rows_have_nothing_wrong() -> None:
    for good in (
        row("math", "1"),
        row("regex", "a+"),
        row("choice", "B", choices=ANIMALS),
        row("choice", "(B)", choices=ANIMALS),
        row("choice", "an old owl", choices=ANIMALS),
        row("countdown", "84", numbers=NUMBERS),
        DOUBLE,
    ):
        assert check(good) is None
