"""Byte-level BPE with V3's pre-tokenizer, special tokens and chat template (report §4.1).

Text that a user wrote can never become a special token: ordinary text goes through a tokenizer that has none, and chats
are split at the template's own tokens only.
"""

import codecs
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers

from leanseek.config import BadInput

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
THINK = ("<think>", "</think>")
FIM_HOLE, FIM_BEGIN, FIM_END = "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"
LAST_TOKENS = (
    *THINK,
    *(FIM_HOLE, FIM_BEGIN, FIM_END),
    *("<｜User｜>", "<｜Assistant｜>", "<|EOT|>"),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
    *("<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
    "<｜tool▁sep｜>",
)
SPLITS = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)
# Places where those three splits always separate: before a space that stands alone, and after a line break that a word
# follows. A long text is cut there and the parts encoded side by side, with the same ids as the whole.
WORD = re.compile(r"(?= \S)(?<=\S)")
SAFE_CUT = re.compile(rf"(?<=\n)(?=\w)|{WORD.pattern}")
PART = 1 << 16  # characters after which a long text is cut at the next such place

CHAT_TEMPLATE = r"""
{%- set state = namespace(system='', outputs=false) -%}
{%- for message in messages if message['role'] == 'system' -%}
  {%- set state.system = state.system + ('' if loop.first else '\n\n') + message['content'] -%}
{%- endfor -%}
{{- bos_token + state.system -}}
{%- for message in messages if message['role'] != 'system' -%}
  {%- if message['role'] == 'tool' -%}
    {{- '\n' if state.outputs else '<｜tool▁outputs▁begin｜>' -}}
    {{- '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' -}}
    {%- set state.outputs = true -%}
  {%- else -%}
    {%- if state.outputs -%}{{- '<｜tool▁outputs▁end｜>' -}}{%- endif -%}
    {%- if message['role'] == 'user' -%}
      {{- '<｜User｜>' + message['content'] -}}
    {%- else -%}
      {{- '' if state.outputs else '<｜Assistant｜>' -}}
      {{- message['content'] or '' -}}
      {%- for call in message['tool_calls'] or [] -%}
        {{- '<｜tool▁calls▁begin｜>' if loop.first else '\n' -}}
        {{- '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + call['function']['name'] + '\n```json\n' -}}
        {{- call['function']['arguments'] + '\n```<｜tool▁call▁end｜>' -}}
        {{- '<｜tool▁calls▁end｜>' if loop.last else '' -}}
      {%- endfor -%}
      {{- eos_token -}}
    {%- endif -%}
    {%- set state.outputs = false -%}
  {%- endif -%}
{%- endfor -%}
{%- if state.outputs -%}
  {{- '<｜tool▁outputs▁end｜>' -}}
{%- elif add_generation_prompt -%}
  {{- '<｜Assistant｜>' -}}
{%- endif -%}
""".strip()


