"""The engine: requests in, tokens out, one step at a time for all that run.

A step first moves every running text on by a token (by two where the MTP module's draft holds, report §5.4.3), then
reads the next piece of the prompts that came since. What runs, and where in the cache, the scheduler says.

B rows · T new tokens of each · D hidden_size · V vocab_size.
"""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leanseek.config import BadInput, ModelConfig
from leanseek.data.tokenizer import Tokenizer
from leanseek.model.moe import watched
from leanseek.model.transformer import Transformer
from leanseek.parallel.mesh import ALONE, Ranks
from leanseek.serve.cache import LARGE_PAGE, PAGE, Cache
from leanseek.serve.grammar import Grammar, Grammars
from leanseek.serve.runner import Now, Runner
from leanseek.serve.sampling import Races, Sampling, adjust, draw
from leanseek.serve.scheduler import Entry, Pages, Scheduler
from leanseek.serve.speculate import follow
from leanseek.serve.writer import Writer

MEMORY_SHARE = 0.25  # of the memory at hand that the cache may grow to, where nobody says
UNLIKE = 2  # prompts are read side by side while the longest piece is not so many times the shortest


@dataclass(frozen=True)
class TokenLogprobs:
    """A drawn token's log-probability under the model, before anything bent it, and the likeliest in its place."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass
class Metrics:
    """Sums since the engine began."""

    submitted: int = 0
    finished: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of them, those found in the cache
    drawn_tokens: int = 0
    drafted: int = 0  # drafts that were verified
    accepted: int = 0
    steps: int = 0
    read_seconds: float = 0.0
    step_seconds: float = 0.0  # drafts verified in the same step included
    draft_seconds: float = 0.0


class Request:
    """What became of a prompt so far; for others to look at."""

    def __init__(
        self,
        prompt: list[int],
        sampling: Sampling,
        entry: Entry,
        writer: Writer,
        grammar: Grammar | None,
        races: Races,
    ) -> None:
        self.prompt, self.sampling, self.entry = prompt, sampling, entry
        self.drawn: list[int] = []  # without the end of the text, and with what a stop string cut
        self.draws = 0
        self.logprobs: list[TokenLogprobs] = []
        self.experts: list[NDArray[np.integer]] = []  # [L, K] for each draw, where the engine tells them
        self.finish_reason: Literal["stop", "length", "cancelled"] | None = None
        self.draft: int | None = None  # what the MTP module thinks comes next
        self.matcher = grammar.matcher() if grammar is not None else None
        self._writer, self._text, self._races = writer, "", races
        self._race: tuple[int, Tensor] | None = None

    @property
    def cached(self) -> int:
        """Tokens of the prompt that were found in the cache."""
        return self.entry.found or 0

    def read(self) -> str:
        """The text that became certain since the last time: whole characters, nothing a stop string may yet cut."""
        text, self._text = self._text, ""
        return text

    def race(self, size: int) -> Tensor:
        """The times [V] that decide the next token: kept, as a draft and its verification meet the same."""
        place = len(self.entry.tokens)
        if self._race is None or self._race[0] != place:
            self._race = place, self._races([(self.sampling.seed, place)], size)[0]
        return self._race[1]

    def push(self, token: int, eos: int, most: int) -> None:
        """Takes a drawn token."""
        self.draws += 1
        if token == eos:
            self._end("stop")
            return
        self.drawn.append(token)
        self.entry.tokens.append(token)
        self._text += self._writer.push(token)
        if self.matcher is not None:
            self.matcher.push(token)
        if self._writer.stopped or (self.matcher is not None and self.matcher.complete):
            self._end("stop")
        elif len(self.drawn) == most:
            self._end("length")

    def _end(self, reason: Literal["stop", "length"]) -> None:
        self._text += self._writer.finish()
        self.finish_reason = "stop" if self._writer.stopped else reason


class Engine:
    """Serves one model; for one thread.

    max_running: texts that are stepped together. cache_tokens: places in the cache; unless told as many as all of them
    could fill, and at most a quarter of the memory at hand. chunk: tokens of prompts read between two steps. speculate:
    draft with the MTP module, if there is one. ranks: those that the model is cut over (`parallel.tensor`); each has an
    engine, and all engines are asked the same. tell_experts: note, for each draw, the experts that the token before it
    went to in every layer.
    Raises BadInput when model and tokenizer do not belong together.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        max_running: int = 64,
        cache_tokens: int | None = None,
        chunk: int = 512,
        speculate: bool = True,
        ranks: Ranks = ALONE,
        tell_experts: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.config = model.eval(), tokenizer, model.config
        _check(model.config, tokenizer)
        for name, value in (("max_running", max_running), ("cache_tokens", cache_tokens), ("chunk", chunk)):
            if value is not None and value < 1:
                raise BadInput(f"{name} must be at least 1, got {value}")
        self.device = next(model.parameters()).device
        self.ranks = ranks
        main = {name: router for name, router in model.routers().items() if name.startswith("layers.")}
        self.tells_experts = tell_experts and bool(main)
        self.watched = main if self.tells_experts else {}
        self.runner = Runner(model, ranks)
        self.speculates = speculate and self.runner.mtp is not None
        if cache_tokens is None:
            cache_tokens = _affordable(model.config, max_running, self.runner.dtype, self.device)
            cache_tokens = -int(ranks.largest(torch.tensor(-cache_tokens, device=self.device), "tp"))  # what all afford
        size = PAGE if self.runner.latent_decode is None else LARGE_PAGE
        pages = -(-cache_tokens // size)
        self.cache = Cache(model.config, pages, self.runner.dtype, self.device, drafts=self.speculates, size=size)
        self.scheduler = Scheduler(Pages(pages, size), max_running, chunk, ahead=1 if self.speculates else 0)
        self.requests: dict[Entry, Request] = {}  # those that have not ended
        self.metrics, self.races = Metrics(), Races()
        # Never drawn: rows of the embedding that no token has, and tokens that cannot follow anything.
        closed = {*range(tokenizer.vocab_size, self.config.vocab_size), tokenizer.bos_id, tokenizer.pad_id}
        self.closed = torch.tensor(sorted(closed - {tokenizer.eos_id}), device=self.device)

    @cached_property
    def grammars(self) -> Grammars:
        """Raises BadInput where llguidance is not installed."""
        return Grammars(self.tokenizer)

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self.requests)

    def submit(self, prompt: list[int], sampling: Sampling, grammar: Grammar | None = None) -> Request:
        """Queues a prompt of token ids. Raises BadInput for one that cannot be served."""
        context, room = self.config.max_position_embeddings, self.cache.pages * self.cache.size
        if not prompt:
            raise BadInput("the prompt is empty")
        if len(prompt) > context:
            raise BadInput(f"the prompt has {len(prompt)} tokens, the model's context holds {context}: shorten it")
        for token, _ in sampling.logit_bias:
            if token >= self.tokenizer.vocab_size:
                raise BadInput(f"logit_bias: there is no token {token}, the last is {self.tokenizer.vocab_size - 1}")
        # The last token of all is drawn but never read, so it needs no place.
        places = context if sampling.max_tokens is None else min(len(prompt) + sampling.max_tokens - 1, context)
        if sampling.max_tokens is None:
            places = max(min(places, room), len(prompt))
        if places > room:
            raise BadInput(f"prompt and max_tokens are {places} tokens together, the cache holds {room}: ask for fewer")
        request = Request(
            list(prompt),
            sampling,
            Entry(list(prompt), places),
            Writer(self.tokenizer, sampling.stop),
            grammar,
            self.races,
        )
        self.scheduler.add(request.entry)
        self.requests[request.entry] = request
        self.metrics.submitted += 1
        self.metrics.prompt_tokens += len(prompt)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request, wherever it is; its pages are free at once. Nothing happens to one that has ended."""
        if request.entry in self.requests:
            self._forget(request)
            request.finish_reason = "cancelled"
            self.metrics.cancelled += 1

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Moves on everything that runs; the requests to which something came."""
        plan = self.scheduler.plan()
        self.metrics.steps += 1
        moved = [self.requests[entry] for entry in plan.steps]
        if moved:
            self._advance(moved)
        for group in _alike(plan.reads):
            moved.extend(self._read(group))
        for request in moved:
            if request.finish_reason is not None:
                self._forget(request)
                self.metrics.finished += 1
        return moved

    def take_over(self, weights: Mapping[str, Tensor]) -> None:
        """Goes on with other weights, named as in the model's `state_dict`; texts under way are read again with them.

        Raises BadInput, and changes nothing, where names or shapes are not the model's.
        """
        own = self.model.state_dict()
        wrong = sorted(own.keys() ^ weights.keys()) or [n for n in own if own[n].shape != weights[n].shape]
        if wrong:
            raise BadInput(f"these weights are another model's: {wrong[0]} is not in both, or of another shape")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(weights[name])
        self.runner = Runner(self.model, self.ranks)
        self.cache = self.cache.emptied()
        self.scheduler.start_over()

    # ── a step ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _advance(self, requests: list[Request]) -> None:
        """Reads every text's newest token and, behind it, its draft; draws what follows, and drafts anew."""
        began = time.perf_counter()
        entries = [request.entry for request in requests]
        drafts = [request.draft for request in requests]
        new = 2 if any(draft is not None for draft in drafts) else 1
        ids = [[entry.tokens[-1], draft or 0][:new] for entry, draft in zip(entries, drafts, strict=True)]
        places = self.cache.at(
            [entry.pages for entry in entries], [entry.read for entry in entries], [new] * len(entries)
        )
        now = self.runner.at(places)
        hidden = self.runner.step(torch.tensor(ids, device=self.device), self.cache, now)  # [B, T, D]
        logits = self.runner.logits(hidden.flatten(0, 1)).unflatten(0, (-1, new))  # [B, T, V]
        experts = None
        if self.tells_experts:
            experts = self.runner.chosen().cpu().unflatten(1, (-1, new)).numpy()  # [L, B, T, K]

        def draw_after(rows: list[int], t: int) -> list[int]:
            told = logits[:, t] if len(rows) == len(requests) else logits[rows, t]
            tokens = self.choose(told, [requests[row] for row in rows])
            if experts is not None:
                for row in rows:
                    requests[row].experts.append(experts[:, row, t])
            return [self._push(requests[row], token) for row, token in zip(rows, tokens, strict=True)]

        followed = follow(draw_after, drafts, new)
        for entry, tokens in zip(entries, followed, strict=True):
            self.scheduler.has_read(entry, len(tokens))
        self.metrics.drafted += sum(draft is not None for draft in drafts)
        self.metrics.accepted += sum(len(tokens) - 1 for tokens in followed)
        ended = time.perf_counter()
        self.metrics.step_seconds += ended - began
        if self.speculates:
            self._draft(requests, hidden, followed, now)
            self.metrics.draft_seconds += time.perf_counter() - ended

    def _read(self, group: list[tuple[Entry, int]]) -> list[Request]:
        """Reads a piece of each prompt; where it was the last one, draws the first token. The requests that got one.

        Of prompts that are alike to the piece's end one is read, and what the cache then holds of it is copied.
        """
        began = time.perf_counter()
        first: dict[tuple[int, ...], int] = {}  # row by the tokens of a prompt to the piece's end, and where it begins
        read: list[tuple[Entry, int]] = []
        of = []  # for each prompt, the row of `read` that is like it
        for entry, count in group:
            # The MTP module sees one token more.
            known = (entry.read, *entry.tokens[: entry.read + count + self.speculates])
            if known not in first:
                first[known] = len(read)
                read.append((entry, count))
            of.append(first[known])
        longest, starts = max(count for _, count in read), [entry.read for entry, _ in read]
        places = self.cache.at([entry.pages for entry, _ in read], starts, [count for _, count in read])
        layers = self.cache.views(places)
        with watched(self.watched) as chosen:
            hidden = self.model(self._ids(read, starts, longest), places.positions, cache=layers)  # [B, T, D]
        if self.speculates:
            following = self._ids(read, [start + 1 for start in starts], longest)
            self.model.remember(hidden, following, places.positions, layers[-1])
        if len(read) < len(group):
            alike = [(read[row][0], *each) for each, row in zip(group, of, strict=True) if read[row][0] is not each[0]]
            self.cache.copy([(one.pages, other.pages, other.read, count) for one, other, count in alike])
        for entry, count in group:
            self.scheduler.has_read(entry, count)
        done = [row for row, (entry, _) in enumerate(group) if not entry.unread]
        answered = [self.requests[group[row][0]] for row in done]
        where = [of[row] for row in done], [group[row][1] - 1 for row in done]
        hidden_of_last = hidden[where].to(self.runner.dtype)
        if self.tells_experts:
            experts = torch.stack(list(chosen.values())).unflatten(1, (-1, longest))[:, *where]  # [L, done, K]
            for request, own in zip(answered, experts.cpu().numpy().swapaxes(0, 1), strict=True):
                request.experts.append(own)
        tokens = self.choose(self.runner.logits(hidden_of_last), answered) if done else []
        followed = [[self._push(request, token)] for request, token in zip(answered, tokens, strict=True)]
        if self.speculates and done:
            pages, last = [request.entry.pages for request in answered], [r.entry.read - 1 for r in answered]
            now = self.runner.at(self.cache.at(pages, last, [1] * len(done)))
            self._draft(answered, hidden_of_last[:, None], followed, now)
        self.metrics.read_seconds += time.perf_counter() - began
        return answered

    def _ids(self, group: Iterable[tuple[Entry, int]], starts: Sequence[int], longest: int) -> Tensor:
        """count tokens of each from its start on, 0 where there are none [B, longest]."""
        rows = [entry.tokens[start : start + count] for (entry, count), start in zip(group, starts, strict=True)]
        return torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.device)

    def _draft(self, requests: list[Request], hidden: Tensor, followed: list[list[int]], now: Now) -> None:
        """Drafts what comes next in every text, from its hidden states [B, T, D] and the tokens that followed them."""
        new = hidden.shape[1]
        # A draft that was wrong leaves a place whose token is not known yet: it is filled when that is read.
        following = [[max(token, 0) for token in tokens] + [0] * (new - len(tokens)) for tokens in followed]
        last, then = [row * new + len(tokens) - 1 for row, tokens in enumerate(followed)], now
        if new > 1:
            entries = [request.entry for request in requests]
            ends = [entry.read - 1 for entry in entries]
            then = self.runner.at(self.cache.at([entry.pages for entry in entries], ends, [1] * len(entries)))
        tokens, rows = torch.tensor(following, device=self.device), torch.tensor(last, device=self.device)
        states = self.runner.draft(hidden, tokens, rows, self.cache, now, then)
        going = [row for row, request in enumerate(requests) if request.finish_reason is None]
        if going:
            drawing = [requests[row] for row in going]
            states = states if len(going) == len(requests) else states[going]
            for request, token in zip(
                drawing, self.choose(self.runner.logits(states), drawing, tell=False), strict=True
            ):
                request.draft = token

    def choose(self, logits: Tensor, requests: Sequence[Request], tell: bool = True) -> list[int]:
        """logits [B, V], which may be changed, → the next token of each text; `tell` the log-probabilities to those
        who asked for them."""
        logits.index_fill_(-1, self.closed, float("-inf"))
        samplings = [request.sampling for request in requests]
        bent = [r for r, request in enumerate(requests) if request.sampling.adjusts or request.matcher is not None]
        asked = [r for r, sampling in enumerate(samplings) if tell and sampling.logprobs is not None]
        if not bent and not asked and not any(sampling.temperature for sampling in samplings):
            return logits.argmax(dim=-1).tolist()
        # On the CPU, so that a seed means the same draws on every device.
        logits = logits.float().cpu()
        own = logits.log_softmax(dim=-1) if len(asked) == len(requests) else logits[asked].log_softmax(dim=-1)
        for row in bent:
            request = requests[row]
            adjust(logits[row], request.sampling, request.prompt, request.drawn)
            if request.matcher is not None:
                logits[row, : self.tokenizer.vocab_size].masked_fill_(~request.matcher.open_tokens(), float("-inf"))
        tokens = draw(logits, samplings, lambda rows: self._times([requests[row] for row in rows]))
        if asked:
            drawn = torch.tensor([tokens[row] for row in asked])
            likelihoods = own.gather(1, drawn[:, None]).squeeze(1).tolist()
            for place, (row, likelihood) in enumerate(zip(asked, likelihoods, strict=True)):
                count = samplings[row].logprobs
                top = _likeliest(own[place], count) if count else []
                requests[row].logprobs.append(TokenLogprobs(tokens[row], likelihood, top))
        return tokens

    def _times(self, requests: Sequence[Request]) -> Tensor:
        """The times [B, V] that decide the next token of each text."""
        size = self.config.vocab_size
        if self.speculates:
            return torch.stack([request.race(size) for request in requests])
        return self.races([(request.sampling.seed, len(request.entry.tokens)) for request in requests], size)

    def _forget(self, request: Request) -> None:
        del self.requests[request.entry]
        self.scheduler.remove(request.entry)
        self.metrics.cached_tokens += request.cached

    def _push(self, request: Request, token: int) -> int:
        """Gives a text its next token, and says which; −1 when it has ended."""
        request.push(token, self.tokenizer.eos_id, most=request.entry.limit + 1 - len(request.prompt))
        self.metrics.drawn_tokens += 1
        return token if request.finish_reason is None else -1


