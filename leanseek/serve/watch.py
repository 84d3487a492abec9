"""The gate every request passes: size, key, shutdown, headers; and what is written down about it.

Nothing here knows what a request means. What only its handler knows (tokens, times) the handler leaves in the `Note`.
"""

import asyncio
import json
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, TextIO

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from leanseek.serve.worker import Worker

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types leanseek"
)
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", PAGE_POLICY.encode()),
]
DRAINED = 16  # times the largest body that is read and thrown away, so that the client gets to read why
DRAIN_SECONDS = 10.0
QUICK = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
LONG = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


@dataclass
class Note:
    """What is known of one request."""

    began: float = field(default_factory=time.perf_counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    first: float | None = None  # seconds to the first token
    latest: float | None = None  # time.perf_counter() of the newest tokens
    cancelled: bool = False

    @property
    def rate(self) -> float | None:
        """Tokens per second after the first ones."""
        if self.first is None or self.latest is None:
            return None
        spent = self.latest - self.began - self.first
        return self.tokens / spent if spent > 0 else None


class Metrics:
    """Counts for Prometheus, in a registry of their own."""

    def __init__(self, worker: Worker) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("leanseek_http_requests", "HTTP requests.", ["path", "status"], registry=self.registry)
        self.cancelled = Counter(
            "leanseek_http_cancelled", "Requests whose client left before the end.", registry=self.registry
        )
        self.first = Histogram(
            "leanseek_first_token_seconds", "From the request to its first token.", buckets=LONG, registry=self.registry
        )
        self.between = Histogram(
            "leanseek_next_token_seconds", "From token to token.", buckets=QUICK, registry=self.registry
        )
        self.whole = Histogram(
            "leanseek_request_seconds", "From the request to its last token.", buckets=LONG, registry=self.registry
        )
        self.registry.register(_EngineNumbers(worker))

    def exposition(self) -> bytes:
        return generate_latest(self.registry)

    def tokens_came(self, note: Note, count: int, at: float) -> None:
        """`count` tokens at `at`, in the note and in the histograms."""
        if not count:
            return
        note.tokens += count
        if note.latest is None:
            note.first = at - note.began
            self.first.observe(note.first)
        else:
            for _ in range(count):
                self.between.observe((at - note.latest) / count)
        note.latest = at


class _EngineNumbers:
    """The engine's own numbers, read when they are asked for."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def collect(self) -> Iterator[Metric]:
        engine = self.worker.engine
        scheduler = engine.scheduler
        gauges = {
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "pages_used": scheduler.pages.used,
            "pages_total": scheduler.pages.count,
        }
        counters = asdict(engine.metrics) | {"preemptions": scheduler.preemptions}
        for name, value in gauges.items():
            yield GaugeMetricFamily(f"leanseek_{name}", NUMBERS[name], value)
        for name, value in counters.items():
            yield CounterMetricFamily(f"leanseek_{name}", NUMBERS[name], value)


NUMBERS = {
    "running": "Requests that are being answered.",
    "waiting": "Requests that wait for room.",
    "pages_used": "Pages of the cache that running requests hold.",
    "pages_total": "Pages of the cache.",
    "submitted": "Requests that the engine took.",
    "finished": "Requests that came to their end.",
    "cancelled": "Requests that were cancelled.",
    "prompt_tokens": "Tokens of prompts.",
    "cached_tokens": "Tokens of prompts that were found in the cache.",
    "drawn_tokens": "Tokens drawn.",
    "drafted": "Tokens that the MTP module drafted and a step verified.",
    "accepted": "Drafted tokens that were accepted.",
    "preemptions": "Times that a request gave its pages back for an older one.",
    "steps": "Steps of the engine.",
    "read_seconds": "Time spent on prompts.",
    "step_seconds": "Time spent on the next tokens.",
    "draft_seconds": "Time spent on drafting.",
}


class Gate:
    """Wraps the application: every request through here, and a line about it to `log`."""

    def __init__(
        self,
        app: ASGIApp,
        worker: Worker,
        metrics: Metrics,
        body_bytes: int,
        body_seconds: float,
        key: str | None,
        paths: frozenset[str],
        log: TextIO | None,
    ) -> None:
        self.app, self.worker, self.metrics = app, worker, metrics
        self.body_bytes, self.body_seconds = body_bytes, body_seconds
        self.key, self.paths, self.log = key, paths, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        note, status = Note(), 500
        scope.setdefault("state", {})["note"] = note

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        body = _Body(receive, self.body_bytes, self.body_seconds)
        try:
            refusal = self._refusal(scope)
            if refusal is None:
                await self.app(scope, body.receive, sending)
            else:
                await body.drain()
                await refuse(sending, *refusal)
        finally:
            self._write_down(scope, status, note)

    def _refusal(self, scope: Scope) -> tuple[int, str, str, dict[str, str]] | None:
        """Status, kind, message and headers, where the request is not to be read at all."""
        headers = dict(scope["headers"])
        api = not _open_to_all(scope["path"])
        if api and scope["path"] != "/metrics" and (why := self.worker.closed):
            return 503, "unavailable_error", why, {"retry-after": "30"}
        if api and self.key is not None:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not secrets.compare_digest(given.strip(), self.key.encode()):
                message = "the API key is missing or wrong: send it as Authorization: Bearer KEY"
                return 401, "authentication_error", message, {"www-authenticate": "Bearer"}
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.body_bytes:
            return 413, "invalid_request_error", _too_large(self.body_bytes), {}
        return None

    def _write_down(self, scope: Scope, status: int, note: Note) -> None:
        path = scope["path"]
        known = path if path in self.paths else "other"
        self.metrics.requests.labels(known, str(status)).inc()
        if note.cancelled:
            self.metrics.cancelled.inc()
        elif note.first is not None:
            self.metrics.whole.observe(time.perf_counter() - note.began)
        if self.log is None or (status < 400 and _open_to_all(path)) or path == "/page/render":
            return
        line: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "method": scope["method"],
            "path": path[:200],
            "status": status,
            "seconds": round(time.perf_counter() - note.began, 4),
        }
        if note.prompt_tokens:
            line |= {
                "prompt_tokens": note.prompt_tokens,
                "cached_tokens": note.cached_tokens,
                "tokens": note.tokens,
                "first_token_ms": None if note.first is None else round(1000 * note.first, 1),
                "tokens_per_second": None if note.rate is None else round(note.rate, 1),
                "cancelled": note.cancelled,
            }
        print(json.dumps(line), file=self.log, flush=True)


class _Body:
    """A request's body while it is read: not too large, and not too slow."""

    def __init__(self, receive: Receive, most: int, seconds: float) -> None:
        self._receive, self.most = receive, most
        self.size, self.whole = 0, False
        self.deadline = time.perf_counter() + seconds

    async def receive(self) -> Message:
        if self.whole:
            return await self._receive()  # tells when the client leaves
        try:
            message = await asyncio.wait_for(self._receive(), max(self.deadline - time.perf_counter(), 0.001))
        except TimeoutError:
            raise HTTPException(408, "the body did not come in time") from None
        if message["type"] == "http.request":
            self.size += len(message.get("body", b""))
            self.whole = not message.get("more_body", False)
            if self.size > self.most:
                await self.drain()
                raise HTTPException(413, _too_large(self.most))
        return message

    async def drain(self) -> None:
        """Reads on and keeps nothing: a connection closed upon an unread body would swallow the answer."""
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                while not self.whole and self.size < DRAINED * self.most:
                    message = await self._receive()
                    if message["type"] != "http.request":
                        return
                    self.size += len(message.get("body", b""))
                    self.whole = not message.get("more_body", False)
        except TimeoutError:
            pass


async def refuse(send: Send, status: int, kind: str, message: str, headers: dict[str, str]) -> None:
    """An error in OpenAI's shape."""
    body = json.dumps(problem(message, kind)).encode()
    fields = {"content-type": "application/json", "content-length": str(len(body)), **headers}
    encoded = [(name.encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


def problem(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def stderr_log() -> TextIO:
    return sys.stderr


def _open_to_all(path: str) -> bool:
    """The page's own files and the state of health; everything else is the API's."""
    return path in ("/", "/health") or (path.startswith("/page/") and path != "/page/render")


def _too_large(most: int) -> str:
    return f"the request is larger than the {most:,} bytes that this service takes"
