"""Recorder: layer code that runs with it computes nothing and records a tape (``kernels.tape``).

Its arrays are ``Value``s. Each function records the operations behind it, with the partition of every array that they
read and write; from these follow the barriers (``schedule``) and which values can share memory (``placement``).

Of a few tokens, operations on rows are replicated: every member computes all rows, into its own memory. That costs less
than a barrier, and than fetching rows, and the halves of cache lines that rows share, from another core.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import numpy as np

import ruvllm.kernels as K
from ruvllm.kernels import operations as o
from ruvllm.kernels import tape as t
from ruvllm.kernels.attention.prefill import NO_WINDOW
from ruvllm.kernels.experts import PADDED, require_routing
from ruvllm.kernels.lora.packed import PARTS
from ruvllm.kernels.matmul.micro_kernels import LANES
from ruvllm.kernels.matmul.panels import panel_count
from ruvllm.kernels.operations.experts import routing_bytes
from ruvllm.kernels.operations.rows import QUANTIZED_GROUP_BYTES, QUANTIZED_ROW_BYTES
from ruvllm.kernels.quant.layout import GROUP
from ruvllm.kernels.tape import Operation
from ruvllm.model.linear import require_group
from ruvllm.model.ops.recording import Recording
from ruvllm.model.ops.schedule import ANY, BY_HEADS, PRIVATE, Access, Value, by_panels, by_rows
from ruvllm.model.weights import FLOAT_LAYOUTS, INTEGER_LAYOUTS

if TYPE_CHECKING:
    from ruvllm.model.linear import Linear
    from ruvllm.model.low_rank import LowRank
    from ruvllm.model.ops import Ops


class Recorder(Recording):
    """Records what each function of layer code does."""

    # Operations on rows.

    def rms_norm(self, x: Value, weight: np.ndarray, eps: float) -> Value:
        """Over the last axis of (T, E) or (T, H, D)."""
        columns = len(weight)
        if columns != (x.dim or x.width):
            raise ValueError(f"rms_norm: expected a weight of {x.dim or x.width}, found {columns}")
        out = self._like(x)
        arguments = {
            "x": x, "weight": self._array(weight), "eps": self._number(eps), "out": out, "columns": columns,
            "vectors": x.width // columns,
        }  # fmt: skip
        self._on_rows(o.rms_norm, [x], out, arguments)
        return self._swapped("rms_norm", lambda y, x: K.rms_norm(x, weight, eps, out=y), out, x)

    def add(self, a: Value, b: Value) -> Value:
        """a + b."""
        _require_alike("add", a, b)
        out = self._like(a)
        return self._on_rows(o.add, [a, b], out, {"a": a, "b": b, "out": out, "columns": a.width})

    def silu_mul(self, gate: Value, up: Value) -> Value:
        """silu(gate) * up."""
        return self._gated(gate, up, "silu_mul", o.silu_mul, K.silu_mul)

    def gelu_mul(self, gate: Value, up: Value) -> Value:
        """gelu(gate) * up."""
        return self._gated(gate, up, "gelu_mul", o.gelu_mul, K.gelu_mul)

    def clamped_swiglu(self, gate: Value, up: Value, limit: float, alpha: float) -> Value:
        """(clamp(up) + 1) * g * sigmoid(alpha g), g = min(gate, limit)."""
        return self._gated(gate, up, "clamped_swiglu", o.clamped_swiglu, K.clamped_swiglu, limit=limit, alpha=alpha)

    def _gated(
        self, gate: Value, up: Value, name: str, operation: Operation, kernel: Callable[..., object], **numbers: float
    ) -> Value:
        _require_alike(name, gate, up)
        out = self._like(gate)
        arguments = {"gate": gate, "up": up, "out": out, "columns": gate.width}
        arguments |= {key: self._number(value) for key, value in numbers.items()}
        self._on_rows(operation, [gate, up], out, arguments)
        return self._swapped(name, lambda y, gate, up: kernel(gate, up, *numbers.values(), out=y), out, gate, up)

    def scale(self, x: Value, factor: float) -> Value:
        """factor * x."""
        out = self._like(x)
        arguments = {"x": x, "factor": self._number(factor), "out": out, "columns": x.width}
        self._on_rows(o.scale, [x], out, arguments)
        return self._swapped("scale", lambda y, x: K.scale(x, factor, out=y), out, x)

    def heads(self, x: Value, dim: int) -> Value:
        """x (T, H D) as (T, H, D): the same memory."""
        if x.width % dim or x.dim not in (0, dim):
            raise ValueError(f"heads: {x.width} elements (heads of {x.dim or 'any'}) do not split into heads of {dim}")
        x.dim = dim
        return x

    def rope(self, x: Value, index: int = 0) -> Value:
        """x (T, H, D) rotated."""
        out = self._like(x)
        arguments = {
            "x": x, "cos": t.operand(t.COS, index), "sin": t.operand(t.SIN, index), "out": out,
            "heads": x.width // x.dim, "dim": x.dim,
        }  # fmt: skip
        self._on_rows(o.rope, [x], out, arguments)
        angles = (Value(x.count, space=space, offset=index) for space in (t.COS, t.SIN))
        return self._swapped(
            "apply_rope_tables", lambda y, x, cos, sin: K.apply_rope_tables(x, cos, sin, out=y), out, x, *angles
        )

    def last_rows(self, x: Value) -> Value:
        """The rows whose logits are wanted, copied: their count differs from that of x, and so does their partition."""
        self._layer = -1
        out = self._floats(t.LOGIT_ROWS, x.width)
        arguments = {"x": x, "out": out, "columns": x.width}
        operation = o.chosen_rows if self.kind.many else o.last_rows
        self._record(operation, t.LOGIT_ROWS, [self._whole(x)], [Access(out, self._rows(out))], arguments)
        return out

    # Linear layers.

    def linear(self, x: Value, matrix: Linear) -> Value:
        """x W^T + bias + adapter."""
        return self._linear(x, matrix, Value(x.count, matrix.rows, 4 * matrix.rows))

    def logits(self, x: Value, head: Linear, softcap: float | None = None) -> Value:
        """x W^T, into the caller's array; nothing may follow it."""
        out = self._linear(x, head, Value(x.count, head.rows, space=t.LOGITS, offset=0))
        if softcap is not None and "softcap" in self.swapped:  # it works in place: the operation is left out
            self._swapped("softcap", lambda y: K.softcap(y, softcap, out=y), out)
        elif softcap is not None:
            arguments = {"x": out, "cap": self._number(softcap), "columns": out.width}
            panels = [Access(out, by_panels(out.width))]
            self._record(o.softcap, out.count, panels, panels, arguments)
        self._ended = True
        return out

    def _linear(self, x: Value, matrix: Linear, out: Value) -> Value:
        if x.width != matrix.columns:
            raise ValueError(f"{matrix.name or 'linear'}: expected {matrix.columns} inputs, found {x.width}")
        weights, adapter = matrix.weights, self.adapters.get(matrix.name)
        address, has_mins = weights.address()
        self.kept.append(weights)
        low = None if adapter is None else self._adapter_down(x, matrix.name, adapter)
        # A bias or adapter is added by the members that computed the panels, without a barrier: no stealing then.
        fixed = matrix.bias is not None or adapter is not None
        arguments: dict[str, object] = {
            "weights": t.operand(t.ABSOLUTE, address), "out": out, "outputs": matrix.rows, "columns": matrix.columns,
        }  # fmt: skip
        if weights.layout in INTEGER_LAYOUTS:
            operation = o.integer_matmul(INTEGER_LAYOUTS[weights.layout])
            x, steal = self._quantized(x), not fixed
            arguments["has_mins"] = has_mins
        else:
            operation = o.float_matmul(FLOAT_LAYOUTS[weights.layout])
            steal = not fixed and not self.single
        arguments |= {"x": x, "steal": int(steal)}
        partition = ANY if steal else by_panels(matrix.rows)
        self._record(operation, x.count, [self._whole(x)], [Access(out, partition)], arguments, matrix.name)
        if matrix.bias is not None:
            bias = {"bias": self._array(matrix.bias), "out": out, "outputs": matrix.rows}
            self._record(o.add_bias, x.count, [Access(out, partition)], [Access(out, partition)], bias)
        if adapter is not None and low is not None:
            self._adapter_up(low, matrix, adapter, Access(out, partition))
        return out

    def _quantized(self, x: Value) -> Value:
        """x rounded to 8 bits, once for all matrices that read it."""
        if x.quantized is None:
            row_bytes = -(-x.width // GROUP) * QUANTIZED_GROUP_BYTES + QUANTIZED_ROW_BYTES
            x.quantized = out = Value(x.count, x.width, row_bytes, self._row_space, layout="quantized")
            self._rounded.append(x)
            self._on_rows(o.quantize, [x], out, {"x": x, "out": out, "columns": x.width}, in_place=False)
        return x.quantized

    def _adapter_down(self, x: Value, name: str, adapter: LowRank) -> Value:
        padded = panel_count(adapter.rank) * LANES
        out = Value(x.count, padded, 4 * padded * (PARTS if self.single else 1), layout="partial")
        arguments = {
            "x": x, "weights": (name, "down"), "scales": (name, "scales"), "out": out, "columns": x.width,
            "panels": panel_count(adapter.rank), "split_k": int(self.single),
        }  # fmt: skip
        dtype: Any = adapter.down.dtype.type
        partition = ANY if self.single else by_rows(x.count)
        self._record(o.adapter_down(dtype), x.count, [Access(x, self._rows(x))], [Access(out, partition)], arguments)
        return out

    def _adapter_up(self, low: Value, matrix: Linear, adapter: LowRank, result: Access) -> None:
        writes, joined = [result], low
        if self.single:
            joined = self._floats(low.count, low.width)
            writes.append(Access(joined, PRIVATE))
        arguments = {
            "h": low, "weights": (matrix.name, "up"), "scales": (matrix.name, "scales"), "joined": joined,
            "out": result.value, "outputs": matrix.rows, "rank": adapter.rank, "split_k": int(self.single),
        }  # fmt: skip
        reads, dtype = [self._whole(low), result], cast(Any, adapter.up.dtype.type)
        self._record(o.adapter_up(dtype), low.count, reads, writes, arguments)

    # Attention.

    def attention(
        self, q: Value, k: Value, v: Value, layer: int, window: int | None, scale: float,
        softcap: float | None = None, sinks: np.ndarray | None = None,
    ) -> Value:  # fmt: skip
        """Append k and v (T, KV, D), then attention of q (T, H, D) over the layer's cache -> (T, H D)."""
        cached: dict[str, object] = {"layer": layer, "kv_heads": k.width // k.dim, "dim": q.dim}
        scores: dict[str, object] = {
            "window": NO_WINDOW if window is None else window, "scale": self._number(scale),
            "softcap": self._number(softcap or 0.0), "sinks": 0 if sinks is None else self._array(sinks),
        }  # fmt: skip
        query: dict[str, object] = {"q": q, "heads": q.width // q.dim, **cached, **scores}
        self._cached.add((layer, k.width // k.dim, k.dim))
        cache = self._caches.setdefault(layer, Value(space=t.CACHE, offset=layer))
        if self.single:
            reads = [self._whole(q), self._whole(k), self._whole(v), Access(cache, ANY)]
            writes = [Access(self._partial, ANY), Access(cache, ANY)]
            arguments = {**query, "k": k, "v": v}
            self._record(o.attend_token(self.kv), q.count, reads, writes, arguments, "attention")
            out = self._floats(q.count, q.width)
            merged = {"out": out, **{name: query[name] for name in ("dim", "heads", "window", "sinks")}}
            self._record(o.merge, q.count, [Access(self._partial, ANY)], [Access(out, PRIVATE)], merged)
            return out
        new: dict[str, object] = {"k": k, "v": v, **cached}
        if self.kind.many:
            append, attend, partition = o.append_blocks, o.attend_runs, by_rows(q.count)
        else:  # a cache line holds a key's element at several positions: a few tokens are divided by heads
            append, attend, partition = o.append, o.attend, BY_HEADS if self.kind.few else by_rows(q.count)
            new["by_heads"] = int(self.kind.few)
        reads = [self._whole(x) if self.kind.few else Access(x, partition) for x in (k, v)]
        self._record(append(self.kv), q.count, reads, [Access(cache, partition)], new, "append")
        out = Value(q.count, q.width, 4 * q.width)
        attended = {**query, "out": out, "steal": 1}
        reads = [self._whole(q), Access(cache, ANY)]
        self._record(attend(self.kv), q.count, reads, [Access(out, ANY)], attended, "attention")
        return out

    # Mixtures of experts.

    def route(self, scores: Value, k: int, normalised: bool = True) -> Value:
        """The k best experts of each token."""
        require_routing(k, scores.width)
        self._require_rows("route", scores, t.TOKENS)
        space = t.LOCAL if self.single else t.SHARED
        out = Value(t.TOKENS, k, routing_bytes(k), space, layout="routing", dim=scores.width)
        arguments = {"scores": scores, "routing": out, "k": k, "count": scores.width, "normalised": int(normalised)}
        self._record(o.route, t.TOKENS, [self._whole(scores)], [self._whole(out)], arguments)
        return out

    def gather(self, x: Value, routing: Value) -> Value:
        """Each token's row once for each of its experts.

        Nothing is recorded before its rows are read: 8-bit rows are made from x, and one token's are all alike.
        """
        self._require_rows("gather", x, t.TOKENS)
        out = self._floats(t.EACH + routing.width, x.width)
        out.source = x, routing
        self._gathers.append(out)
        return out

    def grouped_linear(self, x: Value, routing: Value, matrices: list[Linear]) -> Value:
        """Each expert's rows times its matrix: one operation."""
        first, k = matrices[0], routing.width
        require_group(matrices, self.adapters)
        self._require_rows("grouped_linear", x, t.EACH + k)
        if len(matrices) != routing.dim or x.width != first.columns:
            raise ValueError(
                f"{first.name or 'grouped_linear'}: expected matrices of {routing.dim} experts with {x.width} inputs, "
                f"found {len(matrices)} with {first.columns}"
            )
        self.kept += [matrix.weights for matrix in matrices]
        addresses = [matrix.weights.address() for matrix in matrices]
        out = Value(x.count, first.rows, 4 * first.rows)
        steal = first.bias is None
        arguments: dict[str, object] = {
            "routing": routing, "weights": self._array(np.array([address for address, _ in addresses], np.int64)),
            "out": out, "outputs": first.rows, "columns": first.columns, "k": k, "steal": int(steal),
        }  # fmt: skip
        source = x.source[0] if x.source is not None and self.single else None
        if first.weights.layout in INTEGER_LAYOUTS:
            operation = o.grouped_integer_matmul(INTEGER_LAYOUTS[first.weights.layout])
            x = self._quantized_runs(x, routing) if source is None else self._quantized(source)
            arguments["has_mins"] = addresses[0][1]
        else:
            operation = o.grouped_float_matmul(FLOAT_LAYOUTS[first.weights.layout])
            x = x if source is None else source
        arguments |= {"x": x, "alike": int(source is not None)}
        partition = ANY if steal else by_panels(first.rows)
        reads = [self._whole(x), self._whole(routing)]
        self._record(operation, out.count, reads, [Access(out, partition)], arguments, first.name)
        if first.bias is not None:
            biases = np.array([matrix.bias.ctypes.data for matrix in matrices if matrix.bias is not None], np.int64)
            self.kept += [matrix.bias for matrix in matrices]
            bias = {"routing": routing, "biases": self._array(biases), "out": out, "outputs": first.rows, "k": k}
            reads = [Access(out, partition), self._whole(routing)]
            self._record(o.add_grouped_bias, out.count, reads, [Access(out, partition)], bias)
        return out

    def _quantized_runs(self, x: Value, routing: Value) -> Value:
        """Routed rows rounded to 8 bits, each expert's in blocks of their own, once for all matrices that read them."""
        if x.quantized is None:
            groups = -(-x.width // GROUP)
            row_bytes = PADDED * (groups * QUANTIZED_GROUP_BYTES + QUANTIZED_ROW_BYTES)
            space = t.LOCAL if self.single else t.SHARED
            x.quantized = out = Value(x.count, x.width, row_bytes, space, layout="runs")
            self._rounded.append(x)
            gathers = x.source is not None
            source = x if x.source is None else x.source[0]
            arguments = {
                "x": source, "routing": routing, "out": out, "columns": x.width, "k": routing.width,
                "gathers": int(gathers),
            }  # fmt: skip
            rows = self._whole(source) if gathers else Access(source, self._rows(source))
            reads = [rows, self._whole(routing)]
            self._record(o.quantize_runs, out.count, reads, [self._whole(out)], arguments)
        return x.quantized

    def combine(self, y: Value, routing: Value) -> Value:
        """The weighted sum of each token's rows."""
        self._require_rows("combine", y, t.EACH + routing.width)
        out = self._floats(t.TOKENS, y.width)
        arguments = {"y": y, "routing": routing, "out": out, "columns": y.width, "k": routing.width}
        reads = [self._whole(y), self._whole(routing)]
        self._record(o.combine, out.count, reads, [Access(out, self._rows(out))], arguments)
        return out

    def sigmoid_scale(self, x: Value, gate: Value) -> Value:
        """x / (1 + exp(-gate))."""
        if (gate.width, gate.count) != (1, x.count):
            raise ValueError(f"sigmoid_scale: expected one gate for each row, found {gate.width}")
        out = self._like(x)
        arguments = {"x": x, "gate": gate, "out": out, "columns": x.width}
        return self._on_rows(o.sigmoid_scale, [x, gate], out, arguments)

    # Python between operations.

    def boundary(self, x: Value) -> Value:
        """Between two layers: the replay may return here and enter the region again."""
        self._layer += 1
        self.schedule.end_segment()
        return x

    def call(self, x: Value, function: Callable[[np.ndarray], None]) -> Value:
        """The replay returns here, and Python gets x."""
        for rows in self._gathers:
            if rows is x or (rows.source is not None and rows.source[0] is x):
                self._gathered(rows)
        self._call(function, x)
        return x

    def filled(self, x: Value, width: int, function: Callable[[np.ndarray, np.ndarray], None]) -> Value:
        """The replay returns here, and Python fills a new array."""
        out = self._floats(x.count, width)
        self._call(function, x, out)
        return out

    def name(self, x: Value, name: str) -> Value:
        """x, after its hook; without one nothing is recorded."""
        return self.call(x, self.hooks[name]) if name in self.hooks else x


def _require_alike(name: str, a: Value, b: Value) -> None:
    if (a.width, a.count) != (b.width, b.count):
        raise ValueError(f"{name}: expected arrays of one shape, found rows of {a.width} and {b.width}")


if TYPE_CHECKING:
    _: type[Ops] = Recorder
