"""quantize: a GGUF file or a Hugging Face directory as a GGUF file of another precision, which llama.cpp reads too."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ruvllm.checkpoint.encode import encode_rows
from ruvllm.checkpoint.families import BY_TYPE
from ruvllm.checkpoint.gguf_config import config_from_gguf
from ruvllm.checkpoint.gguf_metadata import metadata_of, rope_factors
from ruvllm.checkpoint.gguf_split import open_gguf
from ruvllm.checkpoint.gguf_writer import Described, encoded, pad, write_header
from ruvllm.checkpoint.hub import resolve
from ruvllm.checkpoint.loader import Checkpoint, open_checkpoint
from ruvllm.checkpoint.names import GGUF_MODEL, half_split_rows
from ruvllm.checkpoint.storage import BLOCKS
from ruvllm.checkpoint.tensor import Tensor
from ruvllm.errors import ModelFormatError
from ruvllm.model.config import ModelConfig
from ruvllm.model.rope import frequencies
from ruvllm.progress import hidden, tqdm

# Type of the matrices: its name in files, and llama.cpp's number for files of it (llama_ftype).
TYPES = {
    "q8_0": ("Q8_0", 7), "q4_0": ("Q4_0", 2), "q4_1": ("Q4_1", 3), "f16": ("F16", 1), "f32": ("F32", 0),
    "bf16": ("BF16", 32),
}  # fmt: skip
_QUANTIZATION_VERSION = 2
# Fields of ModelConfig that a file must give back.
_ARITHMETIC = (
    "hidden_act", "norms", "qk_norm", "no_rope_layers", "attention_sinks", "attention_scale", "attn_logit_softcapping",
    "final_logit_softcapping", "embedding_multiplier", "residual_multiplier", "logits_scaling", "experts",
    "swiglu_limit", "swiglu_alpha", "tie_word_embeddings",
)  # fmt: skip
_CHUNK_ELEMENTS = 1 << 22


def quantize(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    type: str,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Path:
    """Write the model ``source`` as the GGUF file ``target`` with matrices of another type.

    Vectors (norms, biases) become float32. With the 4-bit types, embedding and head become Q8_0; a matrix whose row
    length is not a multiple of 32 becomes F16. A tensor that has the wanted type already is copied. The tokenizer and
    all other metadata of a GGUF source are kept. The file appears under its name when it is complete.

    Args:
        source: a name known to ``ruvllm pull``, a .gguf file, or a Hugging Face directory.
        target: where to write.
        type: "q8_0", "q4_0", "q4_1", "f16", "f32" or "bf16".
        overwrite: replace ``target`` if it exists.
        progress: show a bar; None: where stderr is a terminal or a notebook.

    Returns:
        The path of the file.

    Raises:
        ValueError: an unknown type, or weights that it cannot hold.
        FileNotFoundError: no such source, or no directory for the target.
        FileExistsError: ``target`` exists.
        ModelFormatError: this library does not run the source, or its tokenizer is of a kind unknown to GGUF.
        OSError: the disk has too little space.
    """
    if type not in TYPES:
        raise ValueError(f"type: expected one of {', '.join(TYPES)}, found {type!r}")
    target = Path(target)
    where = Path(resolve(source))
    if target.exists() and target.samefile(where):
        raise ValueError(f"target: expected another file than the source, found {target}")
    if target.is_dir() or (target.exists() and not overwrite):
        raise FileExistsError(f"{target} exists")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no such directory: {target.parent}")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    with open_checkpoint(where) as checkpoint:
        try:
            with open(partial, "xb") as file:
                _write(file, checkpoint, type, progress)
                file.flush()
                os.fsync(file.fileno())
            _require_same_model(checkpoint, partial)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    return target


def _require_same_model(checkpoint: Checkpoint, written: Path) -> None:
    """Raise ModelFormatError where a GGUF file of this family cannot say what the model does."""
    try:
        with open_gguf(written) as file:
            found = config_from_gguf(file)
    except ModelFormatError as error:
        raise ModelFormatError(
            checkpoint.path, field=error.field, found="a model that such GGUF files cannot describe",
            expected=error.expected,
        ) from None  # fmt: skip
    expected = checkpoint.config
    for name in _ARITHMETIC:
        wanted, read = getattr(expected, name), getattr(found, name)
        same = math.isclose(wanted, read, rel_tol=1e-6) if isinstance(wanted, float) and read is not None else None
        if not (wanted == read if same is None else same):
            expected_here = f"{read!r}, as in all such GGUF files"
            raise ModelFormatError(checkpoint.path, field=name, found=wanted, expected=expected_here)
    windows = [[config.window(i) for i in range(config.num_hidden_layers)] for config in (expected, found)]
    if windows[0] != windows[1]:
        raise ModelFormatError(
            checkpoint.path, field="layer_types", found=f"windows {windows[0][:8]}",
            expected=f"windows {windows[1][:8]}, as in all such GGUF files",
        )  # fmt: skip
    for i in range(expected.num_hidden_layers):
        rotation, other = _rotation(expected, i), _rotation(found, i)
        if rotation.shape != other.shape or not np.allclose(rotation, other, rtol=1e-5, atol=0):
            ropes = [config.ropes[config.rope_index(i) or 0] for config in (expected, found)]
            told = [f"base {rope.theta:g}, scaling {rope.scaling}, factor {rope.factor:g}" for rope in ropes]
            raise ModelFormatError(
                checkpoint.path, field=f"rope of layer {i}", found=told[0],
                expected=f"{told[1]}, as in all such GGUF files",
            )  # fmt: skip


def _rotation(config: ModelConfig, layer: int) -> np.ndarray:
    """The frequencies of a layer's pairs and the factor of its cos and sin, in a short context and in a long one."""
    index = config.rope_index(layer)
    if index is None:
        return np.zeros((2, 1))
    ropes = [config.ropes[index].for_context(capacity) for capacity in (1, config.max_position_embeddings)]
    return np.array([[*frequencies(rope, config.head_dim), rope.attention_factor] for rope in ropes])


