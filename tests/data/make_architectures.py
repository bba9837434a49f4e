"""Makes tests/data/architectures: what transformers computes from tiny random checkpoints of each architecture.

Run ``python -m tests.data.make_architectures [NAME ...]`` where torch and transformers are installed
(`pip install ruvllm[peers,test]`); the committed files were made with torch 2.13 and transformers 5.24. The weights are
not stored: tests/model/tiny_checkpoints.py makes them from the tensors' names. They are written under the names that
files on the Hub have, and read back by `from_pretrained`, which must find all of them and no others. As GGUF files they
are read by llama.cpp (llama-cpp-python 0.3.36), which must compute the same logits.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import llama_cpp  # type: ignore[import-not-found]
import numpy as np
import torch  # type: ignore[import-not-found]
import transformers  # type: ignore[import-not-found]

from tests.data.architecture_configs import CONFIGS, GENERATION, TOKENS
from tests.model import tiny_gguf
from tests.model.tiny_checkpoints import DATA, Checkpoint, read, write_checkpoint

LEAST_GAP = 1e-3  # between the logits of the last expert chosen and of the first that is not
MOST_ERROR = 4e-5  # of float32 against float64, so that 2e-4 is a fair bound for another order of sums


def make(name: str) -> None:
    """Write one variant's file."""
    config = CONFIGS[name]
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        (directory / "config.json").write_text(json.dumps(config))
        new_config, shapes = _saved(directory, config)
    text = config.get("text_config", config)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    ids = rng.integers(3, text["vocab_size"] - 8, TOKENS.get(name, 48))
    blank = np.empty(0, np.float32)
    for salt in range(100):
        checkpoint = Checkpoint(config, new_config, GENERATION.get(name), shapes, salt, ids, blank)
        logits, gap = _logits(checkpoint, new=False)
        exact, _ = _logits(checkpoint, new=False, dtype=torch.float64)
        error = np.abs(exact - logits).max()
        if gap > LEAST_GAP and error < MOST_ERROR:
            break
    else:
        raise ValueError(f"{name}: no salt gives clear choices of experts and accurate logits")
    again, _ = _logits(checkpoint, new=True)
    np.testing.assert_array_equal(again, logits)
    about = dataclasses.asdict(checkpoint)
    del about["ids"], about["logits"]
    DATA.mkdir(exist_ok=True)
    np.savez_compressed(DATA / f"{name}.npz", about=json.dumps(about), ids=ids, logits=logits.astype(np.float32))
    size = (DATA / f"{name}.npz").stat().st_size
    print(f"{name}: {size} bytes, salt {salt}, gap {gap:.1e}, std {logits.std():.2f}, float64 {error:.1e}", flush=True)


def _saved(directory: Path, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The result of `save_pretrained`: config.json, and the tensors' shapes by the names of files on the Hub."""
    model = _model_class(config)(transformers.AutoConfig.from_pretrained(directory))
    model.save_pretrained(directory / "saved")
    new_config = json.loads((directory / "saved" / "config.json").read_text())
    raw = (directory / "saved" / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    header.pop("__metadata__", None)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, entry in header.items():
        shapes |= _on_the_hub(name, tuple(entry["shape"]), "quantization_config" in config)
    return new_config, shapes


def _on_the_hub(name: str, shape: tuple[int, ...], mxfp4: bool) -> dict[str, tuple[int, ...]]:
    """`save_pretrained` writes the names of the Hub, but for the vision tower of Gemma 3 and the blocks of GPT-OSS."""
    if mxfp4 and name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        experts, inputs, outputs = shape
        return {
            f"{name}_blocks": (experts, outputs, inputs // 32, 16),
            f"{name}_scales": (experts, outputs, inputs // 32),
        }
    return {name.replace("vision_tower.", "vision_tower.vision_model."): shape}


def _model_class(config: dict[str, Any]) -> Any:
    return getattr(transformers, config["architectures"][0])


def _logits(checkpoint: Checkpoint, new: bool, dtype: torch.dtype = torch.float32) -> tuple[Any, float]:
    """Logits (T, V), and the least distance of a choice of experts from a tie."""
    gaps = [np.inf]

    def watch(module: Any, _: Any, output: Any) -> None:
        ordered = output[0].float().sort(dim=-1, descending=True).values
        gaps.append(float((ordered[:, module.top_k - 1] - ordered[:, module.top_k]).min()))

    more = {}
    if "quantization_config" in checkpoint.config:  # only GPUs compute with MXFP4
        more["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(Path(directory), checkpoint, new)
        model, found = _model_class(checkpoint.config).from_pretrained(
            directory, dtype=dtype, attn_implementation="eager", experts_implementation="eager",
            output_loading_info=True, **more,
        )  # fmt: skip
    wrong = {key: value for key, value in found.items() if value}
    assert not wrong, wrong
    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter"):
            module.register_forward_hook(watch)
    with torch.no_grad():
        return model.eval()(torch.tensor(checkpoint.ids)[None]).logits[0].numpy(), min(gaps)


def check_gguf(name: str) -> None:
    """llama.cpp reads the GGUF file of a variant and computes what transformers does."""
    checkpoint = read(name)
    ids = checkpoint.ids.tolist()
    with tempfile.TemporaryDirectory() as directory:
        path = tiny_gguf.write_gguf(Path(directory) / "model.gguf", checkpoint)
        f32 = llama_cpp.GGML_TYPE_F32
        model = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, type_k=f32, type_v=f32, verbose=False)
        model.eval(ids)
        error = np.abs(model.scores[: len(ids)] - checkpoint.logits).max()
        model.close()
    # Its GELU is a table of float16, and it multiplies MXFP4 with activations of 8 bits. A wrong convention would move
    # logits by whole units.
    most = 1e-2 if name.startswith("gemma") else 0.3 if name.endswith("mxfp4") else 1e-4
    print(f"{name}: llama.cpp {error:.1e}", flush=True)
    assert error < most, f"{name}: llama.cpp is {error} from transformers"


if __name__ == "__main__":
    for variant in sys.argv[1:] or CONFIGS:
        make(variant)
        if variant in tiny_gguf.VARIANTS:
            check_gguf(variant)
