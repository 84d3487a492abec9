"""The HTTP service: OpenAI's and DeepSeek's endpoints over the engine, and the chat page.

`create_app` wires the parts together and holds the routes. A request is checked and turned into token ids off the event
loop, handed to the engine's thread, and answered whole or as server-sent events.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from importlib import resources
from typing import TYPE_CHECKING, Any, TextIO

from fastapi import APIRouter, FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from leanseek.config import BadInput, nearest
from leanseek.serve.markdown import Renderer
from leanseek.serve.prompts import Prompts, sampling
from leanseek.serve.replies import ChatReply, Reply, TextReply
from leanseek.serve.sampling import Sampling
from leanseek.serve.schemas import (
    ChatRequest,
    ChatResponse,
    CompletionRequest,
    CompletionResponse,
    Drawing,
    ErrorBody,
    Health,
    Html,
    Markdown,
    ModelCard,
    ModelList,
)
from leanseek.serve.watch import Gate, Metrics, Note, problem
from leanseek.serve.worker import Answers, Closed, Full, Job, Worker

if TYPE_CHECKING:
    from leanseek.serve.engine import Engine

PAGE = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
PREFIXES = ("/v1", "", "/beta")  # OpenAI's, and DeepSeek's two others
KINDS = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "unavailable_error"}
GONE = 499  # of the log: the client left, nobody reads the answer


@dataclass(frozen=True)
class Limits:
    """What the service takes upon itself. `most`: requests running and waiting together."""

    most: int = 320
    max_tokens: int | None = None  # of an answer; None: as many as the context holds
    body_bytes: int = 4 << 20
    body_seconds: float = 30.0
    keep_alive_seconds: float = 15.0  # of silence in a stream, after which a comment is sent


def create_app(
    engine: "Engine", name: str, limits: Limits | None = None, key: str | None = None, log: TextIO | None = None
) -> FastAPI:
    """The service of one engine under the model name `name`; request lines go to `log`. It owns the engine's thread."""
    limits = limits or Limits()
    name = name.encode("utf-8", "replace").decode()
    worker = Worker(engine, limits.most)
    service = Service(worker, name, limits)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await worker.stop()

    app = FastAPI(
        title="LeanSeek",
        summary=f"The model {name}, by OpenAI's and DeepSeek's conventions.",
        version="1",
        lifespan=lifespan,
        docs_url=None,  # both pages load their scripts from elsewhere
        redoc_url=None,
        dependencies=[] if key is None else [Security(HTTPBearer(auto_error=False))],
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )
    app.state.service = service
    for prefix in PREFIXES:
        app.include_router(service.api(), prefix=prefix, include_in_schema=prefix == PREFIXES[0])
    app.include_router(service.house())
    paths = frozenset(path for path in app.openapi()["paths"] if "{" not in path)
    app.openapi_schema = None
    app.add_middleware(
        Gate,
        worker=worker,
        metrics=service.metrics,
        body_bytes=limits.body_bytes,
        body_seconds=limits.body_seconds,
        key=key,
        paths=paths,
        log=log,
    )
    app.add_exception_handler(BadInput, _bad_input)
    app.add_exception_handler(RequestValidationError, _not_valid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Full, _full)
    app.add_exception_handler(Closed, _closed)
    app.add_exception_handler(Exception, _our_mistake)
    return app


