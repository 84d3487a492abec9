"""A model of ours for EleutherAI's lm-evaluation-harness: its tasks, its prompts and its scores, over our engine.

import lm_eval
from leanseek.eval.lm_eval import LeanSeekLM

lm_eval.simple_evaluate(LeanSeekLM("runs/nano"), tasks=["arc_easy"])
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from leanseek.config import BadInput
from leanseek.eval.likelihood import Asked, likelihoods
from leanseek.serve.engine import Request
from leanseek.serve.llm import LLM
from leanseek.serve.sampling import Sampling

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    raise BadInput("lm-evaluation-harness is not installed: pip install 'leanseek[eval]'") from None

MAX_TOKENS = 256  # of a reply, where a task does not say; as the harness has it
AT_ONCE = 512  # requests that wait in the engine together


class LeanSeekLM(TemplateLM):
    """`model`: a RUN, or what `leanseek.load` gives. Texts begin with BOS, as in training. Raises BadInput."""

    def __init__(self, model: LLM | Path | str, **options: Any) -> None:
        super().__init__()
        self.llm = model if isinstance(model, LLM) else LLM.load(model, **options)
        self.max_length = self.llm.config.max_position_embeddings
        self._known: dict[str, list[int]] = {}  # texts of the requests at hand, encoded

    @property
    def eot_token_id(self) -> int:
        return self.llm.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.llm.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return f"leanseek-{self.llm.tokenizer.fingerprint}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        ids = self._known.get(string) or self.llm.tokenizer.encode(string)
        return ids if add_special_tokens is False else [self.llm.tokenizer.bos_id, *ids]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.llm.tokenizer.render_chat(chat_history, add_generation_prompt)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As the harness has it, but each text is encoded once: the choices of a question share theirs."""
        self._known.clear()
        texts = {context.rstrip() for context, _ in (request.args for request in requests) if context}
        texts |= {context + continuation for context, continuation in (request.args for request in requests) if context}
        ordered = sorted(texts)
        self._known.update(zip(ordered, self.llm.tokenizer.encode_batch(ordered), strict=True))
        try:
            found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
            return found
        finally:
            self._known.clear()

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """ln p of each continuation, and whether greedy decoding would have written it."""
        asked = []
        for _texts, context, continuation in requests:
            # What does not fit is cut on the left, as the harness's own models cut it; a token must be left to see.
            kept = (*context, *continuation)[-(self.max_length + 1) :]
            begins = max(1, len(kept) - len(continuation))
            asked.append(Asked(kept[:begins], kept[begins:]))
        return [(one.logprob, one.greedy) for one in likelihoods(self.llm.model, asked)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """ln p of whole texts, in windows that do not overlap in what they predict."""
        windows, counts = [], []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            own = get_rolling_token_windows(
                token_list=ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            disjoint = [make_disjoint_window(window) for window in own]
            windows += [Asked(tuple(before), tuple(wanted)) for before, wanted in disjoint]
            counts.append(len(disjoint))
        found = iter(likelihoods(self.llm.model, windows))
        return [sum(next(found).logprob for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind each context up to one of the stop strings."""
        engine, replies = self.llm.engine, []
        for first in range(0, len(requests), AT_ONCE):
            under_way = []
            for request in requests[first : first + AT_ONCE]:
                context, options = request.args
                sampling = _sampling(options)
                room = max(1, self.max_length - (sampling.max_tokens or MAX_TOKENS))
                under_way.append(engine.submit(self.tok_encode(context)[-room:], sampling))
            try:
                while any(one.finish_reason is None for one in under_way):
                    engine.step()
            finally:
                for one in under_way:
                    engine.cancel(one)
            replies += [self._reply(one) for one in under_way]
        return replies

    def _reply(self, request: Request) -> str:
        """As the harness shows replies: special tokens left out, then cut before the first stop string."""
        special = set(self.llm.tokenizer.special.values())
        text = self.llm.tokenizer.decode(token for token in request.drawn if token not in special)
        return text[: min((text.find(stop) for stop in request.sampling.stop if stop in text), default=len(text))]


def _sampling(options: dict[str, Any]) -> Sampling:
    """The harness's options of a request, which are those of transformers."""
    until = options.get("until") or []
    stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
    tokens = next((options[name] for name in ("max_gen_toks", "max_new_tokens", "max_tokens") if name in options), None)
    temperature = float(options.get("temperature") or 0.0) if options.get("do_sample", True) else 0.0
    return Sampling(
        temperature=temperature,
        top_p=float(options.get("top_p") or 1.0),
        top_k=int(options.get("top_k") or 0),
        max_tokens=int(tokens) if tokens is not None else MAX_TOKENS,
        stop=stop,
    )
