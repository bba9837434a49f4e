"""Share: the part of a model that one of several ranks holds (tensor parallelism).

A rank holds some of the attention heads, some columns of the feed-forward network and some rows of the vocabulary:

    q, k, v, gate, up    the rows of its heads and columns
    o, down              the columns that multiply those, where the ranks' results are summed afterwards; or rows,
                         where all ranks' inputs are gathered beforehand
    embed, head          the rows of its tokens
    norms, router        whole, on every rank

A mixture's experts are all on every rank, each with some of its columns: ranks then have equal work, whichever experts
a token goes to.

Source: Shoeybi et al. 2019, "Megatron-LM".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from math import lcm
from typing import NamedTuple

from ruvllm.model.config import ModelConfig

GROUP = 32  # columns that share a scale in integer weights: GROUP of the kernels. A group is never cut
_PANEL = 16  # rows of a panel of weights


class Part(NamedTuple):
    """Rows and columns of a tensor; None: all."""

    rows: range | None = None
    columns: range | None = None


@dataclass(frozen=True)
class Share:
    """What one rank holds of the model that ``config`` describes, as ranges of indices.

    heads: query heads; kv_heads: those that they read; columns: of feed-forward networks; expert_columns and
    shared_columns: of experts and of the shared expert; tokens: of the vocabulary. outputs: rows of o and down; None:
    it has all rows, of the columns that its heads and columns multiply.
    """

    config: ModelConfig
    rank: int
    heads: range
    kv_heads: range
    columns: range
    expert_columns: range
    shared_columns: range
    tokens: range
    outputs: range | None = None

    @cached_property
    def local(self) -> ModelConfig:
        """The configuration of the share as a model of its own. Its vocabulary is the whole one."""
        experts = self.config.experts
        if experts is not None:
            experts = replace(
                experts, intermediate_size=len(self.expert_columns),
                shared_intermediate_size=len(self.shared_columns),
            )  # fmt: skip
        return replace(
            self.config, num_attention_heads=len(self.heads), num_key_value_heads=len(self.kv_heads),
            intermediate_size=len(self.columns), experts=experts,
        )  # fmt: skip

    def part(self, name: str) -> Part | None:
        """The part of a tensor that this rank holds, by canonical name; None: nothing.

        A bias that is added to a sum over all ranks is rank 0's.
        """
        tensor = name.rpartition(".")[2]
        matrix, of_bias = tensor.removesuffix("_bias"), tensor.endswith("_bias")
        if matrix in ("o", "down"):
            if self.outputs is not None:
                return Part(rows=self.outputs)
            if of_bias:
                return Part() if self.rank == 0 else None
            return Part(columns=self.elements("heads" if matrix == "o" else self._columns(name)))
        if matrix in ("q", "q_norm", "k", "v", "k_norm"):
            if matrix.endswith("_norm") and (self.config.qk_norm == "head" or self.outputs is not None):
                return Part()
            return Part(rows=self.elements("heads" if matrix.startswith("q") else "kv_heads"))
        if matrix in ("gate", "up"):
            return Part(rows=self.elements(self._columns(name)))
        if matrix == "sinks":
            return Part(rows=self.heads)
        return Part(rows=self.tokens) if name in ("embed", "head") else Part()

    def shape(self, name: str, whole: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape of a tensor's part; None: this rank has none."""
        part = self.part(name)
        if part is None:
            return None
        rows = whole[0] if part.rows is None else len(part.rows)
        return (rows, *whole[1:]) if part.columns is None else (rows, len(part.columns))

    def elements(self, of: str) -> range:
        """The elements of a row that it has, by the name of an attribute: of heads those in them."""
        found: range = getattr(self, of)
        dim = self.config.head_dim if of in ("heads", "kv_heads") else 1
        return range(found.start * dim, found.stop * dim)

    def _columns(self, name: str) -> str:
        if ".experts." in name:
            return "expert_columns"
        return "shared_columns" if ".shared." in name else "columns"

    def __str__(self) -> str:
        heads = f"heads {_shown(self.heads)} (key/value {_shown(self.kv_heads)})"
        columns = f"feed-forward {_shown(self.columns)}"
        if self.config.experts is not None:
            columns = f"columns {_shown(self.expert_columns)} of each expert"
        return f"{heads}, {columns}, tokens {_shown(self.tokens)}"


