"""Prefixes: the blocks of a pool by the tokens that they hold, so that sequences which begin alike share them.

A tree: a node is one block, its parent the block before it. The path from the root to a node spells the beginning of
one or of many sequences. A full block is never written again, and any number of sequences may use it. The last block
of a sequence is still being filled by it alone; another that begins with the same tokens gets a copy.

Blocks that no sequence uses stay, idle, until their memory is needed: the one that was used longest ago goes first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ruvllm.model.kv_blocks import Block
from ruvllm.model.kv_pool import BLOCK, KVPool


class Node:
    """BLOCK positions: ``ids[:count]`` are the tokens whose keys and values its blocks hold and may share.

    blocks: of each group of layers. users: the sequences that use it. parent: None where it is a root, or where it
    shall not be found.
    """

    __slots__ = ("blocks", "children", "count", "ids", "parent", "users")

    def __init__(self, blocks: list[Block], parent: Node | None) -> None:
        self.blocks, self.parent = blocks, parent
        self.ids = np.zeros(BLOCK, np.int64)
        self.count = self.users = 0
        self.children: list[Node] = []
        if parent is not None:
            parent.children.append(self)


class Match(NamedTuple):
    """What a tree knows of some tokens: full blocks, and of one more block the first ``rest`` tokens."""

    nodes: list[Node]
    partial: Node | None
    rest: int

    @property
    def tokens(self) -> int:
        """Tokens that are known."""
        return len(self.nodes) * BLOCK + self.rest


class Prefixes:
    """The blocks of a pool: free, used, or idle."""

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool
        self.used = 0  # bytes of blocks that sequences use
        self._idle: dict[Node, None] = {}  # in the order of their release: children come before their parents
        self._roots: list[tuple[object, Node]] = []

    @property
    def available(self) -> int:
        """Bytes that no sequence uses."""
        return self.pool.memory - self.used

    def root(self, key: object) -> Node:
        """The root of sequences whose keys and values are comparable: those of one ``key``."""
        for known, root in self._roots:
            if known == key:
                return root
        self._roots = [(known, root) for known, root in self._roots if root.children]
        self._roots.append((key, Node([], None)))
        return self._roots[-1][1]

    def match(self, root: Node, ids: np.ndarray) -> Match:
        """The longest beginning of ids that is known."""
        nodes: list[Node] = []
        node, at = root, 0
        while at < len(ids):
            best, rest = None, 0
            for child in node.children:
                if child.count and child.ids[0] == ids[at]:
                    n = common_prefix(child.ids[: child.count], ids[at:])
                    if n > rest:
                        best, rest = child, n
            if best is None or rest < BLOCK:
                return Match(nodes, best, rest)
            nodes.append(best)
            node, at = best, at + BLOCK
        return Match(nodes, None, 0)

    def take(self, match: Match) -> list[Node]:
        """Use what was found: the path of a new sequence. The partial block is copied where others may need it."""
        for node in match.nodes:
            self._use(node)
        path, partial = list(match.nodes), match.partial
        if partial is None:
            return path
        if not partial.users and partial.count == match.rest:
            self._use(partial)
            return [*path, partial]
        self._use(partial)  # allocating must not evict it
        copied = self.allocate(partial.parent)
        if copied is not None:
            for source, target in zip(partial.blocks, copied.blocks, strict=True):
                target.memory[:] = source.memory
            copied.ids[: match.rest], copied.count = partial.ids[: match.rest], match.rest
            path.append(copied)
        self._leave(partial)
        return path

    def allocate(self, parent: Node | None) -> Node | None:
        """A node for the tokens after those of ``parent``, in use; None if all memory is in use."""
        blocks: list[Block] = []
        for group in range(len(self.pool.layout.nbytes)):
            while (block := self.pool.allocate(group)) is None:
                if not self._evict():
                    self._free(blocks)
                    return None
            blocks.append(block)
        node = Node(blocks, parent)
        self._use(node)
        return node

    def _free(self, blocks: list[Block]) -> None:
        for group, block in enumerate(blocks):
            self.pool.free(group, block)

    def release(self, path: list[Node]) -> None:
        """A sequence leaves: what it shares becomes idle if no other uses it, the rest is free."""
        for node in reversed(path):
            self._leave(node)

    def _use(self, node: Node) -> None:
        if not node.users:
            self.used += sum(self.pool.layout.nbytes)
        node.users += 1
        self._idle.pop(node, None)

    def _leave(self, node: Node) -> None:
        node.users -= 1
        if node.users:
            return
        self.used -= sum(self.pool.layout.nbytes)
        if node.parent is None or not node.count:
            self._drop(node)
        else:
            self._idle[node] = None

    def _evict(self) -> bool:
        """Free the block that was used longest ago."""
        oldest = next(iter(self._idle), None)
        if oldest is None:
            return False
        del self._idle[oldest]
        self._drop(oldest)
        return True

    def _drop(self, node: Node) -> None:
        if node.parent is not None:
            node.parent.children.remove(node)
            node.parent = None
        self._free(node.blocks)

    def __iter__(self) -> Iterator[Node]:
        """All blocks that can be found."""
        pending = [child for _, root in self._roots for child in root.children]
        while pending:
            node = pending.pop()
            pending += node.children
            yield node


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two texts begin with together."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
