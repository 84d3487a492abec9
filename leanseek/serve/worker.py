"""The engine's own thread: requests go in from the event loop, pieces of answers come back to it.

The engine belongs to one thread and a step takes its time, so the event loop never calls it. Commands go in by a queue
and are obeyed between two steps; what a step brought goes back by one call into the loop. Everything but `_run` and
what that calls belongs to the event loop.
"""

import asyncio
import queue
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from leanseek.serve.sampling import Sampling

if TYPE_CHECKING:
    from leanseek.serve.engine import Engine, Request, TokenLogprobs
    from leanseek.serve.grammar import Grammar

FAILED, CLOSING = "the engine has failed; the service's log says how", "the service is shutting down"


class Full(Exception):
    """As many requests are running and waiting as may."""


class Closed(Exception):
    """The service is shutting down, or its engine has failed."""


@dataclass(frozen=True)
class Job:
    """One prompt to continue."""

    prompt: list[int]
    sampling: Sampling
    grammar: "Grammar | None" = None


@dataclass(frozen=True)
class Piece:
    """What one step brought to one job: tokens, and the text that became certain."""

    index: int  # of the job
    text: str
    tokens: list[int]
    logprobs: "list[TokenLogprobs]"
    cached: int  # tokens of the prompt that were in the cache
    finish_reason: Literal["stop", "length"] | None
    at: float  # time.perf_counter() when the step ended, in seconds


class Answers:
    """What comes of the jobs of one call, in the order in which it comes."""

    def __init__(self, worker: "Worker", jobs: list[Job]) -> None:
        self.worker, self.jobs = worker, jobs
        self.left = len(jobs)  # jobs that have not ended
        self.came: asyncio.Queue[Piece | Closed] = asyncio.Queue()

    async def pieces(self, quiet: float | None = None) -> AsyncIterator[Piece | None]:
        """Every piece until all jobs have ended; None whenever nothing came for `quiet` seconds. Raises Closed."""
        open_jobs = len(self.jobs)
        while open_jobs:
            try:
                piece = await asyncio.wait_for(self.came.get(), quiet)
            except TimeoutError:
                yield None
                continue
            if isinstance(piece, Closed):
                raise piece
            open_jobs -= piece.finish_reason is not None
            yield piece

    def cancel(self) -> None:
        """Frees what the jobs hold, before the next step; does nothing once all have ended."""
        if self.left:
            self.worker.forget(self)


class Worker:
    """Runs `engine` in a thread, for at most `most` requests at a time, running and waiting together."""

    def __init__(self, engine: "Engine", most: int) -> None:
        self.engine, self.most = engine, most
        self.open = 0  # requests that have not ended
        self.closing = False  # nothing new is taken
        self.failed = False
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._live: dict[int, _Live] = {}  # by id of the request; the thread's
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def closed(self) -> str | None:
        """Why nothing is taken, where nothing is."""
        return FAILED if self.failed else CLOSING if self.closing else None

    # ── the event loop's side ─────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Called inside the event loop that will submit."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def submit(self, jobs: list[Job]) -> Answers:
        """All of the jobs or none. Raises Full, Closed, and the engine's BadInput."""
        if why := self.closed:
            raise Closed(why)
        if self.open + len(jobs) > self.most:
            raise Full(f"{self.open} requests are running and waiting, {self.most} may: try again later")
        answers, accepted = Answers(self, jobs), self._loop.create_future()
        self.open += len(jobs)
        self._commands.put(lambda: self._submit(answers, accepted))
        try:
            await accepted
        except BaseException:  # refused, or the caller is gone before it was taken in
            answers.cancel()
            raise
        return answers

    def forget(self, answers: Answers) -> None:
        """Cancels what is left of the answers."""
        self.open -= answers.left
        answers.left = 0
        self._commands.put(lambda: self._cancel(answers))

    def abort(self) -> None:
        """Ends everything that runs: whoever waits for it is told Closed."""
        self.closing = True
        self._commands.put(lambda: self._end_all(CLOSING))

    async def stop(self) -> None:
        """Aborts, and ends the thread."""
        self.abort()
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    def _hand_over(self, came: list[tuple[Answers, Piece | Closed]]) -> None:
        for answers, piece in came:
            if not answers.left:
                continue  # it was cancelled meanwhile
            ended = answers.left if isinstance(piece, Closed) else int(piece.finish_reason is not None)
            answers.left -= ended
            self.open -= ended
            answers.came.put_nowait(piece)

    # ── the thread's side ─────────────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        try:
            while True:
                while not (self.engine.busy and self._commands.empty()):
                    command = self._commands.get()
                    if command is None:
                        return
                    command()
                self._deliver(self.engine.step())
        except Exception:
            # What the engine holds is unknown now: it must not go on. The trace is for whoever runs the service.
            self.failed = True
            traceback.print_exc(file=sys.stderr)
            self._end_all(FAILED, cancel=False)
            while (command := self._commands.get()) is not None:
                command()  # what is still submitted is refused

    def _submit(self, answers: Answers, accepted: "asyncio.Future[None]") -> None:
        try:
            if self.failed:
                raise Closed(FAILED)
            for index, job in enumerate(answers.jobs):
                request = self.engine.submit(job.prompt, job.sampling, job.grammar)
                self._live[id(request)] = _Live(request, answers, index)
        except Exception as error:  # BadInput of the client, most often; the loop decides what it means
            self._cancel(answers)
            self._loop.call_soon_threadsafe(_settle, accepted, error)
        else:
            self._loop.call_soon_threadsafe(_settle, accepted, None)

    def _cancel(self, answers: Answers) -> None:
        for key, live in list(self._live.items()):
            if live.answers is answers:
                del self._live[key]
                if not self.failed:
                    self.engine.cancel(live.request)

    def _deliver(self, changed: "list[Request]") -> None:
        now = time.perf_counter()
        came: list[tuple[Answers, Piece | Closed]] = []
        for request in changed:
            live = self._live.get(id(request))
            if live is None:
                continue
            first, live.sent = live.sent, len(request.drawn)
            reason = request.finish_reason
            assert reason != "cancelled", "only this thread cancels, and forgets what it cancelled"
            piece = Piece(
                live.index, request.read(), request.drawn[first:], request.logprobs[first:], request.cached, reason, now
            )
            came.append((live.answers, piece))
            if reason is not None:
                del self._live[id(request)]
        if came:
            self._loop.call_soon_threadsafe(self._hand_over, came)

    def _end_all(self, why: str, cancel: bool = True) -> None:
        waiting = {id(live.answers): live.answers for live in self._live.values()}
        if cancel:
            for live in self._live.values():
                self.engine.cancel(live.request)
        self._live.clear()
        told: list[tuple[Answers, Piece | Closed]] = [(answers, Closed(why)) for answers in waiting.values()]
        self._loop.call_soon_threadsafe(self._hand_over, told)


def _settle(accepted: "asyncio.Future[None]", error: Exception | None) -> None:
    if accepted.done():
        return  # whoever waited is gone
    if error is None:
        accepted.set_result(None)
    else:
        accepted.set_exception(error)


@dataclass
class _Live:
    request: "Request"
    answers: Answers
    index: int
    sent: int = 0  # tokens that went out
