"""The drawn figures of the explanations, as SVG whose colours follow the theme (docs/style.css)."""

from collections.abc import Callable
from html import escape


class Drawing:
    """An SVG of boxes, arrows and words; numbers are pixels at full size."""

    def __init__(self, width: int, height: int, label: str) -> None:
        self._parts = [
            f'<svg class="drawing" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto-start-reverse"><path class="head" d="M0 0L8 4L0 8z"/></marker></defs>'
        ]

    def box(self, x: float, y: float, width: float, height: float, kind: str = "box", text: str = "") -> None:
        """A rectangle with words in its middle. kind: a class of the style sheet."""
        self._parts.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2"/>')
        if text:
            self.text(x + width / 2, y + height / 2 + 4, text, "middle")

    def text(self, x: float, y: float, text: str, anchor: str = "start", kind: str = "label") -> None:
        """One line of words."""
        self._parts.append(f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>')

    def arrow(self, x1: float, y1: float, x2: float, y2: float, kind: str = "arrow") -> None:
        """A line with a head at its end."""
        self._parts.append(
            f'<line class="{kind}" x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" marker-end="url(#head)"/>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str = "rule") -> None:
        """A line."""
        self._parts.append(f'<line class="{kind}" x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"/>')

    def svg(self) -> str:
        """All of it, in one line, so that Markdown leaves it alone."""
        return "".join(self._parts) + "</svg>"


def packing() -> str:
    """A row-major matrix becomes panels of 16 rows; in 4 bits, blocks of scales and codes."""
    d = Drawing(720, 330, "A row-major matrix is cut into panels of 16 rows, and each panel into blocks of 32 columns")
    d.text(20, 20, "W, row by row")
    for row in range(8):
        d.box(20, 32 + 14 * row, 160, 12, "first" if row < 4 else "second")
    d.text(100, 160, "K columns", "middle")
    for panel in range(2):
        d.text(188, 64 + 56 * panel, "16 rows")
    d.arrow(244, 89, 288, 89)
    d.text(304, 20, "float32: panels of 16 rows; a vector is one column of them")
    for panel in range(2):
        for column in range(18):
            d.box(304 + 22 * column, 32 + 64 * panel, 20, 52, ("first", "second")[panel])
    d.text(300, 164, "k =", "end")
    for column, name in enumerate(("0", "1", "2", "…")):
        d.text(314 + 22 * column, 164, name, "middle")
    d.arrow(100, 175, 100, 215)
    d.text(20, 235, "4 bits: one block for each group of 32 columns of a panel, 288 bytes")
    d.box(20, 250, 90, 40, "third", "16 scales")
    for line in range(4):
        d.box(114 + 145 * line, 250, 141, 40, "first", f"quads {line} and {line + 4}")
    d.text(65, 308, "32 bytes", "middle")
    for line in range(4):
        d.text(184 + 145 * line, 308, "64 bytes", "middle")
    d.text(20, 326, "A quad is four neighbouring columns: one instruction multiplies it in 16 rows.")
    return d.svg()


def memory() -> str:
    """Bytes that one token of a 7B model reads, by precision, and the least time at 25 GB/s."""
    d = Drawing(720, 220, "Bytes that one token reads: 26 GB in float32, 13 in 16 bits, 7 in 8 bits, 3.8 in 4 bits")
    d.text(20, 20, "What one token of a 6.7-billion-parameter model reads, and the least time at 25 GB/s")
    for i, (name, gigabytes) in enumerate((("float32", 27.0), ("16 bits", 13.5), ("8 bits", 7.2), ("4 bits", 3.8))):
        y = 44 + 42 * i
        d.text(90, y + 19, name, "end")
        d.box(100, y, 16 * gigabytes, 28, "first" if i == 3 else "second")
        d.text(110 + 16 * gigabytes, y + 19, f"{gigabytes:g} GB, {gigabytes / 25 * 1000:.0f} ms")
    return d.svg()


def region() -> str:
    """The layer code runs once on a recorder; its tape is replayed by one parallel region."""
    d = Drawing(720, 300, "Layer code is recorded as a tape, which one parallel region replays on all threads")
    d.box(20, 30, 180, 120, "box")
    d.text(32, 22, "layer.py, once")
    code = ("h = ops.rms_norm(x)", "q = ops.linear(h, Wq)", "k = ops.linear(h, Wk)", "a = ops.attention(…)")
    for i, line in enumerate(code):
        d.text(32, 56 + 24 * i, line, kind="code")
    d.arrow(205, 90, 255, 90)
    d.text(230, 80, "record", "middle")
    d.text(262, 22, "tape: a table of operations")
    for i, (name, meet) in enumerate((("rms_norm", ""), ("linear q", "meet"), ("linear k", ""), ("attention", "meet"))):
        d.box(262, 30 + 30 * i, 130, 26, "third" if meet else "box", name)
        if meet:
            d.text(398, 48 + 30 * i, "barrier before")
    d.arrow(330, 158, 330, 190)
    d.text(340, 180, "replay, every token")
    d.text(20, 212, "thread 0")
    d.text(20, 252, "thread 1")
    spans = (("rms_norm", 90, 70), ("q, k", 190, 180), ("attention", 400, 120), ("…", 550, 90))
    for name, x, width in spans:
        d.box(x, 196, width, 26, "first", name)
        d.box(x, 236, width - (20 if name == "q, k" else 0), 26, "second", name)
    for x in (172, 382, 532):
        d.line(x, 190, x, 268)
    d.text(172, 286, "barrier", "middle")
    d.text(382, 286, "barrier", "middle")
    d.text(532, 286, "barrier", "middle")
    return d.svg()


def stealing() -> str:
    """Two threads' shares in chunks; the one that is done claims the other's last chunks."""
    d = Drawing(720, 240, "Shares of a matrix in chunks: the thread that finishes first claims chunks of the other")
    d.text(20, 20, "Panels of one matrix: a share for each thread, cut into chunks")
    for chunk in range(12):
        d.box(20 + 56 * chunk, 32, 52, 26, "first" if chunk < 6 else "second", str(chunk % 6))
    d.text(20, 84, "share of thread 0")
    d.text(356, 84, "share of thread 1")
    d.text(20, 132, "thread 0")
    d.text(20, 172, "thread 1")
    for i in range(6):
        d.box(90 + 64 * i, 116, 60, 26, "first", str(i))
    for i in range(2):
        d.box(90 + 64 * (6 + i), 116, 60, 26, "second", str(4 + i))
    for i in range(4):
        d.box(90 + 126 * i, 156, 122, 26, "second", str(i))
    d.line(606, 106, 606, 196)
    d.text(606, 212, "barrier", "middle")
    d.text(20, 230, "A slower core (thread 1) leaves two of its chunks, which thread 0 claims from the same counter.")
    return d.svg()


def bits() -> str:
    """Outputs are divided among threads; the sum of one output is one thread's, in one order."""
    d = Drawing(720, 230, "Threads divide the outputs of a product, and never the sum of one output")
    d.text(20, 20, "Divided: the outputs")
    for row in range(6):
        d.box(20, 32 + 24 * row, 220, 20, "first" if row < 3 else "second")
        d.arrow(244, 42 + 24 * row, 274, 42 + 24 * row)
        d.box(280, 32 + 24 * row, 24, 20, "first" if row < 3 else "second")
    d.text(20, 196, "Each sum has one order: any number of")
    d.text(20, 214, "threads gives the same bits.")
    d.text(400, 20, "Not divided: the sum")
    for row in range(6):
        d.box(400, 32 + 24 * row, 108, 20, "first")
        d.box(512, 32 + 24 * row, 108, 20, "second")
        d.arrow(624, 42 + 24 * row, 650, 42 + 24 * row)
        d.text(656, 47 + 24 * row, "a + b")
    d.text(400, 196, "(a1 + a2) + (b1 + b2) rounds differently")
    d.text(400, 214, "from a1 + a2 + b1 + b2.")
    return d.svg()


def cache() -> str:
    """What decides whether compiled code of an earlier process is used."""
    d = Drawing(720, 190, "A kernel is looked up by its sources, options and processor; otherwise it is compiled")
    d.box(20, 40, 150, 60, "box", "first call")
    d.arrow(174, 70, 224, 70)
    d.box(230, 20, 220, 100, "third")
    key = ("hash of all kernel sources", "decorator options", "Python, Numba, LLVM", "processor and features")
    for i, line in enumerate(key):
        d.text(340, 44 + 21 * i, line, "middle")
    d.arrow(454, 50, 520, 50)
    d.text(487, 42, "found", "middle")
    d.box(526, 32, 174, 36, "first", "load machine code")
    d.arrow(454, 92, 520, 92)
    d.text(487, 110, "not", "middle")
    d.box(526, 76, 174, 36, "second", "compile, and keep")
    d.text(20, 150, "The directory is yours alone (mode 0700): machine code is a program.")
    d.text(20, 170, "Links, other owners and other people's write permission are refused.")
    return d.svg()


DRAWINGS: dict[str, Callable[[], str]] = {
    "packing": packing, "memory": memory, "region": region, "stealing": stealing, "bits": bits, "cache": cache,
}  # fmt: skip
