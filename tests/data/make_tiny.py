"""Makes tests/data/tiny: tiny random checkpoints and the float32 logits that `transformers` computes from them.

Run `python tests/data/make_tiny.py` where torch and transformers are installed (`pip install ruvllm[peers]`); the
committed files were made with torch 2.13 and transformers 5.23. Each case is a Hugging Face directory with a file
`logits.npz` beside its weights: `ids` (T,) int64 and `logits` (T, V) float32.

The weights are drawn much wider than an untrained model's, so that attention is peaked and logits are far from flat:
a wrong rotation, mask or head mapping then moves them by whole units. Sizes are odd where the architecture allows it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch  # type: ignore[import-not-found]
from transformers import (  # type: ignore[import-not-found]
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

OUT = Path(__file__).parent / "tiny"
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 20000.0, "factor": 2.5}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 40,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One checkpoint: how to make its model, how to save it, how long a text to run."""

    name: str
    model: Any  # the class
    config: Any
    tokens: int
    dtype: torch.dtype = torch.float32
    shard: str = "1GB"
    patch: dict[str, Any] = field(default_factory=dict)  # changes to the saved config.json; None deletes a key


def common(vocab: int, hidden: int, ffn: int, layers: int, heads: int, kv: int, **more: Any) -> dict[str, Any]:
    """Keyword arguments that every case sets."""
    return {
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, **more,
    }  # fmt: skip


CASES = [
    # LLaMA 2: as many key/value heads as query heads; rotary parameters as spelt before transformers 5.
    Case(
        "llama2_mha", LlamaForCausalLM, LlamaConfig(**common(97, 48, 59, 2, 4, 4)), 40,
        patch={"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": None, "head_dim": None},
    ),
    # LLaMA 3.1: grouped queries, rescaled frequencies, a text longer than the original length of 40.
    Case(
        "llama3_scaled_gqa", LlamaForCausalLM,
        LlamaConfig(**common(97, 48, 47, 2, 4, 2, head_dim=16, rope_parameters=LLAMA3_ROPE, eos_token_id=[2, 5])),
        81,
    ),
    # Mistral: a window of 9 positions, heads whose total width (60) is not the hidden size (50).
    Case(
        "mistral_window", MistralForCausalLM,
        MistralConfig(**common(99, 50, 55, 2, 6, 3, head_dim=10, sliding_window=9)), 48,
    ),
    # Biases on q, k, v and o; one key/value head for all.
    Case(
        "attention_bias", LlamaForCausalLM,
        LlamaConfig(**common(103, 55, 63, 2, 5, 1, head_dim=8, attention_bias=True)), 33,
    ),
    # bfloat16 in several files, the embedding serving as the head.
    Case(
        "bf16_sharded_tied", LlamaForCausalLM, LlamaConfig(**common(113, 48, 61, 3, 6, 3, tie_word_embeddings=True)),
        37, dtype=torch.bfloat16, shard="30KB",
    ),
    # Position interpolation; rotary parameters in the oldest spelling. Its large epsilon shows in the logits.
    Case(
        "linear_rope", LlamaForCausalLM,
        LlamaConfig(**common(97, 48, 59, 2, 4, 2, rms_norm_eps=1e-2, rope_parameters=LINEAR_ROPE)), 64,
        patch={"rope_parameters": None, "rope_theta": 20000.0, "rope_scaling": {"type": "linear", "factor": 2.5}},
    ),
    # Biases in the feed-forward block; float16 weights.
    Case(
        "mlp_bias_f16", LlamaForCausalLM, LlamaConfig(**common(97, 64, 95, 2, 4, 2, mlp_bias=True)), 29,
        dtype=torch.float16,
    ),
]  # fmt: skip


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Wide random weights: matrices with 1.7 / sqrt(inputs), embeddings 0.35, norms around 1, biases 0.5."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            value = 1 + 0.25 * noise
        elif name.endswith("bias"):
            value = 0.5 * noise
        elif "embed_tokens" in name:
            value = 0.35 * noise
        else:
            value = 1.7 / parameter.shape[1] ** 0.5 * noise
        parameter.data.copy_(value)


def make(case: Case, seed: int) -> None:
    """Write one case's directory."""
    directory = OUT / case.name
    shutil.rmtree(directory, ignore_errors=True)
    generator = torch.Generator().manual_seed(seed)
    model = case.model(case.config)
    randomise(model, generator)
    model.to(case.dtype)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=case.config.eos_token_id)
    model.save_pretrained(directory, max_shard_size=case.shard)
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **case.patch}
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in case.patch or v is not None}, indent=1))

    ids = torch.randint(3, case.config.vocab_size, (1, case.tokens), generator=generator)
    # Read back rather than `model.float()`, which would keep the rotary frequencies rounded to 16 bits.
    model = case.model.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = model.eval()(ids).logits[0]
    np.savez_compressed(directory / "logits.npz", ids=ids[0].numpy(), logits=logits.numpy())
    for file in directory.iterdir():
        file.chmod(0o644)
    size = sum(f.stat().st_size for f in directory.iterdir())
    print(f"{case.name}: {size} bytes, logits {tuple(logits.shape)}, std {logits.std():.2f}")


if __name__ == "__main__":
    for number, case in enumerate(CASES):
        make(case, seed=1000 + number)