def _write(file: BinaryIO, checkpoint: Checkpoint, type: str, progress: bool | None) -> None:
    kind, number = TYPES[type]
    metadata = metadata_of(checkpoint)
    metadata |= {"general.file_type": encoded(number), "general.quantization_version": encoded(_QUANTIZATION_VERSION)}
    metadata.pop("general.alignment", None)  # ours is the default
    tensors = _file_tensors(checkpoint)
    described = [Described(name, shape, _dtype(name, shape, kind)) for name, (shape, _) in tensors.items()]
    factors = rope_factors(checkpoint)
    first = [Described(name, divisors.shape, "F32") for name, divisors in factors.items()]
    _require_space(file, sum(tensor.nbytes for tensor in [*first, *described]))
    write_header(file, metadata, [*first, *described])
    for divisors in factors.values():
        file.write(encode_rows("F32", divisors[None]).tobytes())
        pad(file)
    total = sum(math.prod(shape) for shape, _ in tensors.values())
    named = f"writing {type}"
    with tqdm(total=total, desc=named, unit="", unit_scale=True, leave=False, disable=hidden(progress)) as bar:
        for (_, parts), target in zip(tensors.values(), described, strict=True):
            for tensor in parts:
                _write_tensor(file, tensor, target.dtype, bar)
                tensor.release()
            pad(file)


def _file_tensors(checkpoint: Checkpoint) -> dict[str, tuple[tuple[int, ...], list[Tensor]]]:
    """Shape of each tensor of the file, and those of our tensors that it concatenates."""
    config = checkpoint.config
    family = BY_TYPE[config.model_type]
    places, found = family.gguf_places(config), dict[str, tuple[tuple[int, ...], list[Tensor]]]()
    for name in checkpoint.names():
        tensor, place = checkpoint.tensor(name), places[name]
        shape = place.file_shape(tensor.shape)
        parts = found.setdefault(place.name, (shape[1:] if name.endswith("shared_gate") else shape, []))[1]
        parts.append(_interleaved(config, name, tensor) if family.interleaved else tensor)
    return found


def _dtype(name: str, shape: tuple[int, ...], kind: str) -> str:
    """The storage type of a tensor in the file: routers stay exact, since they choose the experts."""
    if len(shape) == 1 or "ffn_gate_inp" in name:
        return "F32"
    if len(shape) == 2 and "_exps.bias" in name:
        return "F32"
    if kind in ("Q4_0", "Q4_1") and name in (GGUF_MODEL["embed"], GGUF_MODEL["head"]):
        kind = "Q8_0"
    return "F16" if shape[-1] % BLOCKS[kind][0] else kind


def _interleaved(config: ModelConfig, name: str, tensor: Tensor) -> Tensor:
    """Rows of q and k in the order of some families' GGUF files: the two rows of a RoPE pair are neighbours."""
    part = name.rpartition(".")[2].removesuffix("_bias")
    if part not in ("q", "k"):
        return tensor
    heads = config.num_attention_heads if part == "q" else config.num_key_value_heads
    return tensor.permuted(np.argsort(half_split_rows(heads, config.head_dim)))


def _write_tensor(file: BinaryIO, tensor: Tensor, dtype: str, bar: Any) -> None:
    step = max(1, _CHUNK_ELEMENTS // tensor.columns)
    for lo in range(0, tensor.rows, step):
        hi = min(lo + step, tensor.rows)
        if tensor.dtype == dtype:
            rows = tensor.raw(lo, hi)
        else:
            try:
                rows = encode_rows(dtype, tensor.float32(lo, hi))
            except ValueError as error:
                found = str(error).rpartition("found ")[2]
                raise ModelFormatError(
                    tensor.path, field=f"tensor {tensor.name!r} rows {lo}:{hi}", found=found,
                    expected=f"finite numbers that {dtype} can hold",
                ) from None  # fmt: skip
        file.write(rows.tobytes())
        bar.update((hi - lo) * tensor.columns)


def _require_space(file: BinaryIO, nbytes: int) -> None:
    free = shutil.disk_usage(Path(file.name).parent).free
    if nbytes > free:
        raise OSError(f"{Path(file.name).parent}: {nbytes / 1e9:.2f} GB needed on the disk, {free / 1e9:.2f} GB free")
