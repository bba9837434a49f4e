"""A tokenizer from a Hugging Face directory: tokenizer.json, and what the other JSON files add.

tokenizer.json says how text is split and which tokens surround it; tokenizer_config.json and older files name tokens,
and may add some (`added_tokens`); generation_config.json and config.json say which of them begin and end a generation;
the chat template is chat_template.jinja or a string in tokenizer_config.json. Where they overlap, the tokens that
encoding really adds take precedence, then names, then ids.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from ruvllm.checkpoint.fields import Fields
from ruvllm.checkpoint.hf_files import MAX_CONFIG_BYTES, MAX_TOKENS_BYTES, listed_ends, read_if_there
from ruvllm.checkpoint.source import Source
from ruvllm.checkpoint.tokenizer.added_tokens import add_named_tokens, read_named_tokens
from ruvllm.checkpoint.tokenizer.gguf import all_ends, looks_like_control, splits_of
from ruvllm.checkpoint.tokenizer.keys import GENERATION_CONFIG_NEUTRAL, TOKENIZER_CONFIG_NEUTRAL, require_neutral
from ruvllm.checkpoint.tokenizer.vocabulary import Kind, Vocabulary, errors_of_the_library, ids_of_kind
from ruvllm.errors import ModelFormatError

logger = logging.getLogger(__name__)

MAX_TOKENIZER_BYTES = 1 << 27  # the largest published ones have 35 MB
MAX_TEMPLATE_BYTES = 1 << 20
MAX_TOKENS = 1 << 22
NAMED_TEMPLATES = "additional_chat_templates"  # transformers' directory of templates besides chat_template.jinja
_MAX_TEMPLATES = 64
MAX_GROWTH = 100  # of a text by the normalizer; SentencePiece's own steps reach 4
# The largest growth of a letter by the other steps of normalizers.
_GROWTH = {
    "NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "ByteLevel": 4, "Lowercase": 3, "Strip": 1, "StripAccents": 1, "Nmt": 1,
    "BertNormalizer": 36,
}  # fmt: skip

_MISTRAL_TOKENS = 100000  # a vocabulary that is larger may have been published with the wrong regular expression
_OTHER_TOKENIZERS = ("tokenizer.model", "vocab.json", "tekken.json")
_BYTE = re.compile("<0x[0-9A-F]{2}>")


def vocabulary_from_directory(directory: str | os.PathLike[str]) -> Vocabulary:
    """The tokenizer of a Hugging Face checkpoint. Raises: ModelFormatError naming the file and what is wrong in it."""
    root = Path(directory)
    path = root / "tokenizer.json"
    model = read_if_there(root / "config.json", MAX_CONFIG_BYTES)
    generation = read_if_there(root / "generation_config.json", MAX_CONFIG_BYTES)
    require_neutral(generation, GENERATION_CONFIG_NEUTRAL)
    if not os.path.lexists(path):
        return _without_tokenizer(root, listed_ends(model, generation)[0])
    config = read_if_there(root / "tokenizer_config.json", MAX_TOKENS_BYTES)
    require_neutral(config, TOKENIZER_CONFIG_NEUTRAL)
    engine = _engine(path)
    byte_level = _is_byte_level(path, engine)
    if config.get("fix_mistral_regex", bool) and engine.get_vocab_size() > _MISTRAL_TOKENS:
        _split_as_tekken(engine)
    space_prefix = "never" if byte_level else _space_prefix(engine)
    _check_space_prefix(config, engine, byte_level, space_prefix != "never")
    tokens = read_named_tokens(root, config)
    add_named_tokens(engine, tokens)
    names = {name: token.content for name, token in tokens.named.items()}
    _make_special(engine, {*names.values(), *(config.get("chat_control_tokens", list) or [])})
    pieces = _pieces(path, engine)
    kinds = _kinds(engine, pieces, byte_level)
    if not byte_level:
        for token in ids_of_kind(kinds, Kind.USER_DEFINED):  # runs of spaces (Gemma), as GGUF spells them
            pieces[token] = str(pieces[token]).replace("▁", " ")
    prefix, suffix = _surroundings(path, engine, config, names)
    if max((*prefix, *suffix), default=0) >= len(pieces):
        found = f"the ids {[*prefix, *suffix]}"
        raise ModelFormatError(path, field="post_processor", found=found, expected=f"ids below {len(pieces)}")
    ends = _end_ids(listed_ends(model, generation)[0], engine, names, pieces, kinds)
    bos = _begin_id(generation, model, engine, names, prefix, len(pieces))
    for name, i in (("bos_token", bos), ("eos_token", ends[0] if ends else None)):
        if i is not None and pieces[i] is not None:
            names.setdefault(name, str(pieces[i]))
    if engine.model.unk_token is not None:
        names.setdefault("unk_token", engine.model.unk_token)
    return Vocabulary(
        engine=engine,
        pieces=pieces,
        kinds=bytes(kinds),
        byte_level=byte_level,
        space_prefix=space_prefix,
        prefix=prefix,
        suffix=suffix,
        bos_id=bos,
        eos_ids=ends,
        names=names,
        stop_strings=_stop_strings(generation),
        **_chat_templates(root, config),
    )


def _without_tokenizer(root: Path, ends: tuple[int, ...]) -> Vocabulary:
    """Only the ids that end a generation: enough to run on token ids."""
    other = next((name for name in _OTHER_TOKENIZERS if (root / name).exists()), None)
    made = (
        f" ({other} is there: transformers' `AutoTokenizer.from_pretrained(...).save_pretrained(...)` makes one of it)"
    )
    missing = f"{root}: no tokenizer.json{made if other else ''}: this model takes token ids, but no text"
    logger.warning(missing)
    return Vocabulary(None, [], b"", byte_level=True, eos_ids=ends, missing=missing)


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
    """Refuse a normalizer that could make a short text fill the memory."""
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
    """The steps of a normalizer, pre-tokenizer or decoder, sequences flattened."""
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


def _split_as_tekken(engine: Any) -> None:
    """Split text as Mistral's own tokenizer does, in place of the first expression of tokenizer.json."""
    from tokenizers import pre_tokenizers

    split = splits_of("tekken")[0]
    if isinstance(engine.pre_tokenizer, pre_tokenizers.Sequence):
        engine.pre_tokenizer[0] = split
    elif engine.pre_tokenizer is not None:
        engine.pre_tokenizer = pre_tokenizers.Sequence([split, engine.pre_tokenizer])


