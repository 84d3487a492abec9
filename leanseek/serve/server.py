"""`leanseek serve`: a run, an address, and a shutdown that lets answers end.

The first signal closes the door: whoever comes now is told 503, what runs may end within the grace period. Then, or at
a second signal, the rest is cut off and the process ends.
"""

import asyncio
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from leanseek.config import BadInput
from leanseek.serve.endpoint import Limits, create_app
from leanseek.serve.llm import LLM
from leanseek.serve.worker import Worker

CUT_SECONDS = 5  # that connections have to end once their answers were cut off


@dataclass(frozen=True)
class Options:
    """What `serve` may be told; the command line has them under the same names."""

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    api_key: str | None = None
    api_key_file: Path | None = None
    max_running: int = 64
    max_waiting: int = 256
    max_tokens: int | None = None
    cache_tokens: int | None = None
    body_mb: float = 4.0
    grace: float = 30.0
    speculation: bool = True
    device: str = "auto"


class Server(uvicorn.Server):
    """uvicorn's, with a door that closes before the house does."""

    def __init__(self, app: FastAPI, grace: float) -> None:
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=CUT_SECONDS,
        )
        super().__init__(config)
        self.worker: Worker = app.state.service.worker
        self.grace = grace
        self.deadline: float | None = None  # time.monotonic() at which the rest is cut off

    def drain(self) -> None:
        """Takes nothing new; ends when nothing runs, or after the grace period. A second call ends at once."""
        self.worker.closing = True
        self.deadline = time.monotonic() + (self.grace if self.deadline is None else 0)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.drain()

    async def on_tick(self, counter: int) -> bool:
        if self.deadline is not None and (not self.worker.open or time.monotonic() >= self.deadline):
            if self.worker.open:
                self.worker.abort()
                await asyncio.sleep(0.1)  # for the last events to go out
            return True
        return await super().on_tick(counter)


def serve(run: Path, options: Options) -> None:
    """Serves RUN until a signal comes. Raises BadInput."""
    key = _key(options)
    limits = _limits(options)
    listener = listen(options.host, options.port)
    try:
        llm = LLM.load(
            run,
            options.device,
            max_running=options.max_running,
            cache_tokens=options.cache_tokens,
            speculate=options.speculation,
        )
        name = options.name or run.resolve().name
        app = create_app(llm.engine, name, limits, key, sys.stderr)
        port = listener.getsockname()[1]
        host = f"[{options.host}]" if ":" in options.host else options.host
        print(f"{name}: http://{host}:{port} has the chat page, http://{host}:{port}/v1 the API", file=sys.stderr)
        Server(app, options.grace).run(sockets=[listener])
    finally:
        listener.close()


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises BadInput where the address is taken, or not ours."""
    if not 0 <= port < 65536:
        raise BadInput(f"--port must lie between 0 and 65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BadInput(
            f"cannot listen on {host} port {port}: {reason.lower()}; --host and --port choose another"
        ) from None
    return listener


def _key(options: Options) -> str | None:
    if options.api_key is not None and options.api_key_file is not None:
        raise BadInput("--api-key and --api-key-file: give one of the two")
    key = options.api_key
    if options.api_key_file is not None:
        try:
            key = options.api_key_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            raise BadInput(f"--api-key-file {options.api_key_file}: not a text file that can be read") from None
    if key is not None and not key.strip():
        raise BadInput("the API key is empty: without a key leave the option out")
    return key


def _limits(options: Options) -> Limits:
    for name, value, least in (
        ("--max-running", options.max_running, 1),
        ("--max-waiting", options.max_waiting, 0),
        ("--max-tokens", options.max_tokens, 1),
        ("--body-mb", options.body_mb, 0.001),
        ("--grace", options.grace, 0),
    ):
        if value is not None and value < least:
            raise BadInput(f"{name} must be at least {least}, got {value}")
    return Limits(
        most=options.max_running + options.max_waiting,
        max_tokens=options.max_tokens,
        body_bytes=int(options.body_mb * 1e6),
    )
