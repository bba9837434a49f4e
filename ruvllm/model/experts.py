"""MixtureOfExperts: a feed-forward block whose router sends each token to a few of many experts."""

from __future__ import annotations

from typing import Any

from ruvllm.model.config import ModelConfig
from ruvllm.model.feed_forward import Gate, Parameters
from ruvllm.model.ops import Ops


class MixtureOfExperts:
    """The weighted sum of what the chosen experts make of a token."""

    def __init__(self, config: ModelConfig, parameters: Parameters, layer: int) -> None:
        assert config.experts is not None
        at = f"layers.{layer}."
        self.per_token = config.experts.per_token
        self.router = parameters.linear(at + "router")
        self.gate, self.up, self.down = (
            [parameters.linear(f"{at}experts.{x}.{name}") for x in range(config.experts.count)]
            for name in ("gate", "up", "down")
        )
        self.gated = Gate(config)

    def __call__(self, ops: Ops, h: Any) -> Any:
        """h (T, E) -> (T, E)."""
        routing = ops.route(ops.linear(h, self.router), self.per_token)
        parts = []
        for x, (gate, up, down) in enumerate(zip(self.gate, self.up, self.down, strict=True)):
            rows = ops.gather(h, routing, x)
            parts.append(ops.linear(self.gated(ops, ops.linear(rows, gate), ops.linear(rows, up)), down))
        return ops.combine(parts, routing)