def _likeliest(chances: Tensor, count: int) -> list[tuple[int, float]]:
    """Of log-probabilities [V] the `count` largest."""
    top = chances.topk(count)
    return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))


def _alike(reads: list[tuple[Entry, int]]) -> list[list[tuple[Entry, int]]]:
    """Pieces of about one length are read side by side; the padding is less than there are tokens."""
    groups: list[list[tuple[Entry, int]]] = []
    for entry, count in sorted(reads, key=lambda read: -read[1]):
        if groups and groups[-1][0][1] < UNLIKE * count:
            groups[-1].append((entry, count))
        else:
            groups.append([(entry, count)])
    return groups


def _check(config: ModelConfig, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise BadInput(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model's vocab_size is {config.vocab_size}: "
            "they do not belong together"
        )
    ends, known = (tokenizer.bos_id, tokenizer.eos_id), (config.bos_token_id, config.eos_token_id)
    if ends != known:
        raise BadInput(f"the tokenizer's BOS and EOS are {ends}, the model's {known}: they do not belong together")


def _affordable(config: ModelConfig, max_running: int, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens of cache for `max_running` whole contexts, or for a share of the memory at hand if that is less."""
    if device.type == "cuda":
        memory = torch.cuda.mem_get_info(device)[0]
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    token = (config.num_hidden_layers + 1) * (config.latent_width + config.qk_rope_head_dim) * dtype.itemsize
    return max(min(max_running * config.max_position_embeddings, int(memory * MEMORY_SHARE) // token), PAGE)
