"""A roofline as SVG: the limits of a machine, all kernels as dots, some of them named."""

import math
from typing import Any

_WIDTH, _HEIGHT = 720, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 16, 48
_LOW_X, _HIGH_X, _LOW_Y, _HIGH_Y = 0.02, 2000.0, 0.1, 1000.0


def _x(intensity: float) -> float:
    share = math.log(max(min(intensity, _HIGH_X), _LOW_X) / _LOW_X) / math.log(_HIGH_X / _LOW_X)
    return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)


def _y(gflops: float) -> float:
    share = math.log(max(min(gflops, _HIGH_Y), _LOW_Y) / _LOW_Y) / math.log(_HIGH_Y / _LOW_Y)
    return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM), 1)


def draw(machine: dict[str, Any], named: tuple[str, ...]) -> str:
    """The SVG, in one line, of everything that was measured, with the kernels ``named`` in front."""
    parts = [
        f'<svg class="drawing" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Roofline: operations per second '
        f'against operations per byte{" of " + ", ".join(named) if named else ""}">'
    ]
    for power in range(-1, 4):
        parts.append(_line(_LOW_X, 10.0**power, _HIGH_X, 10.0**power, "grid"))
        parts.append(_text(_LEFT - 6, _y(10.0**power) + 4, f"{10.0**power:g}", "end"))
    for power in range(-1, 4):
        parts.append(_line(10.0**power, _LOW_Y, 10.0**power, _HIGH_Y, "grid"))
        parts.append(_text(_x(10.0**power), _HEIGHT - _BOTTOM + 18, f"{10.0**power:g}", "middle"))
    peak = machine["peaks"]["fma"]
    for bandwidth in machine["peaks"]["read"].values():
        parts.append(_line(_LOW_X, _LOW_X * bandwidth, peak / bandwidth, peak, "roof"))
    parts.append(_line(peak / max(machine["peaks"]["read"].values()), peak, _HIGH_X, peak, "roof"))
    parts.append(_text(_WIDTH - _RIGHT, _y(peak) - 6, f"multiply-add: {peak:.0f} Gop/s", "end"))
    for point in machine["points"]:
        if point["name"] not in named:
            parts.append(f'<circle class="other" cx="{_x(point["intensity"])}" cy="{_y(point["gflops"])}" r="3"/>')
    parts += [_along(level, bandwidth) for level, bandwidth in machine["peaks"]["read"].items()]
    for point in machine["points"]:
        if point["name"] in named:
            x, y = _x(point["intensity"]), _y(point["gflops"])
            right = x > _WIDTH * 0.7
            parts.append(f'<circle class="point" cx="{x}" cy="{y}" r="6"/>')
            parts.append(_text(x + (-10 if right else 10), y + 16, point["name"], "end" if right else "start", "name"))
    parts.append(_text((_LEFT + _WIDTH) / 2, _HEIGHT - 8, "operations per byte", "middle"))
    parts.append(_text(_LEFT + 4, _TOP + 2, "Gop/s", "start"))
    return "".join(parts) + "</svg>"


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{_x(x1)}" y1="{_y(y1)}" x2="{_x(x2)}" y2="{_y(y2)}"/>'


def _along(level: str, bandwidth: float) -> str:
    """The name of a memory limit, along its line: memory's below it, as the line of L3 is close above."""
    x, y = _x(0.025), _y(0.025 * bandwidth)
    slope = math.degrees(math.atan2(_y(10 * bandwidth) - _y(bandwidth), _x(10.0) - _x(1.0)))
    text = _text(0, 15 if level == "memory" else -5, f"{level}: {bandwidth:.0f} GB/s", "start", "over")
    return f'<g transform="translate({x} {y}) rotate({slope:.1f})">{text}</g>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "label") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'
