"""ModelConfig: real models' figures, sizes of tensors, refusal of the impossible."""

from __future__ import annotations

import dataclasses
import math
import pickle
from typing import Any

import numpy as np
import pytest

from ruvllm.errors import RuvllmError
from ruvllm.kernels.attention.tile import CHUNK
from ruvllm.kernels.matmul.micro_kernels import LANES
from ruvllm.model import kv_size
from ruvllm.model.config import FULL, SLIDING, ConfigError, ExpertsConfig, ModelConfig, RopeConfig
from ruvllm.model.kv_cache import KVCache
from ruvllm.model.presets import PRESETS

SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 50, "intermediate_size": 67, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10,
}  # fmt: skip


def small(**changes: Any) -> ModelConfig:
    return ModelConfig(**{**SMALL, **changes})


# Parameter counts as published with the models' weights (sum of the elements of all tensors in the checkpoints).
@pytest.mark.parametrize(
    ("name", "parameters", "gigabytes"),
    [
        ("llama2-7b", 6_738_415_616, 13.48),
        ("llama2-13b", 13_015_864_320, 26.03),
        ("llama3-8b", 8_030_261_248, 16.06),
        ("mistral-7b", 7_241_732_096, 14.48),
        ("smollm2-135m", 134_515_008, 0.27),
    ],
)
def test_preset_sizes_are_those_of_the_real_models(name, parameters, gigabytes):
    estimate = PRESETS[name].memory_estimate()
    assert PRESETS[name].parameter_count() == estimate.parameters == parameters
    assert round(estimate.fp16 / 1e9, 2) == gigabytes


def mixture(vocab: int, hidden: int, layers: int, heads: int, kv_heads: int, **experts: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=experts["intermediate_size"], num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=128, experts=ExpertsConfig(**experts),
    )  # fmt: skip


# As published: 46.7 B parameters, 12.9 B active; 30.5 B and 3.3 B; 20.9 B and 3.6 B (with the embedding 4.2 B).
MIXTRAL = mixture(32000, 4096, 32, 32, 8, count=8, per_token=2, intermediate_size=14336)
QWEN3_30B = dataclasses.replace(
    mixture(151936, 2048, 48, 32, 4, count=128, per_token=8, intermediate_size=768), qk_norm="head"
)
GPT_OSS_20B = dataclasses.replace(
    mixture(201088, 2880, 24, 64, 8, count=32, per_token=4, intermediate_size=2880, bias=True), head_dim=64,
    attention_bias=True, attention_out_bias=True, attention_sinks=True, sliding_window=128,
    layer_types=(SLIDING, FULL) * 12,
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "parameters", "active"),
    [
        (MIXTRAL, 46_702_792_704, 46_702_792_704 - 32 * 6 * 3 * 4096 * 14336),
        (QWEN3_30B, 30_532_122_624, 30_532_122_624 - 48 * 120 * 3 * 2048 * 768),
        (GPT_OSS_20B, 20_914_757_184, 20_914_757_184 - 24 * 28 * (3 * 2880 * 2880 + 3 * 2880)),
    ],
)  # fmt: skip
def test_mixtures_have_the_published_numbers_of_parameters(config, parameters, active):
    estimate = config.memory_estimate()
    assert estimate.parameters == config.parameter_count() == parameters
    assert estimate.active == config.active_parameter_count() == active


GEMMA3_270M = ModelConfig(
    vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
    num_key_value_heads=1, head_dim=256, tie_word_embeddings=True, norms="both", qk_norm="head", sliding_window=512,
    layer_types=(*(SLIDING,) * 5, FULL) * 3,
)  # fmt: skip