def _check_space_prefix(config: Fields, engine: Any, byte_level: bool, spelt: bool) -> None:
    """Refuse an `add_prefix_space` that contradicts tokenizer.json, if the configured class would follow it."""
    asked = config.values.get("add_prefix_space")
    family = "GPT2Tokenizer" if byte_level else "LlamaTokenizer"
    if not isinstance(asked, bool) or str(config.values.get("tokenizer_class")).removesuffix("Fast") != family:
        return
    if byte_level:
        spelt = any(part.get("add_prefix_space") for part in _parts(engine.pre_tokenizer))
    if asked != spelt:
        raise config.error("add_prefix_space", str(asked).lower(), f"{str(spelt).lower()}, as in tokenizer.json")


def _make_special(engine: Any, named: set[Any]) -> None:
    """Turn named tokens, and added ones that look like control tokens, into control tokens."""
    from tokenizers import AddedToken

    flags = ("single_word", "lstrip", "rstrip", "normalized")
    engine.add_special_tokens([
        AddedToken(token.content, special=True, **{name: getattr(token, name) for name in flags})
        for token in engine.get_added_tokens_decoder().values()
        if not token.special and (token.content in named or looks_like_control(token.content))
    ])  # fmt: skip


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
    """The ids that the post-processor puts before and after a text; without one, those of tokenizer_config.json."""
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


def _end_ids(
    listed: tuple[int, ...], engine: Any, names: dict[str, str], pieces: list[str | None], kinds: bytearray
) -> tuple[int, ...]:
    """The named end token, those that the files list, those known by spelling.

    llama.cpp adds the last for a GGUF file: a model should answer alike in both formats.
    """
    named = engine.token_to_id(names["eos_token"]) if "eos_token" in names else None
    ends = [] if named is None else [named]
    ends += [i for i in listed if i < len(pieces)]  # an embedding may have more rows than there are tokens
    return all_ends(ends, pieces, kinds)


def _begin_id(
    generation: Fields, model: Fields, engine: Any, names: dict[str, str], prefix: tuple[int, ...], count: int
) -> int | None:
    """The token that encoding puts before a text; else the named one; else that of generation_config.json, config.json.

    An id that no token has is no reason to refuse the model: then it has none.
    """
    if prefix:
        return prefix[0]
    named: int | None = engine.token_to_id(names["bos_token"]) if "bos_token" in names else None
    if named is not None:
        return named
    given = [keys.get("bos_token_id", int) for keys in (generation, model)]
    return next((i for i in given if i is not None and 0 <= i < count), None)


def _stop_strings(generation: Fields) -> tuple[str, ...]:
    value = generation.values.get("stop_strings")
    strings = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) and text for text in strings):
        raise generation.error("stop_strings", repr(value), "a string or a list of them")
    return tuple(strings)


def _chat_templates(root: Path, config: Fields) -> dict[str, Any]:
    """``chat_template`` and ``named_templates`` of a Vocabulary: from files of their own, else the configuration."""
    path, more = root / "chat_template.jinja", root / NAMED_TEMPLATES
    templates = {"default": _template_file(path)} if path.exists() else {}
    for file in sorted(more.glob("*.jinja"))[:_MAX_TEMPLATES]:
        templates[file.stem] = _template_file(file)
    value = config.values.get("chat_template")
    if not templates and (value is None or isinstance(value, str)):
        return {"chat_template": value}
    if not templates:
        entries = value if isinstance(value, list) and len(value) <= _MAX_TEMPLATES else []
        named: list[Any] = [(e.get("name"), e.get("template")) for e in entries if isinstance(e, dict)]
        if not named or not all(isinstance(text, str) for pair in named for text in pair):
            raise config.error("chat_template", type(value).__name__, "a template, or a list of named ones")
        templates = dict(named)
    return {"chat_template": templates.pop("default", None), "named_templates": templates}


def _template_file(path: Path) -> str:
    with Source(path, mmap=False) as source:
        if source.size > MAX_TEMPLATE_BYTES:
            expected = f"at most {MAX_TEMPLATE_BYTES} bytes"
            raise ModelFormatError(path, field="file size", found=f"{source.size} bytes", expected=expected)
        raw = source.read(0, source.size).tobytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelFormatError(path, field="encoding", found=error.reason, expected="UTF-8") from None
