"""Adapters on disk: what PEFT wrote is read, what we write is what PEFT would; GGUF; and all that is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.numpy

from ruvllm.checkpoint.adapters import load_adapter, save_adapter
from ruvllm.checkpoint.loader import open_checkpoint
from ruvllm.errors import ModelFormatError
from ruvllm.model.config import ModelConfig
from ruvllm.model.lora import LoraAdapter, LoraConfig
from tests.model import tiny, tiny_gguf

GOLDEN = Path(__file__).parents[1] / "data" / "lora"
CASE = "llama3_scaled_gqa"
Q = "base_model.model.model.layers.1.self_attn.q_proj"


def config_of(case: str) -> ModelConfig:
    with open_checkpoint(tiny.directory(case)) as checkpoint:
        return checkpoint.config


@pytest.mark.parametrize("case", sorted(path.name for path in GOLDEN.iterdir()))
def test_what_peft_wrote_is_read_and_written_alike(case: str, tmp_path: Path) -> None:
    model = config_of(case)
    adapter = load_adapter(GOLDEN / case, model)
    expected = safetensors.numpy.load_file(GOLDEN / case / "adapter_model.safetensors")
    settings = json.loads((GOLDEN / case / "adapter_config.json").read_text())
    name = Q.replace(".1.", ".0.")
    np.testing.assert_array_equal(adapter.a["layers.0.q"], expected[f"{name}.lora_A.weight"].T)
    np.testing.assert_array_equal(adapter.b["layers.0.q"], expected[f"{name}.lora_B.weight"].T)
    assert (adapter.config.rank, adapter.config.alpha) == (settings["r"], settings["lora_alpha"])

    save_adapter(adapter, tmp_path / "saved", model, base=case)
    written = safetensors.numpy.load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert written.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(written[key], array)
    ours = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    for key, value in ours.items():
        assert (sorted(value) if key == "target_modules" else value) == (
            sorted(settings[key]) if key == "target_modules" else settings[key]
        ), key
    again = load_adapter(tmp_path / "saved", model)
    np.testing.assert_array_equal(again.parameters, adapter.parameters)
    assert again.config == adapter.config
    assert not list((tmp_path / "saved").glob(".*")), "nothing is left behind"


def test_some_layers_and_some_modules(tmp_path: Path) -> None:
    model = config_of(CASE)
    adapter = LoraAdapter(model, LoraConfig(2, targets=("v", "down")), names=("layers.1.v", "layers.1.down"))
    save_adapter(adapter, tmp_path, model)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["layers_to_transform"] == [1]
    assert load_adapter(tmp_path, model).names == ("layers.1.v", "layers.1.down")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_gguf_adapters(dtype: Any, tmp_path: Path) -> None:
    """As llama.cpp's convert_lora_to_gguf.py writes them: rows of q and k interleaved, alpha in the metadata."""
    model = config_of(CASE)
    expected = load_adapter(GOLDEN / CASE, model)
    path = write_gguf(tmp_path / "adapter.gguf", dtype)
    got = load_adapter(path, model)
    assert got.names == expected.names
    assert (got.config.rank, got.config.alpha, got.config.targets) == (3, 6.0, expected.config.targets)
    np.testing.assert_array_equal(got.parameters, expected.parameters.astype(dtype).astype(np.float32))


def write_gguf(
    path: Path, dtype: Any = np.float32, alpha: float | None = 6.0, kind: str = "adapter", **more: Any
) -> Path:
    """The golden adapter as GGUF; ``more``: keys after "adapter.", and their values."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(kind)
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for key, value in {"type": "lora", **more}.items():
        if isinstance(value, list):
            writer.add_array(f"adapter.{key}", value)
        elif value is not None:
            writer.add_string(f"adapter.{key}", value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for key, array in safetensors.numpy.load_file(GOLDEN / CASE / "adapter_model.safetensors").items():
        stem, part, _ = key.removeprefix("base_model.model.").rsplit(".", 2)
        if part == "lora_B" and "q_proj" in stem:
            array = tiny_gguf.interleave(array, 4)
        elif part == "lora_B" and "k_proj" in stem:
            array = tiny_gguf.interleave(array, 2)
        writer.add_tensor(f"{names.get_name(stem)}.weight.{part.lower()}", np.ascontiguousarray(array, dtype))
    tiny_gguf.finish(writer)
    return path


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of a golden adapter, to be damaged."""
    return Path(shutil.copytree(GOLDEN / CASE, tmp_path / "adapter"))


