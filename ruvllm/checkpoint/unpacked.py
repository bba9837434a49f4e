"""The weights of a Hugging Face directory, with one tensor in place of its packed parts."""

from __future__ import annotations

from pathlib import Path

from ruvllm.checkpoint.four_bits import Packing, four_bit_tensor, packing_of
from ruvllm.checkpoint.packed import Part, mxfp4_tensor
from ruvllm.checkpoint.safetensors import SafetensorsFile, SafetensorsIndex
from ruvllm.checkpoint.tensor import Tensor
from ruvllm.errors import ModelFormatError


class UnpackedFiles:
    """Files of safetensors: NAME in place of NAME_blocks and NAME_scales, NAME.weight in place of NAME.qweight.

    Attributes:
        tensors: name -> TensorInfo, as of the files.
        zero_biases: names of zero biases of packed weights: some writers of GPTQ give one to every matrix.

    Args:
        files: these files; they are closed with this object.
        directory: where config.json is, which says how ``qweight`` tensors are packed; if it says nothing they stay.

    Raises:
        ModelFormatError: parts are missing or do not match; unsupported settings.
    """

    def __init__(self, files: SafetensorsFile | SafetensorsIndex, directory: Path) -> None:
        self._files = files
        self._packed: dict[str, Tensor] = {}
        self._parts: set[str] = set()
        self.zero_biases: set[str] = set()
        for name in files.tensors:
            stem = name.removesuffix("_blocks")
            if stem != name and f"{stem}_scales" in files.tensors:
                self._packed[stem] = mxfp4_tensor(stem, self._take(name), self._take(f"{stem}_scales"))
        stems = [name.removesuffix(".qweight") for name in files.tensors if name.endswith(".qweight")]
        packing = packing_of(directory) if stems else None
        if packing is not None:
            for stem in stems:
                self._unpack(stem, packing)
        plain = {name: info for name, info in files.tensors.items() if name not in self._parts}
        twice = next((name for name in self._packed if name in plain), None)
        if twice is not None:
            raise ModelFormatError(directory, field=f"tensor {twice!r}", found="packed and not", expected="one of both")
        self.tensors = plain | {name: tensor.info for name, tensor in self._packed.items()}

    def _unpack(self, stem: str, packing: Packing) -> None:
        stored = self._files.tensors
        found = [end for end in ("qweight", "qzeros", "scales", "g_idx") if f"{stem}.{end}" in stored]
        weight = four_bit_tensor(stem, {end: self._take(f"{stem}.{end}") for end in found}, packing)
        self._packed[weight.name] = weight
        bias = f"{stem}.bias"
        if bias in stored and stored[bias].shape == weight.shape[:1] and not self._files.tensor(bias).float32().any():
            self.zero_biases.add(bias)

    def _take(self, name: str) -> Part:
        self._parts.add(name)
        return Part(*self._files.stored(name))

    def tensor(self, name: str) -> Tensor:
        """The tensor of this name; KeyError and ModelFormatError as for SafetensorsFile."""
        return self._packed[name] if name in self._packed else self._files.tensor(name)

    def close(self) -> None:
        """Close the files; arrays taken from mapped files stay valid."""
        self._files.close()
