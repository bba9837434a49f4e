"""Vocabularies of tests/data/tokenizers, and tokenizers made from them or trained on this suite's own strings."""

import io
import json
import random
from pathlib import Path
from types import SimpleNamespace

import sentencepiece

from ruvllm.checkpoint.tokenizer import Kind, load_tokenizer

DATA = Path(__file__).parents[1] / "data"
NAMES = ["gpt2", "llama3", "mistral_v1", "mistral_v3", "qwen2", "o200k"]


def read(name):
    """A file of tests/data/tokenizers."""
    return json.loads((DATA / "tokenizers" / f"{name}.json").read_text("utf-8"))


def metadata_of(name, **changes):
    """A vocabulary as GGUF metadata; ``changes`` are keys below ``tokenizer.ggml``, or whole ones with a dot."""
    return read(name)["metadata"] | {key if "." in key else f"tokenizer.ggml.{key}": v for key, v in changes.items()}


def from_metadata(metadata):
    """The tokenizer of a GGUF file with this metadata."""
    return load_tokenizer(SimpleNamespace(path="model.gguf", metadata=metadata))


STRINGS = read("strings")
TOKENIZERS = {name: from_metadata(metadata_of(name)) for name in NAMES}


def trained_sentencepiece(seed, **settings):
    """A SentencePiece processor trained on STRINGS."""
    rng = random.Random(seed)
    words = [word for text in STRINGS for word in text.split() if "\0" not in word]
    lines = [" ".join(rng.choices(words, k=8))[:200] + " " * rng.randrange(1, 9) + "def f(x):" for _ in range(1500)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=1500, byte_fallback=True,
        character_coverage=0.98, normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, split_by_whitespace=False, split_digits=True, minloglevel=2, **settings,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def kinds_of(sp):
    """The kind of each piece of a SentencePiece processor."""
    special = ((sp.is_unknown, Kind.UNKNOWN), (sp.is_control, Kind.CONTROL), (sp.is_byte, Kind.BYTE))
    return [next((kind for has, kind in special if has(i)), Kind.NORMAL) for i in range(sp.vocab_size())]
