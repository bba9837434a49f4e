"""Decoders of storage types, bit for bit against the gguf package, and the Tensor that hands out rows."""

from __future__ import annotations

from pathlib import Path

import gguf as peer
import numpy as np
import pytest

from ruvllm.checkpoint.dequant import ROW_DECODERS, dequantize_rows, first_bad_scale, half
from ruvllm.checkpoint.gguf import GGUFFile
from ruvllm.checkpoint.storage import BLOCKS, GGUF_REMOVED, GGUF_TYPES, GGUF_UNSUPPORTED
from ruvllm.checkpoint.tensor import Tensor
from ruvllm.errors import ModelFormatError
from tests.checkpoint import corpus
from tests.checkpoint.corpus import SCALE_OFFSETS
from tests.processes import python

GGUF_KINDS = list(GGUF_TYPES.values())
QUANTISED = list(SCALE_OFFSETS)


def oracle(kind: str, raw: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        return peer.quants.dequantize(raw, peer.GGMLQuantizationType[kind])


def same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal to the last bit and sign of zero; any NaN equals any NaN."""
    assert found.dtype == expected.dtype == np.float32
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(found), nan)
    np.testing.assert_array_equal(found[~nan].view(np.uint32), expected[~nan].view(np.uint32))


def decode(kind: str, raw: np.ndarray, columns: int) -> np.ndarray:
    with np.errstate(all="raise"):  # whatever is in a file, no warning
        return dequantize_rows(kind, raw, columns, np.full((len(raw), columns), np.nan, np.float32))


def one_tensor(kind: str, shape: tuple[int, ...], raw: np.ndarray, directory: Path, mmap: bool = True) -> Tensor:
    descriptions, data = corpus.tensors_and_data({"t": (kind, shape, raw)})
    (directory / "model.gguf").write_bytes(corpus.gguf([], descriptions, data))
    return GGUFFile(directory / "model.gguf", mmap).tensor("t")


def test_types_and_blocks_are_ggmls() -> None:
    known = {code.value: code.name for code in peer.GGMLQuantizationType}
    assert known.items() <= (GGUF_TYPES | GGUF_UNSUPPORTED).items()
    assert not (GGUF_REMOVED.keys() & known.keys())
    for code, kind in GGUF_TYPES.items():
        assert BLOCKS[kind] == peer.GGML_QUANT_SIZES[peer.GGMLQuantizationType(code)]


def test_half_of_all_65536() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    found = np.array([half(np.uint8(b & 255), np.uint8(b >> 8)) for b in bits.tolist()], np.float32)
    same_bits(found, bits.view(np.float16).astype(np.float32))


@pytest.mark.parametrize("kind", GGUF_KINDS)
def test_random_blocks(kind: str) -> None:
    for rows, blocks in ((1, 1), (1, 7), (3, 1), (5, 3), (17, 2), (64, 5)):
        columns = BLOCKS[kind][0] * blocks
        raw = corpus.random_rows(kind, rows, columns, rows)
        same_bits(decode(kind, raw, columns), oracle(kind, raw))


@pytest.mark.parametrize("kind", GGUF_KINDS)
def test_any_bytes(kind: str) -> None:
    """Scales of every kind: huge, subnormal, negative zero, infinite, NaN."""
    rng = np.random.default_rng(7)
    columns = BLOCKS[kind][0] * 8
    raw = rng.integers(0, 256, (500, columns // BLOCKS[kind][0] * BLOCKS[kind][1]), np.uint8)
    same_bits(decode(kind, raw, columns), oracle(kind, raw))


@pytest.mark.parametrize("kind", QUANTISED)
def test_extreme_scales(kind: str) -> None:
    extremes = np.array([0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x7BFF, 0xFBFF, 0x3C00, 0x3555], "<u2")
    raw = corpus.random_rows(kind, len(extremes) ** 2, BLOCKS[kind][0])
    for i, at in enumerate(SCALE_OFFSETS[kind]):
        scales = np.repeat(extremes, len(extremes)) if i == 0 else np.tile(extremes, len(extremes))
        raw[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    assert first_bad_scale(kind, raw) is None
    same_bits(decode(kind, raw, BLOCKS[kind][0]), oracle(kind, raw))


def test_bf16_and_f64_every_pattern() -> None:
    bits = np.arange(1 << 16, dtype="<u2").reshape(256, 256)
    found = decode("BF16", bits.view(np.uint8), 256)
    np.testing.assert_array_equal(found.view(np.uint32), bits.astype(np.uint32) << 16)
    values = np.array([[0.1, -1e-300, 1e300, np.inf, np.nan, 2.0**-140]])
    values.view(np.uint64)[0, 4] = 0x7FF0000000000001  # a signalling NaN
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(np.float32)
    same_bits(decode("F64", values.view(np.uint8), 6), expected)


def test_plain_python_decodes_the_same() -> None:
    """NUMBA_DISABLE_JIT=1: the same bodies, stepped through by the interpreter."""
    program = """
import numpy as np
from ruvllm.checkpoint.dequant import half
from tests.checkpoint.test_dequant import BLOCKS, SCALE_OFFSETS, corpus, decode, oracle, same_bits
assert not hasattr(half, "py_func")
for kind in (*SCALE_OFFSETS, "MXFP4"):
    raw = corpus.random_rows(kind, 3, BLOCKS[kind][0] * 2)
    same_bits(decode(kind, raw, BLOCKS[kind][0] * 2), oracle(kind, raw))
"""
    python("-W", "error", "-c", program, NUMBA_DISABLE_JIT="1")


def test_arguments_are_checked() -> None:
    raw, out = corpus.random_rows("Q8_0", 2, 64), np.empty((2, 64), np.float32)
    for kind, bad_raw, columns, bad_out, error, says in (
        ("IQ3_S", raw, 64, out, ValueError, "dtype must be one of"),
        ("Q8_0", raw, 63, out, ValueError, "columns must be a multiple of 32"),
        ("Q8_0", raw, -32, out, ValueError, "columns"),
        ("Q8_0", raw.view(np.int8), 64, out, TypeError, "raw must be uint8"),
        ("Q8_0", raw[:, ::2], 64, out, ValueError, "raw must be contiguous"),
        ("Q8_0", raw[0], 64, out, ValueError, "raw must be contiguous"),
        ("Q8_0", np.zeros((2, 136), np.uint8)[:, ::2], 64, out, ValueError, "raw must be contiguous"),
        ("Q8_0", raw, 64, out.astype(np.float64), TypeError, "out must be float32"),
        ("Q8_0", raw, 64, out[:1], ValueError, "out must be writeable"),
        ("Q8_0", raw, 64, np.empty((64, 2), np.float32).T, ValueError, "out must be writeable"),
        ("Q8_0", raw, 64, np.broadcast_to(np.float32(0), (2, 64)), ValueError, "out must be writeable"),
    ):
        with pytest.raises(error, match=says):
            dequantize_rows(kind, bad_raw, columns, bad_out)


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E00, 0x7C01], ids=["inf", "-inf", "nan", "signalling"])
def test_row33_bad_scale(kind: str, bits: int, tmp_path: Path) -> None:
    per_block, block_bytes = BLOCKS[kind]
    for at in SCALE_OFFSETS[kind]:
        raw = corpus.random_rows(kind, 4, per_block * 3)
        raw[2, block_bytes + at : block_bytes + at + 2] = np.array([bits], "<u2").view(np.uint8)
        tensor = one_tensor(kind, (4, per_block * 3), raw, tmp_path)
        for call in (tensor.float32, tensor.raw, tensor.permuted([3, 2, 1, 0]).float32):
            with pytest.raises(ModelFormatError, match="tensor 't' row 2 block 1 scale: found -?(inf|nan)") as caught:
                call()
            assert caught.value.offset is not None
            (start,) = np.frombuffer((tmp_path / "model.gguf").read_bytes()[caught.value.offset + at :][:2], "<u2")
            assert start == bits
        same_bits(tensor.float32(0, 2), oracle(kind, raw[:2]))  # the other rows are sound
        same_bits(tensor.float32(3), oracle(kind, raw[3:]))


def test_mxfp4_scale_that_is_no_number(tmp_path: Path) -> None:
    raw = corpus.random_rows("MXFP4", 4, 96)
    raw[2, 17] = 255
    tensor = one_tensor("MXFP4", (4, 96), raw, tmp_path)
    with pytest.raises(ModelFormatError, match="tensor 't' row 2 block 1 scale: found nan") as caught:
        tensor.float32()
    assert caught.value.offset is not None
    assert (tmp_path / "model.gguf").read_bytes()[caught.value.offset] == 255
    same_bits(tensor.float32(3), oracle("MXFP4", raw[3:]))


def test_row33_in_a_large_tensor(tmp_path: Path) -> None:
    """Beyond the first group of blocks that is looked at together."""
    raw = np.zeros((3, 18 << 19), np.uint8)
    raw[2, 18 * 77 + 1] = 0x7C
    assert first_bad_scale("Q4_0", raw) == (2, 77, float("inf"))


@pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "read"])
@pytest.mark.parametrize("kind", GGUF_KINDS)
def test_rows_of_a_tensor(kind: str, mmap: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ruvllm.checkpoint.tensor._CHUNK_BYTES", 3 * BLOCKS[kind][1] * 2)  # several chunks a call
    columns = BLOCKS[kind][0] * 2
    raw = corpus.random_rows(kind, 11, columns)
    whole = oracle(kind, raw)
    tensor = one_tensor(kind, (11, columns), raw, tmp_path, mmap)
    assert (tensor.shape, tensor.dtype, tensor.rows, tensor.columns) == ((11, columns), kind, 11, columns)
    order, again = np.random.default_rng(1).permutation(11), np.random.default_rng(2).permutation(11)
    for seen, expected_raw, expected in (
        (tensor, raw, whole),
        (tensor.permuted(order), raw[order], whole[order]),
        (tensor.permuted(order).permuted(again), raw[order][again], whole[order][again]),
        (tensor.permuted(np.array([4, 4, 0], np.uint8)), raw[[4, 4, 0]], whole[[4, 4, 0]]),
    ):
        n = len(expected)
        assert seen.shape == expected.shape
        for lo, hi in ((0, n), (0, 0), (n, n), (1, 2), (1, n), (0, n - 1)):
            same_bits(seen.float32(lo, hi), expected[lo:hi])
            np.testing.assert_array_equal(seen.raw(lo, hi), expected_raw[lo:hi])
            assert not seen.raw(lo, hi).flags.writeable
        out = np.zeros((n + 2, columns), np.float32)
        assert seen.float32(out=out[1:-1]).base is not None
        same_bits(out[1:-1], expected)
        assert not out[0].any() and not out[-1].any()


def test_vectors_are_one_row_and_permute_by_element(tmp_path: Path) -> None:
    for kind in ("F32", "F16", "BF16"):
        raw = corpus.random_rows(kind, 1, 6)
        tensor = one_tensor(kind, (6,), raw, tmp_path)
        assert (tensor.rows, tensor.columns, tensor.shape) == (1, 6, (6,))
        same_bits(tensor.float32(), oracle(kind, raw))
        order, again = [5, 0, 4, 1, 3, 2], [1, 2, 0, 4, 5, 3]
        moved = tensor.permuted(order)
        same_bits(moved.float32(), oracle(kind, raw)[:, order])
        same_bits(moved.permuted(again).float32(), oracle(kind, raw)[:, order][:, again])
        assert moved.shape == (6,) and moved.raw().shape == (1, tensor.row_bytes)
    blocks = one_tensor("Q8_0", (64,), corpus.random_rows("Q8_0", 1, 64), tmp_path)
    with pytest.raises(ValueError, match="vector in blocks of Q8_0"):
        blocks.permuted(np.arange(64))


@pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "read"])
@pytest.mark.parametrize("kind", GGUF_KINDS)
def test_one_expert_of_a_tensor_of_many(kind: str, mmap: bool, tmp_path: Path) -> None:
    columns = BLOCKS[kind][0] * 2
    raw = corpus.random_rows(kind, 4 * 5, columns)
    experts = oracle(kind, raw).reshape(4, 5, columns)
    cube = one_tensor(kind, (4, 5, columns), raw, tmp_path, mmap)
    for i in range(4):
        expert = cube.expert(i)
        assert (expert.shape, expert.rows, expert.dtype, expert.name) == ((5, columns), 5, kind, f"t[{i}]")
        same_bits(expert.float32(), experts[i])
        same_bits(expert.float32(1, 4), experts[i, 1:4])
        same_bits(expert.permuted([4, 0]).float32(), experts[i, [4, 0]])
        np.testing.assert_array_equal(expert.raw(), raw[5 * i : 5 * i + 5])
        expert.release()
        with pytest.raises(ValueError, match="rows 0:6 are outside"):
            expert.float32(0, 6)
    biases = cube.expert(3).expert(2)
    assert biases.shape == (columns,)
    same_bits(biases.float32(), experts[3, 2:3])


def test_experts_that_are_not_there(tmp_path: Path) -> None:
    cube = one_tensor("F32", (2, 2, 3), corpus.random_rows("F32", 4, 3), tmp_path)
    for i in (-1, 2):
        with pytest.raises(ValueError, match=f"expert must lie in 0:2, not {i}"):
            cube.expert(i)
    for tensor in (cube.expert(0).expert(0), cube.expert(0).permuted([1, 0])):
        with pytest.raises(ValueError, match="has no experts"):
            tensor.expert(0)


def test_a_bad_scale_of_an_expert_is_named(tmp_path: Path) -> None:
    raw = corpus.random_rows("Q8_0", 6, 64)
    raw[4, 34:36] = np.array([np.nan], "<f2").view(np.uint8)
    cube = one_tensor("Q8_0", (3, 2, 64), raw, tmp_path)
    for i in (0, 1):
        cube.expert(i).float32()
    with pytest.raises(ModelFormatError, match=r"tensor 't\[2\]' row 0 block 1 scale: found nan") as caught:
        cube.expert(2).float32()
    assert caught.value.offset is not None
    assert (tmp_path / "model.gguf").read_bytes()[caught.value.offset :][:2] == raw[4, 34:36].tobytes()


def test_tensor_arguments_are_checked(tmp_path: Path) -> None:
    tensor = one_tensor("F32", (4, 3), corpus.random_rows("F32", 4, 3), tmp_path)
    cube = one_tensor("F32", (2, 2, 3), corpus.random_rows("F32", 4, 3), tmp_path)
    for lo, hi in ((-1, 2), (0, 5), (3, 2), (5, None)):
        with pytest.raises(ValueError, match=f"rows {lo}:"):
            tensor.float32(lo, hi)
        with pytest.raises(ValueError, match=f"rows {lo}:"):
            tensor.raw(lo, hi)
    for index in ([0, 4], [-1], [[0, 1]], [0.5], [True]):
        with pytest.raises(ValueError, match="row_index must"):
            tensor.permuted(index)
    with pytest.raises(ValueError, match="3 axes"):
        cube.permuted([1, 0])
    with pytest.raises(ValueError, match="out must have the shape"):
        tensor.float32(out=np.empty((3, 4), np.float32))
    with pytest.raises(TypeError, match="out must be float32"):
        tensor.float32(out=np.empty((4, 3), np.float64))


def test_released_pages_read_the_same(tmp_path: Path) -> None:
    raw = corpus.random_rows("F32", 64, 1024)
    for mmap in (True, False):
        tensor = one_tensor("F32", (64, 1024), raw, tmp_path, mmap)
        before = tensor.raw()
        tensor.release()
        np.testing.assert_array_equal(before, raw)
        np.testing.assert_array_equal(tensor.raw(), raw)


def test_every_type_has_a_decoder() -> None:
    assert ROW_DECODERS.keys() == BLOCKS.keys()