def test_gemma3_270m_by_hand():
    """The head is the embedding; 18 layers with norms of q and k and four others; 15 of them see 512 tokens."""
    E, F = 640, 2048
    layer = 4 * E + 2 * 256 + 1024 * E + 2 * 256 * E + E * 1024 + 3 * E * F
    assert GEMMA3_270M.parameter_count() == GEMMA3_270M.active_parameter_count() == 262144 * E + 18 * layer + E
    assert GEMMA3_270M.parameter_count() == 268_098_176  # as in the model's files
    # A key and a value of 256: of all tokens in 3 layers, of the window and a pass of 132, in blocks of 256, in 15.
    # In float32 a block of the 15 layers is 7.5 MiB, rounded up to huge pages of 2.
    assert kv_size.cache_bytes(GEMMA3_270M, 32768) == 4 * 512 * 3 * 32768 + 3 * (8 << 20)
    assert kv_size.cache_bytes(GEMMA3_270M, 32768, "f16") == 2 * 512 * (3 * 32768 + 15 * 768)
    assert kv_size.cache_bytes(GEMMA3_270M, 32768, "int8") == (512 + 8) * (3 * 32768 + 15 * 768)
    assert kv_size.cache_bytes(GEMMA3_270M, 500, "f16") == 2 * 512 * 18 * 512  # before the windows are full


def test_kv_cache_of_a_thousand_tokens():
    # LLaMA2-7B: keys and values of 32 layers, 4096 wide; LLaMA3-8B and Mistral share eight heads of 128. Positions
    # come in blocks of 256.
    kv = {name: kv_size.cache_bytes(PRESETS[name], 1000, "f16") for name in PRESETS}
    assert kv["llama2-7b"] == 1024 * 2 * 32 * 4096 * 2
    assert kv["llama3-8b"] == kv["mistral-7b"] == 1024 * 2 * 32 * 1024 * 2
    # Beyond its window Mistral forgets: 4096 positions and a pass of 132, in blocks of 256.
    assert kv_size.cache_bytes(PRESETS["mistral-7b"], 32768, "f16") == 4352 * 2 * 32 * 1024 * 2


@pytest.mark.parametrize("kv", ["f32", "f16", "int8"])
def test_sizes_of_caches_are_those_of_their_buffers(kv):
    assert (kv_size.BLOCK, kv_size.CHUNK) == (LANES, CHUNK)
    for head_dim in (2, 18, 64):
        for window, types in ((None, ()), (37, ()), (300, (SLIDING, FULL, SLIDING))):
            config = small(head_dim=head_dim, sliding_window=window, layer_types=types)
            for tokens in (1, 17, 1000):
                assert kv_size.cache_bytes(config, tokens, kv) == KVCache(config, tokens, kv).nbytes


@pytest.mark.parametrize("config", [small(mlp_bias=True, attention_bias=True), PRESETS["smollm2-135m"]])
def test_quantised_sizes_count_every_scale(config):
    expected = {8: 0, 4: 0}
    for shape in config.tensor_shapes().values():
        for bits in expected:
            if len(shape) == 1:
                expected[bits] += np.zeros(shape, np.float16).nbytes
                continue
            for start in range(0, shape[1], 32):
                columns = min(32, shape[1] - start)
                expected[bits] += shape[0] * 2  # a float16 scale for each row's group
                if bits == 8:
                    expected[bits] += shape[0] * columns
            if bits == 4:
                expected[bits] += shape[0] * math.ceil(shape[1] / 2)
    estimate = config.memory_estimate()
    assert (estimate.int8, estimate.int4) == (expected[8], expected[4])


def test_tensor_shapes_of_a_model_with_everything():
    config = small(attention_bias=True, attention_out_bias=True, mlp_bias=True)
    shapes = config.tensor_shapes()
    assert shapes["embed"] == shapes["head"] == (97, 50)
    assert shapes["layers.2.q"] == (60, 50)
    assert shapes["layers.0.k"] == shapes["layers.0.v"] == (30, 50)
    assert shapes["layers.1.o"] == (50, 60)
    assert shapes["layers.1.gate"] == shapes["layers.1.up"] == (67, 50)
    assert shapes["layers.1.down"] == (50, 67)
    assert shapes["layers.0.q_bias"] == (60,)
    assert shapes["layers.0.o_bias"] == shapes["layers.0.down_bias"] == shapes["norm"] == (50,)
    assert len(shapes) == 3 + 3 * 16
    assert config.parameter_count() == sum(np.zeros(shape).size for shape in shapes.values())


