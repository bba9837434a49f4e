"""Storage types as groups of 32 codes: exact where the layout can hold them, else within the stated error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ruvllm.checkpoint import groups
from ruvllm.checkpoint.dequant import SCALE_OFFSETS
from ruvllm.checkpoint.gguf import GGUFFile
from ruvllm.checkpoint.groups import ROUNDED, Groups, group_layout, load_panels, tensor_groups
from ruvllm.checkpoint.safetensors import SafetensorsFile
from ruvllm.checkpoint.storage import BLOCKS
from ruvllm.checkpoint.tensor import Tensor
from ruvllm.errors import ModelFormatError
from ruvllm.kernels import reference
from ruvllm.kernels.quant.panels import take_quant_rows
from tests.checkpoint import corpus

LAYOUTS = {
    "Q4_0": ("int4", False),
    "Q4_1": ("int4", True),
    "Q4_K": ("int4", True),
    "Q5_0": ("int5", False),
    "Q5_1": ("int5", True),
    "Q5_K": ("int5", True),
    "Q6_K": ("int8", False),
    "Q8_0": ("int8", False),
    "Q3_K": ("int8", False),
    "IQ4_NL": ("int8", False),
    "IQ4_XS": ("int8", False),
    "MXFP4": ("int5", False),
    "TQ1_0": ("int4", False),
    "TQ2_0": ("int4", False),
}
EXACT = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q3_K", "IQ4_NL", "MXFP4", "TQ1_0", "TQ2_0")
FLOATS = ("F64", "F32", "F16", "BF16")
EVERY_TYPE = pytest.mark.parametrize("kind", LAYOUTS)


def tensor(directory: Path, kind: str, raw: np.ndarray, columns: int) -> Tensor:
    if kind == "F64":
        header = {"t": corpus.st_entry("F64", [len(raw), columns], 0, raw.nbytes)}
        return one_of_safetensors(directory, corpus.safetensors(header, raw.tobytes()))
    descriptions, data = corpus.tensors_and_data({"t": (kind, (len(raw), columns), raw)})
    (directory / "model.gguf").write_bytes(corpus.gguf([], descriptions, data))
    return GGUFFile(directory / "model.gguf").tensor("t")


def one_of_safetensors(directory: Path, data: bytes) -> Tensor:
    (directory / "model.safetensors").write_bytes(data)
    return SafetensorsFile(directory / "model.safetensors").tensor("t")


def values(found: Groups) -> np.ndarray:
    """In float64."""
    codes = found.codes.view(np.int8) if found.kind == "int8" else found.codes
    if found.kind == "int5" and found.mins is None:
        codes = codes.astype(np.int16) - 16
    return reference.dequantize(codes, found.scales, found.mins)


def half(bits: np.ndarray) -> np.ndarray:
    return np.abs(bits.view(np.float16).astype(np.float64))


def half_step(bits: np.ndarray) -> np.ndarray:
    """Half the distance of half floats near these ones, in float64."""
    return np.spacing(np.abs(bits.view(np.float16))).astype(np.float64) / 2


def assert_as_stated(kind: str, found: Groups, expected: np.ndarray) -> None:
    """expected: the float32 values of the file's own decoder."""
    assert (found.kind, found.mins is not None) == LAYOUTS[kind]
    y = values(found)
    if kind in EXACT:  # where a scale is small beside its min, float32 rounds what is exact here
        tolerance = 2.0**-24 * np.abs(expected) if found.mins is not None else 0.0
        assert (np.abs(y - expected) <= tolerance).all()
        return
    error = np.abs(y - expected).reshape(*found.scales.shape, 32)
    if kind == "Q6_K":  # half a step of the one scale; a whole one where 128 is wanted; and the scale's rounding
        steps = np.where(found.codes.view(np.int8).reshape(error.shape) == 127, 1.0, 0.5) + 128 * 2.0**-11
        allowed = half(found.scales)[..., None] * steps
    elif kind == "IQ4_XS":
        allowed = (half_step(found.scales) * 127)[..., None]
    else:  # the codes are exact: what rounding scale and min to half precision moves them by
        largest = 15 if kind == "Q4_K" else 31
        assert found.mins is not None
        allowed = (half_step(found.scales) * largest + half_step(found.mins))[..., None]
    assert (error <= allowed + 1e-6 * np.abs(expected).reshape(error.shape)).all()


