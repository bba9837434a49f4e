"""The metadata of a GGUF file to write: copied from a GGUF file, or translated from a directory.

Keys and their meaning are llama.cpp's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ruvllm.checkpoint.families import BY_TYPE
from ruvllm.checkpoint.gguf_rope import YARN_TRUNCATE
from ruvllm.checkpoint.gguf_split import AnyGGUF
from ruvllm.checkpoint.gguf_writer import encoded
from ruvllm.checkpoint.loader import Checkpoint
from ruvllm.checkpoint.names import GGUF_LONG_FACTORS, GGUF_ROPE_FACTORS, GGUF_SHORT_FACTORS
from ruvllm.checkpoint.tokenizer import Vocabulary
from ruvllm.checkpoint.tokenizer.gguf import PRE_TOKENIZERS, vocabulary_from_metadata
from ruvllm.checkpoint.tokenizer.hf import vocabulary_from_directory
from ruvllm.checkpoint.tokenizer.keys import END_NAMES, NAMED, NFC, PREFIX
from ruvllm.checkpoint.tokenizer.rows import with_rows
from ruvllm.checkpoint.tokenizer_agreement import require_agreement
from ruvllm.errors import ModelFormatError
from ruvllm.model.config import ModelConfig, RopeConfig
from ruvllm.model.rope import frequencies
from ruvllm.model.rope_config import YARN, yarn_attention_factor

# Text that the pre-tokenizers known by name split differently: letters, digits, spaces, lines, scripts, marks.
_PROBE = (
    "Hello World's 12345 1 22 333 4444, it'S we'LL  two   spaces\n\n\nlines\r\n\ttabs ÅÄö señor naïveté Ελληνικά "
    "中文字符和標點。ひらがな カタカナ 한국어 👍🏽 (x+y)^2=a_b*c/d; foo_bar fooBar HTTPServer ...!!! ## $5.60 <|x|> ~`"
)
_USUAL = ("llama-bpe", "dbrx", "gpt-2", "qwen2")
_SPLITS = (*_USUAL, *sorted(set(PRE_TOKENIZERS.values()) - {*_USUAL}))
_FORM = "a GGUF file"
_NO_MERGE = -1e6  # below it, distinct scores of pieces that no merge makes


def metadata_of(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Key -> encoded value. Raises: ModelFormatError where GGUF cannot express something in a directory."""
    source = checkpoint.tokenizer_source
    if isinstance(source, AnyGGUF):
        return {key: source.metadata_bytes(key) for key in source.metadata}
    try:
        values = model_metadata(checkpoint.config)
    except ValueError as error:
        expected, _, found = str(error).partition(": found ")
        raise ModelFormatError(Path(source, "config.json"), field="model", found=found, expected=expected) from None
    values |= tokenizer_metadata(Path(source), checkpoint.config.vocab_size)
    return {key: encoded(value) for key, value in values.items()}


def model_metadata(config: ModelConfig) -> dict[str, Any]:
    """The keys of the model. Raises ValueError where a GGUF file of its family cannot express it."""
    family = BY_TYPE[config.model_type]
    values = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "vocab_size": config.vocab_size,
        **_rope(config),
        **family.gguf_values(config),
    }
    own = {f"{family.architecture}.{key}": value for key, value in values.items()}
    return {"general.architecture": family.architecture, "general.name": config.name or "model"} | own


def _rope(config: ModelConfig) -> dict[str, Any]:
    rope = config.rope
    dim = rope.rotary_dim or config.head_dim
    values: dict[str, Any] = {"rope.dimension_count": dim, "rope.freq_base": float(rope.theta)}
    if rope.scaling == "linear":
        return values | {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope.factor)}
    if rope.scaling == "dynamic":
        raise ValueError("rotary embedding that does not depend on the context's length: found dynamic NTK scaling")
    if rope.scaling not in (*YARN, "longrope"):
        return values
    values |= {
        "rope.scaling.type": "yarn" if rope.scaling in YARN else "longrope",
        "rope.scaling.original_context_length": rope.original_max_position,
        "rope.scaling.attn_factor": float(rope.attention_factor),
    }  # fmt: skip
    if rope.scaling in YARN:
        if (rope.high_freq_factor, rope.low_freq_factor) != (32, 1):
            found = f"{rope.high_freq_factor:g} and {rope.low_freq_factor:g}"
            raise ValueError(f"YaRN with beta_fast 32 and beta_slow 1: found {found}")
        if rope.scaling == "yarn_unrounded":
            values[YARN_TRUNCATE] = False
        values["rope.scaling.factor"] = float(rope.factor)
        values["rope.scaling.attn_factor"] = float(rope.attention_factor / yarn_attention_factor(rope.factor))
    return values


