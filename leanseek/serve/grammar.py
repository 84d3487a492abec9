"""Output that parses: JSON, JSON of a schema, any grammar, by closing the tokens that could not go on (llguidance)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leanseek.config import BadInput
from leanseek.data.tokenizer import Tokenizer

# Between the parts of JSON: enough to indent with, and no room for a model to go on with blanks for ever.
SPACE = r"[ \n]{0,24}"


@dataclass(frozen=True)
class Grammar:
    """A compiled grammar; each text that follows it has a `matcher` of its own."""

    source: str
    vocabulary: Any  # llguidance.LLTokenizer

    def matcher(self) -> "Matcher":
        return Matcher(self)


class Grammars:
    """Compiles grammars for one tokenizer. Raises BadInput where llguidance is not installed."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        try:
            import llguidance
        except ImportError:
            raise BadInput(
                "output by a grammar (JSON mode, schemas, tool calls) needs: pip install 'leanseek[grammar]'"
            ) from None
        self.compiler = llguidance.LLMatcher
        self.vocabulary = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Vocabulary(tokenizer)), eos_token=tokenizer.eos_id
        )

    def json_object(self) -> Grammar:
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: dict[str, Any]) -> Grammar:
        """Raises BadInput for what is no schema, and for a schema that nothing can satisfy."""
        if not isinstance(schema, dict):
            raise BadInput("a JSON schema is an object")
        try:
            source = self.compiler.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_pattern": SPACE})
        except ValueError as error:
            raise BadInput(f"schema: {_first_line(error)}") from None
        return self._checked("schema", source)

    def lark(self, text: str) -> Grammar:
        """A grammar in llguidance's dialect of Lark, where <[7]> is the token with id 7. Raises BadInput."""
        return self._checked("grammar", self.compiler.grammar_from_lark(text))

    def _checked(self, what: str, source: str) -> Grammar:
        fault = self.compiler.validate_grammar(source, self.vocabulary)
        if fault and not fault.startswith("WARNING"):
            raise BadInput(f"{what}: {_first_line(fault)}")
        grammar = Grammar(source, self.vocabulary)
        if not grammar.matcher().open_tokens().any():
            raise BadInput(f"{what}: no text can satisfy it")
        return grammar


class Matcher:
    """Where one text stands in its grammar."""

    def __init__(self, grammar: Grammar) -> None:
        import llguidance

        self.matcher = llguidance.LLMatcher(grammar.vocabulary, grammar.source, log_level=0)
        self.size = grammar.vocabulary.vocab_size

    def open_tokens(self) -> Tensor:
        """Which tokens may come next, bool [V of the tokenizer]; the end of the text among them once it parses."""
        bits = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        return torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self.size].astype(bool))

    def push(self, token: int) -> None:
        self.matcher.consume_token(token)

    @property
    def complete(self) -> bool:
        """Whether nothing but the end can follow."""
        return bool(self.matcher.is_stopped())


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.encode = tokenizer.encode
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special.values())

    def __call__(self, text: str) -> Sequence[int]:
        return self.encode(text)


def _first_line(error: object) -> str:
    return str(error).strip().splitlines()[0]
