"""A tokenizer from a Hugging Face directory: tokenizer.json as it stands, and what the JSON files beside it add.

tokenizer.json says how text is split and which tokens go round it; tokenizer_config.json (or special_tokens_map.json)
names the special tokens; generation_config.json and config.json say which of them end a generation; the chat template
is chat_template.jinja or a string in tokenizer_config.json.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from ruvllm.checkpoint._tokenizer_gguf import looks_like_control
from ruvllm.checkpoint.fields import Fields
from ruvllm.checkpoint.source import Source
from ruvllm.checkpoint.strict_json import read_json_object
from ruvllm.checkpoint.tokenizer import Kind, Vocabulary, errors_of_the_library
from ruvllm.errors import ModelFormatError

MAX_TOKENIZER_BYTES = 1 << 27  # the largest published ones have 35 MB
MAX_JSON_BYTES = 1 << 24  # tokenizer_config.json lists all added tokens
MAX_TEMPLATE_BYTES = 1 << 20
MAX_TOKENS = 1 << 22
MAX_GROWTH = 100  # of a text by the normalizer; SentencePiece's own steps come to 4
# What the other steps of normalizers may make of a letter, at the most.
_GROWTH = {
    "NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "ByteLevel": 4, "Lowercase": 3, "Strip": 1, "StripAccents": 1, "Nmt": 1,
    "BertNormalizer": 36,
}  # fmt: skip

_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
_BYTE = re.compile("<0x[0-9A-F]{2}>")


def vocabulary_from_directory(directory: str | os.PathLike[str]) -> Vocabulary:
    """The tokenizer of a Hugging Face checkpoint. Raises: ModelFormatError naming the file and what is wrong in it."""
    root = Path(directory)
    path = root / "tokenizer.json"
    engine = _engine(path)
    byte_level = _is_byte_level(path, engine)
    names = _named_tokens(root)
    _make_special(engine, names)
    pieces = _pieces(path, engine)
    kinds = _kinds(engine, pieces, byte_level)
    config = _read_if_there(root / "tokenizer_config.json")
    bos = engine.token_to_id(names["bos_token"]) if "bos_token" in names else None
    prefix, suffix = _surroundings(path, engine, config, names)
    if max((*prefix, *suffix), default=0) >= len(pieces):
        found = f"the ids {[*prefix, *suffix]}"
        raise ModelFormatError(path, field="post_processor", found=found, expected=f"ids below {len(pieces)}")
    return Vocabulary(
        engine=engine,
        pieces=pieces,
        kinds=bytes(kinds),
        byte_level=byte_level,
        space_prefix="never" if byte_level else _space_prefix(engine),
        prefix=prefix,
        suffix=suffix,
        bos_id=bos,
        eos_ids=_end_ids(root, engine, names, len(pieces)),
        names=names,
        chat_template=_chat_template(root, config),
    )


def _engine(path: Path) -> Any:
    from tokenizers import Tokenizer

    if not path.is_file():
        raise ModelFormatError(
            path.parent, field="tokenizer.json", found="no such file", expected="the tokenizer in this form"
        )
    with Source(path, mmap=False) as source:
        if source.size > MAX_TOKENIZER_BYTES:
            expected = f"at most {MAX_TOKENIZER_BYTES} bytes"
            raise ModelFormatError(path, field="file size", found=f"{source.size} bytes", expected=expected)
        raw = source.read(0, source.size).tobytes()
    with errors_of_the_library(path):
        engine = Tokenizer.from_buffer(raw)
    model = type(engine.model).__name__
    if model != "BPE" or engine.model.dropout:
        found = model if model != "BPE" else f"BPE with dropout {engine.model.dropout}"
        raise ModelFormatError(path, field="model", found=found, expected="BPE without dropout")
    _check_growth(path, engine)
    engine.no_truncation()
    engine.no_padding()
    return engine


def _check_growth(path: Path, engine: Any) -> None:
    """Refuse a normalizer by which a short text could become one that fills the memory."""
    growth = 1
    for part in _parts(engine.normalizer):
        kind = part["type"]
        if kind == "Replace":
            growth *= 1 + len(part["content"])  # a pattern may match between all letters
        elif kind == "Prepend":
            growth *= 1 + len(part["prepend"])
        elif kind in _GROWTH:
            growth *= _GROWTH[kind]
        else:
            raise ModelFormatError(path, field="normalizer", found=kind, expected=f"one of {', '.join(_GROWTH)}")
    if growth > MAX_GROWTH:
        found, expected = f"steps that may make a text {growth} times as long", f"at most {MAX_GROWTH} times"
        raise ModelFormatError(path, field="normalizer", found=found, expected=expected)


def _parts(component: Any) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, sequences taken apart."""
    todo = [] if component is None else [json.loads(component.__getstate__())]
    while todo:
        part = todo.pop(0)
        nested = next((part[key] for key in ("normalizers", "pretokenizers", "decoders") if key in part), None)
        if nested is None:
            yield part
        else:
            todo = nested + todo


def _is_byte_level(path: Path, engine: Any) -> bool:
    """Whether pieces are spelt in GPT-2's letters (else: as SentencePiece does). Other spellings are refused."""
    kinds = [part["type"] for part in _parts(engine.decoder)]
    if "ByteLevel" in kinds:
        return True
    if kinds in (["Metaspace"], ["Replace", "ByteFallback", "Fuse"], ["Replace", "ByteFallback", "Fuse", "Strip"]):
        return False
    raise ModelFormatError(path, field="decoder", found=kinds or "none", expected="ByteLevel or SentencePiece's steps")


