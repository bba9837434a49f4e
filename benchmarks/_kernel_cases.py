"""The rows of ``benchmarks.kernels``: which kernel on arrays of which sizes; and one of them made ready to be timed."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from ruvllm.kernels import KERNELS
from ruvllm.kernels.attention.kv import append
from ruvllm.kernels.attention.prefill import cached_attention, scratch_size
from ruvllm.kernels.matmul.panels import linear_panels, pack, panel_count, panels_matmul, panels_matmul_parallel
from ruvllm.kernels.memory import aligned_empty
from ruvllm.kernels.threads.pool import num_threads
from ruvllm.report.inside import Inside
from ruvllm.report.peers import KernelPeer, own_copies
from ruvllm.report.timing import Call, Engine

_INSIDE_BELOW = 1e-3  # seconds of a call: in longer ones Python's part does not show
_LARGE = 5e9  # operations from which --quick leaves a case out
_SHORT = {"heads": "H", "kv_heads": "KV", "dim": "D", "tokens": "T", "length": "S", "rank": "R"}


@dataclass(frozen=True)
class Case:
    """One kernel at given sizes. seed: seconds of the seed's own code on a Zen 4, one thread.

    packed: in the layout that a model keeps: the weights of a linear layer, or the keys and values of a cache.
    """

    group: str
    kernel: str
    sizes: dict[str, int]
    seed: float | None = None
    packed: bool = False

    @property
    def label(self) -> str:
        """Kernel and sizes."""
        name = {"gemm_nt": "linear", "grouped_query_attention": "cached"}[self.kernel] if self.packed else self.kernel
        return f"{name} {' '.join(f'{_SHORT.get(axis, axis)}={size}' for axis, size in self.sizes.items())}"

    @property
    def large(self) -> bool:
        """Whether one call takes long."""
        return KERNELS[self.kernel].flops(**self.sizes) > _LARGE

    def prepare(self) -> Job:
        """Make its arrays."""
        return Job(self)


class Job:
    """The arrays of a case, our call of it, and those of the peers."""

    def __init__(self, case: Case) -> None:
        spec = KERNELS[case.kernel]
        self.inputs = spec.example(np.random.default_rng(0), **case.sizes)
        self.flops, self.nbytes = spec.flops(**case.sizes), spec.bytes(**case.sizes)
        self._arguments: tuple[Any, ...]
        if case.packed and case.kernel == "gemm_nt":
            compiled = (panels_matmul, panels_matmul_parallel)
            self.spec = replace(spec, function=linear_panels, compiled=compiled)
            self._arguments = _packed_weights(**self.inputs)
        elif case.packed:
            self.spec = replace(spec, function=cached_attention, compiled=())
            self._arguments = _cached(**self.inputs)
        else:
            self.spec = spec
            self._arguments = _arguments(spec.function, own_copies(self.inputs))
        # What peers are checked against: float64 would take minutes for the largest.
        self._exact = self.spec.function(*self._arguments) if case.large else spec.reference(**self.inputs)

    def call(self) -> Engine:
        """Ours, from Python."""
        return Call(partial(self.spec.function, *self._arguments))

    def peer(self, peer: KernelPeer, threads: int) -> Engine:
        """A peer's, with so many threads. Raises PeerError."""
        return peer.engine(self.spec, self.inputs, self._exact, threads)

    def inside(self) -> Engine | None:
        """Our kernel alone, on one thread; None where a call is long, or is several calls of kernels."""
        if self.call().seconds(1) > _INSIDE_BELOW:
            return None
        try:
            return Inside(self.spec, self._arguments)
        except LookupError:
            return None