def rope_factors(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """The divisors (R/2,) of each pair's frequency that GGUF keeps as tensors, by the tensors' names."""
    config, source = checkpoint.config, checkpoint.tokenizer_source
    if isinstance(source, AnyGGUF):
        names = (GGUF_ROPE_FACTORS, GGUF_SHORT_FACTORS, GGUF_LONG_FACTORS)
        return {name: source.tensor(name).float32()[0] for name in names if name in source.tensors}
    rope = config.rope
    if rope.scaling == "longrope":
        pairs = ((GGUF_SHORT_FACTORS, rope.factors), (GGUF_LONG_FACTORS, rope.long_factors))
        return {name: np.array(factors, np.float32) for name, factors in pairs}
    if rope.scaling in (None, "linear", *YARN):
        return {}
    plain = RopeConfig(theta=rope.theta, rotary_dim=rope.rotary_dim)
    divisors = frequencies(plain, config.head_dim) / frequencies(rope, config.head_dim)
    return {GGUF_ROPE_FACTORS: divisors.astype(np.float32)}


def tokenizer_metadata(directory: Path, vocab_size: int) -> dict[str, Any]:
    """The keys ``tokenizer.*`` for a directory's tokenizer and an embedding of ``vocab_size`` rows.

    Raises: ModelFormatError where a file with these keys would not mean what the directory means.
    """
    vocabulary = with_rows(vocabulary_from_directory(directory), vocab_size, str(directory))
    if vocabulary.missing is not None:
        return {PREFIX + "model": "none"} | _end_keys(vocabulary)
    # The converter's name for rows of the embedding without a token.
    pieces = [f"[PAD{i}]" if piece is None else piece for i, piece in enumerate(vocabulary.pieces)]
    values: dict[str, Any] = {
        PREFIX + "model": "gpt2" if vocabulary.byte_level else "llama",
        PREFIX + "tokens": pieces,
        PREFIX + "token_type": [*vocabulary.kinds],
        PREFIX + "add_bos_token": vocabulary.bos_id is not None and vocabulary.bos_id in vocabulary.prefix,
        PREFIX + "add_eos_token": bool(vocabulary.suffix),
    }
    ids = {piece: i for i, piece in enumerate(pieces)}
    if vocabulary.bos_id is not None:
        values[PREFIX + "bos_token_id"] = vocabulary.bos_id
    for key, name in NAMED.items():
        if key not in ("bos", "eos") and vocabulary.names.get(name) in ids:
            values[f"{PREFIX}{key}_token_id"] = ids[vocabulary.names[name]]
    values |= _end_keys(vocabulary)
    if vocabulary.chat_template is not None:
        values["tokenizer.chat_template"] = vocabulary.chat_template
    if vocabulary.named_templates:
        values["tokenizer.chat_templates"] = list(vocabulary.named_templates)
        values |= {f"tokenizer.chat_template.{name}": text for name, text in vocabulary.named_templates.items()}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in _merges(vocabulary)]
    if vocabulary.byte_level:
        if type(vocabulary.engine.normalizer).__name__ == "NFC":
            values[NFC] = True
        return _with_pre_tokenizer(directory, vocabulary, values | {PREFIX + "merges": merges})
    values[PREFIX + "scores"] = _scores(pieces, merges)
    values[PREFIX + "add_space_prefix"] = vocabulary.space_prefix != "never"
    require_agreement(str(directory), vocabulary, vocabulary_from_metadata(str(directory), values), _FORM)
    return values


def _end_keys(vocabulary: Vocabulary) -> dict[str, Any]:
    ends = [int(token) for token in vocabulary.eos_ids]
    names = END_NAMES[:3]  # the others end texts of fill-in-the-middle
    values: dict[str, Any] = {f"{PREFIX}{name}_token_id": i for name, i in zip(names, ends, strict=False)}
    return values if len(ends) <= len(names) else {**values, PREFIX + "eos_token_ids": ends}


def _merges(vocabulary: Vocabulary) -> list[Any]:
    found: list[Any] = json.loads(vocabulary.engine.to_str())["model"]["merges"]
    return found


def _scores(pieces: list[str], merges: list[str]) -> list[float]:
    """SentencePiece joins the pair whose piece has the highest score: scores in the order of the merges."""
    order: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        order.setdefault(merge.replace(" ", "", 1), rank)
    return [-float(order[piece]) if piece in order else _NO_MERGE - i for i, piece in enumerate(pieces)]


def _with_pre_tokenizer(directory: Path, vocabulary: Vocabulary, values: dict[str, Any]) -> dict[str, Any]:
    """The values with llama.cpp's name of this tokenizer's way to split text: the first that gives the same ids.

    Names that split alike differ in whether a word that is a token is kept whole.
    """
    splitter = vocabulary.engine.pre_tokenizer
    disagreement: ModelFormatError | None = None
    for name in _SPLITS if splitter is not None else ():
        named = values | {PREFIX + "pre": name}
        copy = vocabulary_from_metadata(str(directory), named)
        if copy.engine.pre_tokenizer.pre_tokenize_str(_PROBE) != splitter.pre_tokenize_str(_PROBE):
            continue
        try:
            require_agreement(str(directory), vocabulary, copy, _FORM)
        except ModelFormatError as error:
            disagreement = disagreement or error
        else:
            return named
    raise disagreement or ModelFormatError(
        directory / "tokenizer.json",
        field="pre_tokenizer",
        found="a way to split text that GGUF has no name for",
        expected="that of " + ", ".join(_SPLITS),
    )
