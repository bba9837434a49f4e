"""MixtureOfExperts: a feed-forward network of many experts, of which a router chooses a few for each token."""

from __future__ import annotations

from typing import Any

from ruvllm.model.config import ModelConfig
from ruvllm.model.feed_forward import FeedForward, Gate, Parameters
from ruvllm.model.linear import Linear
from ruvllm.model.ops import Ops


class MixtureOfExperts(FeedForward):
    """The weighted sum of the chosen experts' SwiGLUs, + that of a shared expert, perhaps times a sigmoid.

    router (X, E); gates, ups (F, E) and downs (E, F) of each expert.
    """

    share = "expert_columns"

    def __init__(self, config: ModelConfig, parameters: Parameters, layer: int) -> None:
        assert config.experts is not None
        at, experts = f"layers.{layer}.", config.experts
        self.router = parameters.linear(at + "router")
        self.gates, self.ups, self.downs = (
            [parameters.linear(f"{at}experts.{x}.{name}") for x in range(experts.count)]
            for name in ("gate", "up", "down")
        )  # fmt: skip
        self.gated, self.at = Gate(config), f"layers.{layer}.mlp."
        self.exchange = parameters.exchange
        self.per_token, self.normalised = experts.per_token, experts.normalised
        self.shared = _Shared(config, parameters, layer) if experts.shared_intermediate_size else None
        self.shared_gate = parameters.linear(at + "shared_gate") if experts.shared_gate else None

    def __call__(self, ops: Ops, h: Any) -> Any:
        """h (T, E) -> (T, E)."""
        scores = ops.name(ops.linear(h, self.router), self.at + "router")
        routing = ops.route(scores, self.per_token, self.normalised)
        x = ops.gather(h, routing)  # (T k, E)
        gate, up = ops.grouped_linear(x, routing, self.gates), ops.grouped_linear(x, routing, self.ups)
        hidden = ops.name(self.gated(ops, gate, up), self.at + "experts.hidden")
        hidden = self.exchange.inputs(ops, hidden, self.share)
        out = ops.combine(ops.name(ops.grouped_linear(hidden, routing, self.downs), self.at + "experts.out"), routing)
        if self.shared is None:
            return out
        shared = self.shared(ops, h)
        if self.shared_gate is not None:
            shared = ops.sigmoid_scale(shared, ops.linear(h, self.shared_gate))
        return ops.add(out, ops.name(shared, self.at + "shared.out"))

    @property
    def idle_weights(self) -> int:
        """Weights of the experts that one token does not use."""
        matrices: list[Linear] = [*self.gates, *self.ups, *self.downs]
        return sum(matrix.size for matrix in matrices) * (len(self.gates) - self.per_token) // len(self.gates)


class _Shared(FeedForward):
    """The expert that every token goes to."""

    share = "shared_columns"

    def __init__(self, config: ModelConfig, parameters: Parameters, layer: int) -> None:
        self.gate, self.up, self.down = (
            parameters.linear(f"layers.{layer}.shared.{name}") for name in ("gate", "up", "down")
        )  # fmt: skip
        self.gated, self.at = Gate(config), f"layers.{layer}.mlp.shared."
        self.exchange = parameters.exchange
