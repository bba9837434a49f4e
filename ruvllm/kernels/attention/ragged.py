"""Attention of a ragged batch: sequences of different lengths, one after another in one array, without padding."""

from functools import partial
from typing import Any, Unpack

import numpy as np

from ruvllm.kernels import check, reference
from ruvllm.kernels.attention.flash import (
    Options,
    attend_sequence,
    output_with_lse,
    require_heads,
    require_positions,
    rounded_with_lse,
    scoring_for,
    with_lse,
)
from ruvllm.kernels.attention.kv import kv_append_heads
from ruvllm.kernels.attention.prefill import attend_prompt
from ruvllm.kernels.spec import KernelSpec


class RaggedOptions(Options, total=False):
    """Options of one sequence's attention, as ``flash_attention`` takes them.

    Attributes:
        causal: True if left out.
        window: None if left out: no window.
        scale: 1 / sqrt(D) if left out.
    """

    causal: bool
    window: int | None
    scale: float | None


def ragged_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    cu_seqlens: Any,
    cu_seqlens_k: Any = None,
    out: np.ndarray | None = None,
    **options: Unpack[RaggedOptions],
) -> Any:
    """flash_attention of each sequence of a ragged batch: the rows cu_seqlens[i] : cu_seqlens[i + 1] are sequence i.

    Args:
        q: (T, H, D) float32, the queries of all sequences.
        k, v: (S, KV, D) float32, the keys and values of all sequences, H a multiple of KV.
        cu_seqlens: (B + 1,) integers that do not fall, from 0 to T ("cumulative sequence lengths").
        cu_seqlens_k: the same for k and v, from 0 to S; None if it is ``cu_seqlens``. With more keys than queries, a
            sequence's queries are its last positions.
        out: (T, H, D) float32 to write into; not one of the inputs.
        options: causal, window, scale, softcap, sinks, return_lse, see ``RaggedOptions``.

    Returns:
        (T, H, D) float32, and with ``return_lse`` lse (T, H). Each sequence has the bits of a ``flash_attention`` of
        its own.

    Raises:
        TypeError: not float32, offsets that are not integers, or an unknown option.
        ValueError: shapes do not match, offsets fall or do not end with the arrays, or a sequence has queries that
            see no position.

    Source: Dao et al. 2022, "FlashAttention", whose ``flash_attn_varlen_func`` takes the same offsets.
    """
    if check.is_half(out):
        return rounded_with_lse(out, partial(ragged_attention, **options), q, k, v, cu_seqlens, cu_seqlens_k)
    q = check.float32("q", q, ndim=3)
    k = check.float32("k", k, shape=(None, None, q.shape[2]))
    v = check.float32("v", v, shape=k.shape)
    out = check.apart("out", check.output("out", out, q.shape, q), q, k, v)
    require_heads(q.shape[1], k)
    starts = _offsets("cu_seqlens", cu_seqlens, len(q))
    if cu_seqlens_k is None:
        key_starts = _offsets("cu_seqlens", starts, len(k))
    else:
        key_starts = _offsets("cu_seqlens_k", cu_seqlens_k, len(k))
    if key_starts.size != starts.size:
        raise ValueError(f"cu_seqlens_k: expected {starts.size} offsets, found {key_starts.size}")
    more = dict(options)
    causal, window, scale = more.pop("causal", True), more.pop("window", None), more.pop("scale", None)
    causal = check.flag("causal", causal)
    scoring = scoring_for(q, causal, window, scale, more)  # type: ignore[arg-type]
    wide = output_with_lse(out, options)
    queries, keys = (list(zip(x[:-1].tolist(), x[1:].tolist(), strict=True)) for x in (starts, key_starts))
    for (lo, hi), (first, end) in zip(queries, keys, strict=True):
        if hi > lo:
            require_positions(hi - lo, k[first:end], causal)
    if q.size:
        for (lo, hi), (first, end) in zip(queries, keys, strict=True):
            if hi > lo:
                attend_sequence(q[lo:hi], k[first:end], v[first:end], causal, scoring, wide[lo:hi])
    return out if wide is out else with_lse(out, wide)


def _offsets(name: str, offsets: Any, rows: int) -> np.ndarray:
    """Offsets that do not fall, from 0 to ``rows``."""
    found = check.integers(name, offsets)
    if not found.size or found[0] != 0 or found[-1] != rows or (np.diff(found) < 0).any():
        raise ValueError(f"{name}: expected offsets that rise from 0 to {rows}, found {_brief(found)}")
    return found


def _brief(offsets: np.ndarray) -> str:
    few = offsets.tolist() if offsets.size <= 8 else [*offsets[:4].tolist(), "...", *offsets[-3:].tolist()]
    return ", ".join(map(str, few)) or "none"


def _example(rng: Any, batch: int, tokens: int, heads: int, kv_heads: int, dim: int) -> dict[str, Any]:
    """``batch`` sequences of ``tokens`` together, of which one may be empty."""
    return {
        "q": rng.standard_normal((tokens, heads, dim), np.float32),
        "k": rng.standard_normal((tokens, kv_heads, dim), np.float32),
        "v": rng.standard_normal((tokens, kv_heads, dim), np.float32),
        "cu_seqlens": np.array([0, *sorted(rng.integers(0, tokens, batch - 1, endpoint=True)), tokens]),
    }


SPECS = [
    KernelSpec(
        name="ragged_attention",
        function=ragged_attention,
        compiled=(kv_append_heads, attend_prompt),
        reference=reference.ragged_attention,
        formula="softmax(q k^T / sqrt(D), causal) v, each sequence by itself",
        example=_example,
        # as for sequences of one length
        flops=lambda batch, tokens, heads, kv_heads, dim: 2.0 * tokens * (tokens / batch + 1) * heads * dim,
        bytes=lambda batch, tokens, heads, kv_heads, dim: 8.0 * tokens * (heads + kv_heads) * dim,
        sizes=(
            {"batch": 4, "tokens": 256, "heads": 9, "kv_heads": 3, "dim": 64},
            {"batch": 8, "tokens": 1024, "heads": 32, "kv_heads": 8, "dim": 128},
        ),
    ),
]
