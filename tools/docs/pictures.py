"""``python -m tools.docs.pictures``: the pictures of README.md, from the tables of docs/measuring.md and the drawings.

Their colours are fixed, since a picture in a README follows no theme.
"""

import re
from pathlib import Path

from tools.docs import drawings

DOCS = Path(__file__).parents[2] / "docs"
_STYLE = """<style>
text { fill: #57606a; font: 13px sans-serif } .code { font: 12px monospace } .name { font-weight: bold }
rect { stroke: #8b949e } .box { fill: none } .first { fill: #7aa2f7; fill-opacity: .55 }
.second { fill: #e0af68; fill-opacity: .55 } .third { fill: #9ece6a; fill-opacity: .45 }
line { stroke: #57606a; stroke-width: 1.2 } .rule { stroke-dasharray: 3 3 } .head { fill: #57606a }
</style>"""
_ROW = re.compile(r"^\| ([^|]+) \| ([^|]+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", re.MULTILINE)
_ENGINES = {"ruvllm": "first", "llama.cpp": "second", "ik_llama.cpp": "third"}


def rows() -> list[tuple[str, str, int, tuple[float, ...]]]:
    """The table of comparison with llama.cpp: model, case, threads, tokens/s of each engine."""
    text = (DOCS / "measuring.md").read_text(encoding="utf-8")
    return [(m[1].strip(), m[2].strip(), int(m[3]), tuple(map(float, m.group(4, 5, 6)))) for m in _ROW.finditer(text)]


def speed() -> str:
    """Bars of tokens/s on two threads, decoding and reading a prompt, of each engine."""
    found = [row for row in rows() if row[2] == 2 and row[1] in ("decode", "prefill-512", "prefill-128")]
    cases = {"decode": "decoding, tokens/s", "prefill": "reading a prompt, tokens/s"}
    d = drawings.Drawing(820, 340, "Tokens per second of ruvllm, llama.cpp and ik_llama.cpp on two threads")
    for side, (case, title) in enumerate(cases.items()):
        left = 130 + 410 * side
        d.text(left, 20, title, kind="name")
        for i, (model, _, _, speeds) in enumerate(row for row in found if row[1].startswith(case)):
            y, unit = 34 + 57 * i, 200 / max(speeds)
            d.text(left - 8, y + 28, model, "end")
            for j, (value, kind) in enumerate(zip(speeds, _ENGINES.values(), strict=True)):
                d.box(left, y + 16 * j, value * unit, 14, kind)
                d.text(left + value * unit + 5, y + 12 + 16 * j, f"{value:,.0f}" if value >= 20 else f"{value:.1f}")
    for i, (name, kind) in enumerate(_ENGINES.items()):
        d.box(130 + 100 * i, 324, 12, 12, kind)
        d.text(148 + 100 * i, 335, name)
    return d.svg()


def standalone(svg: str) -> str:
    """A drawing as a file of its own."""
    svg = svg.replace('<svg class="drawing"', '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    return svg.replace("<defs>", _STYLE + "<defs>", 1) + "\n"


def pictures() -> dict[str, str]:
    """The files' contents by name."""
    return {"region.svg": standalone(drawings.region()), "speed.svg": standalone(speed())}


if __name__ == "__main__":
    for name, text in pictures().items():
        (DOCS / "assets" / name).write_text(text, encoding="utf-8")
