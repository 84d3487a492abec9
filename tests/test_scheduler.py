"""The scheduler against a ledger of what really lies on every page: ten thousand texts that come, grow, part and go."""

import random
import subprocess
import sys
from dataclasses import dataclass, field

import pytest

from leanseek.serve.scheduler import Entry, Pages, Scheduler


@dataclass
class Machine:
    """Stands for the model: reads what the plan says and draws tokens, and keeps account of every place."""

    scheduler: Scheduler
    chance: random.Random
    written: dict[int, tuple[int, ...]] = field(default_factory=dict)  # slot → the text up to and with its token
    left: dict[Entry, int] = field(default_factory=dict)  # tokens still to draw
    order: list[Entry] = field(default_factory=list)  # of arrival
    finished: int = 0

    def add(self, prompt: list[int], new: int) -> Entry:
        entry = Entry(list(prompt), len(prompt) + new - 1)
        self.scheduler.add(entry)
        self.left[entry] = new
        self.order.append(entry)
        return entry

    def cancel(self, entry: Entry) -> None:
        self.scheduler.remove(entry)
        self._gone(entry)

    def step(self) -> None:
        plan = self.scheduler.plan()
        read = [entry for entry, _ in plan.reads]
        assert len({*read, *plan.steps}) == len(read) + len(plan.steps), "a text is in the plan twice"
        assert sum(count for _, count in plan.reads) <= self.scheduler.chunk
        if self.order:
            assert self.order[0] in read or self.order[0] in plan.steps, "the oldest does not go on"
        for entry in plan.steps:
            assert entry.unread == 1
            drawn = self.chance.randint(1, 1 + self.scheduler.ahead)
            self._go_on(entry, 1, drawn)
        for entry, count in plan.reads:
            assert 1 <= count <= entry.unread
            self._go_on(entry, count, 1)

    def _go_on(self, entry: Entry, count: int, drawn: int) -> None:
        self._look(entry)
        ahead = self.scheduler.ahead if entry.unread == 1 else 0
        for place in range(entry.read, min(entry.read + count + ahead, entry.limit)):
            page = entry.pages[place // self.scheduler.pages.size]
            assert self.scheduler.pages.holders[page] == 1, "writes on a page that another reads"
            known = place < len(entry.tokens)
            slot = page * self.scheduler.pages.size + place % self.scheduler.pages.size
            self.written[slot] = tuple(entry.tokens[: place + 1]) if known else (-1,)  # a draft
        whole = entry.unread == count
        drawn = min(drawn, self.left[entry]) if whole else 0
        entry.tokens += [self.chance.randrange(3) for _ in range(drawn)]
        self.left[entry] -= drawn
        for place in range(entry.read + count, entry.read + count + max(drawn - 1, 0)):  # drafts that were right
            slot = entry.pages[place // self.scheduler.pages.size] * self.scheduler.pages.size
            self.written[slot + place % self.scheduler.pages.size] = tuple(entry.tokens[: place + 1])
        self.scheduler.has_read(entry, count + max(drawn - 1, 0))
        if not self.left[entry]:
            self.scheduler.remove(entry)
            self._gone(entry)
            self.finished += 1

    def _look(self, entry: Entry) -> None:
        """Everything that a text would attend to is its own."""
        size = self.scheduler.pages.size
        for place in range(entry.read):
            slot = entry.pages[place // size] * size + place % size
            assert self.written[slot] == tuple(entry.tokens[: place + 1]), "a place holds another text"

    def _gone(self, entry: Entry) -> None:
        del self.left[entry]
        self.order.remove(entry)

    def check(self) -> None:
        """Every page is free, kept or held, once; and as many hold it as the texts say."""
        pages = self.scheduler.pages
        held = [page for entry in self.scheduler.running for page in entry.pages]
        assert all(not entry.pages for entry in self.scheduler.waiting)
        for page in range(1, pages.count + 1):
            assert pages.holders[page] == held.count(page)
            assert (page in pages.free) + (page in pages.kept) + (page in held) == 1, "a page is lost, or in two hands"
        assert pages.page_of == {name: page for page, name in pages.hash_of.items()}
        assert not pages.free & pages.hash_of.keys()
        assert pages.kept.keys() <= pages.hash_of.keys()
        assert pages.holders[0] == 0
        assert len(self.scheduler.running) <= self.scheduler.max_running
        for line in (list(self.scheduler.running), list(self.scheduler.waiting)):
            assert [entry.arrival for entry in line] == sorted(entry.arrival for entry in line)


def traffic(arrivals: int, pages: int, seed: int, ahead: int = 0, size: int = 4) -> Machine:
    """Arrivals at random, a tenth of them cancelled at random moments, many that begin alike."""
    chance = random.Random(seed)
    machine = Machine(Scheduler(Pages(pages, size), max_running=8, chunk=10, ahead=ahead), chance)
    heads = [[chance.randrange(3) for _ in range(chance.randint(1, 20))] for _ in range(6)]
    came = steps = 0
    while came < arrivals or machine.order:
        if came < arrivals and chance.random() < 0.25 and len(machine.order) < 40:
            for _ in range(min(chance.choice((1, 1, 1, 2, 12)), arrivals - came)):
                tail = [chance.randrange(3) for _ in range(chance.randint(0, 6))]
                machine.add([7, *chance.choice(heads), *tail], chance.randint(1, 16))
                came += 1
        if machine.order and chance.random() < 0.03:
            machine.cancel(chance.choice(machine.order))
        machine.step()
        if not steps % 7:
            machine.check()
        steps += 1
    machine.check()
    assert not machine.scheduler.pages.used, "a page leaked"
    return machine


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("pages", [12, 40])
def test_ten_thousand_texts(pages: int, ahead: int) -> None:
    machine = traffic(10_000, pages, seed=pages + ahead, ahead=ahead)
    assert machine.finished > 8_000
    assert (machine.scheduler.preemptions > 100) == (pages == 12)


def faults() -> dict[str, tuple[type, str, object]]:
    whole = {"let_go": Pages.let_go, "hashes": Scheduler._hashes, "keep": Pages.keep, "make": Scheduler._make_room}

    def forgets_one(self: Pages, pages: list[int]) -> None:
        whole["let_go"](self, pages[:-1])

    def by_their_own_tokens_alone(self: Scheduler, entry: Entry, pages: int) -> list[bytes]:
        size = self.pages.size
        return [bytes(entry.tokens[i * size : (i + 1) * size]) for i in range(pages)]

    def too_early(self: Scheduler, entry: Entry, count: int) -> None:
        """A page is findable before its last token has been read."""
        before, entry.read = entry.read, entry.read + count
        for i in range(before // self.pages.size, -(-entry.read // self.pages.size)):
            if len(entry.tokens) >= (i + 1) * self.pages.size:
                self.pages.keep(entry.pages[i], self._hashes(entry, i + 1)[i])

    def the_oldest_first(self: Scheduler, entry: Entry, count: int) -> bool:
        self.running.reverse()
        try:
            return whole["make"](self, entry, count)
        finally:
            self.running.reverse()

    return {
        "a page is never let go": (Pages, "let_go", forgets_one),
        "hashes of the page alone": (Scheduler, "_hashes", by_their_own_tokens_alone),
        "pages are shared too early": (Scheduler, "has_read", too_early),
        "the oldest is sent back": (Scheduler, "_make_room", the_oldest_first),
    }


@pytest.mark.parametrize("fault", faults())
def test_a_fault_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, wrong = faults()[fault]
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises((AssertionError, IndexError, KeyError, ValueError)):
        traffic(2_000, pages=12, seed=3, ahead=1)


def scheduler(pages: int = 100, size: int = 4, **more: int) -> Scheduler:
    return Scheduler(Pages(pages, size), **({"max_running": 8, "chunk": 64} | more))


def run_to_the_end(machine: Machine) -> None:
    while machine.order:
        machine.step()


def test_a_text_that_comes_again_is_found() -> None:
    machine = Machine(scheduler(), random.Random(0))
    prompt = list(range(18))
    first = machine.add(prompt, 1)
    run_to_the_end(machine)
    again, longer, other = machine.add(prompt, 1), machine.add([*prompt, 5, 6, 7], 1), machine.add([9, *prompt], 1)
    run_to_the_end(machine)
    assert first.found == 0
    assert again.found == 16
    assert longer.found == 16
    assert other.found == 0
    whole_pages = machine.add(prompt[:16], 1)
    run_to_the_end(machine)
    assert whole_pages.found == 12, "at least one token must be read, or there is nothing to draw from"


def test_texts_that_come_together_share_what_the_first_reads() -> None:
    machine = Machine(scheduler(), random.Random(0))
    prompt = list(range(40))
    together = [machine.add(prompt, 3) for _ in range(5)]
    machine.step()
    assert machine.scheduler.pages.used == 10  # the first one's; the others wait for them
    run_to_the_end(machine)
    assert [entry.found for entry in together] == [0, 36, 36, 36, 36]


def test_long_prompts_do_not_stop_those_that_run() -> None:
    machine = Machine(scheduler(chunk=16), random.Random(0))
    running = machine.add([1, 2], 50)
    machine.step()
    machine.add(list(range(100)), 1)
    for drawn in range(2, 9):
        machine.step()
        assert machine.left[running] == 50 - drawn
    assert len(machine.order) == 1  # 100 tokens, 16 at a time, took seven steps


def test_when_pages_run_out_the_youngest_goes_back_and_is_read_again() -> None:
    machine = Machine(scheduler(pages=8), random.Random(0))
    old, young = machine.add(list(range(12)), 20), machine.add(list(range(50, 60)), 12)
    while not machine.scheduler.preemptions:
        machine.step()
    assert machine.scheduler.running == [old]
    assert list(machine.scheduler.waiting) == [young]
    assert young.tokens[:10] == list(range(50, 60))
    assert len(young.tokens) > 10  # what was drawn is kept
    run_to_the_end(machine)
    assert len(young.tokens) == 22


def test_new_weights_leave_nothing_to_be_found() -> None:
    machine = Machine(scheduler(), random.Random(0))
    machine.add(list(range(20)), 1)
    run_to_the_end(machine)
    under_way = machine.add(list(range(30, 50)), 9)
    machine.step()
    machine.scheduler.start_over()
    machine.written.clear()
    machine.check()
    assert machine.scheduler.pages.available == 100
    assert under_way.read == 0
    again = machine.add(list(range(20)), 1)
    run_to_the_end(machine)
    assert again.found == 0
    assert len(under_way.tokens) == 29


def test_a_page_shared_when_weights_change_is_not_given_out_twice() -> None:
    machine = Machine(scheduler(), random.Random(0))
    for _ in range(3):
        machine.add(list(range(20)), 9)
    machine.step()
    machine.step()
    assert max(machine.scheduler.pages.holders) == 3
    machine.scheduler.start_over()
    machine.written.clear()
    machine.check()
    assert machine.scheduler.pages.available == 100
    assert not any(machine.scheduler.pages.holders)
    run_to_the_end(machine)
    machine.check()
    assert machine.finished == 3


def test_what_could_never_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="41 tokens do not fit into 10 pages of 4"):
        scheduler(pages=10).add(Entry([1], 41))
    machine = Machine(scheduler(pages=10, ahead=1), random.Random(0))
    machine.add(list(range(30)), 11)
    run_to_the_end(machine)
    assert machine.finished == 1


def test_a_text_lies_in_one_piece_where_it_can() -> None:
    machine = Machine(scheduler(), random.Random(0))
    entry = machine.add(list(range(30)), 30)
    machine.step()
    while machine.left.get(entry, 0) > 2:
        machine.step()
    assert entry.pages == list(range(entry.pages[0], entry.pages[0] + len(entry.pages)))


def test_the_scheduler_runs_without_torch() -> None:
    code = "import sys, leanseek.serve.scheduler; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
