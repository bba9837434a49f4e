"""Labels of points in a plot, placed next to them so that none covers another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_HEIGHT = 1.25  # height of a line, in units of the font size
_FAR = 2.0  # font sizes from a point at which a line leads to its label
_RINGS, _DIRECTIONS = 14, 16


def label_points(ax: Any, places: Sequence[tuple[float, float]], texts: Sequence[str], size: float = 7) -> None:
    """Write each text as near to its place (in the axis' coordinates) as others leave room; call it last.

    Labels keep their distance in points when the figure is made larger.
    """
    from matplotlib.textpath import TextPath

    ax.figure.canvas.draw()
    scale = 72 / ax.figure.dpi  # points per pixel
    points = ax.transData.transform(np.asarray(places, float).reshape(-1, 2)) * scale
    frame = np.array(ax.get_window_extent().extents) * scale
    taken = [_box(point, 0.5 * size, 0.5 * size) for point in points]
    legend = ax.get_legend()
    if legend is not None:
        taken.append(np.array(legend.get_window_extent().extents) * scale)
    for i in np.lexsort((points[:, 0], points[:, 1])):
        width = TextPath((0, 0), texts[i], size=size).get_extents().width
        extent = np.array([1.1 * width + 0.5 * size, _HEIGHT * size])
        offset = _free(points[i], extent, taken, frame, size)
        taken.append(_box(points[i] + offset, *extent))
        far = np.hypot(max(0.0, abs(offset[0]) - extent[0] / 2), offset[1]) > _FAR * size
        ax.annotate(
            texts[i], places[i], xytext=tuple(offset), textcoords="offset points", ha="center", va="center",
            fontsize=size, arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "0.5"} if far else None,
        )  # fmt: skip


def _free(point: np.ndarray, extent: np.ndarray, taken: list[np.ndarray], frame: np.ndarray, size: float) -> np.ndarray:
    """The offset of a label's middle from its point where it overlaps least; the nearest of equal ones."""
    best, least, others = np.zeros(2), np.inf, np.array(taken)
    for ring in range(_RINGS):
        for angle in np.arange(_DIRECTIONS) * (2 * np.pi / _DIRECTIONS):
            direction = np.array([np.cos(angle), np.sin(angle)])
            offset = direction * (extent / 2 + 0.4 * size) + ring * 0.8 * size * direction
            box = _box(point + offset, *extent)
            outside = extent.prod() - _overlap(box, frame)
            covered = _overlap(box, others) + 2 * outside
            if covered < 0.98 * least:
                best, least = offset, covered
        if least <= 1e-6:
            break
    return best


def _box(middle: np.ndarray, width: float, height: float) -> np.ndarray:
    half = np.array([width, height]) / 2
    return np.concatenate([middle - half, middle + half])


def _overlap(box: np.ndarray, others: np.ndarray) -> float:
    """The area that a box (x0, y0, x1, y1) shares with others (..., 4), all together."""
    sides = np.minimum(box[2:], others[..., 2:]) - np.maximum(box[:2], others[..., :2])
    return float(np.prod(sides.clip(min=0), axis=-1).sum())
