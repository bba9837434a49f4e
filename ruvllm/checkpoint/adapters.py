"""LoRA adapters on disk: PEFT's directories, read and written, and llama.cpp's GGUF adapters, read.

PEFT stores lora_A (R, K) and lora_B (N, R); in memory both are transposed (see ``model.lora``). GGUF adapters hold the
rows of lora_B for q and k in interleaved order, as GGUF models do.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ruvllm.checkpoint.adapter_settings import check_gguf, check_peft
from ruvllm.checkpoint.families import BY_TYPE
from ruvllm.checkpoint.family import Place
from ruvllm.checkpoint.fields import Fields
from ruvllm.checkpoint.gguf import GGUFFile
from ruvllm.checkpoint.names import HF_LAYER, half_split_rows, hf_name
from ruvllm.checkpoint.safetensors import SafetensorsFile
from ruvllm.checkpoint.safetensors_writer import write_safetensors
from ruvllm.checkpoint.strict_json import read_json_object
from ruvllm.checkpoint.tensor import Tensor
from ruvllm.errors import ModelFormatError
from ruvllm.model.config import ModelConfig
from ruvllm.model.lora_adapter import MAX_RANK, TARGETS, LoraAdapter, LoraConfig
from ruvllm.paths import replacing

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_MAX_CONFIG_BYTES = 1 << 20
_PREFIX = "base_model.model."
_Pair = tuple[np.ndarray, np.ndarray]  # lora_A (R, K) and lora_B (N, R)


def load_adapter(path: str | os.PathLike[str], model: ModelConfig) -> LoraAdapter:
    """Read an adapter for a model.

    Args:
        path: a directory that PEFT wrote (adapter_config.json, adapter_model.safetensors), or a GGUF file of
            llama.cpp's convert_lora_to_gguf.py.
        model: the configuration of the model that it is to be used with.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ModelFormatError: it is unsound, of a kind that is not supported, or was made for another model.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "no such adapter", str(path))
    if path.is_dir():
        return _load_peft(path, model)
    if path.name in (CONFIG_FILE, WEIGHTS_FILE):
        return _load_peft(path.parent, model)
    return _load_gguf(path, model)


