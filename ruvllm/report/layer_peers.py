"""The peers of a transformer layer, on the same weights: PyTorch for float32, llama.cpp for files made for it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ruvllm.checkpoint.encode import encode_rows
from ruvllm.checkpoint.names import half_split_rows
from ruvllm.kernels.rope.frequencies import rope_tables
from ruvllm.measure import gguf_file
from ruvllm.measure.engines import LlamaCpp
from ruvllm.measure.peers import PeerError, Torch, require_same
from ruvllm.measure.timing import Engine
from ruvllm.model.config import ModelConfig
from ruvllm.model.weights import weight_bytes
from ruvllm.paths import cache_directory
from ruvllm.report import layers

_SAME = 0.1  # largest relative error of the same computation: peers round activations and KV cache differently
_CONTEXT = 64  # positions of the KV cache
_LARGEST_FILE = 4e9  # bytes


class LlamaCppLayer:
    """llama.cpp with its fastest settings, on a file written for it."""

    name = "llama.cpp"

    def __init__(self, llama: LlamaCpp) -> None:
        self._llama = llama

    @contextmanager
    def file(self, config: ModelConfig, layout: str) -> Iterator[Path]:
        """A GGUF file of that model, deleted after the block. Raises PeerError."""
        size = weight_bytes(config, layout)
        if size > _LARGEST_FILE:
            raise PeerError(f"would need a file of {size / 1e9:.0f} GB")
        cache_directory().mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_directory(), prefix="report-") as directory:
            path = Path(directory, "layers.gguf")
            _write(path, config, layout)
            yield path
            self._llama.unload()

    def engine(self, path: Path, exact: np.ndarray, threads: int) -> Engine:
        """One token after the others; it replaces the previous engine. Raises PeerError."""
        try:
            self._llama.load(path, threads, _CONTEXT)
            self._llama.append(layers.context_ids().tolist())
            self.seconds(1)
            found = np.array(self._llama.call("last_logits"))
        except RuntimeError as error:
            raise PeerError(str(error)) from None
        require_same(self.name, found, exact, _SAME)
        return self

    def seconds(self, calls: int) -> float:
        """See ``timing.Engine``."""
        self._once()
        return sum(self._once() for _ in range(calls))

    def settle(self) -> None:
        """See ``timing.Engine``."""
        self._llama.worker.settle()

    def _once(self) -> float:
        self._llama.call("truncate", length=layers.CONTEXT)
        return float(self._llama.call("decode", ids=[layers.TOKEN]))


class TorchLayer:
    """PyTorch on one float32 layer, written as its users would; ``torch`` also runs kernels."""

    name = "torch"

    def __init__(self, torch: Torch) -> None:
        self._torch = torch

    def engine(self, config: ModelConfig, layout: str, exact: np.ndarray, threads: int) -> Engine:
        """One token after the others; it replaces the previous engine. Raises PeerError."""
        if layout != "f32":
            raise PeerError("PyTorch has no 4-bit weights with 8-bit activations on CPUs")
        if config.num_hidden_layers > 1:
            raise PeerError("measured for one layer: its weights would take as much memory again")
        weights = layers.RepeatedWeights(config)
        shapes = {name: shape for name, shape in config.tensor_shapes().items() if len(shape) == 2}
        arrays = {f"block{columns}": weights.block(columns) for columns in {shape[1] for shape in shapes.values()}}
        arrays |= {name: weights.tensor(name).float32() for name in config.tensor_shapes() if name not in shapes}
        ids = np.append(layers.context_ids(), layers.TOKEN)
        arrays["cos"], arrays["sin"] = rope_tables(np.arange(len(ids)), config.head_dim, config.rope.theta)
        found = self._torch.prepare(
            "prepare_layer", arrays, threads, shapes={n.rsplit(".", 1)[-1]: s for n, s in shapes.items()},
            ids=ids.tolist(), heads=config.num_attention_heads, kv_heads=config.num_key_value_heads,
            eps=config.rms_norm_eps,
        )  # fmt: skip
        return self._torch.checked(found, exact)


def _write(path: Path, config: ModelConfig, layout: str) -> None:
    """The weights of ``layers.layer_model`` as a file."""
    weights, dtype = layers.RepeatedWeights(config), "Q4_0" if layout == "int4" else "F32"
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}

    def stored(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:
            return weights.tensor(name).float32()
        block = encode_rows(dtype, weights.block(shape[1]))
        rows = np.tile(block, (-(-shape[0] // layers.ROWS), 1))[: shape[0]]
        rotated = heads.get(name.rpartition(".")[2])
        return rows if rotated is None else rows[np.argsort(half_split_rows(rotated, config.head_dim))]

    gguf_file.write(path, config, dtype, stored)
