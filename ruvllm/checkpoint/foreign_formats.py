"""Quantised Hugging Face directories that are not supported, recognised by settings, files or tensors."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from ruvllm.checkpoint.fields import Fields
from ruvllm.checkpoint.four_bits import packing_in
from ruvllm.errors import ModelFormatError

_EXPECTED = "weights in F32, F16 or BF16, GPTQ or AWQ with its settings, or a .gguf file of the model"
# Files next to config.json, from before it named the method.
_FILES = {
    "hf_quant_config.json": "ModelOpt",
    "quanto_qmap.json": "quanto",
    "qmodel.pt": "HQQ",
}
_METHODS = {
    "gptq": "GPTQ", "awq": "AWQ", "mlx": "MLX", "exl2": "EXL2", "exl3": "EXL3", "hqq": "HQQ", "eetq": "EETQ",
    "fp8": "FP8", "compressed-tensors": "compressed-tensors", "fbgemm_fp8": "FBGEMM FP8",
    "modelopt": "ModelOpt", "mxfp4": "MXFP4",
}  # fmt: skip
# The endings of tensors' names that occur together in one format; a format with one name more comes first.
_TENSORS: tuple[tuple[tuple[str, ...], str], ...] = (
    ((".qweight", ".qzeros", ".scales", ".g_idx"), "GPTQ"),
    ((".qweight", ".qzeros", ".scales"), "AWQ"),
    ((".weight", ".scales", ".biases"), "MLX"),
    ((".weight.absmax", ".weight.quant_map"), "bitsandbytes, 4 bits"),
    ((".weight", ".SCB"), "bitsandbytes, 8 bits"),
    ((".q_weight", ".q_scale"), "EXL2"),
    ((".trellis",), "EXL3"),
    ((".W_q",), "HQQ"),
    ((".weight_packed",), "compressed-tensors"),
    ((".weight_scale_inv",), "FP8"),
    ((".weight_scale",), "FP8 or INT8 with scales"),
)  # fmt: skip


def refuse_settings(config: Fields) -> None:
    """Raise ModelFormatError where config.json says that the weights are quantised in an unsupported way."""
    for key in ("quantization_config", "compression_config", "quantization"):  # the last is MLX's
        settings = config.get(key, dict)
        if settings and packing_in(config) is None and settings.get("quant_method") != "mxfp4":
            field = f"{key}.quant_method" if "quant_method" in settings else key
            raise config.error(field, f"{_method(key, settings)}: quantised weights", _EXPECTED)


def refuse_files(directory: Path) -> None:
    """Raise ModelFormatError where a file of a directory whose weights cannot be read says that they are quantised."""
    for name, method in _FILES.items():
        if (directory / name).is_file():
            raise ModelFormatError(directory, field=name, found=f"{method}: quantised weights", expected=_EXPECTED)


def refuse_tensors(directory: Path, names: Collection[str]) -> None:
    """Raise ModelFormatError where the tensors' names are those of quantised weights."""
    for endings, method in _TENSORS:
        found = [next((name for name in names if name.endswith(ending)), None) for ending in endings]
        if None not in found:
            raise ModelFormatError(
                directory, field=f"tensor {found[-1]!r}", found=f"{method}: quantised weights", expected=_EXPECTED
            )


def _method(key: str, settings: dict[str, Any]) -> str:
    method = settings.get("quant_method")
    if any(name.startswith(("bnb_", "load_in_", "llm_int8_")) for name in settings):
        return f"bitsandbytes, {8 if settings.get('load_in_8bit') else 4} bits"
    if key == "compression_config":
        return "compressed-tensors"
    if method is not None:
        return _METHODS.get(str(method).lower(), str(method))
    if key == "quantization" or set(settings) <= {"group_size", "bits", "mode"}:
        return "MLX"
    if "zero_point" in settings or "w_bit" in settings:
        return "AWQ"
    return "GPTQ" if "desc_act" in settings or "damp_percent" in settings else "a method without a name"
