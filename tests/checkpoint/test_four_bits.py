"""GPTQ and AWQ directories against the formula, w = s (q - z), packed here as the formats define it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from ruvllm.checkpoint.groups import load_panels, tensor_groups
from ruvllm.checkpoint.loader import open_checkpoint
from ruvllm.checkpoint.safetensors import open_safetensors
from ruvllm.checkpoint.tensor import Tensor
from ruvllm.checkpoint.unpacked import UnpackedFiles
from ruvllm.errors import ModelFormatError
from ruvllm.kernels.quant.panels import take_quant_rows
from ruvllm.model.reference import reference_logits
from tests.checkpoint.test_groups import half, half_step, values
from tests.model import tiny

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
ROWS, COLUMNS = 24, 192
GROUP_SIZES = pytest.mark.parametrize("size", [32, 64, 128, -1])  # 128: the second group is half as long
BOTH_WAYS = pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "read"])
Arrays = dict[str, np.ndarray]


class Matrix:
    """A random matrix of 4-bit codes q (N, K) in groups; scales s and zero points z (G, N); its values in float64."""

    def __init__(self, size: int, symmetric: bool, rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        size = columns if size == -1 else size
        groups = -(-columns // size)
        self.q = rng.integers(0, 16, (rows, columns))
        self.z = np.full((groups, rows), 8) if symmetric else rng.integers(1, 16, (groups, rows))
        self.s = (rng.uniform(0.5, 1.5, (groups, rows)) / 200).astype(np.float16)
        self.g = np.arange(columns) // size

    @property
    def w(self) -> np.ndarray:
        w: np.ndarray = np.empty(self.q.shape)
        for n in range(len(w)):
            for k in range(len(w[n])):
                w[n, k] = float(self.s[self.g[k], n]) * (int(self.q[n, k]) - int(self.z[self.g[k], n]))
        return w

    def gptq(self, name: str = "t", offset: int = 1) -> Arrays:
        rows, columns = self.q.shape
        qweight, qzeros = np.zeros((columns // 8, rows), np.uint32), np.zeros((len(self.z), rows // 8), np.uint32)
        for k in range(columns):
            qweight[k // 8] |= (self.q[:, k] << (4 * (k % 8))).astype(np.uint32)
        for n in range(rows):
            qzeros[:, n // 8] |= (((self.z[:, n] - offset) & 15) << (4 * (n % 8))).astype(np.uint32)
        return self._named(name, qweight, qzeros) | {f"{name}.g_idx": self.g.astype(np.int32)}

    def awq(self, name: str = "t") -> Arrays:
        rows, columns = self.q.shape
        qweight, qzeros = np.zeros((columns, rows // 8), np.uint32), np.zeros((len(self.z), rows // 8), np.uint32)
        for word in range(rows // 8):
            for i, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                qweight[:, word] |= (self.q[8 * word + output] << (4 * i)).astype(np.uint32)
                qzeros[:, word] |= (self.z[:, 8 * word + output] << (4 * i)).astype(np.uint32)
        return self._named(name, qweight, qzeros)

    def _named(self, name: str, qweight: np.ndarray, qzeros: np.ndarray) -> Arrays:
        arrays: Arrays = {"qweight": qweight.view(np.int32), "qzeros": qzeros.view(np.int32), "scales": self.s}
        return {f"{name}.{part}": array for part, array in arrays.items()}


def write(directory: Path, tensors: Arrays, settings: dict[str, Any], **config: Any) -> Path:
    (directory / "config.json").write_text(json.dumps({"quantization_config": settings, **config}))
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    return directory


def opened(directory: Path, tensors: Arrays, settings: dict[str, Any], mmap: bool = True) -> Tensor:
    files = UnpackedFiles(open_safetensors(write(directory, tensors, settings), mmap), directory)
    assert list(files.tensors) == ["t.weight"]
    return files.tensor("t.weight")


def check(tensor: Tensor, matrix: Matrix, dtype: str) -> None:
    """The values are those of the formula; the integer layouts keep what they are said to."""
    w = matrix.w
    assert (tensor.shape, tensor.dtype, tensor.name) == (w.shape, dtype, "t.weight")
    np.testing.assert_array_equal(tensor.float32(), w)
    for lo, hi in ((0, 1), (3, 21), (8, 16), (17, 17), (9, 24)):
        np.testing.assert_array_equal(tensor.float32(lo, hi), w[lo:hi])
    order = np.random.default_rng(3).permutation(len(w))
    np.testing.assert_array_equal(tensor.permuted(order).float32(), w[order])
    tensor.release()
    groups, panels = tensor_groups(tensor), load_panels(tensor)
    unpacked = take_quant_rows(panels, np.arange(len(w)), np.empty(w.shape, np.float32))
    found = values(groups)
    np.testing.assert_allclose(unpacked, found, rtol=1e-6, atol=1e-7)
    error = np.abs(found - w).reshape(*groups.scales.shape, 32)
    if dtype == "Q4_0":
        assert groups.kind == "int4" and groups.mins is None and not error.any()
    elif dtype == "Q4_Z":
        assert groups.kind == "int4" and groups.mins is not None
        np.testing.assert_array_equal(groups.codes, matrix.q)
        assert (error <= half_step(groups.mins)[..., None]).all()
        assert error.max() <= np.abs(w).max() / 256
    else:
        assert groups.kind == "int8" and (error <= half(groups.scales)[..., None] * 0.501).all()


@BOTH_WAYS
@GROUP_SIZES
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq(symmetric: bool, form: str, size: int, mmap: bool, tmp_path: Path) -> None:
    matrix = Matrix(size, symmetric)
    settings = GPTQ | {"group_size": size, "sym": symmetric, "checkpoint_format": form}
    tensor = opened(tmp_path, matrix.gptq(offset=1 if form == "gptq" else 0), settings, mmap)
    check(tensor, matrix, "Q4_0" if symmetric else "Q4_Z")


@BOTH_WAYS
@GROUP_SIZES
def test_awq(size: int, mmap: bool, tmp_path: Path) -> None:
    matrix = Matrix(size, symmetric=False)
    check(opened(tmp_path, matrix.awq(), AWQ | {"group_size": size}, mmap), matrix, "Q4_Z")


def test_zero_points_of_both_ends(tmp_path: Path) -> None:
    """AWQ has 0 to 15; GPTQ's first format stores 0 as 15."""
    matrix = Matrix(64, symmetric=False)
    matrix.z[0, ::2], matrix.z[1, 1::2] = 0, 15
    check(opened(tmp_path, matrix.awq(), AWQ), matrix, "Q4_Z")
    check(opened(tmp_path, matrix.gptq(), GPTQ), matrix, "Q4_Z")


