"""Whole models, each with one thing wrong: rows 26-34, 46-49 and 51 of the table of bad input, in either format.

Row 50: adapters.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.numpy

from ruvllm.checkpoint.adapters import load_adapter
from ruvllm.checkpoint.loader import open_checkpoint
from ruvllm.checkpoint.tokenizer import load_tokenizer
from ruvllm.model.config import ModelConfig
from tests import llm_cases
from tests.checkpoint import corpus
from tests.model import tiny, tiny_gguf


@dataclass(frozen=True)
class HostileModel:
    """The table's row, a name, a function that writes the model into a directory and returns its path, the error text.

    ``path`` of the error ends with ``at``.
    """

    row: int
    name: str
    write: Callable[[Path], Path]
    says: str
    at: str = "model.gguf"

    def __str__(self) -> str:
        return f"row{self.row:02d}-{self.name}"


def read_all(path: Path, mmap: bool) -> None:
    """Open a model, its tokenizer, and every row of every tensor."""
    with open_checkpoint(path, mmap) as checkpoint:
        load_tokenizer(checkpoint.tokenizer_source, checkpoint.config.vocab_size).encode("the 1st")
        for name in checkpoint.names():
            checkpoint.tensor(name).float32()


def edit_config(directory: Path, case: str, **changes: Any) -> Path:
    """A copy of a case as ``directory/model`` with changes to config.json; ``...`` deletes a key."""
    model = shutil.copytree(tiny.directory(case), directory / "model", dirs_exist_ok=True)
    path = model / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return model


def rewrite_gguf(
    directory: Path, metadata: dict[str, Any] | None, tensors: dict[str, Any] | None, case: str = "llama2_mha"
) -> Path:
    """A case as ``directory/model.gguf`` with changes to either; None deletes."""
    original = gguf.GGUFReader(tiny.write_gguf(case, directory / "original.gguf"))
    path = directory / "model.gguf"
    values = {key: field.contents() for key, field in original.fields.items() if not key.startswith("GGUF.")}
    values |= metadata or {}
    arrays = {tensor.name: tensor.data for tensor in original.tensors} | (tensors or {})
    writer = gguf.GGUFWriter(path, values.pop("general.architecture"))
    for key, value in values.items():
        if value is not None:
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, array in arrays.items():
        if array is not None:
            writer.add_tensor(name, np.ascontiguousarray(array))
    tiny_gguf.finish(writer)
    return path


def _metadata(row: int, name: str, says: str, changes: dict[str, Any]) -> HostileModel:
    """A GGUF file with other metadata; None deletes a key."""
    return HostileModel(row, name, lambda directory: rewrite_gguf(directory, changes, None), says)


def _tensors(row: int, name: str, says: str, changes: dict[str, Any]) -> HostileModel:
    return HostileModel(row, name, lambda directory: rewrite_gguf(directory, None, changes), says)


def _config(row: int, name: str, says: str, **changes: Any) -> HostileModel:
    return HostileModel(
        row, f"hf-{name}", lambda directory: edit_config(directory, "llama2_mha", **changes), says, "config.json"
    )


def _tokenizer(row: int, name: str, says: str, change: Callable[[dict[str, Any]], object]) -> HostileModel:
    """A Hugging Face directory whose tokenizer.json was changed in place."""

    def write(directory: Path) -> Path:
        model = llm_cases.write_directory(directory / "model")
        path = model / "tokenizer.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        return model

    return HostileModel(row, f"hf-{name}", write, says, "tokenizer.json")


def _sharded(row: int, name: str, says: str, at: str, change: Callable[[Path, dict[str, str]], object]) -> HostileModel:
    """A model in four files; ``change`` gets its directory and the index's weight map."""

    def write(directory: Path) -> Path:
        model = shutil.copytree(tiny.directory("bf16_sharded_tied"), directory / "model")
        path = model / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(model, index["weight_map"])
        path.write_text(json.dumps(index))
        return model

    return HostileModel(row, name, write, says, at)


