"""Mixtures of experts at odd sizes: close to float64 of the same weights, and each row as its expert alone computes it.

Experts without tokens, all tokens to one expert, one expert a token and all of them, in every layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ruvllm.kernels.quant.layout import INT4
from ruvllm.kernels.quant.panels import Panels, empty_panels, pack_groups
from ruvllm.kernels.quant.weights import quantize_int4
from ruvllm.model import Llama, ModelConfig
from ruvllm.model.config import ExpertsConfig
from ruvllm.model.experts import MixtureOfExperts
from ruvllm.model.layer import Decoder
from ruvllm.model.low_rank import AdapterSet
from ruvllm.model.ops import Ops
from ruvllm.model.random_weights import RandomTensor, RandomWeights

E, F, X = 70, 53, 6
TOKENS = (1, 2, 7, 40)


class Mixture(Decoder):
    """The mixture of the first layer alone; ``seen`` is what goes in and what comes out."""

    def __init__(self, config: ModelConfig, parameters: Any) -> None:
        super().__init__(config, parameters)
        self.seen: list[np.ndarray] = []

    def __call__(self, ops: Ops, x: Any) -> Any:
        x = ops.call(x, lambda x: self.seen.append(x.copy()))
        y = ops.call(self.layers[0].mlp(ops, x), lambda y: self.seen.append(y.copy()))
        return ops.logits(ops.last_rows(y), self.head)


class Tensor(RandomTensor):
    """Random, in 4 bits with mins; a router's bias that sends all tokens to expert 4, if it is ``biased``."""

    biased = False

    def float32(self, lo: int = 0, hi: int | None = None, out: np.ndarray | None = None) -> np.ndarray:
        if self.biased and self.name.endswith("router_bias"):
            return np.where(np.arange(X) == 4, np.float32(100), np.float32(0))
        return super().float32(lo, hi, out)

    def quantized(self, layout: str) -> Panels:
        if layout != "int4":
            return super().quantized(layout)
        rows, columns = self.shape
        panels = empty_panels(INT4, rows, columns, mins=True)
        pack_groups(*quantize_int4(self.float32(), symmetric=False), panels)
        return panels


class Source(RandomWeights):
    biased = False

    def tensor(self, name: str) -> RandomTensor:
        found = Tensor(name, self._shapes[name], self._seed)
        found.biased = self.biased
        return found


def mixture(layout: str, k: int, biased: bool = False, threads: int = 1, **choices: Any) -> Llama:
    config = ModelConfig(
        vocab_size=100, hidden_size=E, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=16,
        experts=ExpertsConfig(count=X, per_token=k, intermediate_size=F, bias=True, **choices),
    )  # fmt: skip
    source = Source(config, seed=k)
    source.biased = biased
    return Llama(config, source, layout, threads, architecture=Mixture)


