"""Transformer layers of real sizes, with random weights, and their results in float64."""

from __future__ import annotations

import copy
import dataclasses
from functools import cache
from typing import Any

import numpy as np

from ruvllm.kernels import reference
from ruvllm.kernels.quant.weights import quantize_int4
from ruvllm.lab.work import pass_work
from ruvllm.model import KVCache, Llama, ModelConfig
from ruvllm.model.exchange import Alone, Exchange
from ruvllm.model.layer import Decoder
from ruvllm.model.presets import PRESETS
from ruvllm.model.random_weights import RandomTensor, RandomWeights
from ruvllm.model.reference import Float64
from ruvllm.model.replay import recorded

ROWS = 256  # distinct rows of weights; a matrix repeats them, each copy in its own memory
CONTEXT = 16  # tokens before the timed one
TOKEN = 1
_VOCABULARY = 512


@cache
def _block(columns: int) -> np.ndarray:
    return np.random.default_rng(columns).standard_normal((ROWS, columns), np.float32) * np.float32(columns**-0.5)


class RepeatedTensor(RandomTensor):
    """The same rows repeated: drawing 800 million random numbers would take longer than the measurement."""

    def _rows(self, block: int) -> np.ndarray:
        return _block(self.shape[1])


class RepeatedWeights(RandomWeights):
    """Every tensor of a configuration, its matrices of repeated rows."""

    def tensor(self, name: str) -> RepeatedTensor:
        """The tensor of a canonical name; KeyError if the configuration has no such tensor."""
        return RepeatedTensor(name, super().tensor(name).shape, 0)

    def block(self, columns: int) -> np.ndarray:
        """The repeated rows of matrices with ``columns`` columns: (ROWS, columns) float32."""
        return _block(columns)


def layer_config(model: str, layers: int) -> ModelConfig:
    """A preset cut down to its first layers and a small vocabulary, whose embedding is also the head."""
    return dataclasses.replace(
        PRESETS[model], num_hidden_layers=layers, vocab_size=_VOCABULARY, tie_word_embeddings=True, bos_token_id=None,
        eos_token_ids=(),
    )  # fmt: skip


def layer_model(config: ModelConfig, layout: str) -> Llama:
    """That model with random weights."""
    return Llama(config, RepeatedWeights(config), layout)


def first_layers(model: Llama, layers: int, threads: int) -> Llama:
    """The same model with fewer layers, on ``threads`` threads; weights are shared."""
    part = copy.copy(model)
    part.config = dataclasses.replace(model.config, num_hidden_layers=layers)
    part.decoder = copy.copy(model.decoder)
    part.decoder.layers = model.decoder.layers[:layers]
    part.threads = threads
    part.weights_changed()  # the tapes hold all layers
    return part


class OneToken:
    """One token through a model after CONTEXT others: a function without arguments."""

    def __init__(self, model: Llama) -> None:
        self.model = model
        self.cache: KVCache = model.new_cache(CONTEXT + 1)
        self.logits = np.empty(model.config.vocab_size, np.float32)
        model.forward(context_ids(), self.cache, last_only=True)

    def __call__(self) -> np.ndarray:
        self.cache.truncate(CONTEXT)
        return self.model.forward([TOKEN], self.cache, last_only=True, out=self.logits)


def context_ids() -> np.ndarray:
    """The tokens before the timed one."""
    return np.arange(2, 2 + CONTEXT)


def flops(config: ModelConfig) -> float:
    """Arithmetic of the token: of its products and of its attention over CONTEXT + 1 positions."""
    steps = recorded(config, ["f32"]).schedule.steps
    return pass_work(config, steps, "f32", np.array([CONTEXT]), "f32").flops


def exact_logits(config: ModelConfig, layout: str) -> np.ndarray:
    """Logits after the token in float64, on the weights as the layout holds them; (V,)."""
    ids = np.append(context_ids(), TOKEN)
    decoder = Decoder(config, _HeldParameters(config, layout))
    logits: Any = decoder(Float64(config, len(ids)), _held(config.hidden_size, layout)[ids % ROWS])
    return np.asarray(logits[-1])


class _HeldParameters:
    """``RepeatedWeights`` as a layout holds them, in float64."""

    exchange: Exchange = Alone()

    def __init__(self, config: ModelConfig, layout: str) -> None:
        self.weights, self.layout = RepeatedWeights(config), layout

    def vector(self, name: str) -> np.ndarray:
        """A vector."""
        return self.weights.tensor(name).float32().astype(np.float64)

    def linear(self, name: str) -> Any:
        """A matrix of repeated rows."""
        rows, columns = self.weights.tensor(name).shape
        return _HeldMatrix(rows, columns, self.layout)


class _HeldMatrix:
    """A product with repeated rows is the product with one copy of them, repeated."""

    def __init__(self, rows: int, columns: int, layout: str) -> None:
        self.rows, self.held = rows, _held(columns, layout)

    def product(self, x: np.ndarray) -> np.ndarray:
        return np.tile(x @ self.held.T, -(-self.rows // ROWS))[:, : self.rows]


@cache
def _held(columns: int, layout: str) -> np.ndarray:
    """The rows that repeat, as a layout holds them, in float64."""
    block = _block(columns)
    if layout == "f32":
        return block.astype(np.float64)
    codes, scales, mins = quantize_int4(block)
    return reference.dequantize(codes, scales, mins, columns)
