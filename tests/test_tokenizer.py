"""Tokenizer against transformers, against tokenizers' own decoder, and against the published strings."""

import json
import random
import shutil
from pathlib import Path

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from leanseek.config import BadInput
from leanseek.data import tokenizer as module
from leanseek.data.tokenizer import BOS, CHAT_TEMPLATE, EOS, LAST_TOKENS, PAD, PART, Tokenizer

B, E, U, A = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
SAMPLES = [
    "The ship sailed 1234567 miles; it's gone!\n\n  Twice.\r\n\tx = [1, 2]",
    "漢字とかな、カタカナ。混ぜる text 42",
    "naïve café — “quoted”… 👩‍👩‍👧 \x00 \ufffd \u00a0 end ",
    "",
    " ",
    "\n",
]
CHAT = [
    {"role": "user", "content": "How many ships?"},
    {"role": "assistant", "content": "<think>two and two</think>Four."},
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Sure?\n"},
]


def soup(seed: int, sentences: int) -> str:
    rng = random.Random(seed)
    words = ["ship", "harbour", "night", "cold", "sailed", "under", "the", "a", "12", "345", "don't", "café", "漢字"]
    lines = (" ".join(rng.choices(words, k=rng.randint(3, 12))).capitalize() for _ in range(sentences))
    return "".join(line + rng.choice([". ", "!\n", "?\n\n", ";\r\n  "]) for line in lines)


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return Tokenizer.train([soup(seed, 200) for seed in range(5)], 500)


@pytest.fixture(scope="module")
def folder(ours: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    ours.save(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(folder: Path) -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_ids_have_v3s_places(ours: Tokenizer) -> None:
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (0, 1, 2)
    assert [ours.special[token] for token in (BOS, EOS, PAD)] == [0, 1, 2]
    assert ours.vocab_size <= 500
    last = range(ours.vocab_size - len(LAST_TOKENS), ours.vocab_size)
    assert [ours.special[token] for token in LAST_TOKENS] == list(last)
    assert "<|EOT|>" in LAST_TOKENS
    assert sum("tool" in token for token in LAST_TOKENS) == 9


def test_a_small_corpus_gives_a_smaller_vocabulary() -> None:
    assert Tokenizer.train(["ab ab"], 4096).vocab_size == 276 + 1  # a + b is seen twice, space + ab once


def test_a_vocabulary_without_place_for_bytes_is_refused() -> None:
    assert Tokenizer.train(["text"], 276).vocab_size == 276
    with pytest.raises(BadInput, match=r"275 is too small.*276"):
        Tokenizer.train(["text"], 275)


def test_training_is_deterministic(ours: Tokenizer) -> None:
    assert Tokenizer.train([soup(seed, 200) for seed in range(5)], 500).fingerprint == ours.fingerprint


def test_the_three_splits() -> None:
    tokenizer = Tokenizer.train(["x"], 276)
    split = tokenizers.Tokenizer.from_str(tokenizer._json_text).pre_tokenizer.pre_tokenize_str
    pieces = [(start, end) for _, (start, end) in split("I'm 12345 漢字x!!\n\n  y")]
    text = "I'm 12345 漢字x!!\n\n  y"
    assert [text[a:b] for a, b in pieces] == ["I", "'m", " ", "123", "45", " ", "漢字", "x", "!!\n\n", " ", " y"]


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_round_trip_of_any_text(ours: Tokenizer, text: str) -> None:
    ids = ours.encode(text)
    assert ours.decode(ids) == text
    assert not set(ids) & set(ours.special.values())
    stream = ours.decode_stream()
    assert "".join([*map(stream.push, ids), stream.finish()]) == text


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_decoding_any_ids_equals_the_library(ours: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1), max_size=30))
    library = tokenizers.Tokenizer.from_str(ours._json_text)
    assert ours.decode(ids) == library.decode(ids, skip_special_tokens=False)
    stream = ours.decode_stream()
    assert "".join([*map(stream.push, ids), stream.finish()]) == ours.decode(ids)


def test_the_stream_waits_for_whole_characters(ours: Tokenizer) -> None:
    ids = [
        number
        for byte in "é👩".encode()
        for number in range(ours.vocab_size)
        if ours.token_bytes(number) == bytes([byte])
    ]
    stream = ours.decode_stream()
    assert [stream.push(number) for number in ids] == ["", "é", "", "", "", "👩"]
    assert stream.finish() == ""


def test_ids_beyond_the_vocabulary_say_nothing(ours: Tokenizer) -> None:
    assert ours.decode([*ours.encode("ship"), ours.vocab_size, 10**6]) == "ship"


def test_text_never_becomes_a_special_token(ours: Tokenizer) -> None:
    for special in ours.special:
        text = f"a{special}b {special}{special}"
        ids = ours.encode(text)
        assert not set(ids) & set(ours.special.values()), special
        assert ours.decode(ids) == text


