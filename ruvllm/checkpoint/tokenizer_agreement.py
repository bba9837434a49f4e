"""Whether two tokenizers agree: on hard texts, control tokens, chats and the text of every token.

GGUF cannot express parts of a tokenizer.json (normalizers, white space that control tokens strip, some rules for
leading spaces), and some tokenizers differ from their description in ways that no list of keys foresees. So a GGUF
tokenizer written for a directory is read again and compared with the directory's own.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

from ruvllm.checkpoint.chat import Message, encode_chat
from ruvllm.checkpoint.tokenizer import Tokenizer, Vocabulary
from ruvllm.errors import ModelFormatError, printable

HARD_TEXTS = (
    "", " ", "  ", "   a", "a   ", " a b  c   d", "\n", "\n\n a\n", "\t\ta\r\nb", "a b", "hello world", "Hello World's",
    "HELLO HTTPServer camelCase snake_case", "it's IT'S we'LL you'Re o'clock", "1 22 333 4444 55555 3.14 1e-10 ½ ² ٣",
    "café cafe\u0301 ÅÄÖ A\u030a ﬁ ﬀ Ⅻ ① ｆｕｌｌ", "İstanbul ß ſ ǅ Ωω", "señor naïveté Ελληνικά русский",
    "中文字符和標點。ひらがな カタカナ 한국어 ไทย हिन्दी", "العربية עברית",
    "👍🏽 👩‍👩‍👧 🏳️‍🌈 𝒜 𠀀", "a\u00a0b\u2003c\u3000d\u200be\ufeff",
    "(x+y)^2=a_b*c/d; [i]{j} <k> ...!!! ?! ## $5.60 ~`|@\\", "=" * 17 + "-" * 9, " " * 5 + "def f(x):" + " " * 16 + "#",
    "aaaaaaaaaaaaaaaaaaab", "▁a▁▁b ▁", "<0x0A> <0xE4>", "Ġa Ċ", "\x00\x07\x7f\x85\u2028", "[PAD1] <unk> </s> <|x|>",
)  # fmt: skip
_CHATS: tuple[tuple[Message, ...], ...] = (
    ({"role": "user", "content": "Hi there"},),
    ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "  two  spaces \n\nand é"}),
    (
        {"role": "user", "content": "1 + 1 = ?"}, {"role": "assistant", "content": "2"},
        {"role": "user", "content": "\n Sure?  "},
    ),
)  # fmt: skip
_CONTROLS, _JOINS = 300, 200


def require_agreement(path: str, original: Vocabulary, copy: Vocabulary, form: str) -> None:
    """Raise ModelFormatError where ``copy`` does not mean what ``original``, the tokenizer of ``path``, means.

    form: of the copy, for the message.
    """
    for what, mine, its in _differences(Tokenizer(original, path), Tokenizer(copy, path)):
        found = f"{what} means another thing in {form}{_suspects(original.engine)}: {mine} is {its} there"
        raise ModelFormatError(path, field="tokenizer", found=found, expected=f"what {form} can express")


def _differences(original: Tokenizer, copy: Tokenizer) -> Iterator[tuple[str, Any, Any]]:
    """The differences of the two, with both results; the most telling first."""
    for text in _texts(original):
        for how in ({"parse_special": True}, {"parse_special": False, "add_special": False}):
            mine, its = original.encode(text, **how), copy.encode(text, **how)
            if mine != its:
                yield f"the text {printable(repr(text), 60)}", *_apart(mine, its)
    for messages in _CHATS if original.chat_template is not None else ():
        for cue in (False, True):
            chats = [_chat(tokenizer, messages, cue) for tokenizer in (original, copy)]
            if chats[0] != chats[1]:
                yield f"a chat of {len(messages)} messages", *_apart(*chats)
    for name in ("bos_id", "add_bos", "vocab_size", "stop_strings", "chat_template", "named_templates"):
        mine, its = getattr(original, name), getattr(copy, name)
        if mine != its:
            yield name, mine, its
    for name in ("eos_ids", "special_ids"):
        here, there = set(getattr(original, name)), set(getattr(copy, name))
        if here != there:
            yield name, sorted(here - there) or "none", sorted(there - here) or "none"
    for i in range(original.vocab_size):
        if original.token_bytes(i) != copy.token_bytes(i):
            yield f"the token {i}", original.token_bytes(i), copy.token_bytes(i)
        text = original.decode([i])  # no merge may make it: some tokenizers take such words as a whole
        mine, its = (tokenizer.encode(text, parse_special=False, add_special=False) for tokenizer in (original, copy))
        if mine != its:
            yield f"the text {printable(repr(text), 60)}", *_apart(mine, its)


def _apart(mine: list[int] | str, its: list[int] | str) -> tuple[Any, Any]:
    """The parts of two lists of ids from their first difference on, as much as fits a message."""
    if isinstance(mine, str) or isinstance(its, str):
        return mine, its
    at = next((n for n, (a, b) in enumerate(zip(mine, its, strict=False)) if a != b), min(len(mine), len(its)))
    return mine[at : at + 4], its[at : at + 4]


def _texts(tokenizer: Tokenizer) -> Iterator[str]:
    """Hard texts; the vocabulary's own pieces joined at random; control tokens amid text and white space."""
    yield from HARD_TEXTS
    draw = random.Random(0)
    for _ in range(_JOINS):
        yield tokenizer.decode(draw.choices(range(tokenizer.vocab_size), k=8))
    for i in sorted(tokenizer.special_ids)[:_CONTROLS]:
        control = tokenizer.id_to_piece(i)
        yield from (f"a{control}b", f"a {control} b", f"a\n{control}\n b{control}{control}")


def _chat(tokenizer: Tokenizer, messages: tuple[Message, ...], cue: bool) -> list[int] | str:
    try:
        return encode_chat(tokenizer, messages, add_generation_prompt=cue)
    except ValueError:  # some templates refuse a system message
        return "refused"


def _suspects(engine: Any) -> str:
    """Parts of a tokenizer.json that another format may be unable to express."""
    description = json.loads(engine.to_str())
    parts = description["normalizer"] or {"normalizers": []}
    named = [step["type"] for step in parts.get("normalizers", [parts]) if step["type"] not in ("Prepend", "Replace")]
    flags = ["lstrip", "rstrip", "single_word"] + ["normalized"] * (description["normalizer"] is not None)
    named += [
        f"{flag} of {token['content']}" for token in description["added_tokens"] for flag in flags if token[flag]
    ][:3]
    scheme = (description["pre_tokenizer"] or {}).get("prepend_scheme", "never")
    if scheme != "never":
        named.append(f"Metaspace with prepend_scheme {scheme}")
    return f" (it has {printable(', '.join(named), 120)})" if named else ""
