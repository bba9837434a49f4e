"""Opens a model on disk, a GGUF file or a Hugging Face directory, as one thing: a configuration and named tensors.

Both formats look alike: canonical names, q and k rows in half-split order, every tensor of the configuration present
in its right shape, and no other. Nothing large is read on opening.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from ruvllm.checkpoint.computed import shifted, transposed
from ruvllm.checkpoint.families import BY_TYPE
from ruvllm.checkpoint.family import Place
from ruvllm.checkpoint.foreign_formats import refuse_files, refuse_tensors
from ruvllm.checkpoint.gguf_config import config_from_gguf
from ruvllm.checkpoint.gguf_split import AnyGGUF, open_gguf
from ruvllm.checkpoint.hf_config import config_from_directory
from ruvllm.checkpoint.names import (
    GGUF_LONG_FACTORS,
    GGUF_ROPE_FACTORS,
    GGUF_SHORT_FACTORS,
    HF_MODEL,
    half_split_rows,
)
from ruvllm.checkpoint.safetensors import INDEX_FILE, PICKLES, open_safetensors
from ruvllm.checkpoint.source import Closing, Identity, identity_of
from ruvllm.checkpoint.storage import BLOCKS
from ruvllm.checkpoint.tensor import Tensor
from ruvllm.checkpoint.unpacked import UnpackedFiles
from ruvllm.errors import ModelFormatError, printable
from ruvllm.model.config import ModelConfig

logger = logging.getLogger(__name__)

# Tensors that are ignored: tables that are computed from the configuration instead (of the rotary embedding, of the
# causal mask), and tensors outside of the model and its head, such as a reward model's value head. No logit depends on
# them, and transformers leaves them out too.
_HF_LEFTOVERS = re.compile(
    r"(?:.*\.)?rotary_emb\.\w+|(?:.*\.)?(?:masked_bias|causal_mask|position_ids)|.*\.self_attn\.bias"
    r"|(?!model\.|lm_head\.).+"
)
_SETTINGS = ("config.json", "quantize_config.json", "quant_config.json", INDEX_FILE)  # they say what tensors mean
_COMPARED_ROWS = 1024  # of embedding and head at a time


class Checkpoint(Closing):
    """A model on disk. Made by `open_checkpoint`; a context manager.

    Attributes:
        path: the GGUF file or the directory.
        format: "gguf" or "huggingface".
        config: the model's configuration.
        weight_dtypes: how many tensors there are of each storage type, most frequent first.
        tokenizer_source: what `load_tokenizer` takes: the open GGUF file, or the directory.
        identities: of all files that decide what the tensors are.
    """

    def __init__(
        self,
        path: Path,
        format: Literal["gguf", "huggingface"],
        config: ModelConfig,
        tensors: dict[str, Tensor],
        files: AnyGGUF | UnpackedFiles,
        identities: list[Identity],
    ) -> None:
        self.path = path
        self.format = format
        self.config = config
        self.weight_dtypes: dict[str, int] = dict(Counter(t.dtype for t in tensors.values()).most_common())
        self.tokenizer_source: AnyGGUF | Path = files if isinstance(files, AnyGGUF) else path
        self.identities = identities
        self._tensors = tensors
        self._files = files

    def tensor(self, name: str) -> Tensor:
        """The tensor of a canonical name (`embed`, `layers.0.q`, ...). Raises KeyError if the model has none."""
        return self._tensors[name]

    def names(self) -> tuple[str, ...]:
        """All canonical names, embedding first, in the order of a forward pass."""
        return tuple(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    @property
    def paths(self) -> list[Path]:
        """The files that decide what the model computes."""
        settings = [self.path / "config.json", self.path / "tokenizer.json"] if self.path.is_dir() else []
        found = {Path(tensor.path) for tensor in self._tensors.values()}
        return sorted(found) + [path for path in settings if path.is_file()]

    def close(self) -> None:
        """Close the files; arrays taken from mapped files stay valid."""
        self._files.close()


def open_checkpoint(path: str | os.PathLike[str], mmap: bool = True) -> Checkpoint:
    """Open a `.gguf` file (of several parts the first) or a Hugging Face directory (config.json and safetensors).

    Args:
        path: the file or directory.
        mmap: map the files (nothing is copied; a file that shrinks meanwhile ends the process), or read tensors
            on demand.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ModelFormatError: it is not a model that this library can run, with path, field, found and expected.
    """
    path = Path(path)
    if path.is_dir():
        return _open_directory(path, mmap)
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "no such model file or directory", str(path))
    if path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json"):
        raise ModelFormatError(
            path,
            field="model",
            found="weights alone",
            expected=f"the directory that also holds config.json: {path.parent}",
        )
    if path.suffix in PICKLES:
        raise ModelFormatError(
            path, field="model", found="a pickle, which can run code", expected="a .gguf file or safetensors"
        )
    return _open_gguf(path, mmap)


def _open_gguf(path: Path, mmap: bool) -> Checkpoint:
    file = open_gguf(path, mmap=mmap)
    try:
        config = config_from_gguf(file)
        family = BY_TYPE[config.model_type]
        tables = {GGUF_ROPE_FACTORS, GGUF_SHORT_FACTORS, GGUF_LONG_FACTORS}
        tensors = _collect(path, config, family.gguf_places(config), file.tensor, file.tensors, tables)
        if family.interleaved:
            _deinterleave(config, tensors)
        return Checkpoint(path, "gguf", config, tensors, file, file.identities)
    except BaseException:
        file.close()
        raise


def _open_directory(path: Path, mmap: bool) -> Checkpoint:
    if not (path / "config.json").is_file():
        others = sorted(entry.name for entry in path.glob("*.gguf"))
        found = f"no config.json, but {others[0]}: open that" if others else "no config.json in this directory"
        expected = "the directory of a Hugging Face model, or the path of a .gguf file"
        raise ModelFormatError(path, field="model", found=found, expected=expected)
    settings = [identity_of(file.stat()) for name in _SETTINGS if (file := path / name).is_file()]  # before it is read
    config = config_from_directory(path)
    try:
        opened = open_safetensors(path, mmap=mmap)
    except ModelFormatError:
        refuse_files(path)
        raise
    try:
        files = UnpackedFiles(opened, path)
        refuse_tensors(path, files.tensors)
        stored = _text_names(files.tensors)
        leftovers = {name for name in stored if _HF_LEFTOVERS.fullmatch(name)}
        ignored = leftovers | files.zero_biases

        def tensor(name: str) -> Tensor:
            return files.tensor(stored[name])

        family = BY_TYPE[config.model_type]
        places = family.hf_places(config)
        embed, head = HF_MODEL["embed"], HF_MODEL["head"]
        if config.tie_word_embeddings and head in stored:
            if embed not in stored:  # safetensors' save_model keeps the first name of a tensor that has two
                places["embed"] = Place(head)
            # transformers ties the two only if they are equal.
            elif _equal(tensor(embed), tensor(head)):
                ignored.add(head)
            else:
                config = dataclasses.replace(config, tie_word_embeddings=False)
                places = family.hf_places(config)
        tensors = _collect(path, config, places, tensor, stored, ignored)
        if family.norm_offset:
            for name in tensors:
                if name.endswith("norm"):
                    tensors[name] = shifted(tensors[name], family.norm_offset)
        if others := [stored[name] for name in leftovers if not name.endswith("rotary_emb.inv_freq")]:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            logger.warning("%s: no part of the model, left out: %s%s", path, printable(min(others)), more)
        return Checkpoint(path, "huggingface", config, tensors, files, settings + opened.identities)
    except BaseException:
        opened.close()
        raise


def _text_names(stored: Collection[str]) -> dict[str, str]:
    """Each tensor's name in a text-only model, and its name in the file: models with images prefix the names of their
    text model."""
    for prefix in ("language_model.model.", "model.language_model."):
        if f"{prefix}embed_tokens.weight" in stored:
            names = {f"model.{name.removeprefix(prefix)}": name for name in stored if name.startswith(prefix)}
            rest = set(stored) - set(names.values())
            return names | {name.removeprefix("language_model.").removeprefix("model."): name for name in rest}
    return {name: name for name in stored}


def _collect(
    path: Path,
    config: ModelConfig,
    places: Mapping[str, Place],
    tensor: Callable[[str], Tensor],
    stored: Collection[str],
    ignored: Collection[str],
) -> dict[str, Tensor]:
    """All tensors of the model by canonical name. Raises ModelFormatError if one is missing, misshapen or unknown."""
    tensors: dict[str, Tensor] = {}
    expected_names = set(ignored)
    for name, shape in config.tensor_shapes().items():
        place = places[name]
        if place.transposed and place.name in stored and tensor(place.name).dtype == "MXFP4":
            place = place._replace(transposed=False)  # GPT-OSS stores outputs by rows there, else inputs
        expected = place.file_shape(shape)
        if place.name not in stored:
            raise ModelFormatError(
                path, field=f"tensor {place.name!r}", found="no such tensor", expected=f"shape {expected}"
            )
        found = tensor(place.name)
        if found.shape != expected and not (expected[0] == 1 and found.shape == expected[1:]):
            raise ModelFormatError(path, field=f"tensor {place.name!r} shape", found=found.shape, expected=expected)
        if len(shape) == 1 and BLOCKS[found.dtype][0] != 1:
            raise ModelFormatError(
                path, field=f"tensor {place.name!r} type", found=found.dtype, expected="a vector in F32, F16 or BF16"
            )
        expected_names.add(place.name)
        tensors[name] = _part(found, place, shape)
    for file_name in stored:
        if file_name not in expected_names:
            only = f"only the tensors of a {config.num_hidden_layers}-layer model of this configuration"
            raise ModelFormatError(path, field=f"tensor {file_name!r}", found="an unknown tensor", expected=only)
    return tensors


def _part(tensor: Tensor, place: Place, shape: tuple[int, ...]) -> Tensor:
    """The part of a file's tensor that is the model's."""
    if place.expert is not None:
        tensor = tensor.expert(place.expert)
    if place.transposed:
        tensor = transposed(tensor)
    if place.rows is not None:
        tensor = tensor.permuted(np.asarray(place.rows))
    return tensor if tensor.shape == shape else tensor.reshaped(shape)


def _deinterleave(config: ModelConfig, tensors: dict[str, Tensor]) -> None:
    """Put the rows of every q and k, and the elements of their biases, into half-split order."""
    orders = {
        "q": half_split_rows(config.num_attention_heads, config.head_dim),
        "k": half_split_rows(config.num_key_value_heads, config.head_dim),
    }
    for name, tensor in tensors.items():
        order = orders.get(name.rpartition(".")[2].removesuffix("_bias"))
        if order is not None:
            tensors[name] = tensor.permuted(order)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two matrices hold the same bytes."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    for lo in range(0, a.rows, _COMPARED_ROWS):
        hi = min(lo + _COMPARED_ROWS, a.rows)
        if a.raw(lo, hi).tobytes() != b.raw(lo, hi).tobytes():
            return False
    return True
