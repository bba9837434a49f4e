"""Edit: a change of named arrays while a model computes: a function, a value, or a factor."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np

from ruvllm.model.checks import is_integer, is_number
from ruvllm.model.config import ModelConfig
from ruvllm.model.names import Points, found_by, matching

_MOST = float(np.finfo(np.float32).max)
_SCORES = ("logits", "router")  # the ends of names of arrays in which -inf rules a choice out

Change = Callable[[np.ndarray], Any] | np.ndarray | float


def after_layer(config: ModelConfig, layer: int) -> str:
    """The name of the residual stream after a layer."""
    return f"layers.{layer + 1}.residual" if layer + 1 < config.num_hidden_layers else "final.residual"


def steering_edits(
    points: Points, config: ModelConfig, directions: Mapping[int, Any], scale: float, layers: Iterable[int] | None
) -> list[Edit]:
    """Edits that add ``scale`` times the direction (E,) of each layer to the residual stream after it.

    Raises:
        ValueError: no layers, one that has no direction, or a direction that is not (E,) finite numbers.
    """
    chosen = sorted(directions) if layers is None else list(layers)
    if not chosen:
        raise ValueError("layers: expected at least one")
    edits = []
    for layer in chosen:
        if layer not in directions or not 0 <= layer < config.num_hidden_layers:
            known = ", ".join(map(str, sorted(directions)))
            raise ValueError(f"layers: expected some of {known}, which have a direction, found {layer!r}")
        added = np.float32(scale) * np.asarray(directions[layer], np.float32)
        if added.shape != (config.hidden_size,) or not np.isfinite(added).all():
            raise ValueError(
                f"direction of layer {layer}: expected {config.hidden_size} finite numbers, found the shape "
                f"{added.shape}{'' if np.isfinite(added).all() else ' with others'}"
            )
        edits.append(Edit(points, after_layer(config, layer), partial(np.add, added)))
    return edits


class Edit:
    """Changes the arrays of a name in place.

    Args:
        points: the model's named arrays.
        name: a name, alias or glob; one head of an array (T, H, D): the name and its number, "layers.3.heads.4".
        change: a function of the array, which returns another or changes it in place and returns None; or what the
            array becomes, broadcast.
        scale: a factor, in place of ``change``.
        positions: of the sequence, that are changed; None: all. The function then gets their rows alone.

    Raises:
        KeyError: no array has this name.
        ValueError: neither or both of change and scale, a scale that is not a finite number, a head or position that
            there is not, or an array that is computed only to be looked at.
    """

    def __init__(
        self, points: Points, name: str, change: Change | None = None, scale: float | None = None,
        positions: int | Iterable[int] | None = None,
    ) -> None:  # fmt: skip
        if (change is None) == (scale is None):
            raise ValueError(f"edit of {name}: expected either a function or value, or scale=")
        if scale is not None and not (is_number(scale) and abs(scale) <= _MOST):
            raise ValueError(f"edit of {name}: scale: expected a finite number, found {scale!r}")
        self.name, self.scale = name, None if scale is None else np.float32(scale)
        self.head: int | None = None
        self.names, split = set(found_by(points, name)), re.fullmatch(r"(.+)\.(\d+)", name)
        if not self.names and split is not None:
            self.names, self.head = set(matching(points, split[1])), int(split[2])
        elif not self.names:
            self.names = set(matching(points, name))  # raises, with the nearest names
        for found in sorted(self.names):
            point = points[found]
            if point.derived:
                raise ValueError(f"edit of {found}: it is computed to be looked at; edit queries, keys or heads")
            if self.head is not None and (len(point.axes) != 2 or point.router or self.head >= point.axes[0]):
                raise ValueError(f"edit of {name}: {found} has the shape {point.shape}, and no head {self.head}")
        self.positions: np.ndarray | None = None
        if positions is not None:
            wanted: list[Any] = list(positions) if isinstance(positions, Iterable) else [positions]
            if not all(is_integer(p) and p >= 0 for p in wanted):
                raise ValueError(f"edit of {name}: positions: expected integers >= 0, found {positions!r}")
            self.positions = np.array(wanted, np.int64)
        self.change = change if callable(change) or change is None else np.asarray(change)

    def apply(self, name: str, x: np.ndarray, first: int | None) -> None:
        """Change x (T, ...), whose first row is that of position ``first``; None: rows are of several sequences."""
        part = x if self.head is None else x[:, self.head]
        if self.positions is None:
            part[...] = self._changed(name, part)
            return
        if first is None:
            raise ValueError(f"edit of {self.name}: positions are those of one sequence, a batch has several")
        rows = self.positions[(self.positions >= first) & (self.positions < first + len(x))] - first
        if len(rows):
            part[rows] = self._changed(name, part[rows])

    def _changed(self, name: str, x: np.ndarray) -> np.ndarray:
        where = f"edit of {name}"
        if self.scale is not None:
            with np.errstate(over="ignore", invalid="ignore"):
                found = x * self.scale
        elif not callable(self.change):
            found = np.asarray(self.change)
            if found.dtype.kind not in "fiu":
                raise TypeError(f"{where}: expected numbers, found {found.dtype}")
            try:
                found = np.broadcast_to(found.astype(np.float32), x.shape)
            except ValueError:
                raise ValueError(f"{where}: expected a value of shape {x.shape}, found {found.shape}") from None
        else:
            returned = self.change(x)
            found = x if returned is None else returned
            if not isinstance(found, np.ndarray):
                raise TypeError(f"{where}: expected a function that returns an array, found {type(found).__name__}")
            if found.dtype != np.float32:
                raise TypeError(f"{where}: expected float32, found {found.dtype}")
            if found.shape != x.shape:
                raise ValueError(f"{where}: expected the shape {x.shape}, found {found.shape}")
        fine = found < np.inf if name.endswith(_SCORES) else np.isfinite(found)
        if wrong := fine.size - np.count_nonzero(fine):
            kind = "NaN" if np.isnan(found).any() else "infinity"
            raise ValueError(f"{where}: {kind} in {wrong} of {found.size} elements")
        return found
