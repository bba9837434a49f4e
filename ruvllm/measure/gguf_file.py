"""GGUF files with random weights, for llama.cpp to run. Their vocabulary is made up, so their output is meaningless."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ruvllm.checkpoint.families import BY_TYPE
from ruvllm.checkpoint.gguf_metadata import model_metadata
from ruvllm.checkpoint.gguf_writer import Described, encoded, pad, write_header
from ruvllm.checkpoint.storage import BLOCKS
from ruvllm.checkpoint.tokenizer import Kind
from ruvllm.checkpoint.tokenizer.keys import PREFIX
from ruvllm.model.config import ModelConfig

_FILE_TYPES = {"F32": 0, "Q4_0": 2}  # of matrices: llama.cpp's number for the whole file (llama_ftype)
_PRIVATE_USE = 0xF0000  # the first of 65 534 private-use characters of Unicode


def vocabulary(size: int) -> list[str]:
    """A SentencePiece vocabulary of that size: control tokens, all bytes, a space, then private use."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    return pieces + [chr(_PRIVATE_USE + i) for i in range(len(pieces), size)]


def write(path: Path, config: ModelConfig, dtype: str, stored: Callable[[str, tuple[int, ...]], np.ndarray]) -> None:
    """Write a file whose matrices are "Q4_0" or "F32", and whose vectors are float32.

    stored(name, shape): the rows of a tensor as the file holds them, by canonical name; called in the file's order.

    Raises:
        ValueError: a matrix's columns are not a multiple of 32.
    """
    places = BY_TYPE[config.model_type].gguf_places(config)
    tensors = {}
    for name, shape in config.tensor_shapes().items():
        if len(shape) == 2 and shape[1] % BLOCKS["Q4_0"][0]:
            raise ValueError(f"{places[name].name}: expected a multiple of 32 columns, found {shape[1]}")
        tensors[name] = Described(places[name].name, shape, dtype if len(shape) == 2 else "F32")
    values = model_metadata(config) | _tokenizer(config.vocab_size)
    values |= {"general.name": f"{config.name} shape, random weights", "general.file_type": _FILE_TYPES[dtype]}
    with open(path, "wb") as file:
        write_header(file, {key: encoded(value) for key, value in values.items()}, tensors.values())
        for name, tensor in tensors.items():
            file.write(np.ascontiguousarray(stored(name, tensor.shape)).data)
            pad(file)


def _tokenizer(size: int) -> dict[str, Any]:
    pieces = vocabulary(size)
    kinds = [Kind.UNKNOWN] + 2 * [Kind.CONTROL] + 256 * [Kind.BYTE]
    values = {
        "model": "llama", "tokens": pieces, "scores": [-float(i) for i in range(size)],
        "token_type": kinds + (size - len(kinds)) * [Kind.NORMAL], "bos_token_id": 1, "eos_token_id": 2,
        "add_bos_token": True,
    }  # fmt: skip
    return {PREFIX + key: value for key, value in values.items()}
