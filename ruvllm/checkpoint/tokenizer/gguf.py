"""A tokenizer from GGUF metadata: `tokenizer.ggml.*` as an engine of the `tokenizers` library.

Model "gpt2" is byte-level BPE with its merges in the file and its pre-tokenizer given by name; model "llama" is
SentencePiece BPE, joined by the pieces' scores (`spm`). Source of the names, of how each of them splits,
and of the defaults: llama.cpp's `llama-vocab.cpp`. Where it approximates a model's own regular expression, the
model's own is used.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ruvllm.checkpoint.fields import Fields
from ruvllm.checkpoint.tokenizer.keys import END_NAMES, NAMED, NFC, PREFIX, check_gguf_keys
from ruvllm.checkpoint.tokenizer.spm import ScoredPieces, merges_from_scores
from ruvllm.checkpoint.tokenizer.vocabulary import Kind, Vocabulary, ids_of_kind
from ruvllm.errors import ModelFormatError

logger = logging.getLogger(__name__)

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CJK = "一-龥"
# DeepSeek's list of the letters that have two cases, by code points: their spellings look alike.
_LETTERS_OF_DEEPSEEK = (
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)

# Each name's regular expressions, applied one after the other: the next splits both matches and the text between
# them.
_SPLITS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_LLAMA3.replace("{1,3}", ""),),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"),
    "deepseek-llm": (
        r"[\r\n]",
        rf"\s?[{_LETTERS_OF_DEEPSEEK}]+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        f"[{_CJK}ࠀ-一가-퟿]+",
        r"\p{N}+",
    ),
    "poro-chat": (r" ?[^(\s|.,!?…。，、।۔،)]+",),
    "viking": (r" ?[^(\s|.,!?…。，、।۔،)]+", r"\p{N}"),
    "bailingmoe": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", f"[{_CJK}ࠀ-一가-퟿]+", r"\p{N}"),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        f"[{_CJK}぀-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
        r""" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
    ),
    "tekken": (_CASED % ("", "") + r"\p{N}" + _REST,),
    "gpt-4o": (_CASED % (_CONTRACTIONS + "?", _CONTRACTIONS + "?") + r"\p{N}{1,3}" + _REST,),
    "seed-coder": (_LLAMA3.replace("{1,3}", "").replace(r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}\r\n]+"),),
}

_SAME_AS = {
    "gpt-2": ("phi-2", "mpt", "olmo", "jais", "trillion", "gigachat", "a.x-4.0", "mellum", "granite-docling"),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "llama-bpe": (
        "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "dbrx", "smaug-bpe", "chatglm-bpe",
    ),
    "qwen2": ("deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez", "grok-2"),
    "deepseek-v3": ("hunyuan-dense",),
    "gpt-4o": ("llama4", "minimax-m2"),
    "poro-chat": ("bloom", "gpt3-finnish"),
    "bailingmoe": ("bailingmoe2", "llada-moe"),
}  # fmt: skip
PRE_TOKENIZERS = {name: name for name in _SPLITS} | {same: name for name, all_ in _SAME_AS.items() for same in all_}

# A word that is a token as a whole becomes that token, whatever the merges would give.
_WHOLE_WORDS = frozenset({"llama-bpe", "tekken"}) | (
    frozenset(_SAME_AS["llama-bpe"]) - {"dbrx", "smaug-bpe", "chatglm-bpe"}
)
_ADD_BOS = _WHOLE_WORDS

# Tokens that identify the vocabulary of a file from before April 2024, which does not name its pre-tokenizer.
_KNOWN_BY = {
    "llama-bpe": ("<|begin_of_text|>", "<|start_header_id|>"),
    "deepseek-coder": ("<｜begin▁of▁sentence｜>", "<｜fim▁hole｜>", "<|EOT|>"),
}

# Tokens that end a turn or a text, in files that name only one of them.
_END_OF_TURN = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "</s>",
    "<|eom_id|>", "<EOT>", "<|end_of_text|>", "<end_of_utterance>", "<｜end▁of▁sentence｜>",
})  # fmt: skip

# Gemma's vocabulary has the tags of HTML: there, as a user-defined token, it ends text that is struck out.
_END_OR_TAG = "</s>"

