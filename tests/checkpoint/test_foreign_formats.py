"""Quantised directories are named as what they are, whether settings, files or tensors say it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from ruvllm.checkpoint.loader import open_checkpoint
from ruvllm.errors import ModelFormatError
from tests.checkpoint.checks import close_to_golden
from tests.model import tiny

Edited = Callable[..., Path]
GATE = "model.layers.0.mlp.gate_proj"
EXPECTED = (
    "quantised weights, "
    "expected weights in F32, F16 or BF16, GPTQ or AWQ with its settings, or a .gguf file of the model"
)


def refused(directory: Path, message: str) -> None:
    with pytest.raises(ModelFormatError, match=re.escape(message)):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    ("key", "settings", "said"),
    [
        ("quantization_config", {"quant_method": "hqq", "bits": 4}, "quantization_config.quant_method: found HQQ"),
        (
            "quantization_config",
            {"load_in_8bit": True, "llm_int8_threshold": 6.0},
            "quantization_config: found bitsandbytes, 8 bits",
        ),
        (
            "quantization_config",
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            "quantization_config.quant_method: found bitsandbytes, 4 bits",
        ),
        ("quantization", {"group_size": 64, "bits": 4}, "quantization: found MLX"),
        ("quantization_config", {"group_size": 64, "bits": 4}, "quantization_config: found MLX"),
        ("quantization_config", {"quant_method": "newest"}, "quantization_config.quant_method: found newest"),
        ("quantization_config", {"stages": 3}, "quantization_config: found a method without a name"),
        ("compression_config", {"format": "pack-quantized"}, "compression_config: found compressed-tensors"),
    ],
)
def test_settings(edited: Edited, key: str, settings: dict[str, Any], said: str) -> None:
    refused(edited(**{key: settings}), f"config.json: {said}: {EXPECTED}")


def test_empty_settings_say_nothing(edited: Edited) -> None:
    with open_checkpoint(edited(quantization_config=None, quantization={})) as checkpoint:
        close_to_golden(checkpoint, "llama2_mha")


@pytest.mark.parametrize(
    ("endings", "said"),
    [
        (("qweight", "qzeros", "scales", "g_idx"), "tensor 'model.layers.0.mlp.gate_proj.g_idx': found GPTQ"),
        (("qweight", "qzeros", "scales"), "found AWQ"),
        (("weight", "scales", "biases"), "found MLX"),
        (
            ("weight", "weight.absmax", "weight.quant_map", "weight.quant_state"),
            "found bitsandbytes, 4",
        ),
        (("weight", "SCB", "weight_format"), "found bitsandbytes, 8 bits"),
        (("weight_packed", "weight_scale", "weight_shape"), "found compressed-tensors"),
        (("weight", "weight_scale_inv"), "found FP8"),
    ],
)
def test_tensors(edited: Edited, endings: tuple[str, ...], said: str) -> None:
    """Directories from before config.json told of it, or whose config.json was copied from the original."""
    directory = edited()
    tensors: dict[str, np.ndarray] = dict(tiny.weights("llama2_mha"))
    del tensors[f"{GATE}.weight"]
    tensors |= {f"{GATE}.{ending}": np.zeros((4, 4), np.int32) for ending in endings}
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    refused(directory, said)


@pytest.mark.parametrize(
    ("file", "weights", "said"),
    [
        ("hf_quant_config.json", "", "hf_quant_config.json: found ModelOpt"),
        ("quanto_qmap.json", "pytorch_model.bin", "quanto_qmap.json: found quanto"),
    ],
)
def test_files(edited: Edited, file: str, weights: str, said: str) -> None:
    directory = edited()
    (directory / file).write_text('{"bits": 4, "group_size": 128}')
    with open_checkpoint(directory) as checkpoint:  # left over beside weights that are sound
        close_to_golden(checkpoint, "llama2_mha")
    (directory / "model.safetensors").unlink()
    if weights:
        (directory / weights).write_bytes(b"x")
    refused(directory, f"{said}: {EXPECTED}")