@EVERY_TYPE
def test_random_blocks(kind: str, tmp_path: Path) -> None:
    for rows, blocks in ((1, 1), (3, 7), (17, 2), (64, 5)):
        columns = BLOCKS[kind][0] * blocks
        t = tensor(tmp_path, kind, corpus.random_rows(kind, rows, columns, rows), columns)
        found = tensor_groups(t)
        assert found.codes.dtype == np.uint8 and found.codes.shape == (rows, columns)
        assert found.scales.dtype == np.uint16 and found.scales.shape == (rows, columns // 32)
        assert_as_stated(kind, found, t.float32())
        for lo, hi in ((0, rows), (rows // 2, rows), (1 % rows, 1), (rows, rows)):
            part = tensor_groups(t, lo, max(lo, hi))
            for array, whole in zip(part[1:], found[1:], strict=True):
                if isinstance(whole, np.ndarray):
                    np.testing.assert_array_equal(array, whole[lo : max(lo, hi)])


@EVERY_TYPE
@pytest.mark.parametrize("exponent", [-24, -20, -16, -12, -6, 0, 8])
def test_scales_of_every_size(kind: str, exponent: int, tmp_path: Path) -> None:
    """Subnormal half floats, too: there 4- and 5-bit K types stay exact."""
    columns = 256 * 3
    raw = corpus.random_rows(kind, 20, columns, 3)
    blocks = raw.reshape(-1, BLOCKS[kind][1])
    rng = np.random.default_rng(exponent + 99)
    for at in SCALE_OFFSETS.get(kind, ()):
        scales = (rng.uniform(-1, 1, len(blocks)) * 2.0**exponent).astype("<f2")
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    if kind == "MXFP4":
        blocks[:, 0] = np.clip(128 + exponent + rng.integers(-4, 5, len(blocks)), 104, 143)
    t = tensor(tmp_path, kind, raw, columns)
    found, expected = tensor_groups(t), t.float32()
    assert_as_stated(kind, found, expected)
    if exponent <= -20 and kind in ("Q4_K", "Q5_K", "IQ4_XS"):
        np.testing.assert_array_equal(values(found), expected)


def test_q6_k_keeps_the_half_with_the_larger_scale(tmp_path: Path) -> None:
    raw = corpus.random_rows("Q6_K", 40, 512, 1)
    t = tensor(tmp_path, "Q6_K", raw, 512)
    found, expected = tensor_groups(t), t.float32().astype(np.float64)
    sub_scales = np.abs(raw.reshape(-1, 210)[:, 192:208].view(np.int8).astype(int)).reshape(-1, 2)
    error = np.abs(values(found) - expected).reshape(-1, 2, 16)
    size = np.abs(expected).reshape(-1, 2, 16)
    larger = sub_scales.argmax(1)
    chosen = np.arange(len(larger)), larger
    assert (error[chosen] <= size[chosen] * 2.0**-11 + 1e-12).all()
    assert error.max() > 0


def test_q6_k_error_on_weights_like_a_models(tmp_path: Path) -> None:
    """Neighbouring scales of similar size, as quantisers make them: the second rounding is far below the first."""
    rng = np.random.default_rng(2)
    raw = corpus.random_rows("Q6_K", 40, 1024, 2)
    blocks = raw.reshape(-1, 210)
    blocks[:, 192:208] = rng.integers(60, 128, (len(blocks), 16)) * rng.choice([-1, 1], (len(blocks), 16)) & 255
    t = tensor(tmp_path, "Q6_K", raw, 1024)
    expected = t.float32().astype(np.float64)
    assert np.sum((values(tensor_groups(t)) - expected) ** 2) <= 5e-5 * np.sum(expected**2)


def test_every_type_is_exact_or_said_to_be_rounded() -> None:
    assert ROUNDED.keys() == BLOCKS.keys() - {*EXACT, *FLOATS}


def test_q3_k_is_exact_where_its_numbers_are_largest(tmp_path: Path) -> None:
    """Scale -32 with code -4 make 128, which int8 holds only as -128; scale 31 with -4 make -124."""
    raw = corpus.random_rows("Q3_K", 32, 512, 4)
    blocks = raw.reshape(-1, 110)
    blocks[:, :96] = 0  # all codes -4
    blocks[::2, 96:108] = 0  # all scales -32
    blocks[1::2, 96:108] = 255  # all scales 31
    t = tensor(tmp_path, "Q3_K", raw, 512)
    found = tensor_groups(t)
    np.testing.assert_array_equal(values(found), t.float32())
    assert set(np.unique(found.codes.view(np.int8))) == {-128, 124}


def test_mxfp4_of_every_power(tmp_path: Path) -> None:
    """Below 2^-24 the codes are rounded, from 2^16 on the tensor is refused."""
    raw = corpus.random_rows("MXFP4", 144, 64, 5)
    raw[:, 0::17] = np.arange(144)[:, None]
    t = tensor(tmp_path, "MXFP4", raw, 64)
    found, expected = values(tensor_groups(t)), t.float32().astype(np.float64)
    np.testing.assert_array_equal(found[104:], expected[104:])
    assert np.abs(found - expected).max() <= 2.0**-25 and found[101:104].any()
    for power in (144, 200, 254):
        raw[7, 17] = power
        t = tensor(tmp_path, "MXFP4", raw, 64)
        with pytest.raises(ModelFormatError, match="tensor 't' row 7 group 1 scale: .*beyond 65504"):
            tensor_groups(t)


def test_q2_k_error_on_weights_like_a_models(tmp_path: Path) -> None:
    """Quantised as ggml's reference does it, roughly: the second rounding is far below the first."""
    x = np.random.default_rng(1).standard_normal((64, 1024)).astype(np.float32) * 0.02
    t = tensor(tmp_path, "Q2_K", q2_k(x), 1024)
    stored = t.float32().astype(np.float64)
    first = np.sum((stored - x) ** 2)
    assert 0.02 <= first / np.sum(x.astype(np.float64) ** 2) <= 0.2  # so these are weights of 2 bits
    assert np.sum((values(tensor_groups(t)) - stored) ** 2) <= 5e-4 * first


def q2_k(x: np.ndarray) -> np.ndarray:
    """Rows as Q2_K: of each 16 numbers the smallest is the min, and a third of their range the scale."""
    groups = x.reshape(-1, 16, 16)
    low = np.maximum(-groups.min(2), 0)
    step = (groups.max(2) + low) / 3
    d, dmin = step.max(1) / 15, low.max(1) / 15
    s, z = np.rint(step / d[:, None]), np.rint(low / dmin[:, None])
    codes = np.rint((groups + (z * dmin[:, None])[..., None]) / np.maximum(s * d[:, None], 1e-9)[..., None])
    codes = np.clip(codes, 0, 3).astype(np.uint8).reshape(-1, 2, 4, 32)
    packed = (codes << np.array([0, 2, 4, 6], np.uint8)[:, None]).sum(2, dtype=np.uint8)
    halves = np.stack([d, dmin], 1).astype("<f2").view(np.uint8)
    return np.concatenate([(s + 16 * z).astype(np.uint8), packed.reshape(-1, 64), halves], 1).reshape(len(x), -1)


def test_scales_beyond_half_precision_are_refused(tmp_path: Path) -> None:
    for kind, at, what in (("Q4_K", 0, "scale"), ("Q4_K", 2, "min"), ("Q5_K", 0, "scale"), ("Q6_K", 208, "scale")):
        raw = corpus.random_rows(kind, 5, 512, 1)
        blocks = raw.reshape(5, 2, -1)
        blocks[3, 1, at : at + 2] = np.array([65504], "<f2").view(np.uint8)
        if kind == "Q6_K":
            blocks[3, 1, 192:208] = 100
        else:
            blocks[3, 1, 4:16] = 0xFF  # all scales and minimums 63
        t = tensor(tmp_path, kind, raw, 512)
        for call in (tensor_groups, load_panels):
            with pytest.raises(ModelFormatError, match=f"tensor 't' row 3 group 8 {what}: .*beyond 65504"):
                call(t)
        assert np.isfinite(t.float32()).all()
        tensor_groups(t, 0, 3)  # the other rows are sound


def test_bad_scales_in_the_file_are_refused(tmp_path: Path) -> None:
    for kind in (*LAYOUTS, "Q2_K"):
        raw = corpus.random_rows(kind, 4, 512, 1)
        if kind == "MXFP4":
            raw[2, 0] = 255
        else:
            raw[2, SCALE_OFFSETS[kind][0] :][:2] = np.array([np.nan], "<f2").view(np.uint8)
        with pytest.raises(ModelFormatError, match="tensor 't' row 2 block 0 scale: found nan"):
            load_panels(tensor(tmp_path, kind, raw, 512))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "MXFP4", "TQ1_0", "TQ2_0"])
def test_narrow_types_widen_to_int8_without_loss(kind: str, tmp_path: Path) -> None:
    t = tensor(tmp_path, kind, corpus.random_rows(kind, 9, 512), 512)
    own, wide = tensor_groups(t), tensor_groups(t, kind="int8")
    assert (wide.kind, wide.mins is None) == ("int8", own.mins is None)
    np.testing.assert_array_equal(values(wide), values(own))


@pytest.mark.parametrize("kind", [*FLOATS, "Q8_0", "Q6_K", "Q3_K", "IQ4_NL", "IQ4_XS", "Q2_K"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_must_be_rounded_is(kind: str, symmetric: bool, tmp_path: Path) -> None:
    columns = 77 if kind in FLOATS else 512
    t = tensor(tmp_path, kind, corpus.random_rows(kind, 21, columns), columns)
    x = t.float32()
    for wanted, step in (("int4", 1 / 7), ("int8", 1 / 127)):
        if wanted == "int8" and kind in LAYOUTS:
            continue
        found = tensor_groups(t, 0, 21, wanted, symmetric)
        with_mins = wanted == "int4" and not symmetric
        assert (found.kind, found.mins is not None) == group_layout(kind, wanted, symmetric) == (wanted, with_mins)
        error = np.abs(values(found)[:, :columns] - x)
        assert (error <= np.repeat(half(found.scales), 32, 1)[:, :columns] * 0.501).all()
        assert error.max() <= np.abs(x).max() * step
    assert group_layout(kind) == ("int8", False) and tensor_groups(t).kind == "int8"


def test_floats_that_cannot_be_quantised_are_named(tmp_path: Path) -> None:
    for bad in (np.nan, np.inf, 1e30):
        x = np.ones((6, 40), np.float32)
        x[4, 33] = bad
        t = tensor(tmp_path, "F32", x.view(np.uint8), 40)
        for kind in ("int8", "int4"):
            with pytest.raises(ModelFormatError, match=r"tensor 't' row 4 column 33: found (nan|inf|1e\+30)"):
                load_panels(t, kind)
        with pytest.raises(ModelFormatError, match=r"tensor 't' row 4 column 33: found (nan|inf|1e\+30)"):
            tensor_groups(t, 2)


def test_arguments_are_checked(tmp_path: Path) -> None:
    t = tensor(tmp_path, "Q4_0", corpus.random_rows("Q4_0", 4, 64), 64)
    with pytest.raises(ValueError, match="kind must be one of int4, int5, int8, not 'int2'"):
        tensor_groups(t, kind="int2")
    with pytest.raises(ValueError, match="kind: Q4_0 cannot become int5"):
        tensor_groups(t, kind="int5")
    with pytest.raises(ValueError, match="rows 2:9"):
        tensor_groups(t, 2, 9)


@pytest.mark.parametrize("kind", [*LAYOUTS, "Q2_K", "F32", "BF16"])
@pytest.mark.parametrize("elements", [1, 1 << 13, 1 << 30])
def test_panels_of_a_whole_tensor(kind: str, elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts of 16 rows, of some, and at once; over threads and not; permuted as attention weights are."""
    monkeypatch.setattr(groups, "_CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(groups, "PARALLEL_ELEMENTS", 1 << 12)
    for rows, columns in ((1, 256), (130, 512), (75, 33)):
        if columns % BLOCKS[kind][0]:
            continue
        whole = tensor(tmp_path, kind, corpus.random_rows(kind, rows, columns), columns)
        for t in (whole, whole.permuted(np.random.default_rng(1).permutation(rows))):
            found = tensor_groups(t)
            panels = load_panels(t)
            assert panels.has_mins == (found.mins is not None)
            expected = values(found)
            unpacked = take_quant_rows(panels, np.arange(rows), np.empty(expected.shape, np.float32))
            np.testing.assert_allclose(unpacked, expected, rtol=1e-6, atol=1e-6)
            assert not panels.scales[-1, :, (rows - 1) % 16 + 1 :].any()


def test_panels_of_a_real_model(smollm2_path: Path) -> None:
    """Every fourth matrix of SmolLM2 in Q4_1 and Q8_0: the very numbers of the file."""
    file = GGUFFile(smollm2_path)
    matrices = [name for name, info in file.tensors.items() if len(info.shape) == 2]
    for name in matrices[::4]:
        t = file.tensor(name)
        panels = load_panels(t)
        ids = np.array([0, t.rows // 3, t.rows - 1])
        expected = np.concatenate([t.float32(row, row + 1) for row in ids])
        found = take_quant_rows(panels, ids, np.empty_like(expected))
        np.testing.assert_array_equal(found, expected, err_msg=name)
