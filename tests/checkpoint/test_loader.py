"""open_checkpoint: tiny models in both formats against transformers' logits; paths and files that are no models."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from ruvllm.checkpoint.gguf import GGUFFile
from ruvllm.checkpoint.loader import open_checkpoint
from ruvllm.checkpoint.names import half_split_rows, hf_name
from ruvllm.errors import ModelFormatError
from ruvllm.model.config import RopeConfig
from ruvllm.model.presets import PRESETS
from ruvllm.model.reference import inverse_frequencies
from tests.checkpoint.checks import close_to_golden
from tests.model import tiny, tiny_gguf

HEAD = "lm_head.weight"


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
        alike = {"rope": RopeConfig(), "rms_norm_eps": 1e-5, "model_type": "llama"}  # GGUF tells no Mistral from LLaMA
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
    np.testing.assert_array_equal(tiny_gguf.interleave(rows, 3)[half_split_rows(3, 14)], rows)


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


def renamed_embedding(directory, tensors, shards):
    """A tied model under the one name that safetensors.torch.save_model leaves: the first of the alphabet."""
    shutil.copy(tiny.directory("bf16_sharded_tied") / "config.json", directory)
    files = [f"model-{n}.safetensors" for n in range(shards)] if shards > 1 else ["model.safetensors"]
    place = {name: files[i % shards] for i, name in enumerate(tensors)}
    for file in files:
        mine = {name: tensors[name] for name in tensors if place[name] == file}
        safetensors.numpy.save_file(mine, directory / file, {"format": "pt", "model.embed_tokens.weight": HEAD})
    if shards > 1:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))


@pytest.mark.parametrize("shards", [1, 3])
def test_a_tied_model_may_store_its_matrix_as_the_head(shards, tmp_path):
    tensors = tiny.weights("bf16_sharded_tied")
    tensors[HEAD] = tensors.pop("model.embed_tokens.weight")
    renamed_embedding(tmp_path, tensors, shards)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config.tie_word_embeddings and "head" not in checkpoint
        np.testing.assert_array_equal(checkpoint.tensor("embed").float32(), tensors[HEAD])
        close_to_golden(checkpoint, "bf16_sharded_tied")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({HEAD: None}, r"tensor 'model\.embed_tokens\.weight': found no such tensor"),
        ({HEAD: np.zeros((3, 5), np.float32)}, r"tensor 'lm_head\.weight' shape: found \(3, 5\)"),
    ],
)
def test_a_tied_model_without_its_matrix_is_refused(change, message, tmp_path):
    tensors = {**tiny.weights("bf16_sharded_tied"), "model.embed_tokens.weight": None, **change}
    renamed_embedding(tmp_path, {name: array for name, array in tensors.items() if array is not None}, 1)
    with pytest.raises(ModelFormatError, match=message):
        open_checkpoint(tmp_path)


def test_an_untied_model_needs_both_matrices(tmp_path):
    tensors = tiny.weights("llama2_mha")
    del tensors["model.embed_tokens.weight"]
    shutil.copy(tiny.directory("llama2_mha") / "config.json", tmp_path)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelFormatError, match=r"tensor 'model\.embed_tokens\.weight': found no such tensor"):
        open_checkpoint(tmp_path)


def test_a_real_file(smollm2_path):
    with open_checkpoint(smollm2_path) as checkpoint:
        preset = PRESETS["smollm2-135m"]
        eps = float(np.float32(preset.rms_norm_eps))
        found = dataclasses.replace(checkpoint.config, name=preset.name)
        assert found == dataclasses.replace(preset, rms_norm_eps=eps)
        assert checkpoint.weight_dtypes == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
        assert list(checkpoint.names()) == list(checkpoint.config.tensor_shapes())


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


# What transformers leaves out of a checkpoint, with a warning


def _with_tensors(directory: Path, **more: np.ndarray) -> Path:
    """A copy of a case with further tensors; "__" is a dot of their names."""
    model = shutil.copytree(tiny.directory("llama2_mha"), directory / "model")
    tensors = safetensors.numpy.load_file(model / "model.safetensors")
    safetensors.numpy.save_file(
        tensors | {name.replace("__", "."): array for name, array in more.items()}, model / "model.safetensors"
    )
    return model


@pytest.mark.parametrize(
    "name",
    [
        "model__layers__0__self_attn__rotary_emb__cos_cached",
        "model__layers__1__self_attn__rotary_emb__sin_cached",
        "model__rotary_emb__original_inv_freq",
        "model__layers__0__self_attn__masked_bias",
        "model__layers__0__self_attn__bias",
        "model__causal_mask",
        "v_head__summary__weight",
        "v_head__summary__bias",
        "value_head__weight",
        "score__weight",
        "rotary_emb__inv_freq",
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.bool_])
def test_tensors_that_no_logit_depends_on_are_left_out(name, dtype, tmp_path, caplog):
    """Whatever their type: transformers 5 loads such files with the same logits."""
    model = _with_tensors(tmp_path, **{name: np.ones((3, 4), dtype)})
    with open_checkpoint(model) as checkpoint:
        close_to_golden(checkpoint, "llama2_mha")
    silent = name.endswith("__inv_freq")  # in every checkpoint of some years
    assert [record.levelname for record in caplog.records] == ([] if silent else ["WARNING"])
    assert silent or name.replace("__", ".") in caplog.text


@pytest.mark.parametrize(
    "name",
    [
        "model__layers__0__self_attn__q_norm__weight",
        "model__layers__0__self_attn__q_proj__bias",
        "model__layers__0__self_attn__q_proj__lora_A__weight",
        "model__layers__2__mlp__up_proj__weight",
        "lm_head__bias",
    ],
)
def test_tensors_that_would_change_the_logits_are_refused(name, tmp_path):
    with pytest.raises(ModelFormatError, match="found an unknown tensor"):
        open_checkpoint(_with_tensors(tmp_path, **{name: np.ones((3, 4), np.float32)}))