def _special(row: int, name: str, says: str, file: str, make: Callable[[Path], object], at: str) -> HostileModel:
    """A Hugging Face directory one of whose files is something else."""

    def write(directory: Path) -> Path:
        model = llm_cases.write_directory(directory / "model")
        (model / file).unlink()
        make(model / file)
        return model

    return HostileModel(row, name, write, says, at)


def _bad_scale(value: float) -> Callable[[Path], Path]:
    def write(directory: Path) -> Path:
        path = tiny.write_gguf("mlp_bias_f16", directory / "model.gguf", "Q8_0")
        tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_up.weight")
        with path.open("r+b") as file:
            file.seek(int(tensor.data_offset) + 34 * 3)  # the scale of the fourth block
            file.write(np.float16(value).tobytes())
        return path

    return write


class Planted:
    """Creates a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def _pickled(directory: Path) -> Path:
    model = llm_cases.write_directory(directory / "model")
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Planted(directory / "executed")))
    return model


def _fifo_gguf(directory: Path) -> Path:
    os.mkfifo(directory / "model.gguf")
    return directory / "model.gguf"


_ATTENTION = "llama.attention"
_INDEX = "model.safetensors.index.json"
_EMBEDDING = "model.embed_tokens.weight"
_BPE = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"}
_HALF = np.ones((24, 48), np.float32)


def hostile_models() -> list[HostileModel]:
    """Rows 26-34, 46-49 and 51 of the table."""
    return [
        _metadata(26, "layers", "llama.block_count: found no such key", {"llama.block_count": None}),
        _metadata(26, "eps", "epsilon: found no such key", {f"{_ATTENTION}.layer_norm_rms_epsilon": None}),
        _metadata(26, "tokenizer", "tokenizer.ggml.model: found no such key", {"tokenizer.ggml.model": None}),
        _config(26, "width", "hidden_size: found no such key", hidden_size=...),
        _metadata(27, "text", "llama.embedding_length: found '48' (str)", {"llama.embedding_length": "48"}),
        _metadata(27, "float", "llama.block_count: found 2.0 (float)", {"llama.block_count": 2.0}),
        _metadata(27, "tokens", "tokenizer.ggml.tokens", {"tokenizer.ggml.tokens": [1, 2, 3]}),
        _config(27, "float", "hidden_size: found 48.0 (float)", hidden_size=48.0),
        _config(27, "boolean", "num_attention_heads: found True (bool)", num_attention_heads=True),
        _metadata(28, "heads-0", "llama.attention.head_count: found 0", {"llama.attention.head_count": 0}),
        _metadata(28, "kv-heads-3", "llama.attention.head_count_kv: found 3", {"llama.attention.head_count_kv": 3}),
        _config(28, "heads-0", "num_attention_heads: found 0", num_attention_heads=0),
        _config(28, "kv-heads-3", "num_key_value_heads: found 3", num_key_value_heads=3),
        _metadata(29, "head-odd", "llama.attention.key_length: found 13", {"llama.attention.key_length": 13}),
        _metadata(29, "head-huge", "llama.attention.key_length: found 4096", {"llama.attention.key_length": 4096}),
        _metadata(29, "rope-odd", "llama.rope.dimension_count: found 11", {"llama.rope.dimension_count": 11}),
        _config(29, "head-odd", "head_dim: found 11", head_dim=11),
        _tensors(30, "missing", "'blk.1.ffn_up.weight': found no such tensor", {"blk.1.ffn_up.weight": None}),
        _tensors(30, "shape", "'blk.1.attn_v.weight' shape: found (24, 48)", {"blk.1.attn_v.weight": _HALF}),
        _tensors(30, "too-many", "'blk.2.ffn_up.weight': found an unknown tensor", {"blk.2.ffn_up.weight": _HALF}),
        _metadata(31, "rows", "'token_embd.weight' shape", {"tokenizer.ggml.tokens": ["a", "b", "c"]}),
        _metadata(31, "id", "tokenizer.ggml.bos_token_id: found 97", {"tokenizer.ggml.bos_token_id": 97}),
        _metadata(31, "merge", "tokenizer.ggml.merges: found", {**_BPE, "tokenizer.ggml.merges": ["a nosuch"]}),
        _tokenizer(31, "merge", "found", lambda json_: json_["model"]["merges"].append(["a", "nosuch"])),
        _tokenizer(31, "id", "vocabulary: found ids below", lambda json_: json_["model"]["vocab"].update(more=1 << 31)),
        _metadata(32, "eps-0", "epsilon: found 0.0", {"llama.attention.layer_norm_rms_epsilon": 0.0}),
        _metadata(32, "theta-nan", "llama.rope.freq_base: found nan", {"llama.rope.freq_base": math.nan}),
        _config(32, "eps-0", "rms_norm_eps: found 0", rms_norm_eps=0),
        _config(32, "theta-nan", "found NaN", rope_theta=math.nan),
        HostileModel(33, "scale-nan", _bad_scale(math.nan), "'blk.1.ffn_up.weight' row 1 block 1 scale: found nan"),
        HostileModel(33, "scale-inf", _bad_scale(-math.inf), "'blk.1.ffn_up.weight' row 1 block 1 scale: found -inf"),
        _metadata(34, "architecture", "general.architecture: found mamba", {"general.architecture": "mamba"}),
        _metadata(34, "scaling", "llama.rope.scaling.type: found spiral", {"llama.rope.scaling.type": "spiral"}),
        _config(34, "architecture", "architectures: found MambaForCausalLM", architectures=["MambaForCausalLM"]),
        _config(34, "scaling", "rope_scaling.rope_type: found spiral", rope_scaling={"rope_type": "spiral"}),
        _sharded(
            46, "shard-missing", "weight_map: found no file", _INDEX,
            lambda model, names: (model / names[_EMBEDDING]).unlink(),
        ),
        _sharded(
            47, "shard-absolute", "weight_map: found the shard '/etc/passwd'", _INDEX,
            lambda model, names: names.update({_EMBEDDING: "/etc/passwd"}),
        ),
        _sharded(
            47, "shard-above", "weight_map: found the shard '../", _INDEX,
            lambda model, names: names.update({_EMBEDDING: "../model/" + names[_EMBEDDING]}),
        ),
        _sharded(
            48, "index-of-another", "which that shard does not hold", _INDEX,
            lambda model, names: names.update({"model.layers.9.mlp.up_proj.weight": names[_EMBEDDING]}),
        ),
        HostileModel(49, "pickle", _pickled, "found the pickle 'pytorch_model.bin'", "pytorch_model.bin"),
        HostileModel(51, "gguf-fifo", _fifo_gguf, "file: found a FIFO, expected a regular file"),
        _special(51, "config-fifo", "found no config.json", "config.json", os.mkfifo, "model"),
        _special(51, "weights-fifo", "found a FIFO", "model.safetensors", os.mkfifo, "model.safetensors"),
        _special(51, "weights-directory", "found a directory", "model.safetensors", Path.mkdir, "model.safetensors"),
        _special(51, "tokenizer-fifo", "tokenizer.json: found no such file", "tokenizer.json", os.mkfifo, "model"),
    ]  # fmt: skip


ADAPTED = "llama3_scaled_gqa"  # the model that the adapters below are for
_Q = "base_model.model.model.layers.1.self_attn.q_proj"


def adapted_model() -> ModelConfig:
    with open_checkpoint(tiny.directory(ADAPTED)) as checkpoint:
        return checkpoint.config


def read_adapter(path: Path) -> None:
    load_adapter(path, adapted_model())


_Change = Callable[[dict[str, Any], dict[str, Any]], object]


def _peft(name: str, says: str, change: _Change, at: str = "adapter_model.safetensors") -> HostileModel:
    """PEFT's directory after ``change(configuration, tensors)``."""

    def write(directory: Path) -> Path:
        adapter = Path(shutil.copytree(tiny.DATA.parent / "lora" / ADAPTED, directory / "adapter"))
        weights, settings = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
        tensors, config = safetensors.numpy.load_file(weights), json.loads(settings.read_text())
        change(config, tensors)
        settings.write_text(json.dumps(config))
        safetensors.numpy.save_file(tensors, weights)
        return adapter

    return HostileModel(50, name, write, says, at)