def test_symmetric_zero_points_stored_as_in_the_other_format(tmp_path: Path) -> None:
    """Some writers say the first format and store 8, not 7."""
    matrix = Matrix(64, symmetric=True)
    check(opened(tmp_path, matrix.gptq(offset=0), GPTQ | {"sym": True}), matrix, "Q4_0")


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_in_any_order(symmetric: bool, tmp_path: Path) -> None:
    """Neighbours that stay together keep the int4 layout; inputs that are scattered do not."""
    matrix = Matrix(64, symmetric)
    settings = GPTQ | {"sym": symmetric, "desc_act": True}
    matrix.g = np.repeat([2, 0, 1, 1, 2, 0], 32)
    check(opened(tmp_path, matrix.gptq(), settings), matrix, "Q4_0" if symmetric else "Q4_Z")
    matrix.g = np.random.default_rng(1).permutation(matrix.g)
    check(opened(tmp_path, matrix.gptq(), settings), matrix, "Q4_P")


def test_group_indices_that_are_missing_or_zero(tmp_path: Path) -> None:
    matrix = Matrix(64, symmetric=False)
    tensors = matrix.gptq()
    tensors["t.g_idx"][:] = 0
    check(opened(tmp_path, tensors, GPTQ), matrix, "Q4_Z")
    del tensors["t.g_idx"]
    check(opened(tmp_path, tensors, GPTQ), matrix, "Q4_Z")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (GPTQ | {"bits": 8}, "quantization_config.bits: found 8, expected 4"),
        (GPTQ | {"bits": "4"}, "quantization_config.bits: found '4' (str)"),
        ({"quant_method": "gptq"}, "quantization_config.bits: found no such key"),
        (GPTQ | {"group_size": 48}, "quantization_config.group_size: found 48, expected a multiple of 32, or -1"),
        (GPTQ | {"group_size": 0}, "quantization_config.group_size: found 0"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format: found marlin, expected 'gptq' or 'gptq_v2'"),
        (GPTQ | {"is_marlin_format": True}, "quantization_config.is_marlin_format: found true"),
        (GPTQ | {"pack_dtype": "int64"}, 'quantization_config.pack_dtype: found "int64"'),
        (AWQ | {"version": "gemv"}, "quantization_config.version: found gemv, expected 'gemm'"),
        (AWQ | {"version": "GEMV_FAST"}, "quantization_config.version: found gemv_fast"),
        (AWQ | {"bits": 3}, "quantization_config.bits: found 3, expected 4"),
        (AWQ | {"zero_point": False}, "quantization_config.zero_point: found false"),
        (AWQ | {"backend": "llm-awq"}, 'quantization_config.backend: found "llm-awq"'),
        ({"w_bit": 4, "zero_point": True}, "quantization_config.q_group_size: found no such key"),
        ({"bits": 4, "desc_act": False}, "quantization_config.group_size: found no such key"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    """By config.json alone, so that a download stops before the weights."""
    model = shutil.copytree(tiny.directory("llama2_mha"), tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"quantization_config": settings}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFormatError, match=re.escape(says)):
        open_checkpoint(model)


def edited(change: dict[str, np.ndarray | None]) -> Arrays:
    return {name: array for name, array in (Matrix(64, False).gptq() | change).items() if array is not None}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"t.qzeros": None}, "'t.qweight': found no t.qzeros next to it"),
        ({"t.scales": None}, "'t.qweight': found no t.scales next to it"),
        ({"t.qweight": np.zeros((24, 24), np.float32)}, "'t.qweight' type: found F32, expected I32"),
        ({"t.qweight": np.zeros(24, np.int32)}, "'t.qweight' shape: found (24,), expected (any, any)"),
        ({"t.qweight": np.zeros((0, 24), np.int32)}, "'t.qweight' shape: found (0, 24), expected (any, any)"),
        ({"t.qweight": np.zeros((25, 24), np.int32)}, "'t.qweight' shape: found 200 inputs, 24 outputs"),
        ({"t.qweight": np.zeros((24, 28), np.int32)}, "'t.qweight' shape: found 192 inputs, 28 outputs"),
        ({"t.qweight": np.zeros((8, 1 << 21), np.int32)}, "expected a multiple of 32 inputs and of 8 outputs, at most"),
        ({"t.qzeros": np.zeros((3, 3), np.float16)}, "'t.qzeros' type: found F16, expected I32"),
        ({"t.qzeros": np.zeros((2, 3), np.int32)}, "'t.qzeros' shape: found (2, 3), expected (3, 3)"),
        ({"t.scales": np.zeros((3, 24), np.float32)}, "'t.scales' type: found F32, expected F16"),
        ({"t.scales": np.zeros((24, 3), np.float16)}, "'t.scales' shape: found (24, 3), expected (3, 24)"),
        ({"t.g_idx": np.zeros(192, np.int64)}, "'t.g_idx' type: found I64, expected I32"),
        ({"t.g_idx": np.zeros(191, np.int32)}, "'t.g_idx' shape: found (191,), expected (192)"),
        ({"t.g_idx": np.full(192, 3, np.int32)}, "'t.g_idx' element 0: found 3, expected a group, 0 to 2"),
        ({"t.g_idx": np.full(192, -1, np.int32)}, "'t.g_idx' element 0: found -1, expected a group, 0 to 2"),
        ({"t.weight": np.zeros((24, 192), np.float16)}, "tensor 't.weight': found packed and not"),
    ],
)
def test_tensors_that_are_refused(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match=re.escape(says)):
        opened(tmp_path, edited(change), GPTQ)