def _space_prefix(engine: Any) -> Literal["never", "first", "each"]:
    if any(part["type"] == "Prepend" for part in _parts(engine.normalizer)):
        return "each"
    schemes = [part["prepend_scheme"] for part in _parts(engine.pre_tokenizer) if part["type"] == "Metaspace"]
    return {"always": "each", "first": "first"}.get(schemes[0], "never") if schemes else "never"  # type: ignore[return-value]


def _named_tokens(root: Path) -> dict[str, str]:
    """Spelling of bos_token, eos_token, ...: each a string, or an object whose `content` it is."""
    names: dict[str, str] = {}
    for path in (root / "special_tokens_map.json", root / "tokenizer_config.json"):
        keys = _read_if_there(path)
        for name in _NAMES:
            value = keys.values.get(name)
            spelling = value.get("content") if isinstance(value, dict) else value
            if spelling is None:
                continue
            if not isinstance(spelling, str):
                raise keys.error(name, repr(value), "a string")
            names[name] = spelling
    return names


def _make_special(engine: Any, names: dict[str, str]) -> None:
    """Make control tokens of named tokens, and of added ones that look like it, where the file does not say so."""
    from tokenizers import AddedToken

    for token in engine.get_added_tokens_decoder().values():
        if not token.special and (token.content in names.values() or looks_like_control(token.content)):
            how = {"lstrip": token.lstrip, "rstrip": token.rstrip, "normalized": token.normalized}
            engine.add_special_tokens([AddedToken(token.content, special=True, **how)])


def _pieces(path: Path, engine: Any) -> list[str | None]:
    vocabulary: dict[str, int] = engine.get_vocab(with_added_tokens=True)
    count = max(vocabulary.values(), default=-1) + 1
    if not 0 < count <= MAX_TOKENS:
        raise ModelFormatError(path, field="vocabulary", found=f"ids below {count}", expected=f"1 to {MAX_TOKENS} ids")
    pieces: list[str | None] = [None] * count
    for piece, i in vocabulary.items():
        pieces[i] = piece
    return pieces


def _kinds(engine: Any, pieces: list[str | None], byte_level: bool) -> bytearray:
    kinds = bytearray([Kind.NORMAL]) * len(pieces)
    if not byte_level and engine.model.byte_fallback:
        for i, piece in enumerate(pieces):
            if piece is not None and len(piece) == 6 and _BYTE.fullmatch(piece):
                kinds[i] = Kind.BYTE
    for i, token in engine.get_added_tokens_decoder().items():
        kinds[i] = Kind.CONTROL if token.special else Kind.USER_DEFINED
    return kinds


def _surroundings(
    path: Path, engine: Any, config: Fields, names: dict[str, str]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the post-processor puts before and behind a text; without one, what tokenizer_config.json says."""
    if engine.post_processor is not None:
        with errors_of_the_library(path):
            probe = engine.encode("a", add_special_tokens=True)
        text = [n for n, special in enumerate(probe.special_tokens_mask) if not special]
        first, last = (text[0], text[-1]) if text else (len(probe.ids), len(probe.ids))
        return tuple(probe.ids[:first]), tuple(probe.ids[last + 1 :])

    def wanted(name: str) -> tuple[int, ...]:
        token = engine.token_to_id(names[name]) if name in names else None
        return (token,) if token is not None and config.get(f"add_{name}", bool) else ()

    return wanted("bos_token"), wanted("eos_token")


def _end_ids(root: Path, engine: Any, names: dict[str, str], count: int) -> tuple[int, ...]:
    """The named end token, then those that generation_config.json (or else config.json) ends a generation with."""
    named = engine.token_to_id(names["eos_token"]) if "eos_token" in names else None
    ends = [] if named is None else [named]
    for file in ("generation_config.json", "config.json"):
        keys = _read_if_there(root / file)
        value = keys.values.get("eos_token_id")
        if value is None:
            continue
        for i in value if isinstance(value, list) else [value]:
            if not isinstance(i, int) or isinstance(i, bool) or i < 0:
                raise keys.error("eos_token_id", repr(value), "a token id or a list of them")
            if i < count:  # an embedding may have more rows than there are tokens
                ends.append(i)
        break
    return tuple(dict.fromkeys(ends))


def _chat_template(root: Path, config: Fields) -> str | None:
    path = root / "chat_template.jinja"
    if path.exists():
        with Source(path, mmap=False) as source:
            if source.size > MAX_TEMPLATE_BYTES:
                expected = f"at most {MAX_TEMPLATE_BYTES} bytes"
                raise ModelFormatError(path, field="file size", found=f"{source.size} bytes", expected=expected)
            raw = source.read(0, source.size).tobytes()
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelFormatError(path, field="encoding", found=error.reason, expected="UTF-8") from None
    value = config.values.get("chat_template")
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        for entry in value:
            if isinstance(entry, dict) and entry.get("name") == "default" and isinstance(entry.get("template"), str):
                return str(entry["template"])
    raise config.error("chat_template", type(value).__name__, "a template, or a list of named ones with a 'default'")


def _read_if_there(path: Path) -> Fields:
    return Fields(path, read_json_object(path, MAX_JSON_BYTES) if path.exists() else {})
