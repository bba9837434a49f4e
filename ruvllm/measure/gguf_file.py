"""GGUF files with random weights, for llama.cpp to run; writing them needs the ``gguf`` package.

The vocabulary is made up: the output of such a model is meaningless.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ruvllm.model.config import ModelConfig

GROUP = 32  # weights of a Q4_0 block: a float16 scale, then 16 bytes of two codes each
BLOCK_BYTES = 18
_PRIVATE_USE = 0xF0000  # the first of 65 534 private-use characters of Unicode
_NAMES = {
    "attn_norm": "attn_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "mlp_norm": "ffn_norm",
    "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip


def tensor_names(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """(our name, GGUF's name) of every tensor, in GGUF's order."""
    yield "embed", "token_embd.weight"
    for i in range(config.num_hidden_layers):
        for name in config.layer_shapes():
            yield f"layers.{i}.{name}", f"blk.{i}.{_NAMES[name]}.weight"
    yield "norm", "output_norm.weight"
    if not config.tie_word_embeddings:
        yield "head", "output.weight"


def vocabulary(size: int) -> list[bytes]:
    """A SentencePiece vocabulary of that size: control tokens, all bytes, a space, then private use."""
    pieces = [b"<unk>", b"<s>", b"</s>", *(f"<0x{byte:02X}>".encode() for byte in range(256)), "\u2581".encode()]
    return pieces + [chr(_PRIVATE_USE + i).encode() for i in range(len(pieces), size)]


def start(path: Path, config: ModelConfig, layout: str) -> Any:
    """A GGUFWriter with its header written; call ``write_tensor_data`` for each of ``tensor_names``.

    layout: "q4_0" or "f32" for all matrices; vectors are float32.

    Raises:
        ImportError: the ``gguf`` package is not installed.
        ValueError: a matrix's columns are not a multiple of 32.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType

    shapes = config.tensor_shapes()
    writer = GGUFWriter(path, "llama")
    writer.add_name(f"{config.name} shape, random weights")
    writer.add_file_type(LlamaFileType.MOSTLY_Q4_0 if layout == "q4_0" else LlamaFileType.ALL_F32)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_vocab_size(config.vocab_size)
    pieces = vocabulary(config.vocab_size)
    kinds = [TokenType.UNKNOWN] + 2 * [TokenType.CONTROL] + 256 * [TokenType.BYTE]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([-float(i) for i in range(len(pieces))])
    writer.add_token_types(kinds + (len(pieces) - len(kinds)) * [TokenType.NORMAL])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    for ours, name in tensor_names(config):
        shape = shapes[ours]
        if len(shape) == 2 and shape[1] % GROUP:
            raise ValueError(f"{name}: expected a multiple of {GROUP} columns, found {shape[1]}")
        if len(shape) == 2 and layout == "q4_0":
            packed = (shape[0], shape[1] // GROUP * BLOCK_BYTES)
            dtype = np.dtype(np.uint8)
            writer.add_tensor_info(name, packed, dtype, packed[0] * packed[1], GGMLQuantizationType.Q4_0)
        else:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer


def q4_0(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Rows of Q4_0 blocks (rows, bytes) from codes 0..15 (rows, columns) and bits of scales (rows, groups)."""
    rows = len(codes)
    groups = codes.reshape(rows, -1, GROUP)
    blocks = np.empty((rows, groups.shape[1], BLOCK_BYTES), np.uint8)
    blocks[..., :2] = np.ascontiguousarray(scales)[..., None].view(np.uint8)
    blocks[..., 2:] = groups[..., :16] | groups[..., 16:] << 4
    return blocks.reshape(rows, -1)


def interleaved_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k with RoPE pairs (2i, 2i + 1), as GGUF's llama stores them, from pairs (i, i + D/2)."""
    dim = len(rows) // heads
    return rows.reshape(heads, 2, dim // 2, -1).swapaxes(1, 2).reshape(len(rows), -1)
