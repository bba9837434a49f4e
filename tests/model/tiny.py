"""The tiny checkpoints of tests/data/tiny (see make_tiny.py there), and the same weights as GGUF files."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

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
    """Write a case as llama.cpp's converter would: q and k rows interleaved, vectors in F32, matrices in `dtype`.

    `dtype` is the name of a GGUF type ("F32", "F16", "BF16", "Q8_0", ...); a matrix whose rows are not whole blocks
    of it becomes F16.
    """
    config = json.loads((DATA / case / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(case)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_dim)
    if head_dim * heads != config["hidden_size"]:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    _add_rope(writer, config, head_dim)
    add_vocabulary(writer, config["vocab_size"])
    end_ids = config["eos_token_id"]
    if isinstance(end_ids, list):
        writer.add_eot_token_id(end_ids[1])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, array in weights(case).items():
        if ".q_proj." in name:
            array = interleave(array, heads)
        elif ".k_proj." in name:
            array = interleave(array, kv_heads)
        gguf_name = names.get_name(name, (".weight", ".bias"))
        assert gguf_name is not None
        _add_tensor(writer, gguf_name, array, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def interleave(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Half-split to interleaved rows, in the words of llama.cpp's converter."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _add_rope(writer: Any, config: dict[str, Any], head_dim: int) -> None:
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    theta = rope.get("rope_theta") or config["rope_theta"]
    writer.add_rope_freq_base(theta)
    kind = rope.get("rope_type") or rope.get("type")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "llama3":
        writer.add_tensor("rope_freqs.weight", np.array(llama3_divisors(rope, theta, head_dim), np.float32))


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


def vocabulary(size: int) -> list[str]:
    """SentencePiece pieces: control tokens, single characters, then pairs of letters."""
    letters = string.ascii_lowercase
    pieces = ["<unk>", "<s>", "</s>", "▁", *string.ascii_letters, *string.digits, *string.punctuation]
    return (pieces + [a + b for a in letters for b in letters])[:size]


def add_vocabulary(writer: Any, size: int, bos: int = 1, eos: int = 2) -> None:
    """The tokenizer of ``vocabulary``."""
    pieces = vocabulary(size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([-float(i) for i in range(size)])
    writer.add_token_types(
        [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.NORMAL] * (size - 3)]
    )
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(eos)


def _add_tensor(writer: Any, name: str, array: NDArray[np.float32], dtype: str) -> None:
    kind = gguf.GGMLQuantizationType[dtype]
    if array.ndim == 1:
        kind = gguf.GGMLQuantizationType.F32
    elif array.shape[1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = gguf.GGMLQuantizationType.F16
    if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        writer.add_tensor(name, np.ascontiguousarray(array, np.float16 if kind.name == "F16" else np.float32))
    else:
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
