"""A training pass: tokens forward through the layers, keeping what is needed, and the loss's gradient back.

Only the adapter learns: base weights, norms and embedding are fixed, so the gradient of a linear layer's input, dy W,
is all that flows through them. Integer weights multiply activations rounded to 8 bits, as they do when the model
speaks; the gradient passes over that rounding (Bengio et al. 2013, "straight-through").

Several sequences lie one behind the other; attention keeps them apart, all else does not mind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

import ruvllm.kernels as K
from ruvllm.kernels._memory import aligned_empty
from ruvllm.kernels._threads import limited_to
from ruvllm.model.activations import Activations
from ruvllm.model.llama import Llama
from ruvllm.model.lora_adapter import TARGETS, LoraAdapter
from ruvllm.model.low_rank import Factors

NO_TARGET = -1
_LOGIT_ROWS = 64  # positions whose logits exist at one time
_NONE = np.empty(0, np.float32)


@dataclass(frozen=True)
class Batch:
    """Sequences one behind the other.

    ids: (T,) token ids. targets: (T,) the id that each position is to predict, or NO_TARGET. starts: (n + 1,) where
    each sequence begins, and T.
    """

    ids: np.ndarray
    targets: np.ndarray
    starts: np.ndarray


@dataclass
class _Kept:
    """What the backward pass of a layer needs; norms and products of these are computed again."""

    x: np.ndarray  # (T, E) the layer's input
    q: np.ndarray  # (T, H, D) turned
    k: np.ndarray  # (T, KV, D) turned
    v: np.ndarray  # (T, KV, D)
    attended: np.ndarray  # (T, H D); _NONE where o does not learn
    middle: np.ndarray  # (T, E) the residual stream between attention and feed-forward
    gate: np.ndarray  # (T, F)
    up: np.ndarray  # (T, F)


class TrainingPass:
    """The loss of an adapter on a model, and its gradient.

    Args:
        model: whose weights stay as they are.
        adapter: what learns.
        fixed: other adapters that act meanwhile, as ``MicroLora`` mixes them.
        checkpointing: keep only the input of each layer and compute the rest a second time; the same numbers come
            out, from a tenth of the memory.
    """

    def __init__(
        self, model: Llama, adapter: LoraAdapter, fixed: Mapping[str, Factors] | None = None,
        checkpointing: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.adapter, self.checkpointing = model, adapter, checkpointing
        self._fixed = {
            name: (np.ascontiguousarray(down.T), np.ascontiguousarray(up.T))
            for name, (down, up) in (fixed or {}).items()
        }
        self._dropout: np.random.SeedSequence | None = None

    def losses(self, batch: Batch) -> np.ndarray:
        """The negative log-likelihood of each target, in nats, in their order: (number of targets,) float32."""
        with limited_to(self.model.threads):
            x, _ = self._forward(batch, keep=False)
            return self._head(x, batch, scale=0.0, dx=None)

    def gradients(
        self, batch: Batch, into: np.ndarray, scale: float, dropout_seed: tuple[int, ...] | None = None
    ) -> np.ndarray:
        """Add ``scale`` times the gradient of the summed loss to ``into``, laid out as ``adapter.parameters``.

        dropout_seed: numbers that decide what the adapter's dropout leaves out; None for no dropout.

        Returns:
            The loss of each target.
        """
        seeded = dropout_seed is not None and self.adapter.config.dropout > 0
        self._dropout = np.random.SeedSequence(dropout_seed) if seeded else None
        grad_a, grad_b = self.adapter.views(into)
        with limited_to(self.model.threads):
            x, kept = self._forward(batch, keep=True)
            dx = np.zeros_like(x)
            losses = self._head(x, batch, scale, dx)
            back = _Backward(self, batch, grad_a, grad_b)
            for i in reversed(range(len(self.model.layers))):
                saved = kept.pop()
                if self.checkpointing:
                    saved = self._layer(i, saved.x, batch)[1]
                back.layer(i, saved, dx)
        return losses

    def _forward(self, batch: Batch, keep: bool) -> tuple[np.ndarray, list[_Kept]]:
        """The residual stream (T, E) after all layers."""
        x = aligned_empty((len(batch.ids), self.model.config.hidden_size))
        for row, token in zip(x, batch.ids, strict=True):
            row[:] = self.model.embed.row(int(token))
        kept: list[_Kept] = []
        for i in range(len(self.model.layers)):
            before = x
            x, saved = self._layer(i, x, batch)
            if keep:
                kept.append(_Kept(before, *[_NONE] * 7) if self.checkpointing else saved)
        return x, kept

    def _layer(self, i: int, x: np.ndarray, batch: Batch) -> tuple[np.ndarray, _Kept]:
        """x (T, E) through layer i."""
        config, layer = self.model.config, self.model.layers[i]
        T, dim = len(x), config.head_dim
        cos, sin = self.angles(batch)
        h = Activations(*x.shape).of(K.rms_norm(x, layer.attn_norm, layer.eps))
        q = self._linear(i, "q", h).reshape(T, config.num_attention_heads, dim)
        k = self._linear(i, "k", h).reshape(T, config.num_key_value_heads, dim)
        v = self._linear(i, "v", h).reshape(T, config.num_key_value_heads, dim)
        K.apply_rope_tables(q, cos, sin, out=q)
        K.apply_rope_tables(k, cos, sin, out=k)
        attended = aligned_empty(q.shape)
        for a, b in pairwise(batch.starts):
            K.flash_attention(q[a:b], k[a:b], v[a:b], window=config.sliding_window, out=attended[a:b])
        flat = attended.reshape(T, -1)
        middle = self._linear(i, "o", Activations(*flat.shape).of(flat))
        K.add(middle, x, out=middle)
        h = Activations(*x.shape).of(K.rms_norm(middle, layer.mlp_norm, layer.eps))
        gate, up = self._linear(i, "gate", h), self._linear(i, "up", h)
        inner = K.silu_mul(gate, up)
        out = self._linear(i, "down", Activations(*inner.shape).of(inner))
        K.add(out, middle, out=out)
        return out, _Kept(x, q, k, v, flat if self.learns(i, "o") else _NONE, middle, gate, up)

    def _linear(self, i: int, module: str, x: Activations) -> np.ndarray:
        """W x + bias + what the fixed adapters and the learning one add."""
        linear, name = self.model.layers[i].linears()[module], f"layers.{i}.{module}"
        out = aligned_empty((len(x.x), linear.rows))
        linear.weights.matmul(x, out)
        if linear.bias is not None:
            out += linear.bias
        if name in self._fixed:
            K.lora_forward_add(x.x, *self._fixed[name], 1.0, out)
        if self.learns(i, module):
            inputs = self.dropped(i, module, x.x)
            K.lora_forward_add(inputs, self.adapter.a[name], self.adapter.b[name], self.adapter.config.scaling, out)
        return out

    def _head(self, x: np.ndarray, batch: Batch, scale: float, dx: np.ndarray | None) -> np.ndarray:
        """The loss of each target, a few positions at a time; its gradient, times ``scale``, into dx (T, E)."""
        model, eps = self.model, self.model.config.rms_norm_eps
        rows = np.flatnonzero(batch.targets != NO_TARGET)
        losses = np.empty(len(rows), np.float32)
        logits = aligned_empty((min(_LOGIT_ROWS, len(rows)), model.config.vocab_size))
        for lo in range(0, len(rows), _LOGIT_ROWS):
            some = rows[lo : lo + _LOGIT_ROWS]
            at = x[some]
            h = K.rms_norm(at, model.norm, eps)
            part = logits[: len(some)]
            model.head.weights.matmul(Activations(*h.shape).of(h), part)
            losses[lo : lo + len(some)], _ = K.cross_entropy(part, batch.targets[some], scale, grad=part)
            if dx is not None:
                dh = np.empty_like(h)
                model.head.weights.matmul_transposed(part, dh, False)
                dx[some] = K.rms_norm_backward(at, model.norm, dh, eps)
        return losses

    def learns(self, i: int, *modules: str) -> bool:
        """Whether the adapter that learns sits on any of these matrices of layer i."""
        return any(f"layers.{i}.{module}" in self.adapter.a for module in modules)

    def angles(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin (T, D/2) of each token's position in its sequence."""
        positions = np.concatenate([np.arange(b - a) for a, b in pairwise(batch.starts)])
        cos, sin = self.model.rope_tables(int(positions.max()) + 1)
        return cos[positions], sin[positions]

    def mask(self, i: int, module: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """What dropout multiplies an adapter's inputs by, the same in the backward pass; None for no dropout."""
        if self._dropout is None:
            return None
        entropy = self._dropout.entropy
        assert isinstance(entropy, tuple)
        rng = np.random.default_rng((*entropy, i, TARGETS.index(module)))
        p = self.adapter.config.dropout
        return (rng.random(shape, np.float32) >= p) / np.float32(1 - p)

    def dropped(self, i: int, module: str, x: np.ndarray) -> np.ndarray:
        """x (T, K) as the adapter of a matrix sees it."""
        mask = self.mask(i, module, x.shape)
        return x if mask is None else x * mask

    @property
    def fixed(self) -> Mapping[str, Factors]:
        """A (K, R) and B (R, N) of the adapters that act and do not learn."""
        return self._fixed


class _Backward:
    """The way back through the layers: from the gradient of a layer's output to that of its input."""

    def __init__(
        self, forward: TrainingPass, batch: Batch, grad_a: dict[str, np.ndarray], grad_b: dict[str, np.ndarray]
    ) -> None:
        self.forward, self.batch, self.grad_a, self.grad_b = forward, batch, grad_a, grad_b
        self.cos, self.sin = forward.angles(batch)

    def layer(self, i: int, kept: _Kept, dx: np.ndarray) -> None:
        """dx (T, E), the gradient of layer i's output, becomes that of its input."""
        layer, learns = self.forward.model.layers[i], self.forward.learns
        T, window = len(dx), layer.attention.window
        # The input of a matrix is what its adapter learns from, and needed for nothing else.
        inner = K.silu_mul(kept.gate, kept.up) if learns(i, "down") else _NONE
        d_inner = np.empty_like(kept.gate)
        self._linear(i, "down", inner, dx, d_inner)
        d_gate, d_up = K.silu_mul_backward(kept.gate, kept.up, d_inner)
        h = K.rms_norm(kept.middle, layer.mlp_norm, layer.eps) if learns(i, "gate", "up") else _NONE
        dh = np.empty_like(dx)
        self._linear(i, "gate", h, d_gate, dh)
        self._linear(i, "up", h, d_up, dh, add=True)
        K.rms_norm_backward(kept.middle, layer.mlp_norm, dh, layer.eps, add=True, out=dx)
        d_attended = np.empty_like(kept.q)
        self._linear(i, "o", kept.attended, dx, d_attended.reshape(T, -1))
        dq, dk, dv = K.attention_backward(kept.q, kept.k, kept.v, d_attended, self.batch.starts, window)
        K.apply_rope_tables(dq, self.cos, self.sin, inverse=True, out=dq)
        K.apply_rope_tables(dk, self.cos, self.sin, inverse=True, out=dk)
        h = K.rms_norm(kept.x, layer.attn_norm, layer.eps) if learns(i, "q", "k", "v") else _NONE
        into = None if i == 0 else dh  # nothing below the first layer learns
        self._linear(i, "q", h, dq.reshape(T, -1), into)
        self._linear(i, "k", h, dk.reshape(T, -1), into, add=True)
        self._linear(i, "v", h, dv.reshape(T, -1), into, add=True)
        if into is not None:
            K.rms_norm_backward(kept.x, layer.attn_norm, dh, layer.eps, add=True, out=dx)

    def _linear(
        self, i: int, module: str, x: np.ndarray, dy: np.ndarray, dx: np.ndarray | None, add: bool = False
    ) -> None:
        """The adapter's gradients from x (T, K) and dy (T, N); dx (T, K) = dy W + adapters, or += with ``add``.

        x may be _NONE where nothing learns.
        """
        forward, name = self.forward, f"layers.{i}.{module}"
        adapter, scaling = forward.adapter, forward.adapter.config.scaling
        if dx is not None:
            forward.model.layers[i].linears()[module].weights.matmul_transposed(dy, dx, add)
            if name in forward.fixed:
                a, b = forward.fixed[name]
                K.lora_forward_add(dy, np.ascontiguousarray(b.T), np.ascontiguousarray(a.T), 1.0, dx)
        if not forward.learns(i, module):
            return
        a, b = adapter.a[name], adapter.b[name]
        inputs = forward.dropped(i, module, x)
        K.lora_accumulate_grad(inputs, dy, a, b, scaling, self.grad_a[name], self.grad_b[name])
        if dx is not None:
            a_t, b_t = np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)
            mask = forward.mask(i, module, x.shape)
            if mask is None:
                K.lora_forward_add(dy, b_t, a_t, scaling, dx)
            else:
                dx += mask * K.lora_forward(dy, b_t, a_t, scaling)
