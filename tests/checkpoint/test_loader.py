"""open_checkpoint: tiny models in both formats against transformers' logits, and refusal of what cannot be right."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from ruvllm.checkpoint.gguf import GGUFFile
from ruvllm.checkpoint.loader import Checkpoint, open_checkpoint
from ruvllm.checkpoint.names import gguf_name, half_split_rows, hf_name
from ruvllm.errors import ModelFormatError
from ruvllm.model.config import PRESETS, RopeConfig
from tests.model import tiny
from tests.model.reference_llama import inverse_frequencies, reference_logits

# What the reference in float64 may differ by from transformers in float32; a wrong model differs by whole units.
TOLERANCE = 2e-4


def close_to_golden(checkpoint: Checkpoint, case: str) -> None:
    ids, expected = tiny.golden(case)
    found = reference_logits(checkpoint, ids)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    assert (found.argmax(1) == expected.argmax(1)).all()


# ---- what is right -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", tiny.CASES)
def test_directory_computes_what_transformers_computes(case):
    with open_checkpoint(tiny.directory(case)) as checkpoint:
        assert checkpoint.format == "huggingface"
        assert checkpoint.tokenizer_source == checkpoint.path == tiny.directory(case)
        close_to_golden(checkpoint, case)


@pytest.mark.parametrize("case", tiny.CASES)
def test_gguf_of_the_same_weights_is_the_same_model(case, tmp_path):
    path = tiny.write_gguf(case, tmp_path / "model.gguf", tiny.DTYPE.get(case, "F32"))
    with open_checkpoint(path) as ours, open_checkpoint(tiny.directory(case)) as theirs:
        assert ours.format == "gguf"
        assert isinstance(ours.tokenizer_source, GGUFFile)
        assert ours.names() == theirs.names()
        for name in ours.names():
            assert ours.tensor(name).shape == theirs.tensor(name).shape
            np.testing.assert_array_equal(ours.tensor(name).float32(), theirs.tensor(name).float32(), err_msg=name)
        # float32 metadata rounds epsilon; rotary scaling of LLaMA 3 arrives as divisors.
        assert math.isclose(ours.config.rms_norm_eps, theirs.config.rms_norm_eps, rel_tol=1e-7)
        np.testing.assert_allclose(
            inverse_frequencies(ours.config.rope, ours.config.head_dim),
            inverse_frequencies(theirs.config.rope, theirs.config.head_dim),
            rtol=1e-6,
        )
        alike = {"rope": RopeConfig(), "rms_norm_eps": 1e-5}
        assert dataclasses.replace(ours.config, **alike) == dataclasses.replace(theirs.config, **alike)
        close_to_golden(ours, case)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_quantised_rows_come_out_in_half_split_order(dtype, tmp_path):
    case = "mlp_bias_f16"  # 64 wide: whole blocks of 32
    with open_checkpoint(tiny.write_gguf(case, tmp_path / "model.gguf", dtype)) as checkpoint:
        assert dtype in checkpoint.weight_dtypes
        for name in ("embed", "layers.0.q", "layers.1.k", "layers.1.gate"):
            kind = gguf.GGMLQuantizationType[dtype]
            stored = gguf.quants.quantize(tiny.weights(case)[hf_name(name)], kind)
            tensor = checkpoint.tensor(name)
            assert tensor.dtype == dtype
            np.testing.assert_array_equal(tensor.float32(), gguf.quants.dequantize(stored, kind), err_msg=name)
            np.testing.assert_array_equal(tensor.float32(3, 8), tensor.float32()[3:8])


@pytest.mark.parametrize("case", ["attention_bias", "bf16_sharded_tied"])
def test_reading_without_a_map_gives_the_same(case, tmp_path):
    for path in (tiny.directory(case), tiny.write_gguf(case, tmp_path / "model.gguf")):
        with open_checkpoint(path, mmap=False) as read, open_checkpoint(str(path)) as mapped:
            assert read.config == mapped.config
            for name in mapped.names():
                np.testing.assert_array_equal(read.tensor(name).float32(), mapped.tensor(name).float32())


def test_half_split_rows_undo_the_converter():
    rows = np.arange(3 * 14, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(tiny.interleave(rows, 3)[half_split_rows(3, 14)], rows)


def test_configurations_say_what_the_files_say():
    with open_checkpoint(tiny.directory("llama3_scaled_gqa")) as checkpoint:
        config = checkpoint.config
        assert config.rope == RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, original_max_position=40)
        assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 16)
        assert config.hidden_size == 48
        assert (config.bos_token_id, config.eos_token_ids) == (1, (2, 5))
        assert config.name == "llama3_scaled_gqa"
    with open_checkpoint(tiny.directory("linear_rope")) as checkpoint:
        assert checkpoint.config.rope == RopeConfig(20000.0, "linear", 2.5)
        assert checkpoint.config.rms_norm_eps == 1e-2
    with open_checkpoint(tiny.directory("mistral_window")) as checkpoint:
        assert checkpoint.config.sliding_window == 9
    with open_checkpoint(tiny.directory("attention_bias")) as checkpoint:
        assert checkpoint.config.attention_bias
        assert checkpoint.config.attention_out_bias
        assert not checkpoint.config.mlp_bias
        assert "layers.0.o_bias" in checkpoint
    with open_checkpoint(tiny.directory("mlp_bias_f16")) as checkpoint:
        assert checkpoint.config.mlp_bias
        assert not checkpoint.config.attention_bias
        assert checkpoint.weight_dtypes == {"F16": len(checkpoint.names())}
    with open_checkpoint(tiny.directory("bf16_sharded_tied")) as checkpoint:
        assert checkpoint.config.tie_word_embeddings
        assert "head" not in checkpoint
        assert checkpoint.weight_dtypes == {"BF16": len(checkpoint.names())}
        with pytest.raises(KeyError):
            checkpoint.tensor("head")


def test_a_real_file(smollm2_path):
    with open_checkpoint(smollm2_path) as checkpoint:
        preset = PRESETS["smollm2-135m"]
        eps = float(np.float32(preset.rms_norm_eps))
        found = dataclasses.replace(checkpoint.config, name=preset.name)
        assert found == dataclasses.replace(preset, rms_norm_eps=eps)
        assert checkpoint.weight_dtypes == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
        assert list(checkpoint.names()) == list(checkpoint.config.tensor_shapes())


# ---- Hugging Face directories --------------------------------------------------------------------------------------


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """edited(case, key=value, ...): a copy of a case with changes to config.json; `...` deletes a key."""

    def edit(case: str = "llama2_mha", **changes: Any) -> Path:
        directory = shutil.copytree(tiny.directory(case), tmp_path / "model", dirs_exist_ok=True)
        path = directory / "config.json"
        config = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
        return directory

    return edit


def config_of(path: Path) -> Any:
    with open_checkpoint(path) as checkpoint:
        return checkpoint.config


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
        ({"architectures": ["Qwen2ForCausalLM"]}, "architectures"),
        ({"architectures": ..., "model_type": "gemma"}, "model_type"),
        ({"architectures": ..., "model_type": ...}, "model_type"),
        ({"architectures": [["LlamaForCausalLM"]]}, "architectures"),
        ({"model_type": "mistral"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.quant_method"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling.rope_type"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_parameters.rope_type"),
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


# ---- GGUF files ----------------------------------------------------------------------------------------------------


@pytest.fixture
def rewritten(tmp_path: Path) -> Callable[..., Path]:
    """rewritten(case, metadata, tensors): a case as GGUF with changes to either; None deletes."""

    def rewrite(
        metadata: dict[str, Any] | None = None, tensors: dict[str, Any] | None = None, case: str = "llama2_mha"
    ) -> Path:
        original = gguf.GGUFReader(tiny.write_gguf(case, tmp_path / "original.gguf"))
        path = tmp_path / "model.gguf"
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
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return rewrite


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
        ({"tokenizer.ggml.tokens": None}, {"vocab_size": 97}),
        ({"tokenizer.ggml.eot_token_id": 9, "tokenizer.ggml.eom_token_id": 2}, {"eos_token_ids": (2, 9)}),
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
        ({"general.architecture": "qwen2"}, "general.architecture"),
        ({"general.type": "adapter"}, "general.type"),
        ({"split.count": 3}, "split.count"),
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
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type"),
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
        ({"llama.expert_count": 8}, "llama.expert_count"),
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
    assert gguf_name("head") == "output.weight"


# ---- paths ---------------------------------------------------------------------------------------------------------


def test_paths_that_are_not_models(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.gguf"):
        open_checkpoint(tmp_path / "nowhere.gguf")
    with pytest.raises(ModelFormatError, match=r"no config\.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "inside.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelFormatError, match=r"inside\.gguf"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(ModelFormatError, match="pickle"):
        open_checkpoint(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelFormatError, match="the directory"):
        open_checkpoint(tiny.directory("llama2_mha") / "model.safetensors")
    with pytest.raises(ModelFormatError, match="the directory"):
        open_checkpoint(tiny.directory("bf16_sharded_tied") / "model.safetensors.index.json")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelFormatError, match="magic"):
        open_checkpoint(tmp_path / "notes.txt")


def test_a_directory_of_pickles_is_refused(edited):
    directory = edited()
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ModelFormatError):
        open_checkpoint(directory)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_fifo_is_not_waited_for(edited, name):
    directory = edited()
    (directory / name).unlink()
    os.mkfifo(directory / name)
    for path in (directory, directory / name):
        with pytest.raises(ModelFormatError):
            open_checkpoint(path)


# ---- damage of any kind --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def victims(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A GGUF file and a directory to be damaged."""
    root = tmp_path_factory.mktemp("victims")
    return (
        tiny.write_gguf("attention_bias", root / "model.gguf"),
        shutil.copytree(tiny.directory("llama3_scaled_gqa"), root / "directory"),
    )


