"""The service on a port of this machine, over a tiny model that draws by itself or says what a script tells it."""

import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from leanseek.data.tokenizer import Tokenizer
from leanseek.serve.endpoint import Limits, create_app
from leanseek.serve.engine import Engine, Request
from leanseek.serve.server import Server, listen
from tests.runs import model_of

NAME = "tiny"
CONTEXT = 512


def engine_of(vocabulary: Tokenizer, **options: int) -> Engine:
    """A model with an MTP module, so that it drafts."""
    return Engine(
        model_of(vocabulary, max_position_embeddings=CONTEXT, num_nextn_predict_layers=1), vocabulary, **options
    )


class Scripted(Engine):
    """Draws the script's tokens whatever it is asked, and ends; special tokens may be spelt out in it."""

    def __init__(self, vocabulary: Tokenizer, script: str = "", pause: float = 0.0, context: int = CONTEXT) -> None:
        super().__init__(model_of(vocabulary, max_position_embeddings=context), vocabulary)
        self.script, self.pause = script, pause

    def choose(self, logits: Tensor, requests: Sequence[Request], tell: bool = True) -> list[int]:
        ids = [*ids_of(self.tokenizer, self.script), self.tokenizer.eos_id]
        return [ids[len(request.drawn)] for request in requests]

    def step(self) -> list[Request]:
        time.sleep(self.pause)
        return super().step()


def ids_of(vocabulary: Tokenizer, text: str) -> list[int]:
    """Ids of a text in which special tokens are spelt out."""
    ids: list[int] = []
    while text:
        at = {text.find(token): token for token in vocabulary.special if token in text}
        first = min(at, default=len(text))
        ids += vocabulary.encode(text[:first]) if first else []
        if first < len(text):
            ids.append(vocabulary.special[at[first]])
        text = text[first + len(at.get(first, "")) :]
    return ids


@dataclass
class Served:
    url: str
    engine: Engine
    server: Server
    thread: threading.Thread
    log: io.StringIO = field(default_factory=io.StringIO)

    @property
    def pages_used(self) -> int:
        return self.engine.scheduler.pages.used


@contextmanager
def served(
    engine: Engine, limits: Limits | None = None, key: str | None = None, grace: float = 5.0
) -> Iterator[Served]:
    """The service of one engine while the block runs."""
    log = io.StringIO()
    app = create_app(engine, NAME, limits, key, log)
    listener = listen("127.0.0.1", 0)
    server = Server(app, grace)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="server")
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    thread.start()
    try:
        until(lambda: server.started)
        yield Served(url, engine, server, thread, log)
    finally:
        server.grace = 0.0
        server.drain()
        thread.join(20)
        listener.close()
        assert not thread.is_alive(), "the service did not end"


def until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    """Waits for it."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
