"""GGUF files of the llama architecture: what the metadata means, and refusal of what cannot be right."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from ruvllm.checkpoint.loader import open_checkpoint
from ruvllm.checkpoint.names import GGUF_MODEL
from ruvllm.errors import ModelFormatError
from ruvllm.model.config import RopeConfig
from tests.checkpoint.checks import config_of


@pytest.mark.parametrize(
    ("metadata", "rope"),
    [
        ({"llama.rope.freq_base": None}, RopeConfig(10000.0)),
        ({"llama.rope.freq_base": 500000.0}, RopeConfig(500000.0)),
        ({"llama.rope.freq_base": 500000}, RopeConfig(500000.0)),
        ({"llama.rope.scaling.type": "none"}, RopeConfig()),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, RopeConfig()),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, RopeConfig(1e4, "linear", 4.0)),
        ({"llama.rope.scaling.factor": 4.0}, RopeConfig(1e4, "linear", 4.0)),
        ({"llama.rope.scaling.factor": 0.0}, RopeConfig()),
        ({"llama.rope.scale_linear": 4.0}, RopeConfig(1e4, "linear", 4.0)),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0}, RopeConfig()),
    ],
)
def test_rotary_keys_mean_what_llama_cpp_means_by_them(rewritten, metadata, rope):
    assert config_of(rewritten(metadata)).rope == rope


def test_divisors_and_linear_scaling_multiply(rewritten):
    divisors = np.array([1, 1, 1.5, 3, 8, 8], np.float32)
    tensors = {"rope_freqs.weight": divisors}
    assert config_of(rewritten(None, tensors)).rope == RopeConfig(1e4, "factors", factors=tuple(map(float, divisors)))
    rope = config_of(rewritten({"llama.rope.scale_linear": 2.0}, tensors)).rope
    assert rope.factors == tuple(2 * float(d) for d in divisors)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"llama.attention.head_count_kv": None}, {"num_key_value_heads": 4}),
        ({"llama.attention.sliding_window": 0}, {"sliding_window": None}),
        ({"llama.attention.sliding_window": 7}, {"sliding_window": 7}),
        ({"llama.attention.key_length": 12, "llama.attention.value_length": 12}, {"head_dim": 12}),
        ({"llama.rope.dimension_count": None}, {"head_dim": 12}),
        ({"llama.attention.scale": 1 / math.sqrt(12), "llama.attention.causal": True}, {"head_dim": 12}),
        ({"llama.expert_count": 0, "general.type": "model", "split.count": 1}, {"num_hidden_layers": 2}),
        ({"tokenizer.ggml.tokens": None, "llama.vocab_size": 97}, {"vocab_size": 97}),
        ({"tokenizer.ggml.tokens": None, "llama.vocab_size": None}, {"vocab_size": 97}),
        ({"tokenizer.ggml.eot_token_id": 9, "tokenizer.ggml.eom_token_id": 2}, {"eos_token_ids": (2, 9)}),
        ({"tokenizer.ggml.fim_sep_token_id": 9}, {"eos_token_ids": (2, 9)}),
        ({"tokenizer.ggml.eos_token_id": None, "tokenizer.ggml.bos_token_id": None}, {"eos_token_ids": ()}),
        ({"general.name": None}, {"name": "model"}),
    ],
)
def test_optional_keys(rewritten, metadata, expected):
    config = config_of(rewritten(metadata))
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("metadata", "field"),
    [
        ({"general.architecture": "mamba"}, "general.architecture"),
        ({"general.type": "adapter"}, "general.type"),
        ({"split.count": 3}, "split.no"),
        ({"split.count": "3"}, "split.count"),
        ({"llama.embedding_length": None}, "llama.embedding_length"),
        ({"llama.block_count": None}, "llama.block_count"),
        ({"llama.feed_forward_length": None}, "llama.feed_forward_length"),
        ({"llama.context_length": None}, "llama.context_length"),
        ({"llama.attention.head_count": None}, "llama.attention.head_count"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "llama.attention.layer_norm_rms_epsilon"),
        ({"llama.embedding_length": "48"}, "llama.embedding_length"),
        ({"llama.block_count": 2.0}, "llama.block_count"),
        ({"llama.block_count": True}, "llama.block_count"),
        ({"llama.attention.head_count": [4, 4]}, "llama.attention.head_count"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count"),
        ({"llama.attention.head_count": 5}, "llama.attention.head_count"),
        ({"llama.attention.head_count_kv": 3}, "llama.attention.head_count_kv"),
        ({"llama.attention.head_count_kv": 0}, "llama.attention.head_count_kv"),
        ({"llama.attention.key_length": 13}, "llama.attention.key_length"),
        ({"llama.attention.key_length": 4096}, "llama.attention.key_length"),
        ({"llama.attention.value_length": 8}, "llama.attention.value_length"),
        ({"llama.rope.dimension_count": 6}, "llama.rope.dimension_count"),
        ({"llama.rope.dimension_count": 11}, "llama.rope.dimension_count"),
        ({"llama.rope.scaling.type": "spiral"}, "llama.rope.scaling.type"),
        ({"llama.rope.scaling.type": "longrope"}, "llama.rope.scaling.type"),
        ({"llama.rope.scaling.factor": -2.0}, "llama.rope.scaling.factor"),
        ({"llama.rope.scaling.attn_factor": 1.2}, "llama.rope.scaling.attn_factor"),
        ({"llama.rope.freq_base": math.nan}, "llama.rope.freq_base"),
        ({"llama.rope.freq_base": 0.0}, "llama.rope.freq_base"),
        ({"llama.attention.layer_norm_rms_epsilon": 0.0}, "llama.attention.layer_norm_rms_epsilon"),
        ({"llama.attention.layer_norm_rms_epsilon": math.nan}, "llama.attention.layer_norm_rms_epsilon"),
        ({"llama.attention.scale": 0.5}, "llama.attention.scale"),
        ({"llama.attention.causal": False}, "llama.attention.causal"),
        ({"llama.attention.sliding_window": -1}, "llama.attention.sliding_window"),
        ({"llama.expert_count": 8}, "llama.expert_used_count"),
        ({"llama.block_count": (1 << 31) - 1}, "llama.block_count"),
        ({"llama.embedding_length": (1 << 31) - 8}, "llama.embedding_length"),
        ({"tokenizer.ggml.bos_token_id": 97}, "tokenizer.ggml.bos_token_id"),
        ({"tokenizer.ggml.eot_token_id": 97}, "tokenizer.ggml.eot_token_id"),
        ({"tokenizer.ggml.tokens": [1, 2, 3]}, "tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.tokens": ["a", "b", "c"]}, "tensor 'token_embd.weight' shape"),
        ({"llama.block_count": 3}, "tensor 'blk.2.attn_norm.weight'"),
        ({"llama.block_count": 1}, "tensor 'blk.1."),
        ({"llama.feed_forward_length": 60}, "tensor 'blk.0.ffn_gate.weight' shape"),
    ],
)
def test_metadata_that_cannot_be_right_is_refused_by_name(rewritten, metadata, field):
    path = rewritten(metadata)
    with pytest.raises(ModelFormatError) as caught:
        open_checkpoint(path)
    assert caught.value.field.startswith(field)
    assert Path(caught.value.path) == path
    assert "\n" not in str(caught.value)


def test_a_wrong_value_is_shown_with_its_place_in_the_file(rewritten):
    path = rewritten({"llama.attention.head_count_kv": 3})
    with pytest.raises(ModelFormatError) as caught:
        open_checkpoint(path)
    assert caught.value.offset is not None
    assert path.read_bytes()[caught.value.offset :][:4] == (3).to_bytes(4, "little")


MATRIX, VECTOR = np.ones((48, 48), np.float32), np.ones(48, np.float32)


@pytest.mark.parametrize(
    ("tensors", "field"),
    [
        ({"token_embd.weight": None}, "tensor 'token_embd.weight'"),
        ({"output_norm.weight": None}, "tensor 'output_norm.weight'"),
        ({"blk.1.ffn_up.weight": None}, "tensor 'blk.1.ffn_up.weight'"),
        ({"blk.1.attn_v.weight": MATRIX[:36]}, "tensor 'blk.1.attn_v.weight' shape"),
        ({"blk.0.attn_norm.weight": VECTOR[:47]}, "tensor 'blk.0.attn_norm.weight' shape"),
        ({"blk.0.attn_norm.weight": VECTOR[None]}, "tensor 'blk.0.attn_norm.weight' shape"),
        ({"output.weight": MATRIX}, "tensor 'output.weight' shape"),
        ({"blk.0.attn_q.bias": VECTOR}, "tensor 'blk.0.attn_k.bias'"),  # all three, in all layers
        ({"blk.1.attn_output.bias": VECTOR}, "tensor 'blk.1.attn_output.bias'"),
        ({"blk.0.attn_q_norm.weight": VECTOR}, "tensor 'blk.0.attn_q_norm.weight'"),
        ({"blk.0.ffn_gate_inp.weight": MATRIX}, "tensor 'blk.0.ffn_gate_inp.weight'"),
        ({"rope_freqs.weight": VECTOR}, "tensor 'rope_freqs.weight'"),
        ({"rope_freqs.weight": MATRIX}, "tensor 'rope_freqs.weight' shape"),
        ({"rope_freqs.weight": np.array([1, 1, 0, 1, 1, 1], np.float32)}, "tensor 'rope_freqs.weight'[2]"),
        ({"rope_freqs.weight": np.array([1, np.nan, 1, 1, 1, 1], np.float32)}, "tensor 'rope_freqs.weight'[1]"),
    ],
)
def test_tensors_that_do_not_fit_the_metadata_are_refused(rewritten, tensors, field):
    with pytest.raises(ModelFormatError) as caught:
        open_checkpoint(rewritten(None, tensors))
    assert caught.value.field == field


def test_a_head_of_its_own_or_the_embedding(rewritten):
    path = rewritten(None, {"output.weight": None})
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config.tie_word_embeddings
        assert "head" not in checkpoint
    assert GGUF_MODEL["head"] == "output.weight"