_NO_MODEL = ("none", "no_vocab")  # llama.cpp: a model of ids alone
_TEMPLATE = "tokenizer.chat_template"
_LLAMA_IDS = {"bos": (1, "<s>"), "eos": (2, "</s>"), "unknown": (0, "<unk>")}
_ANY_ID = 1 << 31  # the bound on ids if there is no vocabulary


def vocabulary_from_metadata(path: str, metadata: Mapping[str, Any]) -> Vocabulary:
    """The tokenizer that a GGUF file's metadata describes. Raises: ModelFormatError naming the key at fault."""
    keys = Fields(path, metadata)
    check_gguf_keys(keys)
    model = keys.require(PREFIX + "model", str)
    if model in _NO_MODEL:
        missing = f"{path}: {PREFIX}model is {model!r}: this model takes token ids, but no text"
        logger.warning(missing)
        given = _listed_ends(keys, {name: keys.get(f"{PREFIX}{name}_token_id", int) for name in END_NAMES})
        return Vocabulary(None, [], b"", byte_level=True, eos_ids=given, missing=missing)
    if model not in ("gpt2", "llama"):
        raise keys.error(PREFIX + "model", repr(model), "a tokenizer of kind 'gpt2' or 'llama'")
    pieces = keys.require(PREFIX + "tokens", list)
    ids = _ids_of(keys, pieces)
    kinds = _kinds(keys, len(pieces))
    _check_byte_pieces(keys, pieces, kinds)
    named = {name: _named_id(keys, name, pieces, model) for name in dict.fromkeys((*NAMED, *END_NAMES))}
    ends = _end_ids(keys, pieces, kinds, named)
    for i in (*ends, *ids_of_kind(kinds, Kind.USER_DEFINED)):
        if looks_like_control(pieces[i]) or (i in ends and pieces[i] == _END_OR_TAG):
            kinds[i] = Kind.CONTROL
    if model == "gpt2":
        engine, add_bos = _byte_level_engine(keys, ids)
    else:
        engine, add_bos = _sentencepiece_engine(keys, pieces, ids, kinds, named["unknown"]), True
    space = model == "llama" and keys.default(PREFIX + "add_space_prefix", bool, True)
    _add_special(engine, pieces, kinds, normalized_spaces=model == "llama" and not space)
    prefix = _surrounding(keys, "bos", add_bos, named["bos"])
    return Vocabulary(
        engine=engine,
        pieces=pieces,
        kinds=bytes(kinds),
        byte_level=model == "gpt2",
        space_prefix="each" if space else "never",
        prefix=prefix,
        suffix=_surrounding(keys, "eos", False, named["eos"]),
        bos_id=named["bos"],
        eos_ids=ends,
        names={NAMED[name]: pieces[i] for name, i in named.items() if i is not None and name in NAMED},
        chat_template=keys.get(_TEMPLATE, str),
        named_templates={
            key.removeprefix(f"{_TEMPLATE}."): keys.require(key, str)
            for key in metadata if key.startswith(f"{_TEMPLATE}.")
        },
    )  # fmt: skip


def looks_like_control(piece: str) -> bool:
    """Whether a token that its file calls user-defined should be a control token (many files err)."""
    spelt = piece in _END_OF_TURN and piece != _END_OR_TAG
    return spelt or (piece.startswith(("<|", "<｜")) and piece.endswith(("|>", "｜>")))


def _ids_of(keys: Fields, pieces: list[Any]) -> dict[str, int]:
    """Piece to id; pieces that are empty have no text and are left out."""
    key = PREFIX + "tokens"
    if set(map(type, pieces)) != {str}:
        raise keys.error(key, f"{len(pieces)} values", "an array of strings")
    ids = {piece: i for i, piece in enumerate(pieces)}
    if len(ids) != len(pieces) and len(ids) - ("" in ids) != len(pieces) - pieces.count(""):
        second = next(piece for i, piece in enumerate(pieces) if piece and ids[piece] != i)
        raise keys.error(key, f"{second!r} twice", "each token once")
    ids.pop("", None)
    return ids


def _numbers(keys: Fields, key: str, count: int | None = None) -> np.ndarray | None:
    values = keys.values.get(key)
    if values is None:
        return None
    try:
        array = np.asarray(values)
    except ValueError:  # a list of lists of different lengths
        array = np.empty(0, object)
    if array.ndim != 1 or array.dtype.kind not in "iuf":
        raise keys.error(key, type(values).__name__, "an array of numbers")
    if count is not None and len(array) != count:
        raise keys.error(key, f"{len(array)} values", f"{count}, one for each token")
    return array


