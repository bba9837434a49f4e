"""The memory of a tape as byte masks: the bytes that an operation declares to be read or written by one member."""

from __future__ import annotations

import math

import numpy as np

from ruvllm.kernels import tape as t
from ruvllm.kernels.quant.layout import GROUP, OFFSETS, OUTLIERS, token_blocks
from ruvllm.model.kv_cache import KVCache
from ruvllm.model.ops.schedule import ANY, Access, Partition, Step, Value
from ruvllm.model.replay import Working


def part(count: int, member: int, size: int) -> tuple[int, int]:
    return count * member // size, count * (member + 1) // size


def row_part(rows: int, member: int, size: int) -> tuple[int, int]:
    """The rows of a member: whole blocks of 12 tokens."""
    lo, hi = part(-(-rows // 12), member, size)
    return min(12 * lo, rows), min(12 * hi, rows)


class Memory:
    """All buffers that a tape writes to, of one pass; ``mask`` has the same shapes."""

    def __init__(self, working: Working, cache: KVCache, logits: np.ndarray) -> None:
        self.working, self.cache = working, cache
        self.buffers: dict[str, np.ndarray] = {
            "shared": working.shared, "local": working.local, "partial": working.partial, "logits": logits,
        }  # fmt: skip
        for group, (block,) in enumerate(cache._blocks):
            self.buffers[f"block {group}"] = block.memory

    def snapshot(self) -> dict[str, np.ndarray]:
        return {name: as_bytes(buffer).copy() for name, buffer in self.buffers.items()}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        for name, buffer in self.buffers.items():
            as_bytes(buffer)[...] = state[name]

    def mask(self, accesses: list[Access], member: int, size: int) -> dict[str, np.ndarray]:
        """True for each byte that a member may touch by these accesses."""
        masks = {name: np.zeros(buffer.nbytes, bool) for name, buffer in self.buffers.items()}
        for access in accesses:
            self._mark(masks, access, member, size)
        return masks

    def _mark(self, masks: dict[str, np.ndarray], access: Access, member: int, size: int) -> None:
        value, partition = access
        header = self.working.header
        if value.space == t.CACHE:
            self._mark_cache(masks, value, partition, member, size)
        elif value.space == t.PARTIAL:
            masks["partial"][:] = True
        elif value.space == t.LOGITS:
            self._mark_rows(masks["logits"], int(header[value.count]), 4 * value.width, partition, member, size)
        else:
            name, capacity, rows = "shared", self.working.capacity, int(header[value.count])
            start = value.offset * capacity
            if value.space == t.LOCAL:
                name = "local"
                start += (0 if partition == ANY else member) * int(header[t._STRIDE + t.LOCAL])
            mask = masks[name][start:][: value.token_bytes * capacity]
            if value.layout == "quantized" and (value.space == t.LOCAL or partition != ANY):
                lo, hi = (0, rows) if value.space == t.LOCAL else row_part(rows, member, size)
                self._mark_quantized(mask, value.width, rows, capacity, lo, hi)
            elif value.layout != "floats" and (value.space == t.LOCAL or partition == ANY):
                mask[:] = True
            else:
                self._mark_rows(mask, rows, value.row_bytes, partition, member, size)

    def _mark_rows(
        self, mask: np.ndarray, rows: int, row_bytes: int, partition: Partition, member: int, size: int
    ) -> None:
        view = mask[: rows * row_bytes].reshape(rows, row_bytes)
        if partition.kind == "rows":
            lo, hi = row_part(rows, member, size)
            view[lo:hi] = True
        elif partition.kind == "panels":
            lo, hi = part(-(-partition.extent // 16), member, size)
            view[:, 64 * lo : 64 * hi] = True
        else:
            view[:] = True

    def _mark_quantized(self, mask: np.ndarray, width: int, rows: int, capacity: int, lo: int, hi: int) -> None:
        """Rows lo:hi of ``rows`` rounded to 8 bits: five arrays of consecutive blocks of tokens."""
        groups, (blocks, block_tokens) = -(-width // GROUP), token_blocks(rows)
        start = 0
        for nbytes in (GROUP, 4 * OFFSETS, 4, 4):  # codes, offsets, scales, totals of a group
            shape = blocks, groups, block_tokens, nbytes
            view = mask[start : start + math.prod(shape)].reshape(shape)
            for row in range(lo, hi):
                view[row // block_tokens, :, row % block_tokens] = True
            start += capacity * groups * nbytes
        mask[start:].reshape(-1)[lo * 8 * OUTLIERS : hi * 8 * OUTLIERS] = True

    def _mark_cache(
        self, masks: dict[str, np.ndarray], value: Value, partition: Partition, member: int, size: int
    ) -> None:
        layout, layer = self.cache.layout, value.offset
        group, start = layout.groups[layer], layout.offsets[layer]
        k, v = layout.arrays(self.cache._blocks[group][0], layer)
        mask = masks[f"block {group}"][start:][: k.nbytes + v.nbytes].reshape(len(k), -1)
        keys = mask[:, : k.nbytes // len(k)].reshape(*k.shape, -1)
        values = mask[:, k.nbytes // len(k) :].reshape(*v.shape, -1)
        if partition == ANY:
            keys[:], values[:] = True, True
            return
        tokens, heads = int(self.working.header[t.TOKENS]), slice(None)
        lo, hi = row_part(tokens, member, size)
        if partition.kind == "heads":
            (lo, hi), heads = (0, tokens), slice(*part(len(keys), member, size))
        for position in self.working.positions[lo:hi]:
            keys[heads, position // 16, :, position % 16] = True
            values[heads, position] = True


def as_bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def run_step(step: Step, row: np.ndarray, working: Working, member: int, size: int) -> None:
    """One member's part of one operation, as the region calls it; nothing is stolen."""
    row = row.copy()
    if step.counted:
        row[t.ARGUMENTS + step.operation.arguments.index("steal")] = 0
    working.sync[:] = 0
    step.operation(working.header.ctypes.data, row.ctypes.data, member, size)
