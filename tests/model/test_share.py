"""Shares of a model: every head, column and token is on a rank, groups stay whole, and what cannot be is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from ruvllm.checkpoint.loader import open_checkpoint
from ruvllm.checkpoint.part import PartOfCheckpoint
from ruvllm.dividing import divide, threads_of
from ruvllm.kernels.threads.pool import physical_cores
from ruvllm.loading import weight_bytes
from ruvllm.model.config import ExpertsConfig, ModelConfig
from ruvllm.model.linear import Linear
from ruvllm.model.llama import Llama
from ruvllm.model.share import shares_of
from tests.model import tiny

SMOLLM2 = ModelConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=9,
    num_key_value_heads=3, head_dim=64,
)  # fmt: skip


@pytest.mark.parametrize("parts", [[1, 1], [1, 1, 1], [3, 1], [0.1, 5, 1], [1, 1, 1, 1], [2, 1, 1, 1, 1, 1, 1, 1, 1]])
@pytest.mark.parametrize("grouped", [False, True])
def test_every_index_is_on_a_rank(parts: list[float], grouped: bool) -> None:
    shares = shares_of(SMOLLM2, parts, grouped, grouped)
    for name, count in (("heads", 9), ("columns", 1536), ("tokens", 49152)):
        every = [i for share in shares for i in getattr(share, name)]
        assert every == list(range(count))
    for share in shares:
        assert {head // 3 for head in share.heads} == set(share.kv_heads)
        assert not grouped or share.columns.start % 32 == 0
        assert share.local.num_attention_heads == len(share.heads)


def test_shares_follow_their_weights() -> None:
    shares = shares_of(SMOLLM2, [3, 1], True, True)
    assert [len(share.columns) for share in shares] == [1152, 384]
    assert [len(share.kv_heads) for share in shares] == [2, 1]


@pytest.mark.parametrize(
    ("changes", "parts", "grouped", "message"),
    [
        ({}, [1] * 10, False, "10 ranks: expected at least as many query heads"),
        ({"intermediate_size": 40}, [1, 1, 1], True, "feed-forward columns in groups of 32, found 2"),
        ({"head_dim": 12}, [1, 1], True, "key/value heads in groups of 32 columns, found 0"),
        ({"qk_norm": "row", "num_key_value_heads": 1}, [1, 1], False, "normalised together"),
        ({}, [1, 0], False, "shares: expected numbers above 0"),
        ({}, [1, float("nan")], False, "shares: expected numbers above 0"),
    ],
)
def test_what_cannot_be_divided(changes: dict[str, object], parts: list[float], grouped: bool, message: str) -> None:
    config = dataclasses.replace(SMOLLM2, **changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        shares_of(config, parts, grouped, grouped)


@pytest.mark.parametrize("parts", [[1, 1], [3, 1], [1, 1, 1]])
def test_rows_of_o_and_down_need_no_whole_groups(parts: list[float]) -> None:
    config = dataclasses.replace(SMOLLM2, head_dim=12, intermediate_size=40, qk_norm="row")
    shares = shares_of(config, parts, True, True, by_rows=True)
    for name, count in (("outputs", 576), ("columns", 40)):
        assert [i for share in shares for i in getattr(share, name)] == list(range(count))
    for share in shares:
        assert share.part("layers.0.o") == share.part("layers.0.down_bias") == (share.outputs, None)
        assert share.part("layers.0.k_norm") == (None, None)


def test_experts_are_divided_by_columns() -> None:
    experts = ExpertsConfig(count=4, per_token=2, intermediate_size=96, shared_intermediate_size=64)
    shares = shares_of(dataclasses.replace(SMOLLM2, experts=experts), [1, 1], True, True)
    assert [share.expert_columns for share in shares] == [range(0, 64), range(64, 96)]
    assert [share.part("layers.0.experts.3.down") for share in shares] == [
        (None, range(0, 64)), (None, range(64, 96)),
    ]  # fmt: skip
    assert shares[1].part("layers.0.shared.gate") == (range(32, 64), None)
    assert shares[1].part("layers.0.router") == (None, None)


@pytest.mark.parametrize("wire", ["exact", "f32"])
@pytest.mark.parametrize(("dtype", "weights"), [("F32", "auto"), ("Q8_0", "auto"), ("F32", "int4"), ("F32", "int8")])
def test_parts_are_the_whole(dtype: str, weights: str, wire: str, tmp_path: Path) -> None:
    """The matrices of all ranks together have the weights of one rank's, bit for bit."""
    path = tiny.write_gguf("llama3_scaled_gqa", tmp_path / "model.gguf", dtype)
    with open_checkpoint(path) as checkpoint:
        whole = Llama(checkpoint.config, checkpoint, weights, threads=1).linears()
        layouts = {name: linear.layout for name, linear in whole.items()}
        shares = divide(checkpoint.config, [1, 1], layouts, wire)
        for name, linear in whole.items():
            expected = linear.take(np.arange(linear.rows))
            for share in shares:
                held = PartOfCheckpoint(checkpoint, share)
                loaded = Linear.load(held.tensor(name), layouts[name], None, name)
                rows, columns = share.part(name) or (None, None)
                wanted = expected[slice(None) if rows is None else rows]
                wanted = wanted if columns is None else wanted[:, columns]
                np.testing.assert_array_equal(loaded.take(np.arange(loaded.rows)), wanted)
        total = sum(weight_bytes(checkpoint, weights, share) for share in shares)
        whole_bytes = weight_bytes(checkpoint, weights)
        assert whole_bytes < total < 1.6 * whole_bytes  # norms, and panels that are not full, are there twice


def test_threads_are_divided_among_ranks_that_share_cores() -> None:
    cores = tuple(range(4))
    assert threads_of(0, [("a", cores), ("b", cores)]) == physical_cores()
    assert threads_of(0, [("a", cores), ("a", cores)]) == max(1, physical_cores() // 2)
    assert threads_of(0, [("a", (0, 1)), ("a", (2, 3))]) == physical_cores()
