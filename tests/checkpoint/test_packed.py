"""MXFP4 in safetensors, as GPT-OSS has its experts, against the microscaling format's definition."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from ruvllm.checkpoint.groups import load_panels, tensor_groups
from ruvllm.checkpoint.safetensors import open_safetensors
from ruvllm.checkpoint.unpacked import UnpackedFiles
from ruvllm.errors import ModelFormatError
from ruvllm.kernels.quant.panels import take_quant_rows
from tests.checkpoint import test_four_bits
from tests.checkpoint.test_groups import values

NAME = "model.layers.0.mlp.experts.down_proj"
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def experts(shape: tuple[int, ...] = (3, 20, 5)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random blocks (E, N, G, 16) and scales (E, N, G), and their values (E, N, 32 G) in float64."""
    rng = np.random.default_rng(8)
    blocks, scales = rng.integers(0, 256, (*shape, 16), np.uint8), rng.integers(105, 144, shape, np.uint8)
    w = np.empty((*shape, 32))
    for j in range(16):
        w[..., 2 * j] = np.take(E2M1, blocks[..., j] % 16)
        w[..., 2 * j + 1] = np.take(E2M1, blocks[..., j] // 16)
    w *= 2.0 ** (scales[..., None].astype(np.float64) - 127)
    return blocks, scales, w.reshape(*shape[:-1], -1)


def opened(directory: Path, blocks: np.ndarray, scales: np.ndarray, mmap: bool = True) -> UnpackedFiles:
    bias = np.arange(60, dtype=np.float32).reshape(3, 20)
    tensors = {f"{NAME}_blocks": blocks, f"{NAME}_scales": scales, f"{NAME}_bias": bias}
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    return UnpackedFiles(open_safetensors(directory, mmap), directory)


@pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "read"])
def test_experts(mmap: bool, tmp_path: Path) -> None:
    blocks, scales, w = experts()
    files = opened(tmp_path, blocks, scales, mmap)
    assert set(files.tensors) == {NAME, f"{NAME}_bias"}
    merged = files.tensor(NAME)
    assert (merged.shape, merged.dtype) == ((3, 20, 160), "MXFP4")
    np.testing.assert_array_equal(merged.float32(), w.reshape(60, 160))
    np.testing.assert_array_equal(merged.float32(17, 43), w.reshape(60, 160)[17:43])
    for i in range(3):
        expert, bias = merged.expert(i), files.tensor(f"{NAME}_bias").expert(i)
        assert (expert.shape, expert.name, bias.shape) == ((20, 160), f"{NAME}[{i}]", (20,))
        np.testing.assert_array_equal(expert.float32(), w[i])
        np.testing.assert_array_equal(expert.permuted([19, 0, 3]).float32(), w[i][[19, 0, 3]])
        np.testing.assert_array_equal(bias.float32(), np.arange(20 * i, 20 * i + 20)[None])
        expert.release()
        groups, panels = tensor_groups(expert), load_panels(expert)
        assert groups.kind == "int5"
        np.testing.assert_array_equal(values(groups), w[i])
        np.testing.assert_array_equal(take_quant_rows(panels, np.arange(20), np.empty((20, 160), np.float32)), w[i])


def test_two_axes(tmp_path: Path) -> None:
    blocks, scales, w = experts()
    np.testing.assert_array_equal(opened(tmp_path, blocks[1], scales[1]).tensor(NAME).float32(), w[1])


def test_what_is_refused(tmp_path: Path) -> None:
    blocks, scales, _ = experts()
    for bad_blocks, bad_scales, says in (
        (blocks.view(np.int8), scales, "_blocks' type: found I8, expected U8"),
        (blocks, scales.view(np.int8), "_scales' type: found I8, expected U8"),
        (blocks[..., :15].copy(), scales, "_blocks' shape: found (3, 20, 5, 15), expected (any, any, any, 16)"),
        (blocks[0, 0], scales[0, 0], "_blocks' shape: found (5, 16), expected (any, any, 16)"),
        (blocks[:0], scales[:0], "_blocks' shape: found (0, 20, 5, 16)"),
        (blocks, scales[:, :, :4].copy(), "_scales' shape: found (3, 20, 4), expected (3, 20, 5)"),
    ):
        with pytest.raises(ModelFormatError, match=re.escape(says)):
            opened(tmp_path, bad_blocks, bad_scales)
    scales[2, 7, 3] = 255
    merged = opened(tmp_path, blocks, scales).tensor(NAME)
    merged.expert(1).float32()
    with pytest.raises(ModelFormatError, match="_scales' row 47 group 3: found 255, which means NaN"):
        merged.expert(2).float32()


def test_a_model_that_says_it_is_mxfp4(tmp_path: Path) -> None:
    """Of an architecture that is read: one of its matrices in blocks and scales, next to the same one in float32."""
    test_four_bits.model(tmp_path / "plain", tmp_path / "packed", {}, awq=False)
    path = tmp_path / "plain" / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    blocks, scales, w = experts((96, 2))
    scales[:] = 120 + scales % 4
    w = np.take(E2M1, np.stack([blocks % 16, blocks // 16], -1)).reshape(96, 2, 32) * 2.0 ** (scales[..., None] - 127.0)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = w.reshape(96, 64).astype(np.float32)
    safetensors.numpy.save_file(tensors, path)
    del tensors[name]
    tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    safetensors.numpy.save_file(tensors, tmp_path / "packed" / "model.safetensors")
    config = test_four_bits.CONFIG | {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    dtypes = test_four_bits.same_model(tmp_path / "packed", tmp_path / "plain")
    assert dtypes == {"F32": 20, "MXFP4": 1}


def test_one_without_the_other_stays_as_it_is(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"a_blocks": np.zeros((2, 1, 16), np.uint8)}, tmp_path / "model.safetensors")
    assert list(UnpackedFiles(open_safetensors(tmp_path), tmp_path).tensors) == ["a_blocks"]