def change(directory: Path, **values: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refused(path: Path, message: str, case: str = CASE) -> None:
    with pytest.raises(ModelFormatError, match=message):
        load_adapter(path, config_of(case))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank_pattern": {"q_proj": 4}}, 'rank_pattern: found {"q_proj": 4}, expected {}: no other is supported'),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"use_dora": True}, "use_dora: found true"),
        (
            {"alora_invocation_tokens": [5, 6]},
            r"alora_invocation_tokens: found \[5, 6\], expected \[\]",
        ),
        ({"use_newest_idea": {"depth": 2}}, r'use_newest_idea: found {"depth": 2}, expected a known setting'),
        ({"bias": "all"}, 'bias: found "all", expected "none"'),
        ({"peft_type": "IA3"}, 'peft_type: found "IA3"'),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: found pissa_niter_4"),
        ({"lora_alpha": 0}, "alpha: expected a finite number above 0, found 0"),
        ({"lora_alpha": "8"}, "lora_alpha: found '8'"),
        ({"r": 0}, "rank: expected 1 to 1024, found 0"),
        ({"r": 4}, r"lora_A of layers\..* shape: found \(3, 4\d\), expected \(4, 4\d\): rank 4"),
    ],
)
def test_settings(values: dict, message: str, copy: Path) -> None:
    change(copy, **values)
    refused(copy, message)


def test_tensors(copy: Path) -> None:
    path = copy / "adapter_model.safetensors"
    sound = safetensors.numpy.load_file(path)

    def with_tensors(**changes: Any) -> None:
        tensors = {k: v for k, v in {**sound, **changes}.items() if v is not None}
        safetensors.numpy.save_file(tensors, path)

    nan = sound[f"{Q}.lora_A.weight"].copy()
    nan[1, 2] = np.nan
    with_tensors(**{f"{Q}.lora_A.weight": nan})
    refused(copy, r"q_proj\.lora_A\.weight': found NaN or infinity")
    with_tensors(**{f"{Q}.lora_B.weight": None})
    refused(copy, r"lora_B of layers\.1\.q: found no such tensor")
    with_tensors(**{"base_model.model.lm_head.lora_A.weight": nan})
    refused(copy, r"lm_head\.lora_A\.weight': found a tensor for no matrix of this model")
    with_tensors(**{f"{Q}.lora_A.weight": nan[0]})
    refused(copy, "expected a matrix")
    safetensors.numpy.save_file({}, path)
    refused(copy, "tensors: found none")
    path.write_bytes(path.read_bytes()[:5])
    refused(copy, "header length")


def test_another_base_model(copy: Path) -> None:
    refused(copy, r"shape: found .* and the base model's matrix is", case="mistral_window")
    refused(GOLDEN / "bf16_sharded_tied", "a tensor for no matrix of this model", case=CASE)  # a layer more


def test_files(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_adapter(tmp_path / "none", config_of(CASE))
    (copy / "adapter_config.json").write_text("{")
    refused(copy, "no JSON")
    (copy / "adapter_config.json").unlink()
    refused(copy, "no adapter_config.json")
    pickled = Path(shutil.copytree(GOLDEN / CASE, tmp_path / "pickled"))
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    refused(pickled, "adapter_model.bin, a pickle, which can run code")


def test_settings_without_effect(copy: Path, tmp_path: Path) -> None:
    expected = load_adapter(copy, config_of(CASE)).parameters
    change(copy, use_newest_idea=None, another=False, use_dora=None, eva_config={"rho": 2.0}, megatron_core="x")
    np.testing.assert_array_equal(load_adapter(copy, config_of(CASE)).parameters, expected)
    shown: dict[str, Any] = {"lora.task_name": "chat", "lora.prompt_prefix": "Be kind.", "newest.idea": ""}
    path = write_gguf(tmp_path / "adapter.gguf", **shown)
    np.testing.assert_array_equal(load_adapter(path, config_of(CASE)).parameters, expected)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"alora.invocation_tokens": [5, 6]},
            r"adapter\.alora\.invocation_tokens: found \[5, 6\], expected \[\]: no other is supported",
        ),
        ({"type": "loha"}, r'adapter\.type: found "loha", expected "lora"'),
        ({"type": None}, r"adapter\.type: found no such key"),
        ({"newest.idea": "yes"}, r'adapter\.newest\.idea: found "yes", expected a known setting'),
    ],
)
def test_gguf_settings(more: dict, message: str, tmp_path: Path) -> None:
    refused(write_gguf(tmp_path / "adapter.gguf", **more), message)


def test_gguf_files(tmp_path: Path) -> None:
    refused(write_gguf(tmp_path / "0.gguf", alpha=0.0), "alpha: expected a finite number above 0")
    refused(write_gguf(tmp_path / "none.gguf", alpha=None), "adapter.lora.alpha: found no such key")
    refused(write_gguf(tmp_path / "model.gguf", kind="model"), "general.type: found model")
    refused(tiny.write_gguf("llama2_mha", tmp_path / "whole.gguf"), "expected a GGUF file of a LoRA adapter")
