"""64 clients at once against a server of its own: nothing may fail that was not asked to, and no page may be left over.

`python scripts/load.py RUN --seconds 180`. Each client, again and again, does one of these by chance: streams an answer
of random length, leaves in the middle of one, or sends a malformed body. Exit code 1 on any violation.
"""

import argparse
import asyncio
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx

CLIENTS = 64


@dataclass
class Seen:
    """What the clients met."""

    requests: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)  # seconds to the first token
    between: list[float] = field(default_factory=list)  # seconds from piece to piece


async def client(http: httpx.AsyncClient, model: str, most: int, chance: random.Random, end: float, seen: Seen) -> None:
    while time.monotonic() < end:
        kind = chance.choices(["answer", "leaves", "malformed"], [7, 2, 1])[0]
        seen.requests[kind] += 1
        try:
            if kind == "malformed":
                body = chance.choice([b"{", b"\xff", b"[]", b'{"model": 3}', b'{"max_tokens": -1}'])
                found = await http.post(
                    "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
                )
                if found.status_code != 400:
                    seen.errors[f"malformed: {found.status_code}"] += 1
                continue
            words = " ".join(chance.choices(["fox", "wall", "rain", "the", "old"], k=chance.randint(1, 12)))
            body = {
                "model": model,
                "messages": [{"role": "user", "content": words}],
                "max_tokens": chance.randint(1, most),
                "stream": True,
            }
            await answer(http, body, chance.randint(1, 5) if kind == "leaves" else None, seen)
        except httpx.HTTPError as error:
            seen.errors[f"{kind}: {type(error).__name__}"] += 1


async def answer(http: httpx.AsyncClient, body: dict[str, object], leave_after: int | None, seen: Seen) -> None:
    """Streams one answer to its end, or leaves after so many events."""
    began = latest = time.perf_counter()
    count = 0
    async with http.stream("POST", "/v1/chat/completions", json=body) as stream:
        if stream.status_code != 200:
            seen.errors[f"answer: {stream.status_code}"] += 1
            return
        async for line in stream.aiter_lines():
            if line == "data: [DONE]":
                return
            if not line.startswith("data: "):
                continue
            if '"error"' in line:
                seen.errors["answer: an error in the stream"] += 1
                return
            count += 1
            if leave_after is not None and count >= leave_after:
                return
            now = time.perf_counter()
            if count == 2:  # the first one only says who speaks
                seen.first.append(now - began)
            elif count > 2:
                seen.between.append(now - latest)
            latest = now
    seen.errors["answer: broken off"] += 1


async def load(url: str, seconds: float, clients: int) -> tuple[Seen, float]:
    """The clients for so long; what they met, and the pages that are still held after the last one left."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    seen = Seen()
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
        card = (await http.get("/v1/models")).json()["data"][0]
        most = max(1, min(64, card["context_length"] // 4))
        end = time.monotonic() + seconds
        await asyncio.gather(*(client(http, card["id"], most, random.Random(i), end, seen) for i in range(clients)))
        held = 1.0
        for _ in range(50):
            told = (await http.get("/metrics")).text
            held = sum(map(float, re.findall(r"^leanseek_(?:pages_used|running|waiting) (\S+)$", told, re.MULTILINE)))
            if not held:
                break
            await asyncio.sleep(0.1)
    return seen, held


def share(values: list[float], part: float) -> str:
    return f"{1000 * sorted(values)[min(int(part * len(values)), len(values) - 1)]:.1f} ms" if values else "none"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    told = parser.parse_args()
    command = [sys.executable, "-m", "leanseek", "serve", told.run, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        listening = re.search(r"http://\S+?:\d+", server.stderr.readline())
        if listening is None:
            print(server.stderr.read(), file=sys.stderr)
            return 1
        # Its lines have to be read, or it would wait for room to write them.
        lines: list[str] = []
        reader = threading.Thread(target=lines.extend, args=(server.stderr,), daemon=True)
        reader.start()
        try:
            seen, held = asyncio.run(load(listening[0], told.seconds, told.clients))
        finally:
            server.terminate()
            code = server.wait(60)
        reader.join(10)
    traces = sum("Traceback" in line for line in lines)
    for name, value in (
        *((f"requests: {kind}", count) for kind, count in sorted(seen.requests.items())),
        *((f"errors: {kind}", count) for kind, count in sorted(seen.errors.items())),
        ("first token, p50 and p99", f"{share(seen.first, 0.5)}, {share(seen.first, 0.99)}"),
        ("token to token, p50 and p99", f"{share(seen.between, 0.5)}, {share(seen.between, 0.99)}"),
        ("pages and requests left over", int(held)),
        ("traces in the log", traces),
        ("exit code of the server", code),
    ):
        print(f"{name:<30} {value}")
    return int(bool(seen.errors or held or traces or code or not seen.first))


if __name__ == "__main__":
    sys.exit(main())