def _sparse(directory: Path) -> Path:
    """A matrix of 8 GB that the model lacks, in a sparse file."""
    adapter = Path(shutil.copytree(tiny.DATA.parent / "lora" / ADAPTED, directory / "adapter"))
    size = 1 << 33
    header = {f"{_Q}.lora_A.weight": corpus.st_entry("F32", [size // 4 // 48, 48], 0, size // 192 * 192)}
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(corpus.safetensors(header))
    os.truncate(path, path.stat().st_size + size // 192 * 192)
    return adapter


def write_gguf_adapter(path: Path, alpha: float = 6.0, q: tuple[int, ...] = (3, 48)) -> Path:
    """As llama.cpp's converter writes one: an adapter of rank 3 on the q of layer 1."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    with open_checkpoint(tiny.directory(ADAPTED)) as checkpoint:
        rows = checkpoint.tensor("layers.1.q").shape[0]
    writer.add_tensor("blk.1.attn_q.weight.lora_a", np.ones(q, np.float32))
    writer.add_tensor("blk.1.attn_q.weight.lora_b", np.ones((rows, 3), np.float32))
    tiny_gguf.finish(writer)
    return path


def _nan(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    tensors[f"{_Q}.lora_A.weight"] = tensors[f"{_Q}.lora_A.weight"] * np.float32(np.nan)


def hostile_adapters() -> list[HostileModel]:
    """Row 50 of the table; ``read_adapter`` must refuse each."""
    config, a, b = "adapter_config.json", f"{_Q}.lora_A.weight", f"{_Q}.lora_B.weight"
    return [
        _peft("rank-0", "rank: expected 1 to", lambda c, t: c.update(r=0), config),
        _peft("rank-huge", "rank: expected 1 to", lambda c, t: c.update(r=1 << 40), config),
        _peft("rank-of-config", "shape: found", lambda c, t: c.update(r=4)),
        _peft("rank-of-one-matrix", "shape: found", lambda c, t: t.update({a: t[a][:2].copy()})),
        _peft("alpha-0", "alpha: expected a finite number above 0", lambda c, t: c.update(lora_alpha=0), config),
        _peft("alpha-text", "lora_alpha: found '8'", lambda c, t: c.update(lora_alpha="8"), config),
        _peft("rank-pattern", "rank_pattern", lambda c, t: c.update(rank_pattern={"q_proj": 4}), config),
        _peft("width", "shape: found", lambda c, t: t.update({a: np.ones((3, 7), np.float32)})),
        _peft("half-missing", "found no such tensor", lambda c, t: t.pop(b)),
        _peft("nan", "found NaN or infinity", _nan),
        _peft("other-matrix", "a tensor for no matrix of this model", lambda c, t: t.update({"x.lora_A.weight": t[a]})),
        HostileModel(50, "8-GB-matrix", _sparse, "expected a rank up to", "adapter_model.safetensors"),
        HostileModel(
            50, "gguf-alpha-0", lambda d: write_gguf_adapter(d / "a.gguf", alpha=0.0), "alpha: expected", "a.gguf"
        ),
        HostileModel(
            50, "gguf-width", lambda d: write_gguf_adapter(d / "a.gguf", q=(3, 47)), "shape: found (3, 47)", "a.gguf"
        ),
    ]
