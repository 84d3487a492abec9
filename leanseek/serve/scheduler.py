"""Who runs, who waits, and on which pages of the cache: integers only, no torch.

A page has room for `size` tokens of one text. Texts that begin alike share the pages that they fill alike: a full page
is known by a hash of its tokens and of all before them, and stays findable after its last holder let go, until its room
is needed. First come, first served: the oldest text always goes on, and when pages run out the youngest gives its own
up and waits at the head of the queue to be read again.
"""

import hashlib
import heapq
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(eq=False)
class Entry:
    """One text in the making: `tokens` are the prompt's and those drawn so far, at most `limit` in the end."""

    tokens: list[int]
    limit: int
    read: int = 0  # tokens that have passed through the model: the first so many lie in the pages
    found: int | None = None  # of them, those that others had left there when it first came
    pages: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)  # of the full pages of `tokens`, as far as they were needed
    arrival: int = -1

    @property
    def unread(self) -> int:
        return len(self.tokens) - self.read


@dataclass(frozen=True)
class Plan:
    """One step: texts of which so many tokens are read next, and texts whose newest token is the only unread one."""

    reads: list[tuple[Entry, int]]
    steps: list[Entry]


class Pages:
    """Which pages are free, held (by how many texts), or kept for whoever comes with the same beginning.

    Page 0 is nobody's: it takes what padding writes.
    """

    def __init__(self, count: int, size: int) -> None:
        """`count` pages beside page 0."""
        self.count, self.size = count, size
        self.holders = [0] * (count + 1)
        self.free = set(range(1, count + 1))
        self.lowest = list(range(1, count + 1))  # a heap over `free`; what is not free any more is passed over
        self.kept: OrderedDict[int, None] = OrderedDict()  # findable pages without a holder, longest unused first
        self.page_of: dict[bytes, int] = {}
        self.hash_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        return len(self.free) + len(self.kept)

    @property
    def used(self) -> int:
        """Pages that a text holds."""
        return self.count - self.available

    def take(self, after: int = 0) -> int:
        """A page to write on; the one that follows `after` if it is free, so that a text lies in one piece if it can.

        There must be one available.
        """
        if after + 1 in self.free:
            page = after + 1
        elif self.free:
            page = heapq.heappop(self.lowest)
            while page not in self.free:
                page = heapq.heappop(self.lowest)
        else:
            page, _ = self.kept.popitem(last=False)
            del self.page_of[self.hash_of.pop(page)]
        self.free.discard(page)
        self.holders[page] = 1
        return page

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """Takes hold of the pages that are known by the first of these hashes, up to the first that is not."""
        found = []
        for name in hashes:
            page = self.page_of.get(name)
            if page is None:
                break
            self.kept.pop(page, None)
            self.holders[page] += 1
            found.append(page)
        return found

    def keep(self, page: int, name: bytes) -> None:
        """Makes a full page findable, unless another one is by this name."""
        if name not in self.page_of and page not in self.hash_of:
            self.page_of[name], self.hash_of[page] = page, name

    def let_go(self, pages: Sequence[int]) -> None:
        """Of a text's pages the last is forgotten first: the others are worth nothing without the first."""
        for page in reversed(pages):
            self.holders[page] -= 1
            if not self.holders[page]:
                if page in self.hash_of:
                    self.kept[page] = None
                else:
                    self._release(page)

    def forget(self) -> None:
        """Nothing is findable any more: what the pages hold was computed with other weights."""
        for page in self.kept:
            self._release(page)
        self.kept.clear()
        self.page_of.clear()
        self.hash_of.clear()

    def _release(self, page: int) -> None:
        self.free.add(page)
        heapq.heappush(self.lowest, page)


