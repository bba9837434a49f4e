"""Tiny random checkpoints of each architecture, with the logits that transformers computes: tests/data/architectures.

A file there has no weights: they follow from each tensor's name, here (see tests/data/make_architectures.py).
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

DATA = Path(__file__).parents[1] / "data" / "architectures"
VARIANTS = tuple(sorted(path.stem for path in DATA.glob("*.npz")))

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Checkpoint:
    """The file of one variant."""

    config: dict[str, Any]  # config.json as files on the Hub have it
    new_config: dict[str, Any]  # the same as transformers 5 writes it
    generation_config: dict[str, Any] | None
    shapes: dict[str, tuple[int, ...]]  # of the tensors, by the names of files on the Hub
    salt: int  # seeds the weights, so that no token's choice of experts is a near tie
    ids: NDArray[np.int64]  # (T,)
    logits: Array  # (T, V)

    def tensors(self) -> dict[str, NDArray[Any]]:
        """All weights, as files hold them: float32, or the bytes of MXFP4."""
        text = self.config.get("text_config", self.config)
        around_zero = text["model_type"].startswith("gemma")  # whose norms multiply by 1 + weight
        return {name: _tensor(name, shape, self.salt, around_zero) for name, shape in self.shapes.items()}


@cache
def read(variant: str) -> Checkpoint:
    """A variant's file."""
    with np.load(DATA / f"{variant}.npz") as file:
        about = json.loads(str(file["about"]))
        shapes = {name: tuple(shape) for name, shape in about.pop("shapes").items()}
        return Checkpoint(shapes=shapes, ids=file["ids"], logits=file["logits"], **about)


def write_checkpoint(directory: Path, checkpoint: Checkpoint, new: bool = False) -> Path:
    """A Hugging Face directory of it, with the names of the Hub; ``new``: config.json as transformers 5 writes it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(checkpoint.new_config if new else checkpoint.config, indent=2))
    if checkpoint.generation_config is not None:
        (directory / "generation_config.json").write_text(json.dumps(checkpoint.generation_config))
    save_file(checkpoint.tensors(), directory / "model.safetensors", {"format": "pt"})
    return directory


def _tensor(name: str, shape: tuple[int, ...], salt: int, around_zero: bool) -> NDArray[Any]:
    """The weights of one tensor: wide, so that attention is peaked and logits are far from flat."""
    if name.endswith(("_blocks", "_scales")):  # MXFP4: two elements to a byte, and a power of 2 for each 32
        raw = _raw(f"{salt}/{name}", int(np.prod(shape))).reshape(shape)
        return (raw if name.endswith("_blocks") else 122 + raw % 3).astype(np.uint8)
    noise = _noise(f"{salt}/{name}", shape)
    if name.endswith("norm.weight"):
        return np.float32(0 if around_zero else 1) + np.float32(0.3) * noise
    if name.endswith(("bias", "sinks")):
        return np.float32(0.4) * noise
    if "embed_tokens" in name:
        return np.float32(0.35) * noise
    gain = 1.5
    inputs = shape[-1]
    if name.endswith(("experts.gate_up_proj", "experts.down_proj")):  # GPT-OSS: rows are inputs
        inputs = shape[-2]
        gain = 3.0 if "gate_up" in name else 1.0  # the activation's clamp must be reached
    return np.float32(gain / np.sqrt(inputs)) * noise


def _noise(key: str, shape: tuple[int, ...]) -> Array:
    """Nearly normal numbers of variance 1, each the sum of four uniform ones: the same bits on any machine.

    NumPy guarantees the raw stream of a bit generator, but not the normal numbers made from it.
    """
    sums = _raw(key, int(np.prod(shape))).view("<u2").reshape(-1, 4).astype(np.int64).sum(1)
    return ((sums - 2 * 65535) * np.sqrt(3 / 4) / 32768).astype(np.float32).reshape(shape)


def _raw(key: str, count: int) -> NDArray[np.uint64]:
    return np.random.PCG64(zlib.crc32(key.encode())).random_raw(count).astype("<u8")