def rows_of(model: Llama, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What goes into the mixture and what comes out of it."""
    decoder = model.decoder
    assert isinstance(decoder, Mixture)
    decoder.seen.clear()
    model.forward(ids, model.new_cache(len(ids)))
    x, y = decoder.seen
    return x, y


def expected(model: Llama, x: np.ndarray) -> np.ndarray:
    """In float64, token by token, on the weights as they are in memory. Which experts: by the router's own scores."""
    mlp, out = model.decoder.layers[0].mlp, []
    assert isinstance(mlp, MixtureOfExperts)

    def product(x: np.ndarray, matrix: Any) -> np.ndarray:
        bias = 0 if matrix.bias is None else matrix.bias.astype(np.float64)
        return matrix.take(np.arange(matrix.rows)).astype(np.float64) @ x + bias

    def network(x: np.ndarray, gate: Any, up: Any, down: Any) -> np.ndarray:
        g = product(x, gate)
        return product(g / (1 + np.exp(-g)) * product(x, up), down)

    for row, scores in zip(x.astype(np.float64), mlp.router(x).astype(np.float64), strict=True):
        chosen = np.argsort(-scores, kind="stable")[: mlp.per_token]
        shares = np.exp(scores - scores.max())
        shares /= shares[chosen].sum() if mlp.normalised else shares.sum()
        y = sum(shares[i] * network(row, mlp.gates[i], mlp.ups[i], mlp.downs[i]) for i in chosen)
        if mlp.shared is not None:
            assert mlp.shared_gate is not None
            share = 1 / (1 + np.exp(-product(row, mlp.shared_gate)))
            y = y + share * network(row, mlp.shared.gate, mlp.shared.up, mlp.shared.down)
        out.append(y)
    return np.array(out)


@pytest.mark.parametrize(("k", "biased"), [(1, False), (1, True), (3, False), (2, True), (X, False)])
@pytest.mark.parametrize("layout", ["f32", "bf16", "int8", "int4"])
def test_close_to_float64_and_as_each_expert_alone(layout: str, k: int, biased: bool) -> None:
    choices = {"normalised": k != 3, "shared_intermediate_size": 20 * (k == 3), "shared_gate": k == 3}
    model = mixture(layout, k, biased, **choices)
    ids = np.random.default_rng(0).integers(0, 100, max(TOKENS))
    model.fused = False  # matrices one by one
    x, alone = rows_of(model, ids)
    exact = expected(model, x)
    error = np.sum((alone - exact) ** 2) / np.sum(exact**2)
    assert error <= (1e-11 if layout in ("f32", "bf16") else 1e-3)
    model.fused = True
    for threads in (1, 2, 3):
        model.threads = threads
        for tokens in TOKENS:
            np.testing.assert_array_equal(rows_of(model, ids[:tokens])[1], alone[:tokens])


def test_experts_of_other_shapes_layouts_or_with_adapters_are_refused() -> None:
    def refused(message: str, change: Callable[[MixtureOfExperts], None], adapters: AdapterSet | None = None) -> None:
        for fused in (True, False):
            model = mixture("int8", 2)
            mlp = model.decoder.layers[0].mlp
            assert isinstance(mlp, MixtureOfExperts)
            change(mlp)
            model.fused = fused
            model.set_adapters(adapters)
            with pytest.raises(ValueError, match=message):
                rows_of(model, np.arange(5))

    other = mixture("int4", 2).decoder.layers[0].mlp
    assert isinstance(other, MixtureOfExperts)
    like = "expected a matrix like the first, 70 -> 53, int8, bias, found"
    mins = f"experts.2.gate: {like} 70 -> 53, int4 with mins, bias"
    refused(mins, lambda mlp: mlp.gates.__setitem__(2, other.gates[2]))
    refused(f"experts.1.down: {like} 53 -> 70, int8, bias", lambda mlp: mlp.ups.__setitem__(1, mlp.downs[1]))

    def without_bias(mlp: MixtureOfExperts) -> None:
        mlp.ups[3].bias = None

    refused(f"experts.3.up: {like} 70 -> 53, int8$", without_bias)
    rng = np.random.default_rng(0)
    factors = rng.random((2, F), np.float32), rng.random((E, 2), np.float32)
    adapters = AdapterSet(1, {"layers.0.down": factors}, False)
    adapters.matrices["layers.0.experts.1.down"] = adapters.matrices.pop("layers.0.down")
    refused("experts.1.down: an expert's matrix cannot have an adapter", lambda mlp: None, adapters)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("expected matrices of 6 experts with 70 inputs, found 5", lambda m: m.gates.pop()),
        ("expected matrices of 6 experts with 70 inputs, found 6 with 53", lambda m: setattr(m, "gates", m.downs)),
        ("route: expected 1 <= k <= experts <= 512, found k = 7 of 6", lambda m: setattr(m, "per_token", 7)),
    ],
)
def test_layer_code_that_does_not_fit_is_refused(message: str, change: Callable[[MixtureOfExperts], Any]) -> None:
    """The tape must not read beyond an array."""
    model = mixture("int8", 2)
    mlp = model.decoder.layers[0].mlp
    assert isinstance(mlp, MixtureOfExperts)
    change(mlp)
    with pytest.raises(ValueError, match=message):
        rows_of(model, np.arange(5))


def test_rows_of_another_number_are_refused() -> None:
    def run(change: Callable[[Ops, Any, Any, MixtureOfExperts], Any], message: str) -> None:
        class Changed(Mixture):
            def __call__(self, ops: Ops, x: Any) -> Any:
                mlp: Any = self.layers[0].mlp
                return change(ops, x, ops.route(ops.linear(x, mlp.router), 2), mlp)

        base = mixture("f32", 2)
        model = Llama(base.config, Source(base.config, seed=2), "f32", 1, architecture=Changed)
        with pytest.raises(ValueError, match=message):
            model.forward([1, 2, 3], model.new_cache(4))

    run(lambda ops, x, r, m: ops.grouped_linear(x, r, m.gates), "grouped_linear: expected 2 rows for each token")
    run(lambda ops, x, r, m: ops.combine(x, r), "combine: expected 2 rows for each token")
    run(lambda ops, x, r, m: ops.gather(ops.gather(x, r), r), "gather: expected 1 row for each token")
    run(lambda ops, x, r, m: ops.route(ops.last_rows(x), 2), "route: expected 1 row for each token")
    run(lambda ops, x, r, m: ops.sigmoid_scale(x, x), "sigmoid_scale: expected one gate for each row, found 70")


def test_idle_experts_do_not_count() -> None:
    """What a token meets: how much a pass may take at once depends on it."""
    model = mixture("f32", 2)
    assert model.layer_weights == X * E + 2 * 3 * E * F + 4 * 16 * E
    assert len(model.linears()) == 2 + 4 + 1 + 3 * X
