"""Attention: the seed's rows (one query, a cache of s positions) and prefill of many."""

import numpy as np

from ruvllm.kernels import flash_attention, grouped_query_attention, softmax_attention


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


class SoftmaxAttention:
    """One query of one head, head_dim 64 ("Softmax Attention") or 128 ("Flash Attention"), over s positions."""

    version = "1"
    timeout = 60
    params = ([64, 128], [128, 256, 512, 1024, 2048, 4096])
    param_names = ("head_dim", "seq")

    def setup(self, head_dim: int, seq: int) -> None:
        self.q, self.k, self.v = _random(head_dim), _random(seq, head_dim), _random(seq, head_dim)
        self.out = np.empty_like(self.q)
        self.time_attention(head_dim, seq)

    def time_attention(self, head_dim: int, seq: int) -> None:
        softmax_attention(self.q, self.k, self.v, out=self.out)


class GroupedQueryAttention:
    """One token, query heads of size 128 that share kv heads: the seed's ratios 4 and 8, and its headline, 32 / 4."""

    version = "1"
    timeout = 60
    params = (["16/4", "16/2", "32/4"], [128, 256, 512, 4096])
    param_names = ("heads", "seq")

    def setup(self, heads: str, seq: int) -> None:
        query_heads, kv_heads = (int(count) for count in heads.split("/"))
        self.q = _random(query_heads, 128)
        self.k, self.v = _random(seq, kv_heads, 128), _random(seq, kv_heads, 128)
        self.out = np.empty_like(self.q)
        self.time_attention(heads, seq)

    def time_attention(self, heads: str, seq: int) -> None:
        grouped_query_attention(self.q, self.k, self.v, out=self.out)


class PrefillAttention:
    """Causal attention of a whole prompt: 32 query heads, 8 kv heads, head_dim 128."""

    version = "1"
    timeout = 120
    params = ([128, 512, 2048],)
    param_names = ("tokens",)

    def setup(self, tokens: int) -> None:
        self.q, self.k, self.v = _random(tokens, 32, 128), _random(tokens, 8, 128), _random(tokens, 8, 128)
        self.out = np.empty_like(self.q)
        self.time_attention(tokens)

    def time_attention(self, tokens: int) -> None:
        flash_attention(self.q, self.k, self.v, out=self.out)
