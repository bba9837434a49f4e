"""The tiny checkpoints of tests/data/tiny (see make_tiny.py there), and the same weights as GGUF files."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tests.model import tiny_gguf

DATA = Path(__file__).parents[1] / "data" / "tiny"
CASES = (
    "attention_bias", "bf16_sharded_tied", "linear_rope", "llama2_mha", "llama3_scaled_gqa", "mistral_window",
    "mlp_bias_f16",
)  # fmt: skip
DTYPE = {"bf16_sharded_tied": "BF16", "mlp_bias_f16": "F16"}  # what the matrices are stored in; else F32

_NUMPY = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


def directory(case: str) -> Path:
    """The Hugging Face directory of a case."""
    return DATA / case


def golden(case: str) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """ids (T,) and the logits (T, V) that transformers computes from them in float32."""
    with np.load(DATA / case / "logits.npz") as file:
        return file["ids"], file["logits"]


def weights(case: str) -> dict[str, NDArray[np.float32]]:
    """All tensors by Hugging Face name as float32, read without the code under test."""
    tensors = {}
    for path in sorted((DATA / case).glob("*.safetensors")):
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8:start]).items():
            if name != "__metadata__":
                begin, end = (start + offset for offset in entry["data_offsets"])
                array = np.frombuffer(raw[begin:end], _NUMPY[entry["dtype"]]).reshape(entry["shape"])
                tensors[name] = array.astype(np.float32)
    return tensors


def write_gguf(case: str, path: Path, dtype: str = "F32") -> Path:
    """Write a case as llama.cpp's converter would; ``dtype``: see ``tiny_gguf.write``."""
    config = json.loads((DATA / case / "config.json").read_text())
    return tiny_gguf.write(path, config, weights(case), dtype, name=case)