def _kinds(keys: Fields, count: int) -> bytearray:
    types = _numbers(keys, PREFIX + "token_type", count)
    if types is None:
        return bytearray([Kind.NORMAL]) * count
    known = np.isin(types, [kind.value for kind in Kind])
    return bytearray(np.where(known, types, Kind.NORMAL).astype(np.uint8).tobytes())  # llama.cpp: others are undefined


def _named_id(keys: Fields, name: str, pieces: list[str], model: str) -> int | None:
    """The id that the file gives for one of the named tokens; LLaMA's own where a SentencePiece file gives none."""
    key = f"{PREFIX}{name}_token_id"
    found = keys.get(key, int)
    if found is not None and not 0 <= found < len(pieces):
        if name in ("bos", *END_NAMES):
            raise keys.error(key, found, f"a token id from 0 to {len(pieces) - 1}")
        logger.warning("%s: %s is %d, which is no token: it is left out", keys.path, key, found)
        found = None
    if found is None:
        default = _LLAMA_IDS.get(name) if model == "llama" else None
        return default[0] if default is not None and pieces[default[0] : default[0] + 1] == [default[1]] else None
    return found


def _end_ids(keys: Fields, pieces: list[str], kinds: bytearray, named: Mapping[str, int | None]) -> tuple[int, ...]:
    """The file's end token, its end-of-turn and end-of-message tokens, then others known by their spelling."""
    return all_ends(_listed_ends(keys, named, len(pieces)), pieces, kinds)


def _listed_ends(keys: Fields, named: Mapping[str, int | None], count: int = _ANY_ID) -> tuple[int, ...]:
    """The tokens that the file names as ends of a text, a turn or a message; ids below ``count``."""
    given = [i for name in END_NAMES if (i := named[name]) is not None]
    more = _numbers(keys, PREFIX + "eos_token_ids")  # Ollama's key for several
    for i in [] if more is None else more.tolist():
        if not isinstance(i, int) or not 0 <= i < count:
            raise keys.error(PREFIX + "eos_token_ids", i, f"token ids from 0 to {count - 1}")
        given.append(i)
    return tuple(dict.fromkeys(given))


def all_ends(listed: Iterable[int], pieces: Sequence[str | None], kinds: bytearray) -> tuple[int, ...]:
    """The tokens that are listed as ends, then control and user-defined ones that are known by their spelling.

    Without <|end|> where there are <|return|> and <|call|>: it only ends one message of several, whatever a file says.
    """
    spelt = [i for i in ids_of_kind(kinds, Kind.CONTROL, Kind.USER_DEFINED) if pieces[i] in _END_OF_TURN]
    spelt = [i for i in spelt if pieces[i] != _END_OR_TAG or kinds[i] == Kind.CONTROL]
    ends = dict.fromkeys([*listed, *spelt])
    harmony = {"<|return|>", "<|call|>"} <= {pieces[i] for i in ends}
    return tuple(i for i in ends if not (harmony and pieces[i] == "<|end|>"))


def _surrounding(keys: Fields, name: str, default: bool, token: int | None) -> tuple[int, ...]:
    key = f"{PREFIX}add_{name}_token"
    if not keys.default(key, bool, default):
        return ()
    if token is None:
        if key in keys:
            raise keys.error(f"{PREFIX}{name}_token_id", "no such key", f"an id, since {key} is true")
        return ()
    return (token,)


