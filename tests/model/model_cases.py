"""Small models of every kind of weights, and their results: shared by tests in this process and in others.

Run as a program, ``python -m tests.model.model_cases 1 2`` prints a hash of the logits of every kind for each number
of threads; with ``tokens`` it prints the logits of a prompt and of the token after it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from ruvllm.checkpoint.loader import open_checkpoint
from ruvllm.model import Llama, ModelConfig, RopeConfig
from ruvllm.model.kv_cache import KVCache

LAYOUTS = ("f32", "f16", "bf16", "int8", "int4")
# Weights and cache: each pair that is compiled apart costs seconds, so not all of them.
KINDS = (("f32", "f32"), ("f32", "f16"), ("f16", "f32"), ("bf16", "f32"), ("int8", "int8"), ("int4", "f32"))

# Odd everywhere: 3 query heads a kv head, rows that end within a panel, groups of 32 that end within a row.
SMALL = ModelConfig(
    vocab_size=211, hidden_size=75, intermediate_size=107, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, head_dim=18, max_position_embeddings=1024, rope=RopeConfig(theta=500.0),
    attention_bias=True, attention_out_bias=True, mlp_bias=True, eos_token_ids=(2,),
)  # fmt: skip
WINDOWED = dataclasses.replace(SMALL, sliding_window=37)
MIXED = dataclasses.replace(
    SMALL, num_hidden_layers=3, sliding_window=20,
    layer_types=("sliding_attention", "full_attention", "sliding_attention"),
)  # fmt: skip
# Without biases threads steal each other's chunks; its feed-forward is wide enough for several chunks per thread.
PLAIN = dataclasses.replace(
    SMALL, attention_bias=False, attention_out_bias=False, mlp_bias=False, intermediate_size=707
)  # fmt: skip


def small_model(layout: str, threads: int = 1, config: ModelConfig = SMALL) -> Llama:
    """One thread is enough for most tests: how many there are changes no bit, which test_llama.py shows."""
    return Llama(config, layout=layout, threads=threads, seed=7)


def text(tokens: int, vocabulary: int = SMALL.vocab_size, seed: int = 0) -> np.ndarray:
    """Random token ids (tokens,)."""
    return np.random.default_rng(seed).integers(0, vocabulary, tokens)


def load(path: Path, layout: str = "auto", threads: int = 1) -> Llama:
    """The model in a GGUF file or a directory."""
    with open_checkpoint(path) as checkpoint:
        return Llama(checkpoint.config, checkpoint, layout, threads)


def logits(model: Llama, ids: np.ndarray, kv: str = "auto") -> np.ndarray:
    """Logits (T, V) of a text on its own."""
    return model.forward(ids, model.new_cache(len(ids), kv))


def run(model: Llama, cache: KVCache, ids: np.ndarray, parts: list[int]) -> np.ndarray:
    """Logits (T, V) of ids run in consecutive parts of these lengths."""
    assert sum(parts) == len(ids)
    ends = np.cumsum(parts)
    return np.concatenate([model.forward(ids[end - part : end], cache) for part, end in zip(parts, ends, strict=True)])


def digest(threads: int) -> str:
    """Hash of logits: prefill of many tokens, a few tokens, decode; every kind of weights."""
    state = hashlib.sha256()
    ids = text(150)
    for layout, kv in KINDS:
        model = small_model(layout, threads)
        state.update(run(model, model.new_cache(150, kv), ids, [130, 1, 2, 7, *[1] * 10]).tobytes())
        model = small_model(layout, threads, PLAIN)
        state.update(run(model, model.new_cache(150, kv), ids, [130, 1, 2, 17]).tobytes())
    return state.hexdigest()


if __name__ == "__main__":
    if sys.argv[1] == "tokens":
        answers = []
        for layout, kv in (("f32", "f32"), ("bf16", "f32"), ("int4", "f32"), ("f32", "f16")):
            model = small_model(layout, threads=1)
            answers.append(run(model, model.new_cache(12, kv), text(9), [7, 1, 1]).tolist())
        print(json.dumps(answers))
    else:
        print(json.dumps({threads: digest(int(threads)) for threads in sys.argv[1:]}))