def _arguments(function: Any, inputs: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments by position, with ``out`` where the function takes one: nothing is allocated in a call."""
    signature = inspect.signature(function)
    if "out" in signature.parameters and "out" not in inputs:
        inputs = inputs | {"out": function(**inputs)}
    bound = signature.bind(**inputs)
    bound.apply_defaults()
    return bound.args


def _packed_weights(a: np.ndarray, b: np.ndarray) -> tuple[Any, ...]:
    panels = aligned_empty((panel_count(len(b)), b.shape[1], 16))
    pack(b, panels)
    return panels, a, np.empty((len(a), len(b)), np.float32)


def _cached(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[Any, ...]:
    length, kv_heads, dim = k.shape
    keys, values = aligned_empty((kv_heads, length // 16, dim, 16)), aligned_empty((kv_heads, length, dim))
    append(k, v, keys, values, np.arange(length))
    scratch = np.empty((num_threads(), scratch_size(dim)), np.float32)
    return q[None], keys, values, np.array([length - 1]), None, dim**-0.5, np.empty((1, *q.shape), np.float32), scratch


def _gemm(n: int, seed_ms: float | None = None) -> Case:
    return Case("gemm", "gemm", {"m": n, "n": n, "k": n}, seed_ms and seed_ms * 1e-3)


def _gemv(n: int, us: float) -> Case:
    return Case("gemv", "gemv", {"m": n, "k": n}, us * 1e-6)


def _linear(tokens: int) -> Case:
    return Case("linear", "gemm_nt", {"m": tokens, "n": 4096, "k": 4096}, packed=True)


def _decode(kv_heads: int, length: int, packed: bool = False) -> Case:
    sizes = {"heads": 32, "kv_heads": kv_heads, "length": length, "dim": 128}
    if packed:
        return Case("attention", "grouped_query_attention", sizes, packed=True)
    return Case("attention", "grouped_query_attention", sizes, 1140e-6 if (kv_heads, length) == (4, 512) else None)


def _rows(kernel: str, n: int, seeds: dict[int, float] | None = None) -> list[Case]:
    return [
        Case("norm", kernel, {"rows": rows, "n": n}, (seeds or {}).get(n, 0) * 1e-9 or None if rows == 1 else None)
        for rows in (1, 64)
    ]


def _rope(kernel: str, tokens: int, heads: int, dim: int, us: float | None = None) -> Case:
    return Case("rope", kernel, {"tokens": tokens, "heads": heads, "dim": dim}, us and us * 1e-6)


def _lora(kernel: str, dim: int, rank: int, seeds: dict[tuple[int, int], float] | None = None) -> Case:
    us = (seeds or {}).get((dim, rank))
    return Case("lora", kernel, {"rows": 1, "dim": dim, "rank": rank}, us and us * 1e-6)


_WIDTHS = (768, 1024, 2048, 4096, 8192)
_RMS, _LAYER = {768: 180.0, 4096: 806.0, 8192: 1840.0}, {768: 256.0, 4096: 1360.0}  # ns
_LORA_ADD = {(4096, 1): 2.40, (4096, 2): 3.80}  # us
_LORA_GRAD = {(768, 2): 4.21, (2048, 2): 11.2, (4096, 2): 22.3}
_DIMS, _RANKS = (768, 2048, 4096), (1, 2, 8, 64)

CASES: tuple[Case, ...] = (
    *(_gemm(n, ms) for n, ms in ((128, 0.082), (256, 0.682), (512, 6.45), (1024, None), (2048, None), (4096, None))),
    *(_linear(tokens) for tokens in (1, 4, 16, 64, 512)),
    *(_gemv(n, us) for n, us in ((256, 2.87), (512, 12.8), (1024, 55.0), (2048, 257.0), (4096, 2160.0))),
    Case("attention", "softmax_attention", {"length": 512, "dim": 64}, 12.3e-6),
    Case("attention", "softmax_attention", {"length": 512, "dim": 128}, 22.1e-6),
    Case("attention", "softmax_attention", {"length": 4096, "dim": 128}, 179e-6),
    Case("attention", "grouped_query_attention", {"heads": 16, "kv_heads": 4, "length": 512, "dim": 128}, 702e-6),
    *(
        _decode(kv_heads, length, packed)
        for kv_heads in (8, 4) for length in (128, 512, 2048, 8192) for packed in (False, True)
    ),
    *(
        Case("attention", "flash_attention", {"tokens": t, "heads": 32, "kv_heads": 8, "dim": 128})
        for t in (128, 512, 2048, 4096)
    ),
    *(case for n in _WIDTHS for case in _rows("rms_norm", n, _RMS)),
    *(case for n in _WIDTHS for case in _rows("layer_norm", n, _LAYER)),
    *(case for n in _WIDTHS for kernel in ("softmax", "silu_mul") for case in _rows(kernel, n)),
    *(_rope("apply_rope", t, 1, 128, us) for t, us in ((1, 0.525), (32, 8.34), (128, 35.0))),
    *(_rope("apply_rope", t, 32, 128) for t in (1, 64)),
    *(_rope("apply_rope_tables", t, 1, d, us) for t, d, us in ((1, 64, 0.027), (32, 128, 0.785))),
    *(_rope("apply_rope_tables", t, 32, 128) for t in (1, 64)),
    *(_lora("lora_forward", d, r) for d in _DIMS for r in _RANKS),
    *(_lora("lora_forward_add", d, r, _LORA_ADD) for d in _DIMS for r in (1, 2)),
    *(_lora("lora_accumulate_grad", d, r, _LORA_GRAD) for d in _DIMS for r in _RANKS),
    Case("kv", "kv_append", {"tokens": 512, "kv_heads": 32, "dim": 128, "length": 512}, 8.7e-3),
)
GROUPS: tuple[str, ...] = tuple(dict.fromkeys(case.group for case in CASES))