def test_act_order_needs_its_indices(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="found no t.g_idx next to it, .* since desc_act is true"):
        opened(tmp_path, edited({"t.g_idx": None}), GPTQ | {"desc_act": True})


def test_numbers_that_are_refused(tmp_path: Path) -> None:
    """When they are read, and only where they are."""
    matrix = Matrix(64, symmetric=True)
    for bad in (np.inf, np.nan):
        matrix.s[2, 5] = bad
        tensor = opened(tmp_path, matrix.gptq(), GPTQ | {"sym": True})
        tensor.float32(6, 24)
        for call in (Tensor.float32, Tensor.raw, tensor_groups, load_panels):
            with pytest.raises(ModelFormatError, match=f"'t.scales' group 2 of output 5: found {bad}"):
                call(tensor)
    matrix = Matrix(64, symmetric=True)
    matrix.z[1, 20] = 3
    tensor = opened(tmp_path, matrix.gptq(), GPTQ | {"sym": True})
    tensor.float32(0, 20)
    with pytest.raises(ModelFormatError, match="'t.qzeros': found zero points 3, 8 of outputs 16:24, expected 8 alone"):
        tensor.float32(16)
    matrix = Matrix(64, symmetric=False)
    matrix.s[1, 7], matrix.z[1, 7] = 60000, 2
    with pytest.raises(ModelFormatError, match="tensor 't.weight' row 7 group 2 min: found a number beyond 65504"):
        tensor_groups(opened(tmp_path, matrix.gptq(), GPTQ))