@given(edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=300)
def test_a_damaged_gguf_header_is_an_error_or_another_model(victims, edits):
    pristine = victims[0].read_bytes()
    damaged = bytearray(pristine)
    header = pristine.index(b"token_embd.weight") + 2000  # metadata and most tensor descriptions
    for place, value in edits:
        damaged[int(place * header)] = value
    path = victims[0].with_name("damaged.gguf")
    path.write_bytes(damaged)
    try:
        open_checkpoint(path, mmap=False).close()
    except ModelFormatError as error:
        assert "\n" not in str(error)


@given(place=st.floats(0, 1, exclude_max=True), text=st.text(alphabet='0123456789-+.eE"{}[]:, truefalsn\\', max_size=6))
@settings(max_examples=300)
def test_a_damaged_config_is_an_error_or_another_model(victims, place, text):
    pristine = (tiny.directory("llama3_scaled_gqa") / "config.json").read_text()
    at = int(place * len(pristine))
    (victims[1] / "config.json").write_text(pristine[:at] + text + pristine[at + len(text) :])
    try:
        open_checkpoint(victims[1]).close()
    except ModelFormatError as error:
        assert "\n" not in str(error)


def test_failing_to_open_leaves_no_file_open(rewritten, edited):
    paths = [rewritten({"llama.block_count": 3}), edited(num_hidden_layers=3)]
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    errors = []  # kept, with the frames that they hold: nothing is left to the garbage collector
    for path in paths:
        for mmap in (True, False):
            with pytest.raises(ModelFormatError) as caught:
                open_checkpoint(path, mmap=mmap)
            errors.append(caught.value)
    after = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    assert after == before
