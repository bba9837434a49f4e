"""Trace: arrays of a model as it takes one text, found by their names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from ruvllm.errors import InsufficientMemoryError
from ruvllm.kernels.memory import require_memory
from ruvllm.model.edits import Edit
from ruvllm.model.hooks import active, again, recording
from ruvllm.model.kv_cache import Filling, KVCache
from ruvllm.model.llama import Llama
from ruvllm.model.names import READ, Point, matching
from ruvllm.model.reference import attention_pattern, attention_scores, rms_norm
from ruvllm.tracing.attribution import Attribution, direct_attribution, needed
from ruvllm.tracing.labels import text_of
from ruvllm.tracing.lens import LogitLens, logit_lens
from ruvllm.tracing.patterns import AttentionPattern

_READ_KEYS = ".heads"  # the end of the name of what is computed from keys
_KEYS = "attention.keys"  # what a layer's cache holds, read with what its heads have read


class Trace:
    """The arrays of one text, made by ``llm.trace``.

    Args:
        model: that computes them.
        tokenizer: which shows tokens as text.
        ids: of the text, which ``run`` takes through the model; None: what is computed inside of the block is read.
        new_cache: makes the KV cache of the text.
        limit: bytes that may be kept; None: as many as are free.
    """

    def __init__(
        self, model: Llama, tokenizer: Any, ids: np.ndarray | None, new_cache: Callable[[int], KVCache],
        limit: int | None = None,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.limit = model, tokenizer, limit
        self.edits: list[Edit] = []
        self._text, self._new_cache = ids, new_cache
        self._globs: list[str] = []
        self._kept: set[str] | None = None
        self._parts: dict[str, list[np.ndarray]] = {}
        self._ids: list[np.ndarray] = []
        self._cache: KVCache | None = None
        self.first = 0  # the position of the first row
        self.nbytes = 0  # of all arrays that are kept
        self._done = False
        self._acted: tuple[Edit, ...] = ()  # edits that the text met, and what else decided its arrays
        self._filling: Filling | None = None

    def keep(self, *globs: str) -> None:
        """Keep the arrays of these names, aliases or globs, in addition to those of earlier calls.

        Raises:
            KeyError: no array has such a name.
            ValueError: the text was taken through the model already.
        """
        if self._kept is not None:
            raise ValueError("keep: the trace has begun; say what to keep before that")
        for glob in globs:
            matching(self.model.points, glob)
        self._globs += globs

    @property
    def names(self) -> list[str]:
        """Names of the arrays that this trace has; computed ones only where they were chosen."""
        self.run()
        asked = [name for name in self.model.points if not self._globs or self._keeps(name)]
        return [name for name in asked if self._has(name)]

    @property
    def ids(self) -> np.ndarray:
        """Token ids (T,), one of each row."""
        self.run()
        return np.concatenate(self._ids) if self._ids else np.empty(0, np.int64)

    @property
    def tokens(self) -> list[str]:
        """The text of each token."""
        return [text_of(self.tokenizer, i) for i in self.ids.tolist()]

    def __getitem__(self, name: str) -> np.ndarray:
        """The array of a name or alias, float32; its shape is in ``llm.names()``.

        ``final.norm`` and ``logits`` of a generation have rows of those tokens alone whose logits it computed.
        Raises KeyError for an unknown name, and one that was not kept.
        """
        self.run()
        found = matching(self.model.points, name)
        if len(found) > 1:
            raise KeyError(f"{name!r}: expected one array, found {len(found)}: {', '.join(found[:3])}, ...")
        point = self.model.points[found[0]]
        return self._derived(point) if point.derived else self._array(point.name)

    def keys(self) -> list[str]:
        """``names``."""
        return self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        self.run()
        return isinstance(name, str) and all(self._has(found) for found in matching(self.model.points, name))

    def attention(self, layer: int) -> AttentionPattern:
        """The weights (H, T, S) with which each head reads; ``plot()`` draws them."""
        pattern = self[f"layers.{layer}.attention.pattern"]
        before = [""] * self.first
        return AttentionPattern(f"layer {layer}", pattern, self.tokens, [*before, *self.tokens])

    def logit_lens(self, top: int = 3) -> LogitLens:
        """The likeliest tokens if the residual stream after each layer went straight to the last norm and head.

        Arrays that it needs and that were not kept are computed again from the prompt, with the same edits, and kept.
        Raises KeyError without a prompt, or if weights or adapters have changed.
        """
        states = [*(f"layers.{i}.residual" for i in range(self.model.config.num_hidden_layers)), "final.residual"]
        self._complete(states)
        return logit_lens(self.model, self.tokenizer, [self[name] for name in states], self.tokens, top)

    def direct_attribution(self, wanted: str | int, other: str | int, position: int = -1) -> Attribution:
        """What each layer, head and feed-forward network adds to logit(wanted) - logit(other) after one token.

        Arrays that were not kept are computed again, as for ``logit_lens``.
        """
        self._complete(needed(self.model))
        return direct_attribution(self.model, self.tokenizer, self, (wanted, other), position)

    def run(self) -> None:
        """Take the text through the model, unless that was done."""
        if self._done or self._text is None:
            return
        self._begun()
        for edit in self.edits:  # those of this text alone; others may be meant for longer ones
            beyond = [] if edit.positions is None else edit.positions[edit.positions >= len(self._text)].tolist()
            if beyond:
                last = len(self._text) - 1
                raise ValueError(f"edit of {edit.name}: positions: expected 0 to {last} of this text, found {beyond}")
        each = sum(point.row_bytes for point in self.model.points.values() if point.name in (self._kept or ()))
        self._require(each * len(self._text))
        whole = any(self._keeps(name) for name in ("final.norm", "logits"))
        with recording(self.model, self):
            hooks = active(self.model)
            self._acted, self._filling = () if hooks is None else hooks.edits, self.model.filling
            self.model.forward(self._text, self._new_cache(len(self._text)), last_only=not whole)
        self._done = True

    def _complete(self, names: Iterable[str]) -> None:
        """Have these arrays: what was not kept is computed again."""
        self.run()
        missing = [name for name in names if not self._has(name)]
        if not missing:
            return
        wanted = f"were not kept: keep({', '.join(map(repr, missing))}) before the text is computed"
        if self._text is None:
            raise KeyError(f"{len(missing)} arrays {wanted}; without a prompt they cannot be computed again")
        more = Trace(self.model, self.tokenizer, self._text, self._new_cache, self.limit)
        more.nbytes = self.nbytes
        more.keep(*missing)
        with again(self.model, self._acted):
            if self.model.filling != self._filling:
                raise KeyError(f"weights or adapters have changed since the trace, and {len(missing)} arrays {wanted}")
            more.run()
        assert self._kept is not None
        self._kept |= more._parts.keys()
        self._parts |= more._parts
        self.nbytes = more.nbytes

    # What ``hooks`` call.

    def wants(self, point: Point) -> bool:
        """Whether it keeps this array."""
        self._begun()
        return self._keeps(point.name) or self._keeps_keys(point)

    def begin(self, cache: KVCache | None, ids: np.ndarray) -> None:
        """A pass of ids begins, which follow what the cache holds."""
        if cache is None:
            raise ValueError("trace: expected one sequence, found a batch of several")
        if self._cache is None:
            self._cache, self.first = cache, len(cache)
            for point in self.model.points.values():
                if self._keeps_keys(point) and point.layer is not None and len(cache):
                    self._store(_keys_of(point), _all_keys(cache, point.layer))
        expected = self.first + sum(map(len, self._ids))
        if cache is not self._cache or len(cache) != expected:
            raise ValueError(
                f"trace: expected position {expected} of one sequence, found position {len(cache)}"
                f"{'' if cache is self._cache else ' of another'}: each sequence needs a trace of its own"
            )
        self._ids.append(ids.copy())

    def see(self, point: Point, x: np.ndarray) -> None:
        """Keep the rows of this pass."""
        if self._keeps(point.name):
            self._store(point.name, x)
        if self._cache is not None and point.layer is not None and self._keeps_keys(point):
            keys, _ = self._cache.layer(point.layer, len(self._cache) + len(x))
            self._store(_keys_of(point), keys[len(keys) - len(x) :])

    def _begun(self) -> None:
        """Decide what is kept."""
        if self._kept is not None:
            return
        points = self.model.points
        if self._globs:
            kept = {name for glob in self._globs for name in matching(points, glob)}
        else:
            kept = {name for name, point in points.items() if not point.derived}
        self._kept = kept | {points[name].source or name for name in kept}

    def _keeps(self, name: str) -> bool:
        return self._kept is not None and name in self._kept

    def _keeps_keys(self, point: Point) -> bool:
        """Whether patterns will be computed: of all layers, or of chosen ones."""
        if not point.name.endswith(_READ_KEYS):
            return False
        at = point.name.removesuffix(_READ_KEYS)
        asked = any(self._keeps(f"{at}.{name}") for name in ("pattern", "scores"))
        return asked or (not self._globs and self._keeps(f"{at}.rotated_q"))

    def _store(self, name: str, x: np.ndarray) -> None:
        self._require(x.nbytes)
        self.nbytes += x.nbytes
        self._parts.setdefault(name, []).append(x.copy())

    def _require(self, more: int) -> None:
        """Raise InsufficientMemoryError unless so many more bytes may be kept."""
        if self.limit is None:
            if more > 1 << 20:  # to ask the system for less takes longer than to keep it
                require_memory(more, f"trace: {self.nbytes + more:,} bytes to keep")
        elif self.nbytes + more > self.limit:
            raise InsufficientMemoryError(
                f"trace: {self.nbytes + more:,} bytes to keep, more than limit={self.limit:,}: keep fewer arrays"
            )

    def _array(self, name: str) -> np.ndarray:
        parts = self._parts.get(name)
        if parts is None:
            raise KeyError(f"{name!r} was not kept: name it in keep()")
        if len(parts) > 1:
            parts[:] = [np.concatenate(parts)]
        return parts[0]

    def _has(self, name: str) -> bool:
        point = self.model.points[name]
        if point.source is None:
            return name in self._parts
        return point.source in self._parts and (not name.endswith(READ) or _keys_of(point) in self._parts)

    def _derived(self, point: Point) -> np.ndarray:
        """What is computed from arrays that were kept: normalised ones, scores and patterns."""
        if point.source is None or not self._has(point.name):
            raise KeyError(f"{point.name!r} was not kept: name it in keep()")
        if not point.name.endswith(READ):
            x = self._array(point.source).astype(np.float64)
            return rms_norm(x, np.ones(1), self.model.config.rms_norm_eps).astype(np.float32)
        q, k = (self._array(name).swapaxes(0, 1) for name in (point.source, _keys_of(point)))
        # Scores and what NumPy computes on the way, in float64.
        self._require(4 * 8 * len(q) * q.shape[1] * k.shape[1])
        assert point.layer is not None
        block = self.model.decoder.layers[point.layer].attention
        scores = attention_scores(q.astype(np.float64), k, block.window, block.scale, block.softcap)
        found = scores if point.name.endswith("scores") else attention_pattern(scores, block.sinks)
        return found.astype(np.float32)

    def __repr__(self) -> str:
        state = f"{len(self._parts)} arrays, {self.nbytes:,} bytes" if self._parts else "nothing yet"
        return f"Trace({state})"


def _keys_of(point: Point) -> str:
    return f"layers.{point.layer}.{_KEYS}"


def _all_keys(cache: KVCache, layer: int) -> np.ndarray:
    """Keys (S, KV, D) of all positions, zeros where a windowed layer has dropped them and no query sees them."""
    held, _ = cache.layer(layer)
    return np.concatenate([np.zeros((len(cache) - len(held), *held.shape[1:]), np.float32), held])