def test_switches_add_and_remove_their_tensors():
    plain = set(small().tensor_shapes())
    assert plain - set(small(tie_word_embeddings=True).tensor_shapes()) == {"head"}
    extra = set(small(attention_bias=True).tensor_shapes()) - plain
    assert extra == {f"layers.{i}.{x}_bias" for i in range(3) for x in "qkv"}
    extra = set(small(mlp_bias=True).tensor_shapes()) - plain
    assert extra == {f"layers.{i}.{x}_bias" for i in range(3) for x in ("gate", "up", "down")}


@pytest.mark.parametrize("name", list(SMALL))
@pytest.mark.parametrize("bad", [0, -1, 1 << 62, 2.0, True, None, "8"])
def test_sizes_are_positive_integers_of_this_world(name, bad):
    with pytest.raises(ValueError, match=name) as caught:
        small(**{name: bad})
    assert isinstance(caught.value, ConfigError)
    assert caught.value.field == name
    assert repr(bad) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_key_value_heads": 4}, "num_key_value_heads"),  # does not divide 6
        ({"num_key_value_heads": 12}, "num_key_value_heads"),
        ({"head_dim": 9}, "head_dim"),
        ({"head_dim": 1026}, "head_dim"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"max_position_embeddings": 0}, "max_position_embeddings"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"sliding_window": -4}, "sliding_window"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"attention_bias": None}, "attention_bias"),
        ({"bos_token_id": 97}, "bos_token_id"),
        ({"bos_token_id": -1}, "bos_token_id"),
        ({"eos_token_ids": (2, 97)}, "eos_token_ids"),
        ({"eos_token_ids": 2}, "eos_token_ids"),
        ({"eos_token_ids": (True,)}, "eos_token_ids"),
        ({"rope": None}, "rope"),
        ({"rope": RopeConfig(scaling="factors", factors=(1.0,) * 4)}, "rope.factors"),  # head_dim 10 has 5 pairs
        ({"rope": RopeConfig(scaling="ntk", factor=2.0), "head_dim": 2}, "rope.scaling"),
    ],
)
def test_impossible_configurations_name_the_field(changes, field):
    with pytest.raises(ConfigError) as caught:
        small(**changes)
    assert caught.value.field == field
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, RuvllmError)
    assert "\n" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"theta": math.nan}, "rope.theta"),
        ({"theta": 0.0}, "rope.theta"),
        ({"theta": math.inf}, "rope.theta"),
        ({"scaling": "spiral"}, "rope.scaling"),
        ({"scaling": "linear", "factor": 0.0}, "rope.factor"),
        ({"scaling": "linear", "factor": math.nan}, "rope.factor"),
        ({"scaling": "llama3", "low_freq_factor": 4.0}, "rope.high_freq_factor"),
        ({"scaling": "llama3", "low_freq_factor": -1.0}, "rope.low_freq_factor"),
        ({"scaling": "llama3", "original_max_position": 0}, "rope.original_max_position"),
        ({"scaling": "factors"}, "rope.factors"),
        ({"factors": (1.0,)}, "rope.factors"),
        ({"scaling": "factors", "factors": (1.0, math.nan)}, "rope.factors[1]"),
        ({"scaling": "factors", "factors": (0.0,)}, "rope.factors[0]"),
    ],
)
def test_impossible_rotary_embeddings_name_the_field(values, field):
    with pytest.raises(ConfigError) as caught:
        RopeConfig(**values)
    assert caught.value.field == field


def test_a_configuration_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        small().hidden_size = 3
    assert dataclasses.replace(small(), num_hidden_layers=1).parameter_count() < small().parameter_count()
