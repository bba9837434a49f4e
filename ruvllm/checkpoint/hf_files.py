"""The small JSON files of a Hugging Face directory: their keys, and the end tokens, which either of two may hold."""

from __future__ import annotations

from pathlib import Path

from ruvllm.checkpoint.fields import Fields
from ruvllm.checkpoint.strict_json import read_json_object

MAX_CONFIG_BYTES = 1 << 20
MAX_TOKENS_BYTES = 1 << 24  # tokenizer_config.json lists all added tokens


def read_if_there(path: Path, max_bytes: int) -> Fields:
    """The keys of a JSON file; none if there is no such file. Raises: ModelFormatError."""
    return Fields(path, read_json_object(path, max_bytes) if path.exists() else {})


def listed_ends(config: Fields, generation: Fields) -> tuple[tuple[int, ...], Fields]:
    """The ids that end a generation, and the file that lists them: generation_config.json, or else config.json.

    Either holds an id or a list of them. Raises: ModelFormatError.
    """
    keys = config if generation.values.get("eos_token_id") is None else generation
    value = keys.values.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise keys.error("eos_token_id", repr(value), "a token id or a list of them")
    return tuple(dict.fromkeys(ids)), keys