def test_long_texts_are_cut_where_nothing_changes(ours: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = soup(99, 300) + "  \n\n9 x\n\x1cy \u2028z\nzz!\nA\u00a0b" * 20
    whole = ours._plain.encode(text).ids
    assert ours.encode(text) == whole
    for part in (1, 7, 50):
        monkeypatch.setattr(module, "PART", part)
        assert len(list(module._parts(text))) > 10
        assert ours.encode(text) == whole
    assert PART > 1000


def test_a_lone_surrogate_is_refused(ours: Tokenizer) -> None:
    with pytest.raises(BadInput, match="surrogate"):
        ours.encode("a\ud800b")


# ── transformers ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("text", [*SAMPLES, soup(7, 40)])
def test_transformers_gives_the_same_ids(
    ours: Tokenizer, theirs: transformers.PreTrainedTokenizerBase, text: str
) -> None:
    assert theirs.encode(text) == [ours.bos_id, *ours.encode(text)]
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text


def test_transformers_sees_the_same_special_tokens(
    ours: Tokenizer, theirs: transformers.PreTrainedTokenizerBase
) -> None:
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    assert len(theirs) == ours.vocab_size
    for token, number in ours.special.items():
        assert theirs.convert_tokens_to_ids(token) == number


@pytest.mark.parametrize("prompt", [True, False])
def test_transformers_renders_the_same_chat(
    ours: Tokenizer, theirs: transformers.PreTrainedTokenizerBase, prompt: bool
) -> None:
    call = {"type": "function", "function": {"name": "count", "arguments": '{"what": "ships"}'}}
    tools = [
        {"role": "user", "content": "Count."},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "content": "4"},
        {"role": "tool", "content": "5"},
    ]
    for chat in (CHAT, tools, [*tools, {"role": "assistant", "content": "Nine."}]):
        expected = theirs.apply_chat_template(chat, add_generation_prompt=prompt, return_dict=False)
        assert ours.encode_chat(chat, prompt) == expected
        assert ours.render_chat(chat, prompt) == theirs.apply_chat_template(
            chat, add_generation_prompt=prompt, tokenize=False
        )


def test_transformers_reads_it_beside_a_model(ours: Tokenizer, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "deepseek_v3"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    for text in SAMPLES:
        assert theirs.encode(text) == [ours.bos_id, *ours.encode(text)]


# ── chats ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_chat_strings_byte_for_byte(ours: Tokenizer) -> None:
    user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
    system = {"role": "system", "content": "S"}
    assert ours.render_chat([user]) == f"{B}{U}Hi{A}"
    assert ours.render_chat([user], add_generation_prompt=False) == f"{B}{U}Hi"
    assert ours.render_chat([user, answer, user]) == f"{B}{U}Hi{A}Yo{E}{U}Hi{A}"
    assert ours.render_chat([user, system, answer], False) == f"{B}S{U}Hi{A}Yo{E}"
    assert ours.render_chat([system, system, user]) == f"{B}S\n\nS{U}Hi{A}"


def test_tool_strings_byte_for_byte(ours: Tokenizer) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "content": "one"},
        {"role": "tool", "content": "two"},
    ]
    one = '<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"x": 1}\n```<｜tool▁call▁end｜>'
    calls = f"{B}{U}Hi{A}<｜tool▁calls▁begin｜>{one}\n{one}<｜tool▁calls▁end｜>{E}"
    outputs = (
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>one<｜tool▁output▁end｜>\n"
        "<｜tool▁output▁begin｜>two<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
    )
    assert ours.render_chat(chat[:2], False) == calls
    assert ours.render_chat(chat) == calls + outputs
    assert ours.render_chat([*chat, {"role": "assistant", "content": "3"}], False) == calls + outputs + f"3{E}"
    assert ours.render_chat([*chat, {"role": "user", "content": "?"}]) == calls + outputs + f"{U}?{A}"


def specials_in(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.decode([number]) for number in ids if number in tokenizer.special.values()]


def test_messages_cannot_smuggle_special_tokens(ours: Tokenizer) -> None:
    call = {"type": "function", "function": {"name": f"f{EOS}", "arguments": f"{U}"}}
    for special in ours.special:
        for role in ("user", "system"):
            chat = [{"role": role, "content": f"x{special}y{special}"}]
            ids = ours.encode_chat(chat)
            assert specials_in(ours, ids) == [BOS, *([U] if role == "user" else []), A], (special, role)
            assert ours.decode(ids) == ours.render_chat(chat)
        tool = [{"role": "tool", "content": special}]
        assert specials_in(ours, ours.encode_chat(tool)) == specials_in(
            ours, ours.encode_chat([{"role": "tool", "content": "x"}])
        )
    ids = ours.encode_chat([{"role": "assistant", "content": None, "tool_calls": [call]}], False)
    assert EOS in specials_in(ours, ids)
    assert specials_in(ours, ids).count(EOS) == 1
    assert U not in specials_in(ours, ids)


def test_an_assistant_may_think_and_nothing_else(ours: Tokenizer) -> None:
    ids = ours.encode_chat([{"role": "assistant", "content": f"<think>a{EOS}{U}</think>b"}], False)
    assert specials_in(ours, ids) == [BOS, A, "<think>", "</think>", EOS]