def save_adapter(
    adapter: LoraAdapter, path: str | os.PathLike[str], model: ModelConfig, base: str | None = None
) -> Path:
    """Write an adapter as PEFT does: a directory with adapter_config.json and adapter_model.safetensors.

    Args:
        adapter: what to write.
        path: the directory; created if needed.
        model: the configuration of its model.
        base: name or path of the base model, stored for PEFT's users.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name in adapter.names:
        stored = _PREFIX + hf_name(name).removesuffix(".weight")
        tensors[f"{stored}.lora_A.weight"] = adapter.a[name].T
        tensors[f"{stored}.lora_B.weight"] = adapter.b[name].T
    write_safetensors(path / WEIGHTS_FILE, tensors, {"format": "pt"})
    config = adapter.config
    fields: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base or model.name or None,
        "r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout, "use_rslora": config.rslora,
        "target_modules": [_module_name(target) for target in config.targets],
        "layers_to_transform": _layers(adapter, model),
        "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
        "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}, "use_dora": False,
    }  # fmt: skip
    with replacing(path / CONFIG_FILE) as temporary:
        temporary.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    return path


def _layers(adapter: LoraAdapter, model: ModelConfig) -> list[int] | None:
    """The layers that it adapts, or None for all."""
    found = sorted({int(name.split(".")[1]) for name in adapter.names})
    return None if len(found) == model.num_hidden_layers else found


def _module_name(target: str) -> str:
    """q is q_proj."""
    return HF_LAYER[target].split(".")[-2]


def _load_peft(path: Path, model: ModelConfig) -> LoraAdapter:
    config_path, weights_path = path / CONFIG_FILE, path / WEIGHTS_FILE
    if not config_path.is_file():
        raise ModelFormatError(path, field="adapter", found=f"no {CONFIG_FILE}", expected="a directory that PEFT wrote")
    if not weights_path.is_file():
        pickles = sorted(entry.name for entry in path.glob("*.bin"))
        found = f"{pickles[0]}, a pickle, which can run code" if pickles else f"no {WEIGHTS_FILE}"
        raise ModelFormatError(path, field="adapter", found=found, expected=WEIGHTS_FILE)
    fields = Fields(config_path, read_json_object(config_path, _MAX_CONFIG_BYTES))
    check_peft(fields)
    rank, alpha = fields.require("r", int), fields.require("lora_alpha", float)
    dropout, rslora = fields.default("lora_dropout", float, 0.0), bool(fields.get("use_rslora", bool))

    def settings(targets: tuple[str, ...]) -> LoraConfig:
        try:
            return LoraConfig(rank, alpha, dropout, targets, rslora)
        except ValueError as error:
            raise ModelFormatError(config_path, field="settings", found=error, expected="those of an adapter") from None

    settings(TARGETS)  # before anything is read
    with SafetensorsFile(weights_path) as file:
        family = BY_TYPE[model.model_type]
        stored: dict[str, list[_Part]] = {}
        for name in _matrices(model):
            # Adapters of a matrix that is part of a larger one come under either name: PEFT's know the larger one.
            for place in (family.hf_places(model)[name], Place(hf_name(name))):
                _add_parts(stored, f"{_PREFIX}{place.name.removesuffix('.weight')}.lora_%s.weight", "AB", name, place)
        pairs = _read_pairs(weights_path, model, file.tensors, stored, file.tensor, ("lora_A", "lora_B"))
    return _assembled(weights_path, model, settings, pairs, lambda name, b: b)


def _load_gguf(path: Path, model: ModelConfig) -> LoraAdapter:
    with GGUFFile(path) as file:
        fields = Fields(path, file.metadata, offsets=file.metadata_offsets)
        kind = fields.get("general.type", str)
        if kind != "adapter":
            raise fields.error("general.type", kind or "no such key", "a GGUF file of a LoRA adapter")
        fields.require("adapter.type", str)
        architecture, family = fields.require("general.architecture", str), BY_TYPE[model.model_type]
        if architecture != family.architecture:
            raise fields.error("general.architecture", architecture, f"{family.architecture}, as the model is")
        check_gguf(fields)
        alpha = fields.require("adapter.lora.alpha", float)
        stored: dict[str, list[_Part]] = {}
        for name in _matrices(model):
            place = family.gguf_places(model)[name]
            _add_parts(stored, f"{place.name}.lora_%s", "ab", name, place)
        pairs = _read_pairs(path, model, file.tensors, stored, file.tensor, ("lora_a", "lora_b"))
    rank = next(iter(pairs.values()))[0].shape[0]

    def settings(targets: tuple[str, ...]) -> LoraConfig:
        try:
            return LoraConfig(rank, alpha, 0.0, targets)
        except ValueError as error:
            raise fields.error("adapter.lora.alpha", error, "the settings of an adapter") from None

    orders = {
        "q": half_split_rows(model.num_attention_heads, model.head_dim),
        "k": half_split_rows(model.num_key_value_heads, model.head_dim),
    }

    def half_split(name: str, b: np.ndarray) -> np.ndarray:
        order = orders.get(name.rpartition(".")[2]) if family.interleaved else None
        return b if order is None or len(order) != len(b) else b[order]

    return _assembled(path, model, settings, pairs, half_split)


def _matrices(model: ModelConfig) -> list[str]:
    """Every matrix that can have an adapter, by canonical name."""
    shapes = model.tensor_shapes()
    names = (f"layers.{i}.{target}" for i in range(model.num_hidden_layers) for target in TARGETS)
    return [name for name in names if name in shapes]


class _Part(NamedTuple):
    """What a tensor of a file is: ``half`` "A" or "B" of a matrix; ``place``: where that stands in a larger one."""

    name: str
    half: str
    place: Place


def _add_parts(stored: dict[str, list[_Part]], pattern: str, spelt: str, name: str, place: Place) -> None:
    """Add both halves of the adapter of a matrix to the tensors that a file may have."""
    for letter, half in zip(spelt, "AB", strict=True):
        parts = stored.setdefault(pattern % letter, [])
        if all(part.name != name for part in parts):
            parts.append(_Part(name, half, place))


def _read_pairs(
    path: Path, model: ModelConfig, found: Collection[str], stored: Mapping[str, list[_Part]],
    tensor: Callable[[str], Tensor], spelling: tuple[str, str],
) -> dict[str, _Pair]:  # fmt: skip
    """lora_A and lora_B of every matrix in the file, by canonical name; nothing else may be there."""
    shapes: dict[str, Any] = model.tensor_shapes()
    halves: dict[str, dict[str, np.ndarray]] = {}
    for file_name in found:
        if file_name not in stored:
            found_here, expected = "a tensor for no matrix of this model", f"adapters of {', '.join(TARGETS)}"
            raise ModelFormatError(path, field=f"tensor {file_name!r}", found=found_here, expected=expected)
    for file_name in found:
        opened = tensor(file_name)
        name, part, place = stored[file_name][0]
        if len(opened.shape) != 2 or 0 in opened.shape:
            raise ModelFormatError(path, field=f"tensor {file_name!r} shape", found=opened.shape, expected="a matrix")
        # Before it is read: a tensor too large for the model may be too large for the memory.
        height, width = place.file_shape(shapes[name])
        rank = opened.shape[0 if part == "A" else 1]
        if rank > MAX_RANK or opened.shape != ((rank, width) if part == "A" else (height, rank)):
            expected = f"a rank up to {MAX_RANK}, and the base model's matrix is {(height, width)}"
            raise ModelFormatError(path, field=f"lora_{part} of {name} shape", found=opened.shape, expected=expected)
        values = opened.float32()
        if not np.isfinite(values).all():
            expected = "finite numbers"
            raise ModelFormatError(path, field=f"tensor {file_name!r}", found="NaN or infinity", expected=expected)
        for name, part, place in stored[file_name]:
            own = values if part == "A" or place.rows is None else values[np.asarray(place.rows)]
            halves.setdefault(name, {})[part] = own
    if not halves:
        raise ModelFormatError(path, field="tensors", found="none", expected="an adapter's")
    for name, parts in halves.items():
        for part, spelt in zip("AB", spelling, strict=True):
            if part not in parts:
                raise ModelFormatError(path, field=f"{spelt} of {name}", found="no such tensor", expected="both parts")
    return {name: (parts["A"], parts["B"]) for name, parts in halves.items()}


def _assembled(
    path: Path, model: ModelConfig, settings: Callable[[tuple[str, ...]], LoraConfig], pairs: dict[str, _Pair],
    rows: Callable[[str, np.ndarray], np.ndarray],
) -> LoraAdapter:  # fmt: skip
    """An adapter of the arrays that were read, each checked against the model and the rank."""
    config = settings(tuple({name.rpartition(".")[2] for name in pairs}))
    shapes: dict[str, Any] = model.tensor_shapes()
    for name, (a, b) in pairs.items():
        height, width = shapes[name]
        for part, array, shape in (("A", a, (config.rank, width)), ("B", b, (height, config.rank))):
            if array.shape != shape:
                expected = f"{shape}: rank {config.rank}, and the base model's matrix is {(height, width)}"
                raise ModelFormatError(path, field=f"lora_{part} of {name} shape", found=array.shape, expected=expected)
    adapter = LoraAdapter(model, config, names=tuple(name for name in _matrices(model) if name in pairs))
    for name, (a, b) in pairs.items():
        adapter.a[name][:] = a.T
        adapter.b[name][:] = rows(name, b).T
    return adapter
