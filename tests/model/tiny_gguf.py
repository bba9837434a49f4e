"""Tiny checkpoints as GGUF files, in the conventions of llama.cpp's converters.

tests/data/make_architectures.py shows that llama.cpp computes the logits of transformers from these files.
"""

from __future__ import annotations

import math
import re
import string
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from tests.model.tiny_checkpoints import Checkpoint

# Those that llama.cpp supports. It has no windows of Qwen and Phi, no attention scale of Gemma's own, no other
# pattern of layers without positions than SmolLM3's, no betas of YaRN in a file, and truncates them always.
VARIANTS = (
    "gemma", "gemma2", "gemma3", "gemma3_pattern", "gpt_oss_mxfp4", "gpt_oss_truncated", "granite", "granite_biased",
    "llama3", "llama_yarn", "mixtral", "olmo2", "olmo3", "olmo3_layers", "olmoe", "phi3", "phi3_long", "phi3_short",
    "phi4_mini", "qwen2", "qwen2_moe", "qwen2_yarn", "qwen3", "qwen3_moe", "smollm3",
)  # fmt: skip
ARCHITECTURES = {
    "gemma": "GEMMA", "gemma2": "GEMMA2", "gemma3_text": "GEMMA3", "gpt_oss": "GPT_OSS", "granite": "GRANITE",
    "llama": "LLAMA", "mistral": "LLAMA", "mixtral": "LLAMA", "olmo2": "OLMO2", "olmo3": "OLMO2", "olmoe": "OLMOE",
    "phi3": "PHI3", "qwen2": "QWEN2", "qwen2_moe": "QWEN2MOE", "qwen3": "QWEN3", "qwen3_moe": "QWEN3MOE",
    "smollm3": "SMOLLM3",
}  # fmt: skip
# Families whose q and k rows are reordered for pairs (2i, 2i + 1).
INTERLEAVED = ("llama", "mistral", "mixtral", "granite", "smollm3")
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")


def write_gguf(path: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint in F32 (and MXFP4 where it is so)."""
    return write(path, checkpoint.config, checkpoint.tensors())


def write(
    path: Path, config: dict[str, Any], tensors: dict[str, NDArray[Any]], dtype: str = "F32", name: str | None = None
) -> Path:
    """Write tensors, by Hugging Face names, as llama.cpp's converter would: vectors in F32, matrices in ``dtype``.

    ``dtype`` is the name of a GGUF type ("F32", "F16", "BF16", "Q8_0", ...); a matrix whose rows are not whole blocks
    of it becomes F16.
    """
    architecture = gguf.MODEL_ARCH[ARCHITECTURES[config["model_type"]]]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    if name is not None:
        writer.add_name(name)
    _add_sizes(writer, config)
    _add_attention(writer, config)
    _add_experts(writer, config)
    rope = _add_rope(writer, config)
    _add_vocabulary(writer, config)
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    for stored, array in _merged(tensors).items():
        for part, values in _split(stored, array).items():
            gguf_name = names.get_name(part, (".weight", ".bias"))
            assert gguf_name is not None, part
            _add_tensor(writer, gguf_name, _converted(part, values, config), dtype)
    for tensor, factors in rope.items():
        writer.add_tensor(tensor, np.array(factors, np.float32))
    finish(writer)
    return path


def finish(writer: gguf.GGUFWriter) -> None:
    """Write the file that was described."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def vocabulary(size: int) -> list[str]:
    """SentencePiece pieces: control tokens, single characters, then pairs of letters."""
    letters = string.ascii_lowercase
    pieces = ["<unk>", "<s>", "</s>", "▁", *string.ascii_letters, *string.digits, *string.punctuation]
    return (pieces + [a + b for a in letters for b in letters])[:size]


def _add_vocabulary(writer: Any, config: dict[str, Any]) -> None:
    """The tokenizer of ``vocabulary``."""
    size, ends = config["vocab_size"], config["eos_token_id"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(vocabulary(size))
    writer.add_token_scores([-float(i) for i in range(size)])
    writer.add_token_types(
        [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.NORMAL] * (size - 3)]
    )
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(ends[0] if isinstance(ends, list) else ends)
    if isinstance(ends, list):
        writer.add_eot_token_id(ends[1])


def interleave(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Half-split to interleaved rows, in the words of llama.cpp's converter."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def llama3_divisors(rope: dict[str, Any], theta: float, dim: int) -> list[float]:
    """LLaMA 3.1's divisor of each pair's frequency."""
    divisors = []
    for i in range(dim // 2):
        wavelength = 2 * np.pi * theta ** (2 * i / dim)
        turns = rope["original_max_position_embeddings"] / wavelength
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = (turns - low) / (high - low)
        if turns > high:
            divisors.append(1.0)
        elif turns < low:
            divisors.append(rope["factor"])
        else:
            divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return divisors


def _head_dim(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _add_sizes(writer: Any, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])


def _add_attention(writer: Any, config: dict[str, Any]) -> None:
    kind = config["model_type"]
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if kind in ("gemma2", "gemma3_text", "gpt_oss", "mistral", "olmo3"):
        writer.add_sliding_window(config["sliding_window"])
    if kind == "phi3":
        writer.add_sliding_window(config["sliding_window"] or 0)
    if kind in ("gemma3_text", "olmo3") and "layer_types" in config:
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
    if kind == "gemma3_text" and "layer_types" in config:
        writer.add_rope_freq_base_swa(config["rope_local_base_freq"])
    if config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if kind == "granite":
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])


def _add_experts(writer: Any, config: dict[str, Any]) -> None:
    if "num_experts_per_tok" not in config:
        return
    writer.add_expert_count(config.get("num_local_experts") or config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if config["model_type"] == "gpt_oss":
        writer.add_expert_feed_forward_length(config["intermediate_size"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if "shared_expert_intermediate_size" in config:
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])


def _add_rope(writer: Any, config: dict[str, Any]) -> dict[str, list[float]]:
    """Write the keys of rotary embedding. Returns the tensors of divisors, by name."""
    dim = int(_head_dim(config) * config.get("partial_rotary_factor", 1.0))
    if config["model_type"] in (*INTERLEAVED, "phi3"):
        writer.add_rope_dimension_count(dim)
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    theta = rope.get("rope_theta") or config.get("rope_theta", 10000.0)
    if config["model_type"] not in ("gemma", "gemma2"):
        writer.add_rope_freq_base(theta)
    kind = rope.get("rope_type") or rope.get("type")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if config["model_type"] == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config["original_max_position_embeddings"])
    if kind == "longrope":
        original = config["original_max_position_embeddings"]
        factor = config["max_position_embeddings"] / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(factor) / math.log(original)))
        return {f"rope_factors_{length}.weight": rope[f"{length}_factor"] for length in ("long", "short")}
    if kind == "llama3":
        return {"rope_freqs.weight": llama3_divisors(rope, theta, dim)}
    return {}


