"""Hooks: what Python does at the named arrays of a model, for one thread: edits change them, recordings read them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np

from ruvllm.kernels.experts import route
from ruvllm.model.edits import Edit
from ruvllm.model.kv_cache import KVCache
from ruvllm.model.names import Point, Points
from ruvllm.model.replay import Tapes


class Recording(Protocol):
    """What reads named arrays, after all edits."""

    edits: list[Edit]  # those that began while it was open

    def wants(self, point: Point) -> bool:
        """Whether it reads this array."""
        ...

    def begin(self, cache: KVCache | None, ids: np.ndarray) -> None:
        """A pass of ids begins, which follow what the cache holds; None: of several sequences."""
        ...

    def see(self, point: Point, x: np.ndarray) -> None:
        """The array (T, *axes) of this pass; only for this call."""
        ...


class Hooks:
    """The edits and recordings of one moment. ``functions`` are what layer code runs with."""

    def __init__(self, points: Points, edits: list[Edit], recordings: list[Recording]) -> None:
        self.edits, self._recordings = tuple(edits), tuple(recordings)
        self.functions: dict[str, Any] = {}
        self._acting: dict[str, tuple[tuple[Edit, ...], tuple[Recording, ...]]] = {}
        self._choices: dict[str, int] = {}  # experts of a token, by the router whose choices must be known
        for point in points.values():
            mine = tuple(edit for edit in edits if point.name in edit.names)
            readers = tuple(r for r in recordings if r.wants(point))
            if mine or readers:
                self.functions[point.name] = partial(self._at, point)
                self._acting[point.name] = mine, readers
                if point.router:
                    self.functions.setdefault(point.router, partial(self._at, points[point.router]))
                    self._choices[point.router] = point.axes[0]
        self._slots: dict[str, np.ndarray] = {}  # (T, k), by router: where the row of each choice is, in this pass
        self._first: int | None = None
        self._plain: Tapes | None = None
        self._tapes: Tapes | None = None

    @property
    def records(self) -> bool:
        """Whether anything reads arrays."""
        return bool(self._recordings)

    def begin(self, cache: KVCache | None, ids: np.ndarray) -> None:
        """A pass of ids begins; None: of several sequences."""
        self._first = None if cache is None else cache.length
        for recording in self._recordings:
            recording.begin(cache, ids)

    def tapes(self, plain: Tapes) -> Tapes:
        """Tapes with the calls of these hooks, recorded when needed, for a model that has ``plain`` ones."""
        if self._tapes is None or self._plain is not plain:
            self._plain, self._tapes = plain, Tapes(plain.model, self.functions)
        return self._tapes

    def end(self) -> None:
        """Let go of edits and recordings: the working memory of a cache may point to a tape until it gets another."""
        self.edits, self._recordings, self._tapes = (), (), None
        self._acting.clear()

    def _at(self, point: Point, x: np.ndarray) -> None:
        edits, readers = self._acting.get(point.name, ((), ()))
        if not len(x):  # logits that nobody wants
            return
        rows, slots = x, self._slots.get(point.router or "")
        x = x.reshape(len(x), *point.axes) if slots is None else rows[slots]
        for edit in edits:
            edit.apply(point.name, x, self._first)
        if slots is not None and edits:
            rows[slots] = x
        if point.name in self._choices:
            self._slots[point.name] = route(x, self._choices[point.name], True).slots
        for reader in readers:
            reader.see(point, x)


class _Stack:
    """What acts on one model in one thread."""

    def __init__(self) -> None:
        self.edits: list[Edit] = []
        self.recordings: list[Recording] = []
        self.waiting: list[Recording] = []  # open, and run later: edits that begin meanwhile are theirs too
        self.hooks: Hooks | None = None

    def changed(self) -> None:
        if self.hooks is not None:
            self.hooks.end()
        self.hooks = None


class _Stacks(threading.local):
    def __init__(self) -> None:
        self.by_model: WeakKeyDictionary[Any, _Stack] = WeakKeyDictionary()


_here = _Stacks()


def active(model: Any) -> Hooks | None:
    """The hooks of a model in this thread. ``model`` has ``points``."""
    stack = _here.by_model.get(model) if _here.by_model else None
    if stack is None or not (stack.edits or stack.recordings):
        return None
    if stack.hooks is None:
        stack.hooks = Hooks(model.points, stack.edits, stack.recordings)
    return stack.hooks


class Editing:
    """``with`` it, edits act on what this thread computes with the model; as often as wanted, also within itself."""

    def __init__(self, model: Any, edits: Iterable[Edit]) -> None:
        self._model, self.edits = model, tuple(edits)

    def __enter__(self) -> None:
        stack = _here.by_model.setdefault(self._model, _Stack())
        for recording in stack.waiting:
            recording.edits.extend(self.edits)
        stack.edits.extend(self.edits)
        stack.changed()

    def __exit__(self, *error: object) -> None:
        stack = _here.by_model[self._model]
        for edit in reversed(self.edits):
            del stack.edits[len(stack.edits) - 1 - stack.edits[::-1].index(edit)]  # its last entry: it may have several
        stack.changed()

    def __repr__(self) -> str:
        return f"Editing({', '.join(edit.name for edit in self.edits)})"


@contextmanager
def again(model: Any, edits: Iterable[Edit]) -> Iterator[None]:
    """Inside the block these edits act in this thread, and none that began around it; nor does a recording read."""
    outer, stack = _here.by_model.setdefault(model, _Stack()), _Stack()
    stack.edits.extend(edits)
    _here.by_model[model] = stack
    try:
        yield
    finally:
        stack.changed()
        _here.by_model[model] = outer


@contextmanager
def recording(model: Any, by: Recording) -> Iterator[None]:
    """Inside the block ``by`` reads what this thread computes with the model, with the edits that it met."""
    stack = _here.by_model.setdefault(model, _Stack())
    edits = [edit for edit in by.edits if edit not in stack.edits]
    stack.edits += edits
    try:
        with _within(stack, stack.recordings, by):
            yield
    finally:
        for edit in edits:
            stack.edits.remove(edit)


@contextmanager
def waiting(model: Any, by: Recording) -> Iterator[None]:
    """Inside the block ``by`` collects the edits that begin."""
    stack = _here.by_model.setdefault(model, _Stack())
    stack.waiting.append(by)
    try:
        yield
    finally:
        stack.waiting.remove(by)


@contextmanager
def _within(stack: _Stack, held: list[Any], item: Any) -> Iterator[None]:
    held.append(item)
    stack.changed()
    try:
        yield
    finally:
        held.remove(item)
        stack.changed()