class Scheduler:
    """`running` and `waiting` are in order of arrival. `ahead`: drafts that a step reads behind the newest token."""

    def __init__(self, pages: Pages, max_running: int, chunk: int, ahead: int = 0) -> None:
        self.pages, self.max_running, self.chunk, self.ahead = pages, max_running, chunk, ahead
        self.running: list[Entry] = []
        self.waiting: deque[Entry] = deque()
        self.arrivals = 0
        self.preemptions = 0

    def add(self, entry: Entry) -> None:
        """To the end of the queue. Raises ValueError for a text that the pages could never hold."""
        if self._pages_for(entry.limit) > self.pages.count:
            raise ValueError(f"{entry.limit} tokens do not fit into {self.pages.count} pages of {self.pages.size}")
        entry.arrival, self.arrivals = self.arrivals, self.arrivals + 1
        self.waiting.append(entry)

    def remove(self, entry: Entry) -> None:
        """Ends a text, wherever it is; its pages are free at once."""
        if entry in self.running:
            self.running.remove(entry)
            self._let_go(entry)
        else:
            self.waiting.remove(entry)

    def plan(self) -> Plan:
        """What the next step does. Every running text goes on by a token before any of a new one is read."""
        sent_back = self.preemptions
        steps = [
            entry
            for entry in list(self.running)
            if entry.pages and entry.unread == 1 and self._make_room(entry, 1 + self.ahead)
        ]
        stepped = set(steps)
        budget = self.chunk
        reads: list[tuple[Entry, int]] = []
        if sent_back == self.preemptions:
            self._admit()
        for entry in self.running:
            if entry.unread > 1 and budget:
                reads.append((entry, min(entry.unread, budget)))
                budget -= reads[-1][1]
            elif entry.unread == 1 and entry not in stepped:
                steps.append(entry)
        # Making room for one may have sent another away.
        return Plan(reads, [entry for entry in steps if entry.pages])

    def has_read(self, entry: Entry, count: int) -> None:
        """The next `count` tokens are in the cache; pages that they filled can be found from now on."""
        before, entry.read = entry.read, entry.read + count
        for i in range(before // self.pages.size, entry.read // self.pages.size):
            self.pages.keep(entry.pages[i], self._hashes(entry, i + 1)[i])

    def start_over(self) -> None:
        """New weights: every running text waits to be read again, and no page is findable."""
        for entry in reversed(self.running):
            self._send_back(entry)
        self.running.clear()
        self.pages.forget()

    # ── room ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _make_room(self, entry: Entry, count: int) -> bool:
        """Pages for the next `count` tokens; younger texts give theirs up if need be, at last the text itself."""
        needed = self._pages_for(min(entry.read + count, entry.limit))
        while len(entry.pages) < needed:
            if not self.pages.available:
                youngest = self.running.pop()
                self._send_back(youngest)
                self.preemptions += 1
                if youngest is entry:
                    return False
                continue
            entry.pages.append(self.pages.take(entry.pages[-1] if entry.pages else 0))
        return True

    def _admit(self) -> None:
        """Takes texts out of the queue while there is room for all that is known of them, and a page to grow for each.

        One whose next page is being filled by another right now waits for that page.
        """
        filling = {name for entry in self.running for name in self._unfilled(entry)}
        while self.waiting and len(self.running) < self.max_running:
            entry = self.waiting[0]
            hashes = self._hashes(entry, (len(entry.tokens) - 1) // self.pages.size)
            pages = self.pages.find(hashes)
            needed = self._pages_for(min(len(entry.tokens) + self.ahead, entry.limit)) - len(pages)
            comes = len(pages) < len(hashes) and hashes[len(pages)] in filling
            if comes or needed + len(self.running) > self.pages.available:
                self.pages.let_go(pages)
                break
            entry.pages, entry.read = pages, len(pages) * self.pages.size
            entry.found = entry.read if entry.found is None else entry.found
            self._make_room(entry, entry.unread + self.ahead)
            filling.update(self._unfilled(entry))
            self.running.append(self.waiting.popleft())

    def _send_back(self, entry: Entry) -> None:
        self._let_go(entry)
        self.waiting.appendleft(entry)

    def _let_go(self, entry: Entry) -> None:
        self.pages.let_go(entry.pages)
        entry.pages, entry.read = [], 0

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.pages.size)

    # ── names ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _hashes(self, entry: Entry, pages: int) -> list[bytes]:
        """The names of its first so many full pages."""
        size = self.pages.size
        for i in range(len(entry.hashes), pages):
            before = entry.hashes[-1] if i else b""
            tokens = array("q", entry.tokens[i * size : (i + 1) * size]).tobytes()
            entry.hashes.append(hashlib.blake2b(before + tokens, digest_size=16).digest())
        return entry.hashes[:pages]

    def _unfilled(self, entry: Entry) -> list[bytes]:
        """Names of the pages that reading on will fill."""
        return entry.hashes[entry.read // self.pages.size :] if entry.unread > 1 else []
