"""The peers of a transformer layer, on the same weights: PyTorch for float32, llama.cpp for files made for it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ruvllm.kernels.quant.weights import quantize_int4
from ruvllm.kernels.rope.frequencies import rope_tables
from ruvllm.model.config import ModelConfig
from ruvllm.paths import cache_directory
from ruvllm.report import gguf_file, layers
from ruvllm.report.peers import PeerError, Torch, relative_error
from ruvllm.report.timing import Engine
from ruvllm.report.worker import Worker

_SAME = 0.1  # relative error of logits up to which a peer computes the same: its 8-bit sums and f16 cache are its own
_CONTEXT = 64  # positions of its KV cache
_LARGEST_FILE = 4e9  # bytes


class LlamaCpp:
    """llama.cpp at its best settings, in a process of its own, on a file written for it. Raises what Worker does."""

    name = "llama.cpp"

    def __init__(self, python: str) -> None:
        self._worker = Worker("llama.cpp", python, Path(__file__).with_name("_llama_worker.py"))
        features = re.findall(r"(\w+) = 1", self._worker.hello["system"])
        self.about = f"llama-cpp-python {self._worker.hello['version']} ({', '.join(features)})"

    @contextmanager
    def file(self, config: ModelConfig, layout: str) -> Iterator[Path]:
        """A GGUF file of that model, there as long as the block runs. Raises PeerError."""
        size = layers.weight_bytes(config, layout)
        if size > _LARGEST_FILE:
            raise PeerError(f"would need a file of {size / 1e9:.0f} GB")
        cache_directory().mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_directory(), prefix="report-") as directory:
            path = Path(directory, "layers.gguf")
            try:
                _write(path, config, layout)
            except ImportError:
                raise PeerError("needs the gguf package to write its file") from None
            yield path
            self._worker.call("unload")

    def engine(self, path: Path, exact: np.ndarray, threads: int) -> Engine:
        """One token after the others, ready to be timed until the next is. Raises PeerError."""
        try:
            self._worker.call("load", path=str(path), threads=threads, context=_CONTEXT)
            self._worker.call("prefill", ids=layers.context_ids().tolist())
            engine = _OneToken(self._worker)
            engine.seconds(1)
            error = relative_error(np.array(self._worker.call("last_logits")), exact)
        except RuntimeError as error_there:
            raise PeerError(str(error_there)) from None
        if not error < _SAME:
            raise PeerError(f"llama.cpp computes something else: relative error {error:.1e}")
        return engine

    def close(self) -> None:
        """End its process."""
        self._worker.close()


class _OneToken:
    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def seconds(self, calls: int) -> float:
        """See Engine."""
        self._once()
        return sum(self._once() for _ in range(calls))

    def settle(self) -> None:
        """See Engine."""
        self._worker.call("settle")

    def _once(self) -> float:
        self._worker.call("truncate", length=layers.CONTEXT)
        return float(self._worker.call("decode", ids=[layers.TOKEN]))


class TorchLayer:
    """PyTorch on one float32 layer, written as its users would: ``torch`` is the peer that runs kernels too."""

    name = "torch"

    def __init__(self, torch: Torch) -> None:
        self._torch = torch

    def engine(self, config: ModelConfig, layout: str, exact: np.ndarray, threads: int) -> Engine:
        """One token after the others, ready to be timed until the next is. Raises PeerError."""
        if layout != "f32":
            raise PeerError("PyTorch has no 4-bit weights with 8-bit activations on CPUs")
        if config.num_hidden_layers > 1:
            raise PeerError("measured for one layer: its weights need as much memory again")
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
    weights = layers.RepeatedWeights(config)
    writer = gguf_file.start(path, config, "q4_0" if layout == "int4" else layout)
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    for name, _ in gguf_file.tensor_names(config):
        tensor = weights.tensor(name)
        values = tensor.float32()
        if values.ndim == 2:
            if layout == "int4":
                codes, scales, _mins = quantize_int4(tensor.float32(0, layers.ROWS))
                block = gguf_file.q4_0(codes, scales)
                values = np.tile(block, (-(-tensor.shape[0] // layers.ROWS), 1))[: tensor.shape[0]]
            kind = name.rsplit(".", 1)[-1]
            if kind in heads:
                values = gguf_file.interleaved_pairs(values, heads[kind])
        writer.write_tensor_data(values)
    writer.close()