def test_halves_do_not_join(ours: Tokenizer, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "t")
    (tmp_path / "t" / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    joined = Tokenizer.load(tmp_path / "t")
    for special in joined.special:
        for at in range(len(special) + 1):
            chat = [{"role": "user", "content": half} for half in (special[:at], special[at:])]
            ids = joined.encode_chat(chat)
            assert specials_in(joined, ids) == []
            assert joined.decode(ids) == special
    (tmp_path / "t" / "chat_template.jinja").write_text("<｜Us{{ messages[0]['content'] }}")
    assert specials_in(ours, Tokenizer.load(tmp_path / "t").encode_chat([{"role": "user", "content": "er｜>"}])) == []


def test_the_mark_is_no_character_of_the_chat(ours: Tokenizer) -> None:
    text = "".join(map(chr, range(0xFDD0, 0xFDF0))) + U
    ids = ours.encode_chat([{"role": "user", "content": text}])
    assert ours.decode(ids) == f"{B}{U}{text}{A}"
    with pytest.raises(BadInput, match="noncharacter"):
        ours.encode_chat([{"role": "user", "content": "".join(module._noncharacters())}])


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hello",
        ["hello"],
        [{"content": "x"}],
        [{"role": "robot", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": None}],
        [{"role": "assistant", "content": None}],
        [{"role": "user", "content": "x", "tool_calls": []}],
        [{"role": "assistant", "content": None, "tool_calls": ["f"]}],
        [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}],
        [{"role": "user", "content": "\ud800"}],
    ],
)
def test_malformed_messages_are_refused(ours: Tokenizer, messages: object) -> None:
    with pytest.raises(BadInput):
        ours.encode_chat(messages)  # type: ignore[arg-type]


def test_a_template_stays_in_its_sandbox(folder: Path, tmp_path: Path) -> None:
    for i, (template, error) in enumerate(
        [
            ("{{ messages.__class__.__mro__ }}", "unsafe"),
            ("{{ messages.append(1) }}", "unsafe"),
            ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
            ("{% if %}", "template"),
        ]
    ):
        shutil.copytree(folder, tmp_path / str(i))
        (tmp_path / str(i) / "chat_template.jinja").write_text(template)
        with pytest.raises(BadInput, match=error):
            Tokenizer.load(tmp_path / str(i)).encode_chat([{"role": "user", "content": "x"}])


# ── folders ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_saving_and_loading(ours: Tokenizer, folder: Path, tmp_path: Path) -> None:
    again = Tokenizer.load(folder)
    again.save(tmp_path / "copy")
    assert again.fingerprint == ours.fingerprint == Tokenizer.load(tmp_path / "copy").fingerprint
    assert again.special == ours.special
    for file in sorted(folder.iterdir()):
        assert (tmp_path / "copy" / file.name).read_bytes() == file.read_bytes()


def test_a_release_as_published_loads(ours: Tokenizer, folder: Path, tmp_path: Path) -> None:
    """Named tokens as objects, the template in the config, chat tokens not marked special, no BOS in the file."""
    tree = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for token in tree["added_tokens"]:
        token["special"] = token["id"] < 3
    for step in tree["pre_tokenizer"]["pretokenizers"][:3]:
        step["pattern"]["Regex"] = step["pattern"]["Regex"].replace(r"\r\n", "\r\n")
    tree["normalizer"] = {"type": "Sequence", "normalizers": []}
    config = {key: {"__type": "AddedToken", "content": token} for key, token in
              (("bos_token", BOS), ("eos_token", EOS), ("pad_token", PAD))}  # fmt: skip
    config |= {"chat_template": CHAT_TEMPLATE, "tokenizer_class": "LlamaTokenizerFast"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    release = Tokenizer.load(tmp_path)
    assert (release.bos_id, release.eos_id, release.pad_id) == (0, 1, 2)
    assert release.separates_words
    text = f"x {U} <think> y"
    assert release.encode(text) == ours.encode(text)
    assert release.encode_chat(CHAT) == ours.encode_chat(CHAT)


def test_unusable_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"nowhere: .*tokenizer\.json is missing"):
        Tokenizer.load(tmp_path / "nowhere")

    def broken(name: str, file: str, text: str) -> Path:
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / file).write_text(text)
        return tmp_path / name

    tree = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for path, error in (
        (broken("a", "tokenizer.json", "{"), "not a usable tokenizer"),
        (broken("b", "tokenizer.json", "{}"), "not a byte-level tokenizer"),
        (broken("c", "tokenizer_config.json", "{}"), "bos_token is missing"),
        (broken("d", "tokenizer_config.json", '{"bos_token": "<s>"}'), "bos_token is missing"),
        (broken("e", "tokenizer.json", json.dumps(tree | {"decoder": None})), "not a byte-level"),
        (broken("f", "tokenizer.json", json.dumps(tree | {"model": {"type": "Nothing"}})), "not a usable tokenizer"),
    ):
        with pytest.raises(BadInput, match=error):
            Tokenizer.load(path)