def shares_of(
    config: ModelConfig, parts: Sequence[float], grouped_heads: bool = False, grouped_columns: bool = False,
    by_rows: bool = False,
) -> list[Share]:  # fmt: skip
    """The shares of a model, in proportion to ``parts``, one for each rank.

    Args:
        config: of the whole model.
        parts: how much each rank should hold, relative to the others; above 0.
        grouped_heads, grouped_columns: whether o, and down, have integer weights, whose groups cannot be cut.
        by_rows: whether ranks have rows of o and down, not columns: no group is cut then.

    Raises:
        ValueError: the model has too few heads or columns for so many ranks, or a part is not above 0.
    """
    if not all(0 < part < float("inf") for part in parts):
        raise ValueError(f"shares: expected numbers above 0, found {', '.join(f'{part:g}' for part in parts)}")
    experts, group = config.experts, GROUP if grouped_columns else 1

    def cut(count: int, what: str) -> list[range]:
        unit = _whole_panels(count, len(parts)) if by_rows else group
        return _cut(count, parts, unit, what)

    columns = cut(config.intermediate_size, "feed-forward columns")
    experts_columns = shared_columns = [range(0)] * len(parts)
    if experts is not None:
        experts_columns = cut(experts.intermediate_size, "columns of an expert")
        if experts.shared_intermediate_size:
            shared_columns = cut(experts.shared_intermediate_size, "columns of the shared expert")
    tokens = _cut(config.vocab_size, parts, _whole_panels(config.vocab_size, len(parts)), "tokens")
    outputs: Sequence[range | None] = [None] * len(parts)
    if by_rows:
        outputs = cut(config.hidden_size, "outputs")
    heads = _cut_heads(config, parts, GROUP if grouped_heads and not by_rows else 1)
    return [
        Share(
            config, rank, *heads[rank], columns[rank], experts_columns[rank], shared_columns[rank], tokens[rank],
            outputs[rank],
        )
        for rank in range(len(parts))
    ]  # fmt: skip


def _whole_panels(count: int, ranks: int) -> int:
    """In units of how many rows to cut: whole panels where there are enough."""
    return _PANEL if count >= _PANEL * ranks else 1


def _cut_heads(config: ModelConfig, parts: Sequence[float], group: int) -> list[tuple[range, range]]:
    """Query heads and key/value heads of each rank: whole kv heads where there are enough, else parts of their group.

    A kv head whose query heads are on several ranks is on each of them.
    """
    kv, each = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    unit = _unit(each * config.head_dim, group)
    if kv >= len(parts) * unit or (kv >= len(parts) and each == 1):
        cut = _cut(kv, parts, unit, "key/value heads")
        return [(range(heads.start * each, heads.stop * each), heads) for heads in cut]
    if config.qk_norm == "row":
        raise ValueError(f"{len(parts)} ranks: the model's {kv} key/value heads are normalised together: use {kv}")
    found: list[tuple[range, range]] = []
    unit = _unit(config.head_dim, group)
    if kv > len(parts):
        raise ValueError(_too_few(f"key/value heads in groups of {group} columns", kv // unit, len(parts)))
    most = kv * -(-each // unit)
    if len(parts) > most:
        raise ValueError(_too_few("query heads" + f" in groups of {unit}" * (unit > 1), most, len(parts)))
    for head, ranks in enumerate(_cut(len(parts), [1.0] * kv, 1, "ranks")):
        cut = _cut(each, [parts[rank] for rank in ranks], unit, "query heads of a key/value head")
        found += [(range(head * each + q.start, head * each + q.stop), range(head, head + 1)) for q in cut]
    return found


def _unit(columns: int, group: int) -> int:
    """How many heads of so many columns are whole groups."""
    return lcm(columns, group) // columns


def _cut(count: int, parts: Sequence[float], unit: int, what: str) -> list[range]:
    """0 .. count in proportion to ``parts``, cut at multiples of ``unit``; each has at least one."""
    units, ranks = -(-count // unit), len(parts)
    if units < ranks:
        raise ValueError(_too_few(what + f" in groups of {unit}" * (unit > 1), units, ranks))
    bounds, total = [0], sum(parts)
    for i in range(1, ranks):
        wanted = round(units * sum(parts[:i]) / total)
        bounds.append(min(max(wanted, bounds[-1] + 1), units - (ranks - i)))
    bounds.append(units)
    return [range(lo * unit, min(hi * unit, count)) for lo, hi in pairwise(bounds)]


def _too_few(what: str, found: int, ranks: int) -> str:
    return f"{ranks} ranks: expected at least as many {what}, found {found}"


def _shown(indices: range) -> str:
    return f"{indices.start}-{indices.stop - 1}" if len(indices) > 1 else str(indices.start)
