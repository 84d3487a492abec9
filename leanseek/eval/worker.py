"""A process beside ours for comparisons that may never come back: asked one at a time, and replaced when it is late.

It has no walls, as the sandbox has: algebra and patterns are data to it, never code. It has little memory, so that a
tower of powers fails there and not here.
"""

import contextlib
import json
import re
import resource
import selectors
import subprocess
import sys
from typing import Any

from leanseek.config import BadInput

MEMORY_BYTES = 1 << 31
STARTING = 120.0  # seconds for the imports, on a machine that has other work


class Hung(Exception):
    """The answer did not come in time."""


class Worker:
    """Starts with the first question. Raises BadInput where what it needs is not installed."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.process: subprocess.Popen[str] | None = None

    def ask(self, kind: str, wanted: str, said: str) -> bool:
        """Whether `said` is `wanted`, as math or as a regex; raises Hung when that took too long."""
        if self.process is None or self.process.poll() is not None:
            self._start()
        assert self.process is not None
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps([kind, wanted, said]) + "\n")
            self.process.stdin.flush()
            told = self._told(self.seconds)
        except BrokenPipeError:
            told = None
        if told is None:
            self.close()
            raise Hung
        if told == "missing":
            raise BadInput("answers in mathematics are compared by math-verify: pip install 'leanseek[eval]'")
        return told == "true"

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
            self.process = None

    def _start(self) -> None:
        self.close()
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from leanseek.eval.worker import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C is for whoever asks
        )
        if self._told(STARTING) != "ready":
            self.close()
            raise Hung

    def _told(self, seconds: float) -> str | None:
        """The next line; None when it does not come in time, or never."""
        assert self.process is not None
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as waiting:
            waiting.register(self.process.stdout, selectors.EVENT_READ)
            return self.process.stdout.readline().strip() or None if waiting.select(seconds) else None


def serve() -> None:
    """The other side: a question on each line of stdin, true or false on each of stdout."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    try:
        import math_verify
    except ImportError:
        math_verify = None
    print("ready", flush=True)
    for line in sys.stdin:
        kind, wanted, said = json.loads(line)
        if kind == "math" and math_verify is None:
            print("missing", flush=True)
            continue
        try:
            same = bool(re.search(wanted, said)) if kind == "regex" else _same_math(math_verify, wanted, said)
        except Exception:  # what cannot be compared is not the same
            same = False
        print("true" if same else "false", flush=True)


def _same_math(math_verify: Any, wanted: str, said: str) -> bool:
    # Limits of time by alarm are the caller's business here.
    gold, answer = (math_verify.parse(f"${text}$", parsing_timeout=None) for text in (wanted, said))
    return bool(gold) and bool(answer) and math_verify.verify(gold, answer, timeout_seconds=None)