def _merged(tensors: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """With the matrices of all experts of a layer stacked: (experts, rows, columns)."""
    merged: dict[str, NDArray[Any]] = {}
    stacks: dict[str, dict[int, NDArray[Any]]] = {}
    for name, array in tensors.items():
        if name.endswith("_blocks"):
            merged[name.removesuffix("_blocks")] = _mxfp4(array, tensors[name.removesuffix("_blocks") + "_scales"])
        elif name.endswith("_scales"):
            continue
        elif found := EXPERT.fullmatch(name):
            where, number, part = found.groups()
            stacks.setdefault(f"{where}.{part}.weight", {})[int(number)] = array
        else:
            merged[name] = array
    return merged | {name: np.stack([stack[x] for x in range(len(stack))]) for name, stack in stacks.items()}


def _mxfp4(blocks: NDArray[np.uint8], scales: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(experts, outputs, bytes): GGUF's blocks are a scale, then bytes of elements i and i + 16, not 2i and 2i + 1."""
    numbers = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, 32)
    packed = np.concatenate([scales[..., None], numbers[..., :16] | numbers[..., 16:] << 4], axis=-1)
    return packed.reshape(*scales.shape[:2], -1)


def _split(name: str, array: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """GPT-OSS: gate and up apart, rows of outputs, names that end like the others'."""
    if name.endswith("sinks"):
        return {name + ".weight": array}
    if not name.endswith(("experts.gate_up_proj", "experts.gate_up_proj_bias", "experts.down_proj_bias", "down_proj")):
        return {name: array}
    stem, biased = name.removesuffix("_bias"), name.endswith("_bias")
    rows = array if biased or array.dtype == np.uint8 else array.swapaxes(-1, -2)
    end = ".bias" if biased else ".weight"
    if stem.endswith("gate_up_proj"):
        stem = stem.removesuffix("gate_up_proj")
        return {f"{stem}gate_proj{end}": rows[:, ::2], f"{stem}up_proj{end}": rows[:, 1::2]}
    return {stem + end: rows}


def _converted(name: str, array: NDArray[Any], config: dict[str, Any]) -> NDArray[Any]:
    """The values that the file holds in place of transformers'."""
    if config["model_type"].startswith("gemma") and name.endswith("norm.weight"):
        return array + np.float32(1)
    if config["model_type"] in INTERLEAVED:
        if ".q_proj." in name:
            return interleave(array, config["num_attention_heads"])
        if ".k_proj." in name:
            return interleave(array, config["num_key_value_heads"])
    return array[0] if name.endswith("shared_expert_gate.weight") else array


def _add_tensor(writer: Any, name: str, array: NDArray[np.float32], dtype: str) -> None:
    kind = gguf.GGMLQuantizationType["MXFP4" if array.dtype == np.uint8 else dtype]
    if array.dtype == np.uint8:
        writer.add_tensor(name, np.ascontiguousarray(array), raw_dtype=kind)
        return
    if array.ndim == 1:
        kind = gguf.GGMLQuantizationType.F32
    elif array.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = gguf.GGMLQuantizationType.F16
    if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        writer.add_tensor(name, np.ascontiguousarray(array, np.float16 if kind.name == "F16" else np.float32))
    else:
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