class Tokenizer:
    """What a folder's `tokenizer.json`, `tokenizer_config.json` and chat template say, read as transformers reads them.

    Made by `train` or `load`; the constructor raises ValueError where the three do not fit together.
    """

    def __init__(self, json_text: str, config: dict[str, Any], chat_template: str) -> None:
        tree = json.loads(json_text)
        if (tree.get("decoder") or {}).get("type") != "ByteLevel":
            raise ValueError("not a byte-level tokenizer")
        self._json_text, self._config, self.chat_template = json_text, config, chat_template
        vocabulary = tokenizers.Tokenizer.from_str(json_text).get_vocab(with_added_tokens=True)
        # A tokenizer without added tokens encodes the text: whatever the text spells, no special token can come out.
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(tree | {"added_tokens": [], "post_processor": None}))
        self.splits = _split_patterns(tree)
        self.separates_words = self.splits == SPLITS  # text may be cut at `WORD`
        self.special: dict[str, int] = {token["content"]: token["id"] for token in tree["added_tokens"]}
        self.vocab_size = max(vocabulary.values()) + 1
        self.bos_id = self._named("bos_token")
        self.eos_id = self._named("eos_token")
        self.pad_id = self._named("pad_token") if config.get("pad_token") else self.eos_id
        self.fingerprint = hashlib.sha256(
            json.dumps(tree, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
        ).hexdigest()

        byte_of = {character: byte for byte, character in enumerate(_byte_characters())}
        self._bytes_of = [b""] * self.vocab_size  # ids nobody uses say nothing
        for token, number in vocabulary.items():
            known = token not in self.special and all(character in byte_of for character in token)
            self._bytes_of[number] = bytes(byte_of[character] for character in token) if known else token.encode()

    # ── making, reading, writing ──────────────────────────────────────────────────────────────────────────────────

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn a vocabulary of at most `vocab_size` ids, special tokens included; fewer when the texts hold no more.

        Pairs seen only once are never merged. Raises BadInput when there is no place for the bytes and special tokens.
        """
        smallest = 256 + 3 + len(LAST_TOKENS)
        if vocab_size < smallest:
            raise BadInput(f"vocabulary size {vocab_size} is too small: bytes and special tokens alone need {smallest}")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS]
            + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(LAST_TOKENS),
            min_frequency=2,
            special_tokens=[BOS, EOS, PAD],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator((part for text in texts for part in _parts(text)), trainer)
        backend.add_special_tokens(list(LAST_TOKENS))
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
        )
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
        }
        return cls(backend.to_str(), config, CHAT_TEMPLATE)

    @classmethod
    def load(cls, folder: Path | str) -> "Tokenizer":
        """Read a folder that `save` or a release of V3 wrote. Raises BadInput when it holds no usable tokenizer."""
        folder = Path(folder)
        json_file, config_file, template_file = (
            folder / name for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
        )
        for file in (json_file, config_file):
            if not file.is_file():
                raise BadInput(f"{folder}: not a tokenizer folder, {file.name} is missing")
        try:
            config = json.loads(config_file.read_text(encoding="utf-8"))
            template = config.get("chat_template", CHAT_TEMPLATE)
            if isinstance(template, list):  # several named templates
                template = {entry["name"]: entry["template"] for entry in template}["default"]
            if template_file.is_file():
                template = template_file.read_text(encoding="utf-8")
            return cls(json_file.read_text(encoding="utf-8"), config, template)
        except OSError:
            raise
        except Exception as error:  # tokenizers raises plain Exception for a file it cannot read
            raise BadInput(f"{folder}: not a usable tokenizer: {str(error).splitlines()[0]}") from None

    def save(self, folder: Path | str) -> None:
        """Write the folder that `load` and `transformers.AutoTokenizer` read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {key: value for key, value in self._config.items() if key != "chat_template"}
        (folder / "tokenizer.json").write_text(self._json_text, encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(
            json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")

    # ── text ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text: no BOS, never a special token. Raises BadInput for text that is not Unicode."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on all processors."""
        parts = [list(_parts(text)) if self.separates_words else [text] for text in texts]
        try:
            encodings = iter(
                self._plain.encode_batch_fast([part for some in parts for part in some], add_special_tokens=False)
            )
        except (UnicodeEncodeError, TypeError):  # which of the two depends on the version of tokenizers
            raise BadInput("text holds half of a surrogate pair: it cannot be written as UTF-8") from None
        return [[number for _ in some for number in next(encodings).ids] for some in parts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens spelt out; bytes that are no UTF-8 show as U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def decode_stream(self) -> "DecodeStream":
        """A decoder to feed one id at a time; its pieces join to what `decode` gives."""
        return DecodeStream(self)

    def token_bytes(self, number: int) -> bytes:
        """The bytes one id stands for; none for an id of the padded embedding that no token has."""
        return self._bytes_of[number] if 0 <= number < self.vocab_size else b""

    # ── chats ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def encode_chat(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """Ids of a chat through the chat template, BOS included.

        What the messages say never becomes a special token, save <think> and </think> in an assistant's content.
        Raises BadInput for messages the template cannot render.
        """
        rendered, mark = self._render(messages, add_generation_prompt)
        pieces = self._at_special.split(rendered)  # text, special, text, …, text
        texts = iter(self.encode_batch([piece.replace(mark, "") for piece in pieces[::2]]))
        ids = next(texts)
        for special, text in zip(pieces[1::2], texts, strict=True):
            ids = [*ids, self.special[special], *text]
        return ids

    def encode_chat_turns(
        self, chats: Sequence[list[dict[str, Any]]], known: Sequence[int] | None = None
    ) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """`encode_chat` of many chats up to the last answer of each, and the answers' places in it: (first, after).

        An answer is what an assistant's message adds to the generation prompt before it, the EOS that ends it included.
        The first `known` ones of a chat are part of what is asked, and not told.
        Raises BadInput as `encode_chat` does, and for a template that does more than append when a message is added.
        """
        divided: list[list[list[str]]] = []  # of each chat: what no answer is, an answer, … each as text, special, text
        joints: list[tuple[str, str, str]] = []  # where text meets text between two of them: left, right, both
        texts: list[str] = []
        for messages, old in zip(chats, known or [0] * len(chats), strict=True):
            safe, mark = self._protected(messages)
            whole, cuts = "", [0]
            for i in [i for i, message in enumerate(safe) if message["role"] == "assistant"][old:]:
                # Some templates leave thoughts out of what was said: those to be learnt they must not see as such.
                answer = {**safe[i], "content": veil(safe[i].get("content"), mark)}
                before = self._rendered(safe[:i], True)
                after = unveil(self._rendered([*safe[:i], answer], False), mark)
                if not (before.startswith(whole) and after.startswith(before)):
                    raise BadInput(
                        f"chat: the template rewrites what stands before message {i + 1} when that is added: "
                        "an answer to be learnt may only be appended"
                    )
                whole, cuts = after, [*cuts, len(before), len(after)]
            parts = [self._at_special.split(whole[first:after]) for first, after in itertools.pairwise(cuts)]
            for left, right in itertools.pairwise(parts):
                if left[-1] and right[0]:
                    if len(self._at_special.split(left[-1] + right[0])) > 1:
                        raise BadInput("chat: the template begins an answer inside a special token")
                    both = left[-1] + right[0]
                    joints.append((left[-1].replace(mark, ""), right[0].replace(mark, ""), both.replace(mark, "")))
            for part in parts:
                part[::2] = [text.replace(mark, "") for text in part[::2]]
                texts.extend(text for text in part[::2] if text)
            divided.append(parts)

        ends = iter(self.encode_batch([text for joint in joints for text in joint]))
        if any(left + right != both for left, right, both in zip(ends, ends, ends, strict=True)):
            raise BadInput("chat: the template begins or ends an answer where tokens join: put a special token there")
        encoded, results = iter(self.encode_batch(texts)), []
        for parts in divided:
            ids: list[int] = []
            borders = [0]
            for part in parts:
                for i, piece in enumerate(part):
                    if i % 2:
                        ids.append(self.special[piece])
                    elif piece:
                        ids.extend(next(encoded))
                borders.append(len(ids))
            results.append((ids, list(zip(borders[1::2], borders[2::2], strict=True))))
        return results

    def render_chat(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """The chat as the template writes it, for people to read; `encode_chat` is what a model is given."""
        rendered, mark = self._render(messages, add_generation_prompt)
        return rendered.replace(mark, "")

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> tuple[str, str]:
        """The rendered chat with `mark` wherever user text could begin or end a special token."""
        safe, mark = self._protected(messages)
        return self._rendered(safe, add_generation_prompt), mark

    def _protected(self, messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
        """The messages with `mark` wherever their text could begin or end a special token."""
        check_messages(messages)
        everything = json.dumps(messages, ensure_ascii=False, default=str) + self.chat_template
        mark = next((point for point in _noncharacters() if point not in everything), None)
        if mark is None:
            raise BadInput("chat: the messages use every noncharacter of Unicode, no mark is left to protect them")
        firsts, lasts = self._edges
        apart = {c: mark * (c in lasts) + chr(c) + mark * (c in firsts) for c in firsts | lasts}

        def protect(value: Any, allowed: tuple[str, ...] = ()) -> Any:
            # Also one content after another may not spell a token together, so every first and last letter of a
            # special token is set apart and not only whole tokens.
            if isinstance(value, str):
                words = re.split("(" + "|".join(map(re.escape, allowed)) + ")", value) if allowed else [value]
                return "".join(word if word in allowed else word.translate(apart) for word in words)
            if isinstance(value, list):
                return [protect(item) for item in value]
            if isinstance(value, dict):
                return {key: protect(item) for key, item in value.items()}
            return value

        def of_message(message: dict[str, Any]) -> dict[str, Any]:
            allowed = THINK if message["role"] == "assistant" else ()
            return {
                key: value if key == "role" else protect(value, allowed if key == "content" else ())
                for key, value in message.items()
            }

        return [of_message(message) for message in messages], mark

    def _rendered(self, safe: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=safe,
                add_generation_prompt=add_generation_prompt,
                **{
                    name: self._text(name) for name in ("bos_token", "eos_token", "pad_token") if self._config.get(name)
                },
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise BadInput(f"chat: the template refuses these messages: {error}") from None

    @cached_property
    def _template(self) -> jinja2.Template:
        environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = _refuse
        return environment.from_string(self.chat_template)

    @cached_property
    def _edges(self) -> tuple[set[int], set[int]]:
        """The characters that special tokens begin and end with."""
        return {ord(token[0]) for token in self.special}, {ord(token[-1]) for token in self.special}

    @cached_property
    def _at_special(self) -> re.Pattern[str]:
        return re.compile("(" + "|".join(map(re.escape, sorted(self.special, key=len, reverse=True))) + ")")

    def _text(self, name: str) -> str:
        token = self._config[name]
        return token["content"] if isinstance(token, dict) else token

    def _named(self, name: str) -> int:
        if not self._config.get(name) or self._text(name) not in self.special:
            raise ValueError(f"{name} is missing")
        return self.special[self._text(name)]


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which asks of every attribute whether it is a safe one: half the time of rendering a short chat.

    For Jinja's own loops and namespaces, which templates use most, all that it asks comes down to the underscore.
    """

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if type(obj) in (jinja2.runtime.LoopContext, jinja2.utils.Namespace):
            return not attr.startswith("_")
        return super().is_safe_attribute(obj, attr, value)


class DecodeStream:
    """Bytes of ids as they come, held back until they end a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, number: int) -> str:
        """The text that one more id completes, possibly none."""
        return self._decoder.decode(self._tokenizer.token_bytes(number))

    def finish(self) -> str:
        """What is left over: U+FFFD where a character was never completed."""
        return self._decoder.decode(b"", final=True)


def without_thoughts(said: str) -> str:
    """What was said, as whoever is asked again sees it (R1's template): behind </think>, where there is one."""
    return said.rpartition(THINK[1])[2].lstrip("\n") if THINK[1] in said else said


def veil(text: str | None, mark: str) -> str | None:
    """<think> and </think> written so that a template does not know them; nothing that anybody says looks like it."""
    for token in THINK if text else ():
        text = text.replace(token, f"{token[0]}{3 * mark}{token[1:]}")  # type: ignore[union-attr]
    return text


def unveil(text: str, mark: str) -> str:
    """Undoes `veil` in what a template made of it."""
    for token in THINK:
        text = text.replace(f"{token[0]}{3 * mark}{token[1:]}", token)
    return text


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def _parts(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > 2 * PART and (cut := SAFE_CUT.search(text, start + PART)):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _split_patterns(tree: dict[str, Any]) -> tuple[str, ...]:
    steps = (tree.get("pre_tokenizer") or {}).get("pretokenizers", [])
    patterns = tuple(
        step["pattern"].get("Regex", "").replace("\r", r"\r").replace("\n", r"\n")
        for step in steps
        if step["type"] == "Split"
    )
    plain = all(step.get("behavior") == "Isolated" for step in steps if step["type"] == "Split")
    normalised = (tree.get("normalizer") or {}).get("normalizers", tree.get("normalizer"))
    return patterns if plain and not normalised else ()


def _byte_characters() -> list[str]:
    """Byte-level BPE writes byte b as character [b]: itself where it shows, else the next one from U+0100 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) if byte in shown else chr(0x100 + hidden.index(byte)) for byte in range(256)]


def _noncharacters() -> Iterator[str]:
    yield from map(chr, range(0xFDD0, 0xFDF0))
    yield from (chr(plane << 16 | last) for plane in range(17) for last in (0xFFFE, 0xFFFF))


def check_messages(messages: list[dict[str, Any]]) -> None:
    """Raises BadInput unless every message has a role that is known and something to say."""
    if not isinstance(messages, list) or not messages:
        raise BadInput("chat: messages must be a list with at least one message")
    for i, message in enumerate(messages):
        where = f"chat: message {i + 1}"
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant", "tool"):
            raise BadInput(f"{where}: needs a role: system, user, assistant or tool")
        calls = message.get("tool_calls")
        if calls is not None and (message["role"] != "assistant" or not isinstance(calls, list)):
            raise BadInput(f"{where}: tool_calls is a list, and the assistant's only")
        for call in calls or []:
            function = call.get("function") if isinstance(call, dict) else None
            if not isinstance(function, dict) or not all(
                isinstance(function.get(key), str) for key in ("name", "arguments")
            ):
                raise BadInput(f"{where}: a tool call needs function.name and function.arguments, both strings")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and calls):
            raise BadInput(f"{where}: content must be a string")


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
