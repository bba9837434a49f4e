"""FeedForward: the gated network of a layer, in the operations of ``ops``."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from ruvllm.model.config import ModelConfig
from ruvllm.model.exchange import Exchange
from ruvllm.model.linear import Linear
from ruvllm.model.ops import Ops


class Parameters(Protocol):
    """The source of a model's matrices and vectors, by canonical name ("layers.3.q").

    exchange: with the ranks that hold the other parts of the matrices.
    """

    exchange: Exchange

    def linear(self, name: str) -> Linear:
        """A matrix, with its bias if it has one."""
        ...

    def vector(self, name: str) -> np.ndarray:
        """A vector (n,)."""
        ...


class Gate:
    """The gated activation that a configuration chooses: SwiGLU, GeGLU or the clamped SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        self.kind, self.limit, self.alpha = config.hidden_act, config.swiglu_limit, config.swiglu_alpha

    def __call__(self, ops: Ops, gate: Any, up: Any) -> Any:
        """gate, up (T, F) -> (T, F)."""
        if self.kind == "gelu_tanh":
            return ops.gelu_mul(gate, up)
        if self.kind == "clamped_swiglu":
            return ops.clamped_swiglu(gate, up, self.limit, self.alpha)
        return ops.silu_mul(gate, up)


class FeedForward:
    """down(activation(gate(h)) * up(h)). ``share``: the part of a ``Share`` that says which columns a rank has."""

    share = "columns"

    def __init__(self, config: ModelConfig, parameters: Parameters, layer: int) -> None:
        self.gate, self.up, self.down = (
            parameters.linear(f"layers.{layer}.{name}") for name in ("gate", "up", "down")
        )  # fmt: skip
        self.gated, self.at = Gate(config), f"layers.{layer}.mlp."
        self.exchange = parameters.exchange

    def __call__(self, ops: Ops, h: Any) -> Any:
        """h (T, E) -> (T, E)."""
        gate, up = (ops.name(ops.linear(h, m), self.at + name) for m, name in ((self.gate, "gate"), (self.up, "up")))
        hidden = ops.name(self.gated(ops, gate, up), self.at + "hidden")
        return ops.linear(self.exchange.inputs(ops, hidden, self.share), self.down)
