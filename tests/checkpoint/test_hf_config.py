"""Hugging Face directories: what config.json means, and refusal of what cannot be right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from ruvllm.checkpoint.hf_config import config_from_directory
from ruvllm.checkpoint.loader import open_checkpoint
from ruvllm.errors import ModelFormatError
from ruvllm.model.config import RopeConfig
from tests.checkpoint.checks import close_to_golden, config_of
from tests.model import tiny

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 40}


@pytest.mark.parametrize(
    ("changes", "rope"),
    [
        ({"rope_theta": ...}, RopeConfig(10000.0)),
        ({"rope_theta": 7}, RopeConfig(7.0)),
        ({"rope_parameters": {"rope_theta": 7.5}}, RopeConfig(7.5)),
        ({"rope_parameters": {"rope_theta": 7.5, "rope_type": "default"}, "rope_theta": 3.0}, RopeConfig(7.5)),
        ({"rope_scaling": None, "rope_parameters": None}, RopeConfig(10000.0)),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, RopeConfig(10000.0, "linear", 4.0)),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, RopeConfig(10000.0, "ntk", 2.0)),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, RopeConfig(10000.0, "linear", 4.0)),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_parameters": {"rope_type": "default"}},
            RopeConfig(10000.0, "linear", 4.0),
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
            RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 40),
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_theta": 5e5},
            RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 40),
        ),
        (
            {
                "rope_scaling": {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": None},
                "max_position_embeddings": 333,
            },
            RopeConfig(10000.0, "llama3", 8.0, 1.0, 4.0, 333),
        ),
    ],
)
def test_every_spelling_of_rotary_parameters(edited, changes, rope):
    assert config_of(edited(**changes)).rope == rope


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (2, ..., (2,)),
        ([5, 2, 5], ..., (5, 2)),
        (None, ..., ()),
        (..., ..., (2,)),  # transformers' default
        (2, {"eos_token_id": 7}, (7,)),
        (2, {"eos_token_id": [7, 8]}, (7, 8)),
        (2, {"eos_token_id": None}, (2,)),
        (2, {}, (2,)),
    ],
)
def test_end_of_generation_tokens(edited, config, generation, expected):
    directory = edited(eos_token_id=config)
    (directory / "generation_config.json").unlink()
    if generation is not ...:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    assert config_of(directory).eos_token_ids == expected


def test_silence_means_what_transformers_means_by_it(edited):
    config = config_of(
        edited(num_key_value_heads=..., rms_norm_eps=..., max_position_embeddings=..., head_dim=None, hidden_act=...)
    )
    assert (config.num_key_value_heads, config.head_dim) == (4, 12)
    assert (config.rms_norm_eps, config.max_position_embeddings) == (1e-6, 2048)
    mistral = config_of(edited("mistral_window", sliding_window=..., max_position_embeddings=...))
    assert (mistral.sliding_window, mistral.max_position_embeddings) == (4096, 131072)
    assert config_of(edited("mistral_window", sliding_window=None)).sliding_window is None
    assert config_of(edited(architectures=...)).num_hidden_layers == 2
    assert config_of(edited(bos_token_id=None)).bos_token_id is None


def test_llama_has_no_window(edited):
    assert config_of(edited(sliding_window=4)).sliding_window is None


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "architectures"),
        ({"architectures": ..., "model_type": "mamba"}, "model_type"),
        ({"architectures": ..., "model_type": ...}, "model_type"),
        ({"architectures": [["LlamaForCausalLM"]]}, "architectures"),
        ({"model_type": "mistral"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"type": "spiral", "factor": 2.0}}, "rope_scaling.rope_type"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": -2.0}}, "rope_scaling.factor"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_parameters.short_factor"),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1], "long_factor": [1]},
             "original_max_position_embeddings": 0},
            "original_max_position_embeddings",
        ),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling.rope_type"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters.rope_type"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": None}}, "rope_scaling.low_freq_factor"),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1}}, "rope_scaling.high_freq_factor"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_theta": 1e300}, "rope_parameters.rope_theta"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"rms_norm_eps": 2.0}, "rms_norm_eps"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"num_attention_heads": True}, "num_attention_heads"),
        ({"head_dim": 11}, "head_dim"),
        ({"hidden_size": 48.0}, "hidden_size"),
        ({"hidden_size": ...}, "hidden_size"),
        ({"vocab_size": None}, "vocab_size"),
        ({"vocab_size": 1 << 40}, "vocab_size"),
        ({"num_hidden_layers": 1 << 31}, "num_hidden_layers"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ({"eos_token_id": "2"}, "eos_token_id"),
        ({"eos_token_id": [2, 97]}, "eos_token_id"),
        ({"bos_token_id": 97}, "bos_token_id"),
    ],
)
def test_a_config_that_cannot_be_right_is_refused_by_name(edited, changes, field):
    directory = edited(**changes)
    (directory / "generation_config.json").unlink()
    with pytest.raises(ModelFormatError) as caught:
        open_checkpoint(directory)
    assert caught.value.field == field
    assert Path(caught.value.path) == directory / "config.json"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ends", [97, [2, 97], [2, -1], "2", [2, True], 10**30])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_bad_end_tokens_are_blamed_on_the_file_that_has_them(edited, name, ends):
    directory = edited(eos_token_id=2)
    (directory / "generation_config.json").write_text("{}")
    (directory / name).write_text(json.dumps({**json.loads((directory / name).read_text()), "eos_token_id": ends}))
    with pytest.raises(ModelFormatError) as caught:
        config_of(directory)
    assert caught.value.path == str(directory / name)
    assert caught.value.field == "eos_token_id"


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{",
        b"\xff\xfe{}",
        b'{"a": ' + b"[" * 100_000,
        b"1" * 5000,
        b'{"eos_token_id": {}}',
        b'{"eos_token_id": NaN}',
    ],
)
def test_damaged_json_is_refused(edited, name, text):
    directory = edited()
    (directory / name).write_bytes(text)
    with pytest.raises(ModelFormatError) as caught:
        open_checkpoint(directory)
    assert Path(caught.value.path) == directory / name


def test_oversized_json_is_not_read(edited):
    directory = edited()
    with open(directory / "config.json", "wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(ModelFormatError, match="file size"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    ("changes", "tensor"),
    [
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight"),  # missing
        ({"num_hidden_layers": 1}, "model.layers.1."),  # too many
        ({"vocab_size": 98}, "model.embed_tokens.weight' shape"),
        ({"intermediate_size": 60}, "model.layers.0.mlp.gate_proj.weight' shape"),
        ({"head_dim": 14}, "model.layers.0.self_attn.q_proj.weight' shape"),
        ({"num_key_value_heads": 2}, "model.layers.0.self_attn.k_proj.weight' shape"),
        ({"attention_bias": True}, "model.layers.0.self_attn.q_proj.bias"),
        ({"mlp_bias": True}, "model.layers.0.mlp.gate_proj.bias"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_refused(edited, changes, tensor):
    with pytest.raises(ModelFormatError) as caught:
        open_checkpoint(edited(**changes))
    assert tensor in caught.value.field


def test_biases_without_their_switch_are_refused(edited):
    with pytest.raises(ModelFormatError, match="proj.bias"):
        open_checkpoint(edited("attention_bias", attention_bias=False))


def resave(directory: Path, **changes: Any) -> Path:
    """Rewrite model.safetensors with tensors added or (None) removed, by name with `__` for dots."""
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    tensors |= {name.replace("__", "."): value for name, value in changes.items()}
    kept = {name: value for name, value in tensors.items() if value is not None}
    safetensors.numpy.save_file(kept, directory / "model.safetensors")
    return directory


def test_rotary_tables_of_old_checkpoints_are_ignored(edited):
    directory = resave(edited(), model__layers__0__self_attn__rotary_emb__inv_freq=np.ones(6, np.float32))
    with open_checkpoint(directory) as checkpoint:
        close_to_golden(checkpoint, "llama2_mha")


def test_a_missing_head_is_refused(edited):
    with pytest.raises(ModelFormatError, match=r"lm_head\.weight.*no such tensor"):
        open_checkpoint(resave(edited(), lm_head__weight=None))


def test_a_head_beside_a_tied_embedding_counts_only_if_it_differs(edited):
    directory = edited(tie_word_embeddings=True)
    assert not config_of(directory).tie_word_embeddings
    with open_checkpoint(directory) as checkpoint:
        close_to_golden(checkpoint, "llama2_mha")
    embedding = tiny.weights("llama2_mha")["model.embed_tokens.weight"]
    with open_checkpoint(resave(directory, lm_head__weight=embedding)) as checkpoint:
        assert checkpoint.config.tie_word_embeddings
        assert "head" not in checkpoint


def test_integer_weights_are_refused(edited):
    weight = np.ones((48, 48), np.int8)
    with pytest.raises(ModelFormatError, match="I8"):
        open_checkpoint(resave(edited(), **{"model__layers__0__self_attn__q_proj__weight": weight}))


def test_rope_parameters_by_layer_type(edited):
    """As transformers merges them: ``rope_scaling`` is that of full layers; windowed ones have a base of their own."""
    gemma = {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "rope_theta": ...,
        "hidden_act": ..., "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "rope_parameters": {"full_attention": {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 3e3}},
    }  # fmt: skip
    config = config_from_directory(edited(**gemma))
    assert config.rope == RopeConfig(5e5, "linear", 8.0) and config.local_rope == RopeConfig(3e3)
    config = config_from_directory(edited(**gemma | {"rope_parameters": {"full_attention": {}}, "rope_scaling": ...}))
    assert config.rope == RopeConfig(1e6) and config.local_rope == RopeConfig(1e4)