def _byte_level_engine(keys: Fields, ids: dict[str, int]) -> tuple[Any, bool]:
    """The engine of a "gpt2" vocabulary, and whether a BOS token goes before text unless the file says otherwise."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    pre = keys.require(PREFIX + "pre", str) if PREFIX + "pre" in keys else _known_pre_tokenizer(keys, ids)
    if pre not in PRE_TOKENIZERS:
        raise keys.error(PREFIX + "pre", repr(pre), f"one of {', '.join(sorted(_SPLITS))}")
    key = PREFIX + "merges"
    lines = keys.require(key, list)
    if not set(map(type, lines)) <= {str}:
        raise keys.error(key, "values that are not strings", "an array of strings")
    merges = [tuple(line.split(" ")) for line in lines]
    if not set(map(len, merges)) <= {2}:
        wrong = next(merge for merge in merges if len(merge) != 2)
        raise keys.error(key, repr(" ".join(wrong)), "two tokens and one space")
    try:
        model = models.BPE(vocab=ids, merges=merges, ignore_merges=pre in _WHOLE_WORDS)
    except Exception as error:  # the library raises nothing more specific for a token that is not in the vocabulary
        raise keys.error(key, error, "merges of tokens") from None
    engine = Tokenizer(model)
    splits = splits_of(PRE_TOKENIZERS[pre])
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    if keys.default(NFC, bool, False):
        engine.normalizer = normalizers.NFC()
    return engine, pre in _ADD_BOS


def splits_of(name: str) -> list[Any]:
    """The steps that cut text into words by the regular expressions of a name of ``PRE_TOKENIZERS``' values."""
    from tokenizers import Regex, pre_tokenizers

    return [pre_tokenizers.Split(Regex(regex), "isolated") for regex in _SPLITS[name]]


def _known_pre_tokenizer(keys: Fields, ids: dict[str, int]) -> str:
    """The pre-tokenizer of a file that names none: that of the vocabulary if it is known, else llama.cpp's default."""
    name = next((name for name, tokens in _KNOWN_BY.items() if all(token in ids for token in tokens)), None)
    why = "taken for a vocabulary of that kind" if name else "a vocabulary that is not known: text may be split wrongly"
    name = name or "default"
    logger.warning("%s: the key %spre is missing; split as %r, %s", keys.path, PREFIX, name, why)
    return name


def _sentencepiece_engine(
    keys: Fields, pieces: list[str], ids: dict[str, int], kinds: bytearray, unknown: int | None
) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    scores = _numbers(keys, PREFIX + "scores", len(pieces))
    if scores is None or not np.isfinite(scores).all():
        found = "no such key" if scores is None else "a score that is not finite"
        raise keys.error(PREFIX + "scores", found, "a finite number for each token")
    # As in SentencePiece: pieces cannot be merged into a control token.
    in_text = (Kind.NORMAL, Kind.UNUSED)
    scored = {p: s for p, s, kind in zip(pieces, scores.tolist(), kinds, strict=True) if kind in in_text and p}
    merges = merges_from_scores(str(keys.path), scored)
    engine = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=merges or [],
            ignore_merges=merges is None,
            byte_fallback=True,
            unk_token=None if unknown is None else pieces[unknown],
            fuse_unk=True,
        )
    )
    if merges is None:
        engine.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(ScoredPieces(scored, ids))
    spaces: list[Any] = [normalizers.Replace(" ", "▁")]
    if keys.default(PREFIX + "add_space_prefix", bool, True):
        spaces.insert(0, normalizers.Prepend("▁"))
    engine.normalizer = normalizers.Sequence(spaces)
    return engine


def _check_byte_pieces(keys: Fields, pieces: list[str], kinds: bytearray) -> None:
    names = {f"<0x{byte:02X}>" for byte in range(256)}
    wrong = next((pieces[i] for i in ids_of_kind(kinds, Kind.BYTE) if pieces[i] not in names), None)
    if wrong is not None:
        raise ModelFormatError(
            keys.path, field=PREFIX + "tokens", found=repr(wrong), expected="a byte as <0x00>..<0xFF>"
        )


def _add_special(engine: Any, pieces: list[str], kinds: bytearray, normalized_spaces: bool) -> None:
    """Let the engine cut control and user-defined tokens out of text.

    normalized_spaces: find user-defined runs of spaces where spaces are spelt "▁" already, as SentencePiece does
    (Gemma). Not where each part of a text gets a space prefix: it would interfere.
    """
    from tokenizers import AddedToken

    control = ids_of_kind(kinds, Kind.CONTROL, Kind.UNKNOWN)
    engine.add_special_tokens([AddedToken(pieces[i], normalized=False, special=True) for i in control if pieces[i]])
    own = [pieces[i] for i in ids_of_kind(kinds, Kind.USER_DEFINED) if pieces[i]]
    engine.add_tokens(
        [AddedToken(piece, normalized=normalized_spaces and " " in piece and piece.isspace()) for piece in own]
    )
