"""Attention of many queries over plain arrays ("flash attention")."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypedDict, Unpack

import numpy as np

from ruvllm.kernels import check, reference
from ruvllm.kernels.attention.kv import append, kv_append_heads, padded
from ruvllm.kernels.attention.prefill import NO_WINDOW, attend_cache, attend_prompt, prompt_scratch_size, scoring_of
from ruvllm.kernels.attention.tile import Scoring, plain_cache
from ruvllm.kernels.matmul.micro_kernels import LANES
from ruvllm.kernels.memory import aligned_empty
from ruvllm.kernels.spec import KernelSpec, grid
from ruvllm.kernels.threads.pool import num_threads

_LN_2 = np.float32(np.log(2))


class Options(TypedDict, total=False):
    """Options of attention that few models need.

    Attributes:
        softcap: c > 0: a score s becomes c tanh(s / c) (Gemma 2). None: no cap.
        sinks: (H,) float32: a score of each head that takes its share of the softmax and has no value (GPT-OSS;
            Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks"). None: no sinks.
        return_lse: return (out, lse) with lse (..., T, H) = log(sum(e^score)), over the positions that a query sees and
            its sink. Results over different positions can be merged with it.
    """

    softcap: float | None
    sinks: np.ndarray | None
    return_lse: bool


def flash_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    out: np.ndarray | None = None,
    **options: Unpack[Options],
) -> Any:
    """softmax(scale q k^T + mask) v for many queries, without storing the (T, S) scores.

    Args:
        q: (..., T, H, D) float32.
        k, v: (..., S, KV, D) float32 with the same leading dimensions, H a multiple of KV.
        causal: query t stands at position S - T + t and sees no later one (needs S >= T); else every position.
        window: with causal, a query sees only the ``window`` latest positions up to its own.
        scale: 1 / sqrt(D) if None.
        out: (..., T, H, D) float32 to write into; not one of the inputs.
        options: ``softcap``, ``sinks`` and ``return_lse``, see ``Options``.

    Returns:
        (..., T, H, D) float32; with ``return_lse``, that and lse (..., T, H).

    Raises:
        TypeError: not float32, or an unknown option.
        ValueError: shapes do not match, S < T with causal, a window < 1 or without causal.

    Source: Dao et al. 2022, "FlashAttention"; the window is Mistral's (Jiang et al. 2023).
    """
    if check.is_half(out):
        return rounded_with_lse(out, partial(flash_attention, **options), q, k, v, causal, window, scale)
    q = check.float32("q", q)
    if q.ndim < 3:
        raise ValueError(f"q: expected (..., T, H, D), found shape {q.shape}")
    k = check.float32("k", k, shape=(*q.shape[:-3], None, None, q.shape[-1]))
    v = check.float32("v", v, shape=k.shape)
    out = check.apart("out", check.output("out", out, q.shape), q, k, v)
    require_heads(q.shape[-2], k)
    require_positions(q.shape[-3], k, causal)
    scoring = scoring_for(q, causal, window, scale, options)
    wide = output_with_lse(out, options)
    if q.size:
        sequences = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v, wide))
        for qs, ks, vs, outs in zip(*sequences, strict=True):
            attend_sequence(qs, ks, vs, causal, scoring, outs)
    return out if wide is out else with_lse(out, wide)


def scoring_for(q: np.ndarray, causal: bool, window: int | None, scale: float | None, options: Options) -> Scoring:
    """The checked settings of attention of q (..., H, D).

    Raises:
        TypeError: an unknown option, or one of a wrong type.
        ValueError: a window < 1 or without causal, a softcap that is not positive, or not one sink for each head.
    """
    unknown = sorted(options.keys() - Options.__annotations__.keys())
    if unknown:
        *most, last = Options.__annotations__
        raise TypeError(f"options: expected {', '.join(most)} or {last}, found {', '.join(unknown)}")
    heads, dim = q.shape[-2:]
    if window is not None and (not causal or check.integer("window", window) < 1):
        raise ValueError(f"window: expected a positive integer with causal=True, found {window!r}")
    softcap, sinks = options.get("softcap"), options.get("sinks")
    return scoring_of(
        window and min(window, NO_WINDOW), check.attention_scale(scale, dim),
        None if softcap is None else check.positive("softcap", softcap),
        None if sinks is None else check.float32("sinks", sinks, shape=(heads,)),
    )  # fmt: skip


def output_with_lse(out: np.ndarray, options: Options) -> np.ndarray:
    """``out`` (..., H, D) itself; for return_lse, an array with the two more columns that ``with_lse`` takes."""
    if not check.flag("return_lse", options.get("return_lse", False)):
        return out
    return np.empty((*out.shape[:-1], out.shape[-1] + 2), np.float32)


def with_lse(out: np.ndarray, wide: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """out, filled, and lse, from what ``attend_prompt`` wrote: the result, m in base 2, and the factor of the sums."""
    out[...] = wide[..., :-2]
    return out, _LN_2 * wide[..., -2] - np.log(wide[..., -1])


def rounded_with_lse(out: np.ndarray, function: Callable[..., Any], *arguments: Any) -> Any:
    """check.rounded for a function that may return lse with its result."""
    kept: list[np.ndarray] = []

    def attend(*given: Any) -> np.ndarray:
        result = function(*given)
        if isinstance(result, tuple):
            kept.append(result[1])
            return result[0]
        return result

    check.rounded(out, attend, *arguments)
    return (out, kept[0]) if kept else out


def require_heads(heads: int, k: np.ndarray) -> None:
    """Raise ValueError unless k (..., S, KV, D) has kv heads that ``heads`` query heads can share."""
    length, kv_heads = k.shape[-3:-1]
    if not kv_heads or heads % kv_heads:
        raise ValueError(f"k: {length} positions of {kv_heads} kv heads do not fit {heads} query heads")


def require_positions(tokens: int, k: np.ndarray, causal: bool) -> None:
    """Raise ValueError unless each of ``tokens`` queries sees a position of k (..., S, KV, D)."""
    length = k.shape[-3]
    if not length:
        raise ValueError(f"k: expected at least one position, found shape {k.shape}")
    if causal and length < tokens:
        raise ValueError(f"k: causal attention of {tokens} queries needs as many positions, found {length}")


def attend_sequence(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool, scoring: Scoring, out: np.ndarray
) -> np.ndarray:
    """flash_attention of one sequence, of arrays that fit: q, out (T, H, D), k and v (S, KV, D).

    out: or with two more columns, as ``attend_prompt`` writes it.
    """
    tokens, _, dim = q.shape
    length, kv_heads, _ = k.shape
    blocks = -(-length // LANES)
    keys = aligned_empty((kv_heads, blocks, dim, LANES))
    values = aligned_empty((kv_heads, blocks * LANES, padded(dim)))
    keys[:, -1] = 0  # lanes past the last position are read, and masked
    values[:, :, dim:] = 0
    own = aligned_empty((num_threads(), prompt_scratch_size(dim)))
    positions = np.arange(length - tokens, length) if causal else np.full(tokens, length - 1)
    cache = plain_cache(keys, values)
    append(k, v, cache, np.arange(length))
    return attend_cache(q, cache, positions, scoring, out, own)


def _many_tokens(rng: Any, tokens: int, heads: int, kv_heads: int, dim: int) -> dict[str, Any]:
    return {
        "q": rng.standard_normal((tokens, heads, dim), np.float32),
        "k": rng.standard_normal((tokens, kv_heads, dim), np.float32),
        "v": rng.standard_normal((tokens, kv_heads, dim), np.float32),
    }


SPECS = [
    KernelSpec(
        name="flash_attention",
        function=flash_attention,
        compiled=(kv_append_heads, attend_prompt),
        reference=reference.flash_attention,
        formula="softmax(q k^T / sqrt(D), causal) v, many queries",
        example=_many_tokens,
        flops=lambda tokens, heads, kv_heads, dim: 2.0 * tokens * (tokens + 1) * heads * dim,
        bytes=lambda tokens, heads, kv_heads, dim: 8.0 * tokens * (heads + kv_heads) * dim,
        sizes=(
            *grid(tokens=(128, 512, 2048, 4096), heads=32, kv_heads=8, dim=128),
            {"tokens": 512, "heads": 9, "kv_heads": 3, "dim": 64},
        ),
    ),
]
