"""GPTQ and AWQ weights of 4 bits: matrices W (N, K) that safetensors keep as columns of packed codes.

    w = s (q - z)      of input k in group g: s (G, N) 16-bit floats, z (G, N) and q (K, N) of 0..15

    GPTQ    qweight (K / 8, N) int32: input 8 i + j in bits 4 j of word i; qzeros (G, N / 8): output 8 i + j likewise
    AWQ     qweight (K, N / 8), qzeros (G, N / 8) int32: in bits 4 j of word i output 8 i + (0, 2, 4, 6, 1, 3, 5, 7)[j]

GPTQ's first format stores z - 1. With symmetric codes z is 8, whatever a file says: some declare the first format and
store 8. ``g_idx`` (K,), where there is one, gives the group of each input. The matrix becomes one of

    Q4_0    symmetric, groups of neighbours: exact
    Q4_Z    groups of neighbours, with their zero points
    Q4_P    inputs of each 32 in several groups (act-order): the values in float32

Sources: AutoGPTQ, nn_modules/qlinear; GPTQModel, quantization/config.py; AutoAWQ, modules/linear/gemm.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ruvllm.checkpoint.fields import Fields
from ruvllm.checkpoint.hf_files import MAX_CONFIG_BYTES, read_if_there
from ruvllm.checkpoint.packed import Array, Part, packed_tensor
from ruvllm.checkpoint.tensor import Tensor
from ruvllm.kernels.jit.decorators import kernel

_KEY = "quantization_config"  # of config.json
_GROUP = 32  # elements of one block
_WORD = 8  # codes of an int32
_AWQ_ORDER = np.array([0, 4, 1, 5, 2, 6, 3, 7], np.int32)  # the position of each output in a word
_SYMMETRIC_ZERO = 8
_LARGEST = 1 << 20  # inputs or outputs: four times the largest vocabulary


@dataclass(frozen=True)
class Packing:
    """How the 4-bit weights of a directory are packed.

    ``group_size``: inputs that share a scale, None for all; ``zero_offset``: zero point minus its stored value;
    ``act_order``: ``g_idx`` is needed.
    """

    awq: bool
    group_size: int | None
    zero_offset: int
    symmetric: bool
    act_order: bool


def packing_of(directory: Path) -> Packing | None:
    """The settings of 4-bit weights in config.json or, in older directories, quantize_config.json or quant_config.json.

    Raises: ModelFormatError: unsupported settings.
    """
    config = read_if_there(directory / "config.json", MAX_CONFIG_BYTES)
    if config.get(_KEY, dict):
        return packing_in(config)
    for name, awq in (("quantize_config.json", False), ("quant_config.json", True)):
        if (directory / name).is_file():
            return packing(read_if_there(directory / name, MAX_CONFIG_BYTES), awq)
    return None


def packing_in(config: Fields) -> Packing | None:
    """The settings of 4-bit weights in config.json; None if it names neither GPTQ nor AWQ.

    Raises: ModelFormatError: unsupported settings.
    """
    settings = config.get(_KEY, dict) or {}
    method = settings.get("quant_method")
    if method is None and ("w_bit" in settings or "zero_point" in settings):
        method = "awq"
    if method is None and ("desc_act" in settings or "damp_percent" in settings):
        method = "gptq"
    keys = Fields(config.path, settings, prefix=f"{_KEY}.")
    return packing(keys, awq=method == "awq") if method in ("gptq", "awq") else None


def packing(keys: Fields, awq: bool) -> Packing:
    """The settings of GPTQ or AWQ. Raises ModelFormatError, naming the setting, where one is not supported."""
    bits, size = ("w_bit", "q_group_size") if awq and "w_bit" in keys else ("bits", "group_size")
    if keys.require(bits, int) != 4:
        raise keys.error(bits, keys.values[bits], "4: no other is supported")
    group_size = keys.require(size, int)
    if group_size != -1 and (group_size <= 0 or group_size % _GROUP):
        raise keys.error(size, group_size, f"a multiple of {_GROUP}, or -1 for whole rows")
    formats = ("gemm",) if awq else ("gptq", "gptq_v2")
    found = formats[0]
    for key in ("version", "checkpoint_format", "format") if awq else ("checkpoint_format", "format"):
        found = (keys.get(key, str) or found).lower()
        if found not in formats:
            raise keys.error(key, found, " or ".join(map(repr, formats)))
    keys.require_plain("is_marlin_format", [False])
    keys.require_plain("pack_dtype", ["int32"])
    if awq:
        keys.require_plain("zero_point", [True])
        keys.require_plain("backend", ["autoawq", "auto"])
    return Packing(
        awq=awq,
        group_size=None if group_size == -1 else group_size,
        zero_offset=int(not awq and found == "gptq"),
        symmetric=not awq and bool(keys.get("sym", bool)),
        act_order=not awq and bool(keys.get("desc_act", bool)),
    )


def four_bit_tensor(stem: str, parts: Mapping[str, Part], packing: Packing) -> Tensor:
    """The matrix ``stem``.weight.

    Args:
        parts: "qweight", and those of "qzeros", "scales", "g_idx" that the file has.

    Raises:
        ModelFormatError: a part is missing, or of another type, shape or content than the others require.
    """
    qweight = parts["qweight"]
    qweight.require("I32", (None, None))
    first, second = qweight.info.shape
    columns, rows = (first, _WORD * second) if packing.awq else (_WORD * first, second)
    if columns % _GROUP or rows % _WORD or max(columns, rows) > _LARGEST:
        expected = f"a multiple of {_GROUP} inputs and of {_WORD} outputs, at most {_LARGEST} of each"
        raise qweight.error("shape", f"{columns} inputs, {rows} outputs", expected)
    size = packing.group_size or columns
    groups = -(-columns // size)
    for name in ("qzeros", "scales", *(["g_idx"] if packing.act_order else [])):
        if name not in parts:
            expected = "zero points and scales" + (", and g_idx since desc_act is true" if name == "g_idx" else "")
            raise qweight.error("", f"no {stem}.{name} next to it", expected)
    parts["qzeros"].require("I32", (groups, rows // _WORD))
    parts["scales"].require("F16", (groups, rows))
    if "g_idx" in parts:
        parts["g_idx"].require("I32", (columns,))
    matrix = _Matrix(qweight, parts["qzeros"], parts["scales"], parts.get("g_idx"), packing, columns)
    if matrix.scattered():
        dtype, read = "Q4_P", matrix.values
    elif packing.symmetric:
        dtype, read = "Q4_0", matrix.blocks
    else:
        dtype, read = "Q4_Z", matrix.blocks_with_zeros
    return packed_tensor(f"{stem}.weight", (rows, columns), dtype, tuple(parts.values()), read)


@kernel(strict=True)
def gptq_rows(words: Any, out: Any) -> None:
    """Codes out (n, K / 32, 16): j in the low half of byte j, j + 16 in the high; words (K / 8, n) int32."""
    for g in range(out.shape[1]):
        for half in range(2):
            low, high = words[4 * g + half], words[4 * g + 2 + half]
            for i in range(out.shape[0]):
                y = out[i, g, 8 * half : 8 * half + 8]
                for j in range(8):
                    shift = np.int32(4 * j)
                    y[j] = ((low[i] >> shift) & 15) | (((high[i] >> shift) & 15) << 4)


@kernel(strict=True)
def awq_rows(words: Any, skip: Any, out: Any) -> None:
    """The same from words (K, n / 8) int32 of 8 rows; the first ``skip`` rows, and those after n, are left out."""
    for g in range(out.shape[1]):
        for j in range(16):
            low, high = words[_GROUP * g + j], words[_GROUP * g + 16 + j]
            for i in range(out.shape[0]):
                at = skip + i
                shift = np.int32(4) * _AWQ_ORDER[at % 8]
                out[i, g, j] = ((low[at // 8] >> shift) & 15) | (((high[at // 8] >> shift) & 15) << 4)


@dataclass(frozen=True)
class _Matrix:
    """Rows of W as stored rows of our types. It holds no array: a file may have thousands of matrices."""

    qweight: Part
    qzeros: Part
    scales: Part
    g_idx: Part | None
    packing: Packing
    columns: int

    def groups(self) -> Array:
        """The group of each input (K,). In early files a g_idx of zeros means that they are in order."""
        plain = np.arange(self.columns) // (self.packing.group_size or self.columns)
        if self.g_idx is None:
            return plain
        listed = self.g_idx.array().astype(np.int64)
        bad = (listed < 0) | (listed > plain[-1])
        if bad.any():
            expected = f"a group, 0 to {plain[-1]}"
            raise self.g_idx.error(f"element {int(bad.argmax())}", int(listed[bad][0]), expected)
        return listed if listed.any() else plain

    def scattered(self) -> bool:
        """Whether the inputs of a block of 32 are in several groups."""
        if self.g_idx is None:
            return False
        blocks = self.groups().reshape(-1, _GROUP)
        self.g_idx.release()
        return bool((blocks != blocks[:, :1]).any())

    def blocks(self, lo: int, hi: int) -> Array:
        """Rows lo:hi as Q4_0: scale, codes."""
        zeros = np.unique(self._zeros(lo, hi))
        allowed = (_SYMMETRIC_ZERO, _SYMMETRIC_ZERO + self.packing.zero_offset)
        if len(zeros) > 1 or any(zero not in allowed for zero in zeros):
            found = f"zero points {', '.join(map(str, zeros))} of outputs {lo}:{hi}"
            raise self.qzeros.error("", found, f"{_SYMMETRIC_ZERO} alone, since sym is true")
        return self._with_codes(lo, hi, np.empty((hi - lo, self.columns // _GROUP, 18), np.uint8))

    def blocks_with_zeros(self, lo: int, hi: int) -> Array:
        """Rows lo:hi as Q4_Z: scale, zero point, 0, codes."""
        out = np.empty((hi - lo, self.columns // _GROUP, 20), np.uint8)
        out[:, :, 2] = self._zeros(lo, hi).T[:, self.groups()[::_GROUP]]
        out[:, :, 3] = 0
        return self._with_codes(lo, hi, out)

    def values(self, lo: int, hi: int) -> Array:
        """Rows lo:hi as Q4_P: float32 values."""
        packed = self._codes(lo, hi)
        codes = np.concatenate([packed & 15, packed >> 4], axis=2).reshape(hi - lo, -1).astype(np.float32)
        zeros = self._zeros(lo, hi).T.astype(np.float32)
        scales = self._scales(lo, hi).T.astype(np.float32)
        groups = self.groups()
        return (scales[:, groups] * (codes - zeros[:, groups])).view(np.uint8)

    def _with_codes(self, lo: int, hi: int, out: Array) -> Array:
        scales = self._scales(lo, hi).T[:, self.groups()[::_GROUP]]
        out[:, :, :2] = scales[:, :, None].view(np.uint8)
        out[:, :, -16:] = self._codes(lo, hi)
        return out

    def _codes(self, lo: int, hi: int) -> Array:
        """Codes of rows lo:hi, (n, K / 32, 16) uint8: j in the low half of byte j, j + 16 in the high."""
        words = self.qweight.array()
        out = np.empty((hi - lo, self.columns // _GROUP, 16), np.uint8)
        if self.packing.awq:
            first = lo // _WORD
            awq_rows(np.array(words[:, first : -(-hi // _WORD)]), lo - first * _WORD, out)
        else:
            gptq_rows(np.array(words[:, lo:hi]), out)
        return out

    def _zeros(self, lo: int, hi: int) -> Array:
        """Zero points (G, n) of rows lo:hi, int32; less one, 0 is stored as 15."""
        rows = np.arange(lo, hi)
        order = _AWQ_ORDER if self.packing.awq else np.arange(_WORD, dtype=np.int32)
        stored = self.qzeros.array()[:, rows // _WORD] >> (4 * order[rows % _WORD])
        return (stored + self.packing.zero_offset) & 15

    def _scales(self, lo: int, hi: int) -> Array:
        """Scales (G, n) of rows lo:hi, 16-bit floats."""
        scales = self.scales.array()[:, lo:hi]
        bad = ~np.isfinite(scales)
        if bad.any():
            group, row = np.argwhere(bad)[0]
            raise self.scales.error(f"group {group} of output {lo + row}", scales[group, row], "a finite number")
        return scales
