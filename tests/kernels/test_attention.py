"""Attention beyond what the shared tests of all kernels cover: blocks, windows, groups, long rows, 16-bit caches."""

from typing import Any

import numpy as np
import pytest

from ruvllm.kernels import (
    flash_attention,
    grouped_query_attention,
    kv_append,
    multi_query_attention,
    paged_attention,
    softmax_attention,
)
from ruvllm.kernels.attention.kv import SCALE_ROWS, key_rows, padded
from ruvllm.kernels.attention.prefill import attend_cache, prompt_scratch_size, scoring_of
from ruvllm.kernels.attention.tile import plain_cache
from ruvllm.kernels.matmul.micro_kernels import LANES

Array = np.ndarray


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def attended(q: Any, k: Any, v: Any, visible: Any, scale: float | None = None) -> Array:
    """One query at a time, in float64: q (T, H, D), k and v (S, KV, D), visible(t) the positions that query t sees."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.empty_like(q)
    group = q.shape[1] // k.shape[1]
    for t, h in np.ndindex(q.shape[:2]):
        seen = list(visible(t))
        scores = k[seen, h // group] @ q[t, h] * (q.shape[2] ** -0.5 if scale is None else scale)
        weights = np.exp(scores - scores.max())
        out[t, h] = weights / weights.sum() @ v[seen, h // group]
    return out


def assert_near(got: Array, expected: Array, tolerance: float = 1e-10) -> None:
    """Normalised mean squared error."""
    assert got.shape == expected.shape and got.dtype == np.float32
    assert ((got - expected) ** 2).sum() <= tolerance * (expected**2).sum()


def test_leading_dimensions_are_sequences_of_their_own() -> None:
    q, k, v = normal(2, 3, 4, 17), normal(2, 3, 33, 2, 17, seed=1), normal(2, 3, 33, 2, 17, seed=2)
    got = grouped_query_attention(q, k, v, out=np.empty_like(q))
    shared = multi_query_attention(q, k[..., 0, :], v[..., 0, :])
    single = softmax_attention(q[..., 0, :], k[..., 0, :], v[..., 0, :])
    for batch in np.ndindex(2, 3):
        for found, kv in ((got, 2), (shared, 1)):
            expected = attended(q[batch][None], k[batch][:, :kv], v[batch][:, :kv], lambda t: range(33))[0]
            assert_near(found[batch], expected)
        one = attended(q[batch][None, :1], k[batch][:, :1], v[batch][:, :1], lambda t: range(33))[0, 0]
        assert_near(single[batch], one)
    with pytest.raises(ValueError, match="^k: expected shape"):
        grouped_query_attention(q, k[0], v[0])
    with pytest.raises(ValueError, match="^out: shares memory"):
        grouped_query_attention(q, k, v, out=k.reshape(-1)[: q.size].reshape(q.shape))


# --- many queries ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 40, 255, 256, 257, 1000])
@pytest.mark.parametrize(("tokens", "length"), [(1, 300), (7, 301), (40, 40)])
def test_window(tokens: int, length: int, window: int) -> None:
    q, k, v = normal(tokens, 4, 18), normal(length, 2, 18, seed=1), normal(length, 2, 18, seed=2)
    start = length - tokens
    expected = attended(q, k, v, lambda t: range(max(0, start + t - window + 1), start + t + 1))
    assert_near(flash_attention(q, k, v, window=window), expected)


@pytest.mark.parametrize(("tokens", "length"), [(1, 1), (5, 3), (6, 17), (13, 270)])
def test_without_a_mask(tokens: int, length: int) -> None:
    q, k, v = normal(tokens, 3, 16), normal(length, 1, 16, seed=1), normal(length, 1, 16, seed=2)
    got = flash_attention(q, k, v, causal=False, scale=0.3)
    assert_near(got, attended(q, k, v, lambda t: range(length), 0.3))


def test_leading_dimensions_are_separate_sequences() -> None:
    q, k, v = normal(2, 3, 9, 4, 12), normal(2, 3, 20, 2, 12, seed=1), normal(2, 3, 20, 2, 12, seed=2)
    got = flash_attention(q, k, v)
    for i in np.ndindex(2, 3):
        np.testing.assert_array_equal(got[i], flash_attention(q[i], k[i], v[i]))
        assert_near(got[i], attended(q[i], k[i], v[i], lambda t: range(11 + t + 1)))


@pytest.mark.parametrize("dim", [2, 10, 64, 80, 128, 130, 256])
def test_any_head_dim(dim: int) -> None:
    q, k, v = normal(8, 2, dim), normal(8, 2, dim, seed=1), normal(8, 2, dim, seed=2)
    assert_near(flash_attention(q, k, v), attended(q, k, v, lambda t: range(t + 1)))


@pytest.mark.parametrize("at", [0, 100, 255, 256, 399])
def test_large_scores_neither_overflow_nor_lose_the_rest(at: int) -> None:
    """Whether the largest score comes early or late, in this chunk of positions or another."""
    q, k, v = np.ones((7, 2, 16), np.float32), normal(400, 2, 16, seed=1), normal(400, 2, 16, seed=2)
    k[at] = 2000
    k[(at + 200) % 400] = -2000
    got = flash_attention(q, k, v, causal=False)
    assert_near(got, attended(q, k, v, lambda t: range(400)))
    one = grouped_query_attention(q[0], k, v)
    assert_near(one, got[0].astype(np.float64), 1e-9)


def test_all_scores_far_below_zero() -> None:
    # Scores near -12000, of which float32 keeps three digits behind the point.
    q, k, v = np.full((7, 1, 16), 50, np.float32), normal(300, 1, 16, seed=1) - 60, normal(300, 1, 16, seed=2)
    assert_near(flash_attention(q, k, v), attended(q, k, v, lambda t: range(294 + t)), 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": normal(4, 8)}, "q: expected (..., T, H, D)"),
        ({"k": normal(9, 2, 6), "v": normal(9, 2, 6)}, "k: expected shape"),
        ({"v": normal(8, 2, 8)}, "v: expected shape"),
        ({"k": normal(9, 3, 8), "v": normal(9, 3, 8)}, "9 positions of 3 kv heads do not fit 4 query heads"),
        ({"k": normal(0, 2, 8), "v": normal(0, 2, 8)}, "k: expected at least one position, found shape"),
        ({"k": normal(4, 2, 8), "v": normal(4, 2, 8)}, "causal attention of 5 queries needs as many"),
        ({"window": 0}, "window: expected a positive integer with causal=True, found 0"),
        ({"window": 3, "causal": False}, "window: expected a positive integer with causal=True, found 3"),
    ],
)
def test_flash_attention_refuses(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"q": normal(5, 4, 8), "k": normal(9, 2, 8), "v": normal(9, 2, 8)}
    with pytest.raises(ValueError) as caught:
        flash_attention(**{**arguments, **change})
    assert message in str(caught.value)


def test_no_queries() -> None:
    assert flash_attention(normal(0, 4, 8), normal(9, 2, 8), normal(9, 2, 8)).shape == (0, 4, 8)


# --- one query ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 16, 50])
@pytest.mark.parametrize("length", [1, 16, 33, 150])
def test_blocks_in_any_order(size: int, length: int) -> None:
    """Bit for bit what the same rows give when they lie one after the other; other blocks are never read."""
    q, k, v = normal(6, 20), normal(length, 2, 20, seed=1), normal(length, 2, 20, seed=2)
    expected = grouped_query_attention(q, k, v)
    assert_near(expected, attended(q[None], k, v, lambda t: range(length))[0])
    used = -(-length // size)
    table = np.random.default_rng(3).permutation(used + 2)[:used]
    pools = np.full((2, used + 2, size, 2, 20), np.nan, np.float32)
    for pool, rows in zip(pools, (k, v), strict=True):
        for s in range(length):
            pool[table[s // size], s % size] = rows[s]
    for dtype in (np.int64, np.int32, np.uint16):
        np.testing.assert_array_equal(paged_attention(q, pools[0], pools[1], table.astype(dtype), length), expected)
    longer = np.append(table, -1)  # what is behind the used blocks is not looked at
    np.testing.assert_array_equal(paged_attention(q, pools[0], pools[1], longer, length), expected)


def test_paged_sequences_share_the_pools() -> None:
    q, pool = normal(2, 3, 6, 20), normal(2, 9, 4, 2, 20, seed=1)
    tables = np.random.default_rng(3).integers(0, 9, (2, 3, 5))
    lengths = np.array([[1, 20, 7], [4, 13, 16]])
    got = paged_attention(q, pool[0], pool[1], tables, lengths, out=np.empty_like(q))
    same = paged_attention(q, pool[0], pool[1], tables.tolist(), 7)
    for one in np.ndindex(2, 3):
        rows = pool[:, tables[one]].reshape(2, 20, 2, 20)
        for found, length in ((got, int(lengths[one])), (same, 7)):
            visible = range(length)
            expected = attended(q[one][None], rows[0, :length], rows[1, :length], lambda t, seen=visible: seen)[0]
            assert_near(found[one], expected)
    arguments = {"q": q, "k_pool": pool[0], "v_pool": pool[1], "block_table": tables, "length": 7}
    for name, wrong in (("block_table", tables[0]), ("block_table", tables[:, :2]), ("length", lengths[:1])):
        with pytest.raises(ValueError, match="^block_table: "):
            paged_attention(**{**arguments, name: wrong})
    with pytest.raises(ValueError, match="^length: expected 1 to 20, found 21"):
        paged_attention(q, pool[0], pool[1], tables, 21)
    with pytest.raises(TypeError, match="^length: expected integers"):
        paged_attention(q, pool[0], pool[1], tables, 7.0)


def test_one_kv_head_and_one_head_are_special_cases() -> None:
    q, k, v = normal(5, 16), normal(70, 16, seed=1), normal(70, 16, seed=2)
    grouped = grouped_query_attention(q, k[:, None], v[:, None], scale=0.7)
    np.testing.assert_array_equal(multi_query_attention(q, k, v, scale=0.7), grouped)
    for head in range(5):
        np.testing.assert_array_equal(softmax_attention(q[head], k, v, scale=0.7), grouped[head])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 0}, "length: expected 1 to 12, found 0"),
        ({"length": 13}, "length: expected 1 to 12, found 13"),
        ({"block_table": [0, 1, 5]}, "block_table: expected blocks 0 to 4, found [0, 1, 5]"),
        ({"block_table": [0, -1, 2]}, "block_table: expected blocks 0 to 4, found [0, -1, 2]"),
        ({"block_table": [[0, 1, 2]]}, "block_table: expected 1 dimensions"),
        ({"q": normal(4, 6)}, "q: 4 heads of 6 do not fit k_pool of 2 kv heads of 8"),
        ({"q": normal(3, 8)}, "q: 3 heads of 8 do not fit k_pool of 2 kv heads of 8"),
        ({"v_pool": normal(5, 4, 1, 8)}, "v_pool: expected shape (5, 4, 2, 8)"),
        ({"k_pool": normal(5, 0, 2, 8), "v_pool": normal(5, 0, 2, 8)}, "length: expected 1 to 0, found 9"),
    ],
)
def test_paged_attention_refuses(change: dict[str, Any], message: str) -> None:
    pool = normal(5, 4, 2, 8)
    arguments: dict[str, Any] = {"q": normal(4, 8), "k_pool": pool, "v_pool": pool}
    arguments |= {"block_table": [0, 1, 2], "length": 9}
    paged_attention(**arguments)
    with pytest.raises(ValueError) as caught:
        paged_attention(**{**arguments, **change})
    assert message in str(caught.value)
    with pytest.raises(TypeError, match="block_table: expected integers"):
        paged_attention(**{**arguments, "block_table": [0.0, 1.0, 2.0]})


def test_no_positions_are_refused() -> None:
    for call, q in ((softmax_attention, normal(8)), (multi_query_attention, normal(4, 8))):
        with pytest.raises(ValueError, match="k: expected at least one position"):
            call(q, normal(0, 8), normal(0, 8))


# --- over a cache ------------------------------------------------------------------------------------------------


def cache(length: int, kv_heads: int, dim: int, dtype: Any) -> tuple[Array, Array, Array, Array]:
    """Rows k, v (S, KV, D) as they are read back, and the cache that they were appended to, in two parts."""
    blocks = -(-length // LANES)
    # What was never written is not a number, or an int8 cache's scale of it is none: reading it shows.
    fill = {np.float32: np.nan, np.uint16: 0x7E00, np.int8: -1}[dtype]
    keys = np.full((kv_heads, blocks, key_rows(dim, dtype), LANES), fill, dtype)
    values = np.full((kv_heads, blocks * LANES, padded(dim)), fill, dtype)
    k, v = normal(length, kv_heads, dim, seed=1), normal(length, kv_heads, dim, seed=2)
    later = np.arange(length // 3, length)
    kv_append(k[later], v[later], keys, values, later)
    kv_append(k[: length // 3], v[: length // 3], keys, values, np.arange(length // 3))
    if dtype == np.uint16:
        k, v = (a.astype(np.float16).astype(np.float32) for a in (k, v))
    if dtype == np.int8:
        k, v = (np.rint(a / scale_of(a)) * scale_of(a) for a in (k, v))
    return k, v, keys, values


def scale_of(rows: Array) -> Array:
    """The scale of each head's key or value in an int8 cache."""
    return np.abs(rows).max(axis=2, keepdims=True) / np.float32(127)


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
@pytest.mark.parametrize(("kv_heads", "dim"), [(1, 2), (2, 18), (3, 64)])
def test_append_puts_every_number_in_its_place(dtype: Any, kv_heads: int, dim: int) -> None:
    k, v, keys, values = cache(45, kv_heads, dim, dtype)
    as_float = (lambda a: a.view(np.float16).astype(np.float32)) if dtype == np.uint16 else (lambda a: a)
    for p in range(45):
        np.testing.assert_array_equal(as_float(keys[:, p // LANES, :, p % LANES]), k[p])
        np.testing.assert_array_equal(as_float(values[:, p, :dim]), v[p])
    assert np.isnan(as_float(keys[:, 2, :, 45 % LANES :])).all()
    assert np.isnan(as_float(values[:, 45:])).all() and np.isnan(as_float(values[:, :, dim:])).all()


@pytest.mark.parametrize(("kv_heads", "dim"), [(1, 2), (2, 18), (3, 64)])
def test_append_in_eight_bits(kv_heads: int, dim: int) -> None:
    """Each number within half a step of a 127th of its row's largest; nothing else is touched."""
    _, _, keys, values = cache(45, kv_heads, dim, np.int8)
    k, v = normal(45, kv_heads, dim, seed=1), normal(45, kv_heads, dim, seed=2)
    scales = np.ascontiguousarray(keys[:, :, dim:]).view(np.float32).reshape(kv_heads, 3, SCALE_ROWS // 4, LANES)
    for p in range(45):
        for rows, codes, which in ((k, keys[:, p // LANES, :dim, p % LANES], 0), (v, values[:, p, :dim], 1)):
            scale = scales[:, p // LANES, which, p % LANES][:, None]
            np.testing.assert_array_equal(scale, scale_of(rows)[p])
            assert (np.abs(codes).max(axis=1) == 127).all()
            assert np.abs(codes * scale - rows[p]).max() <= scale.max() * 0.5001
    assert (keys[:, 2, :dim, 45 % LANES :] == -1).all() and np.isnan(scales[:, 2, :, 45 % LANES :]).all()
    assert (values[:, 45:] == -1).all() and (values[:, :, dim:] == -1).all()


def test_eight_bits_of_zeros_and_of_what_is_no_number() -> None:
    keys, values = np.zeros((1, 1, 16 + SCALE_ROWS, LANES), np.int8), np.zeros((1, 16, 16), np.int8)
    k = np.zeros((16, 1, 16), np.float32)
    k[3, 0, 5], k[4, 0, 6] = np.nan, np.inf
    for positions in (np.arange(16), np.arange(15, -1, -1)):  # a whole block at once, and one by one
        kv_append(k[positions], k[positions], keys, values, positions)
        scales = np.ascontiguousarray(keys[0, 0, 16:]).view(np.float32).reshape(2, LANES)
        assert (np.isnan(scales) == np.isin(np.arange(16), [3, 4])).all()
        assert (np.nan_to_num(scales) == 0).all()


def test_append_of_whole_blocks_is_append_one_by_one() -> None:
    k, v = normal(50, 2, 37, seed=1), normal(50, 2, 37, seed=2)
    for dtype in (np.float32, np.uint16, np.int8):
        caches = []
        for _ in range(2):
            caches.append((np.zeros((2, 4, key_rows(37, dtype), LANES), dtype), np.zeros((2, 64, 48), dtype)))
        kv_append(k, v, *caches[0], np.arange(10, 60))
        for t in range(50):
            kv_append(k[t : t + 1], v[t : t + 1], *caches[1], np.array([10 + t]))
        for whole, single in zip(*caches, strict=True):
            np.testing.assert_array_equal(whole, single)


@pytest.mark.parametrize("window", [None, 20, 280])
@pytest.mark.parametrize("dtype", [np.float32, np.uint16, np.int8])
@pytest.mark.parametrize("first", [0, 5, 250, 256, 500])
def test_queries_anywhere_over_a_cache(first: int, dtype: Any, window: int | None) -> None:
    """One token and many, before and behind the ends of the chunks of 256 positions; nothing unwritten is used."""
    for tokens in (1, 2, 6, 13):
        length = first + tokens
        k, v, keys, values = cache(length, 2, 18, dtype)
        if dtype != np.int8:
            keys[...] = np.where(np.isnan(as_numbers(keys)), np.zeros((), dtype), keys)  # masked lanes may be read
        values[:, :length, 18:] = 0
        q = normal(tokens, 6, 18)
        out, scratch = np.empty_like(q), np.empty((2, prompt_scratch_size(18)), np.float32)
        positions = np.arange(first, length)
        reach = window or length
        expected = attended(q, k, v, lambda t: range(max(0, first + t - reach + 1), first + t + 1), 0.25)  # noqa: B023
        values[:, length:] = 0
        assert attend_cache(q, plain_cache(keys, values), positions, scoring_of(window, 0.25), out, scratch) is out
        assert_near(out, expected)


def test_many_tokens_on_several_threads_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a thread steals what others have not done: nine threads on fewer cores."""
    _, _, keys, values = cache(300, 3, 18, np.float32)
    q, positions = normal(300, 6, 18), np.arange(300)
    answers = []
    for threads in (1, 2, 5, 9):
        monkeypatch.setattr("ruvllm.kernels.attention.prefill.threads_for", lambda *_, n=threads: n)
        scratch, out = np.empty((threads, prompt_scratch_size(18)), np.float32), np.full(q.shape, np.float32(np.nan))
        answers.append(attend_cache(q, plain_cache(keys, values), positions, scoring_of(None, 0.25), out, scratch))
    for answer in answers:
        np.testing.assert_array_equal(answer, answers[0])
    assert np.isfinite(answers[0]).all()


@pytest.mark.parametrize("window", [None, 300])
def test_one_token_on_several_threads_is_the_same(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, keys, values = cache(700, 3, 18, np.float32)
    q, position = normal(1, 6, 18), np.array([699])
    answers = []
    for threads in (1, 2, 5, 9):
        monkeypatch.setattr("ruvllm.kernels.attention.prefill.threads_for", lambda *_, n=threads: n)
        scratch = np.empty((threads, prompt_scratch_size(18)), np.float32)
        scoring, out = scoring_of(window, 0.25), np.empty_like(q)
        answers.append(attend_cache(q, plain_cache(keys, values), position, scoring, out, scratch))
    for other in answers[1:]:
        np.testing.assert_array_equal(other, answers[0])


def as_numbers(cached: Array) -> Array:
    return cached.view(np.float16) if cached.dtype == np.uint16 else cached


def test_append_refuses() -> None:
    k, keys, values = normal(3, 2, 18), np.zeros((2, 2, 18, 16), np.float32), np.zeros((2, 32, 32), np.float32)
    kv_append(k, k, keys, values, np.array([31, 0, 5]))
    before = keys.copy(), values.copy()
    read_only = keys.copy()
    read_only.flags.writeable = False
    for error, message, arguments in (
        (ValueError, "positions: expected 0 to 31, found 0 to 32", (k, k, keys, values, [0, 1, 32])),
        (ValueError, "positions: expected 0 to 31, found -1 to 1", (k, k, keys, values, [-1, 0, 1])),
        (TypeError, "positions: expected integers", (k, k, keys, values, [0.0, 1.0, 2.0])),
        (ValueError, "do not fit keys", (k, k, keys, values, [0, 1])),
        (ValueError, "do not fit keys", (k, k[:2], keys, values, [0, 1, 2])),
        (ValueError, "do not fit keys", (k[:, :1], k[:, :1], keys, values, [0, 1, 2])),
        (ValueError, "are no cache for head_dim 16", (k[:, :, :16], k[:, :, :16], keys, values, [0, 1, 2])),
        (ValueError, "are no cache for head_dim 18", (k, k, keys, values[:1], [0, 1, 2])),
        (ValueError, "are no cache for head_dim 18", (k, k, keys, values.astype(np.uint16), [0, 1, 2])),
        (TypeError, "keys: expected a writable C-contiguous", (k, k, keys.astype(np.float64), values, [0, 1, 2])),
        (TypeError, "keys: expected a writable C-contiguous", (k, k, read_only, values, [0, 1, 2])),
    ):
        with pytest.raises(error) as caught:
            kv_append(*arguments)
        assert message in str(caught.value)
    np.testing.assert_array_equal(keys, before[0])
    np.testing.assert_array_equal(values, before[1])
    kv_append(k[:0], k[:0], keys, values, np.array([], np.int64))
