"""Prefixes: the blocks of a pool by the tokens that they hold, so that sequences which begin alike share them.

A tree: a node is one block, its parent the block before it. The path from the root to a node spells the beginning of
one or of many sequences. A full block is never written again, and any number of sequences may use it. The last block
of a sequence is still being filled by it alone; another that begins with the same tokens gets a copy.

Blocks that no sequence uses stay, idle, until their memory is needed: the one that was used longest ago goes first.

Layers with a sliding window read only the positions inside it. A node has one block for each group of layers
(``BlockLayout``). A block that lies behind the window of every sequence that uses its node is evicted before any idle
node. A sequence that shares a prefix resumes at a position where the windows of all groups are still cached.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from ruvllm.model.kv_blocks import Block
from ruvllm.model.kv_pool import BLOCK, KVPool


class Node:
    """BLOCK positions: ``ids[:count]`` are the tokens whose keys and values its blocks hold and may share.

    blocks: of each group of layers; None where it was given up. needed: of each, by how many sequences. users: the
    sequences that use the node. parent: None where it is a root, or where it shall not be found.
    """

    __slots__ = ("blocks", "children", "count", "ids", "needed", "parent", "users")

    def __init__(self, blocks: list[Block], parent: Node | None) -> None:
        self.blocks: list[Block | None] = [*blocks]
        self.needed, self.parent = [0] * len(blocks), parent
        self.ids = np.zeros(BLOCK, np.int64)
        self.count = self.users = 0
        self.children: list[Node] = []
        if parent is not None:
            parent.children.append(self)


class Path:
    """The nodes of a sequence.

    first: of each group of layers, the first node whose block it still needs. tokens: how many it began with.
    """

    def __init__(self, first: list[int], tokens: int = 0) -> None:
        self.nodes: list[Node] = []
        self.first, self.tokens = first, tokens

    def tables(self) -> np.ndarray:
        """Addresses of its blocks (groups, nodes); 0 of those that it does not need."""
        blocks = [[node.blocks[group] for node in self.nodes] for group in range(len(self.first))]
        return np.array([[0 if block is None else block.address for block in row] for row in blocks])


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
        self.used = 0  # bytes of blocks that sequences need
        self._groups = range(len(pool.layout.nbytes))
        self._idle: dict[Node, None] = {}  # in the order of their release: children come before their parents
        self._behind: dict[tuple[Node, int], None] = {}  # blocks behind the windows of all that use their nodes
        self._roots: list[tuple[object, Node]] = []

    @property
    def available(self) -> int:
        """Bytes that no sequence needs."""
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
        """The longest beginning of ids that is known, from whose end a sequence can go on."""
        nodes: list[Node] = []
        node, at = root, 0
        best, rest = None, 0
        while at < len(ids):
            for child in node.children:
                if child.count and child.ids[0] == ids[at]:
                    n = common_prefix(child.ids[: child.count], ids[at:])
                    if n > rest:
                        best, rest = child, n
            if best is None or rest < BLOCK:
                break
            nodes.append(best)
            node, at, best, rest = best, at + BLOCK, None, 0
        return self._shortened(Match(nodes, best, rest))

    def _shortened(self, match: Match) -> Match:
        """As much of a match as a sequence can go on from."""
        while not self._goes_on(match):
            match = Match(match.nodes if match.partial else match.nodes[:-1], None, 0)
        return match

    def _goes_on(self, match: Match) -> bool:
        """Whether all blocks that the token after it sees are there."""
        chain = match.nodes if match.partial is None else [*match.nodes, match.partial]
        first = self.pool.first_blocks(match.tokens)
        return all(node.blocks[group] is not None for group in self._groups for node in chain[first[group] :])

    def take(self, match: Match) -> Path:
        """Use what was found: the path of a new sequence. The partial block is copied where others may need it."""
        path, partial = Path(self.pool.first_blocks(match.tokens), match.tokens), match.partial
        for node in match.nodes:
            self._append(path, node)
        if partial is None:
            return path
        alone = not partial.users and partial.count == match.rest
        self._append(path, partial)  # allocating must not evict it
        if alone:
            return path
        copied = self._allocated(partial.parent)
        self._leave(partial, self._groups)
        del path.nodes[-1]
        if copied is None:
            self.release(path)
            return self.take(self._shortened(Match(match.nodes, None, 0)))
        for source, target in zip(partial.blocks, copied.blocks, strict=True):
            if source is not None and target is not None:
                target.memory[:] = source.memory
        copied.ids[: match.rest], copied.count = partial.ids[: match.rest], match.rest
        self._append(path, copied)
        return path

    def extend(self, path: Path, root: Node | None) -> bool:
        """Blocks for the next tokens; False if all memory is in use. root: None where they shall not be found."""
        node = self._allocated(path.nodes[-1] if root is not None and path.nodes else root)
        if node is not None:
            self._append(path, node)
        return node is not None

    def advance(self, path: Path, length: int) -> None:
        """A sequence has grown to ``length`` tokens: it stops using the blocks behind its windows."""
        first = self.pool.first_blocks(length)
        for group in self._groups:
            for node in path.nodes[path.first[group] : first[group]]:
                self._stop_using(node, group)
        path.first = first

    def release(self, path: Path) -> None:
        """A sequence leaves: what it shares becomes idle if no other uses it, the rest is free."""
        for i, node in reversed(list(enumerate(path.nodes))):
            self._leave(node, [group for group in self._groups if i >= path.first[group]])

    def _allocated(self, parent: Node | None) -> Node | None:
        """A new node; None if all memory is in use."""
        blocks: list[Block] = []
        for group in self._groups:
            while (block := self.pool.allocate(group)) is None:
                if not self._evict():
                    for other, given in enumerate(blocks):
                        self.pool.free(other, given)
                    return None
            blocks.append(block)
        return Node(blocks, parent)

    def _append(self, path: Path, node: Node) -> None:
        """A node is the next of a sequence."""
        node.users += 1
        self._idle.pop(node, None)
        for group in self._groups:
            if len(path.nodes) >= path.first[group]:
                if not node.needed[group]:
                    self.used += self.pool.layout.nbytes[group]
                    self._behind.pop((node, group), None)
                node.needed[group] += 1
        path.nodes.append(node)

    def _leave(self, node: Node, groups: Iterable[int]) -> None:
        """A sequence that needed the blocks of ``groups`` leaves a node."""
        node.users -= 1
        for group in groups:
            self._stop_using(node, group)
        if not node.users and (node.parent is None or not node.count):
            self._drop(node)
        elif not node.users:
            self._idle[node] = None

    def _stop_using(self, node: Node, group: int) -> None:
        """One sequence fewer uses a block."""
        node.needed[group] -= 1
        if node.needed[group]:
            return
        self.used -= self.pool.layout.nbytes[group]
        if node.users and node.parent is None:
            self._free(node, group)
        elif node.users:
            self._behind[node, group] = None

    def _evict(self) -> bool:
        """Free a block that lies behind windows, or else the node that was used longest ago."""
        passed = next(iter(self._behind), None)
        if passed is not None:
            self._free(*passed)
            return True
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
        for group in self._groups:
            self._free(node, group)

    def _free(self, node: Node, group: int) -> None:
        """Give a block back, if it is there."""
        self._behind.pop((node, group), None)
        block, node.blocks[group] = node.blocks[group], None
        if block is not None:
            self.pool.free(group, block)

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
