"""Write a GGUF file of LLaMA-2-7B's shape with random Q4_0 weights: its speed is that of the real model.

python -m benchmarks.make_7b [FILE]     (3.8 GB; default: in the cache directory, where benchmarks.peers looks)

Needs the ``gguf`` package (of the test extra). Codes are uniform, scales such that activations neither vanish nor
overflow; the vocabulary is made up. What the model says means nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ruvllm.model.config import PRESETS, ModelConfig

SEVEN_B = PRESETS["llama2-7b"]
GROUP = 32  # weights of a Q4_0 block: a float16 scale, then 16 bytes of two codes each
BLOCK_BYTES = 18
PRIVATE_USE = 0xF0000  # Unicode's first of 65 534 characters that mean nothing
CODE_DEVIATION = 4.61  # standard deviation of the integers -8 .. 7, all equally likely


def tensor_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes (rows, columns) in GGUF's order; vectors have one axis."""
    E, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    yield "token_embd.weight", (V, E)
    for i in range(config.num_hidden_layers):
        yield f"blk.{i}.attn_norm.weight", (E,)
        yield f"blk.{i}.attn_q.weight", (queries, E)
        yield f"blk.{i}.attn_k.weight", (keys, E)
        yield f"blk.{i}.attn_v.weight", (keys, E)
        yield f"blk.{i}.attn_output.weight", (E, queries)
        yield f"blk.{i}.ffn_norm.weight", (E,)
        yield f"blk.{i}.ffn_gate.weight", (F, E)
        yield f"blk.{i}.ffn_up.weight", (F, E)
        yield f"blk.{i}.ffn_down.weight", (E, F)
    yield "output_norm.weight", (E,)
    yield "output.weight", (V, E)


def random_blocks(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Q4_0 rows (rows, bytes) uint8 whose weights have the standard deviation 1 / sqrt(columns)."""
    blocks = np.frombuffer(rng.bytes(rows * columns // GROUP * BLOCK_BYTES), np.uint8).reshape(-1, BLOCK_BYTES).copy()
    scale = 1 / (CODE_DEVIATION * np.sqrt(columns))
    scales = rng.uniform(0.5 * scale, 1.3 * scale, len(blocks)).astype(np.float16)
    blocks[:, :2] = scales[:, None].view(np.uint8)
    return blocks.reshape(rows, -1)


def vocabulary(size: int) -> list[bytes]:
    """A SentencePiece vocabulary of that size: control tokens, all bytes, a space, then private use."""
    pieces = [b"<unk>", b"<s>", b"</s>", *(f"<0x{byte:02X}>".encode() for byte in range(256)), "\u2581".encode()]
    return pieces + [chr(PRIVATE_USE + i).encode() for i in range(len(pieces), size)]


def write(path: Path, config: ModelConfig, seed: int = 0, progress: bool = True) -> None:
    """Write the file, a tensor at a time.

    Raises:
        ValueError: a matrix has columns that are no multiple of 32.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType

    shapes = dict(tensor_shapes(config))
    for name, shape in shapes.items():
        if len(shape) == 2 and shape[1] % GROUP:
            raise ValueError(f"{name}: expected a multiple of {GROUP} columns, found {shape[1]}")
    writer = GGUFWriter(path, "llama")
    writer.add_name(f"{config.name} shape, random weights")
    writer.add_file_type(LlamaFileType.MOSTLY_Q4_0)
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
    for name, shape in shapes.items():
        if len(shape) == 2:
            packed = (shape[0], shape[1] // GROUP * BLOCK_BYTES)
            dtype = np.dtype(np.uint8)
            writer.add_tensor_info(name, packed, dtype, packed[0] * packed[1], GGMLQuantizationType.Q4_0)
        else:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * shape[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(seed)
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    with tqdm(total=total, desc=f"writing {path.name}", unit="", unit_scale=True, disable=not progress) as bar:
        for shape in shapes.values():
            writer.write_tensor_data(random_blocks(rng, *shape) if len(shape) == 2 else np.ones(shape, np.float32))
            bar.update(int(np.prod(shape)))
    writer.close()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        write(Path(sys.argv[1]), SEVEN_B)
    else:
        from benchmarks._files import seven_b

        print(seven_b())