CONFIG: dict[str, Any] = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 40},
}
SHAPES = {
    **{f"self_attn.{name}_proj": (n, 64) for name, n in (("q", 64), ("k", 32), ("v", 32), ("o", 64))},
    **{"mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64), "mlp.down_proj": (64, 96)},
}


def model(plain: Path, packed: Path, settings: dict[str, Any], awq: bool, symmetric: bool = False) -> Arrays:
    """A model in float32 and the same one packed; returns the packed tensors."""
    rng = np.random.default_rng(5)
    shared = {name: rng.standard_normal((40, 64)).astype(np.float32) for name in ("model.embed_tokens", "lm_head")}
    shared = {f"{name}.weight": array for name, array in shared.items()}
    shared["model.norm.weight"] = np.ones(64, np.float32)
    floats, codes = dict(shared), dict(shared)
    for layer in range(2):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            floats[f"model.layers.{layer}.{norm}.weight"] = codes[f"model.layers.{layer}.{norm}.weight"] = (
                rng.uniform(0.5, 1.5, 64).astype(np.float32)
            )
        for i, (name, (rows, columns)) in enumerate(SHAPES.items()):
            full = f"model.layers.{layer}.{name}"
            matrix = Matrix(64, symmetric, rows, columns, seed=10 * layer + i)
            floats[f"{full}.weight"] = matrix.w.astype(np.float32)
            codes |= matrix.awq(full) if awq else matrix.gptq(full)
    for directory, tensors in ((plain, floats), (packed, codes)):
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(CONFIG))
        safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    if settings:
        (packed / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": settings}))
    return codes


def same_model(packed: Path, plain: Path) -> dict[str, int]:
    ids = np.array([1, 7, 39, 0, 12])
    with open_checkpoint(packed) as found, open_checkpoint(plain) as expected:
        np.testing.assert_array_equal(reference_logits(found, ids), reference_logits(expected, ids))
        return found.weight_dtypes


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [(GPTQ, "Q4_Z"), (GPTQ | {"sym": True}, "Q4_0"), (AWQ, "Q4_Z")],
    ids=["gptq", "symmetric", "awq"],
)
def test_a_model(settings: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    awq, symmetric = settings is AWQ, dtype == "Q4_0"
    model(tmp_path / "plain", tmp_path / "packed", settings, awq, symmetric)
    assert same_model(tmp_path / "packed", tmp_path / "plain") == {dtype: 14, "F32": 7}


@pytest.mark.parametrize(
    ("name", "settings", "awq"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 64, "desc_act": False, "sym": False}, False),
        ("quant_config.json", {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}, True),
    ],
)
def test_settings_beside_config_json(name: str, settings: dict[str, Any], awq: bool, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    model(tmp_path / "plain", packed, {}, awq)
    (packed / name).write_text(json.dumps(settings))
    same_model(packed, tmp_path / "plain")
    (packed / name).unlink()
    with pytest.raises(ModelFormatError, match=f"found {'AWQ' if awq else 'GPTQ'}: quantised weights, .* its settings"):
        open_checkpoint(packed)


def test_biases_of_zero_are_no_part_of_the_model(tmp_path: Path) -> None:
    codes = model(tmp_path / "plain", tmp_path / "packed", GPTQ, awq=False)
    bias = "model.layers.1.mlp.up_proj.bias"
    for value in (0, 1):
        codes[bias] = np.zeros(96, np.float16)
        codes[bias][95] = value
        safetensors.numpy.save_file(codes, tmp_path / "packed" / "model.safetensors")
        if value == 0:
            same_model(tmp_path / "packed", tmp_path / "plain")
    with pytest.raises(ModelFormatError, match=f"tensor '{bias}': found an unknown tensor"):
        open_checkpoint(tmp_path / "packed")