class Service:
    """The routes, and what they share."""

    def __init__(self, worker: Worker, name: str, limits: Limits) -> None:
        self.worker, self.name, self.limits = worker, name, limits
        engine = worker.engine
        self.tokenizer = engine.tokenizer
        self.context = engine.config.max_position_embeddings
        self.most = min(limits.max_tokens or self.context, self.context)
        self.unasked = self.most if self.most < self.context else None
        self.prompts = Prompts(engine)
        self.metrics = Metrics(worker)
        self.render = Renderer()
        self.created = int(time.time())

    # ── the API ───────────────────────────────────────────────────────────────────────────────────────────────────

    def api(self) -> APIRouter:
        router = APIRouter()
        streamed: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}

        @router.post("/chat/completions", response_model=ChatResponse, responses=streamed)
        async def chat_completions(request: Request, body: ChatRequest) -> Response:
            """The assistant's answer to a chat."""
            self._check_model(body.model)
            n = body.n or 1
            logprobs = (body.top_logprobs or 0) if body.logprobs else None
            draw = sampling(body, self.most, self.unasked, logprobs)
            ask = await asyncio.to_thread(self.prompts.chat, body)
            jobs = [Job(ask.prompt, _seeded(draw, i), ask.grammar) for i in range(n)]
            reply = ChatReply(self.tokenizer, self.name, ask, n, logprobs is not None)
            return await self._answer(request, body, jobs, reply)

        @router.post("/completions", response_model=CompletionResponse, responses=streamed)
        async def completions(request: Request, body: CompletionRequest) -> Response:
            """The continuation of a text; with a suffix, what belongs between the two."""
            self._check_model(body.model)
            n = body.n or 1
            draw = sampling(body, self.most, self.unasked, body.logprobs)
            prompts = await asyncio.to_thread(self.prompts.completion, body)
            jobs = [Job(prompt, _seeded(draw, i), None) for prompt in prompts for i in range(n)]
            echo = [self._shown(prompt) for prompt in prompts] if body.echo else []
            reply = TextReply(self.tokenizer, self.name, prompts, n, body.logprobs is not None, echo)
            return await self._answer(request, body, jobs, reply)

        @router.get("/models")
        async def models() -> ModelList:
            """The one model that is served."""
            return ModelList(object="list", data=[self._card()])

        @router.get("/models/{model}")
        async def one_model(model: str) -> ModelCard:
            """What is known of a model."""
            self._check_model(model)
            return self._card()

        return router

    def _card(self) -> ModelCard:
        return ModelCard(
            id=self.name,
            object="model",
            created=self.created,
            owned_by="leanseek",
            context_length=self.context,
            max_tokens=self.most,
        )

    def _check_model(self, model: str) -> None:
        if model != self.name:
            raise HTTPException(404, f"no model {model!r}{nearest(model, [self.name])} is served here: {self.name} is")

    def _shown(self, prompt: list[int]) -> str:
        return self.tokenizer.decode(prompt[prompt[0] == self.tokenizer.bos_id :])

    async def _answer(self, request: Request, body: Drawing, jobs: list[Job], reply: Reply) -> Response:
        note: Note = request.state.note
        note.prompt_tokens = reply.prompt_tokens
        answers = await self.worker.submit(jobs)
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            return _Events(self._events(answers, reply, note, usage), answers, note)
        try:
            whole = await _unless_gone(request, self._whole(answers, reply, note))
        finally:
            note.cached_tokens = reply.cached_tokens
            note.cancelled = bool(answers.left)
            answers.cancel()
        return Response(status_code=GONE) if whole is None else _Json(whole)

    async def _whole(self, answers: Answers, reply: Reply, note: Note) -> dict[str, Any]:
        reply.opening()
        async for piece in answers.pieces():
            assert piece is not None
            self.metrics.tokens_came(note, len(piece.tokens), piece.at)
            reply.push(piece)
        return reply.whole()

    async def _events(self, answers: Answers, reply: Reply, note: Note, usage: bool) -> AsyncIterator[bytes]:
        """The lines of a stream. Once it has begun an error can only be its last event."""
        nothing = {"usage": None} if usage else {}
        try:
            for chunk in reply.opening():
                yield _event(chunk | nothing)
            async for piece in answers.pieces(self.limits.keep_alive_seconds):
                if piece is None:
                    yield b": keep-alive\n\n"
                    continue
                self.metrics.tokens_came(note, len(piece.tokens), piece.at)
                grown = reply.push(piece)
                if grown is not None:
                    yield _event(grown | nothing)
            note.cached_tokens = reply.cached_tokens
            if usage:
                yield _event(reply.last())
            yield b"data: [DONE]\n\n"
        except Closed as error:
            yield _event(problem(str(error), KINDS[503]))

    # ── the house ─────────────────────────────────────────────────────────────────────────────────────────────────

    def house(self) -> APIRouter:
        router = APIRouter()
        files = resources.files("leanseek.serve") / "page"
        contents = {file: (files / file).read_bytes() for file in ("index.html", *PAGE)}

        @router.get("/health", responses={503: {"model": Health}})
        async def health() -> Response:
            """Whether requests are taken, and how many are under way."""
            worker, engine = self.worker, self.worker.engine
            state = Health(
                status="failed" if worker.failed else "closing" if worker.closing else "ok",
                model=self.name,
                running=len(engine.scheduler.running),
                waiting=len(engine.scheduler.waiting),
                drafted=engine.metrics.drafted,
                accepted=engine.metrics.accepted,
            )
            return _Json(state.model_dump(), 200 if state.status == "ok" else 503)

        @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
        async def metrics() -> Response:
            """The service's numbers, for Prometheus."""
            return Response(self.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

        @router.post("/page/render")
        async def render(body: Markdown) -> Html:
            """Markdown to the HTML that the chat page shows."""
            return Html(html=await asyncio.to_thread(self.render, body.text.encode("utf-8", "replace").decode()))

        @router.get("/", include_in_schema=False)
        async def page() -> Response:
            return _file(contents["index.html"], "text/html")

        @router.get("/page/{file}", include_in_schema=False)
        async def page_file(file: str) -> Response:
            if file not in PAGE:
                raise HTTPException(404, "no such file")
            return _file(contents[file], PAGE[file])

        return router


class _Json(JSONResponse):
    """JSON that any string can be put into, half a surrogate pair included."""

    def render(self, content: Any) -> bytes:
        return _dumped(content)


class _Events(StreamingResponse):
    """A stream of events. When it ends, for whatever reason, its requests end."""

    def __init__(self, lines: AsyncIterator[bytes], answers: Answers, note: Note) -> None:
        super().__init__(
            lines, media_type="text/event-stream", headers={"cache-control": "no-store", "x-accel-buffering": "no"}
        )
        self.answers, self.note = answers, note

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.note.cancelled = bool(self.answers.left)
            self.answers.cancel()


async def _unless_gone(request: Request, work: Any) -> Any:
    """What `work` comes to, or None when the client leaves before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _seeded(draw: Sampling, i: int) -> Sampling:
    return replace(draw, seed=draw.seed + i)


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + _dumped(content) + b"\n\n"


def _dumped(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def _file(content: bytes, kind: str) -> Response:
    return Response(content, media_type=kind, headers={"cache-control": "no-cache"})


# ── errors ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _error(status: int, message: str, param: str | None = None, code: str | None = None, **headers: str) -> Response:
    kind = KINDS.get(status, "invalid_request_error")
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return _Json(problem(message, kind, param, code), status, headers=fields)


async def _bad_input(request: Request, error: Exception) -> Response:
    message = str(error)
    word = message.partition(" ")[0].rstrip(":")
    param = word if word in ChatRequest.model_fields | CompletionRequest.model_fields else None
    code = "context_length_exceeded" if "context holds" in message else None
    return _error(400, message, param, code)


async def _not_valid(request: Request, error: Exception) -> Response:
    """The first complaint in one line, an unknown field before others: it says what to mend."""
    assert isinstance(error, RequestValidationError)
    complaints = error.errors()
    first = next((item for item in complaints if item["type"] == "extra_forbidden"), complaints[0])
    path = [str(part) for part in first["loc"][1:]]
    place = ".".join(path)
    if first["type"] == "json_invalid":
        return _error(400, f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
    if first["type"] == "value_error" and not path:
        return _error(400, first["msg"].removeprefix("Value error, "))
    if not path:
        return _error(400, "the body must be a JSON object, sent with Content-Type: application/json")
    if first["type"] == "extra_forbidden":
        known = ChatRequest.model_fields | CompletionRequest.model_fields
        return _error(400, f"unknown field {place!r}{nearest(path[-1], list(known))}", place, "unknown_parameter")
    message = first["msg"].removeprefix("Value error, ")
    return _error(400, f"{place}: {message}, got {str(first.get('input'))[:80]!r}", place)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    fields = {name.replace("-", "_"): value for name, value in (error.headers or {}).items()}
    code = "model_not_found" if error.status_code == 404 and "model" in error.detail else None
    detail = error.detail
    if error.status_code == 400:  # FastAPI's only one, whatever it was that json could not read
        detail = "the body cannot be read: it must be JSON in UTF-8, not too deep, its numbers not too long"
    return _error(error.status_code, detail, None, code, **fields)


async def _full(request: Request, error: Exception) -> Response:
    return _error(429, str(error), retry_after="1")


async def _closed(request: Request, error: Exception) -> Response:
    return _error(503, str(error), retry_after="30")


async def _our_mistake(request: Request, error: Exception) -> Response:
    return _error(500, "the service has made a mistake; its log says which")
