"""The innermost loops in assembly: their vector width, and what they call, spill, read and write.

LLVM's comments say where a loop begins, which blocks belong to it, and which moves are spills.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from ruvllm.brief import brief

_FUNCTION = re.compile(r'^"?([A-Za-z_$][\w.$]*)"?:')
_BLOCK = re.compile(r"^\.?L?(BB\d+_\d+):|^[#;] %(bb\.\d+):")
_HEADER = re.compile(r"=>\s*This Inner Loop Header")
_OUTER = re.compile(r"=>\s*This Loop Header")
_MEMBER = re.compile(r"in Loop: Header=(BB\d+_\d+)")
_LOC = re.compile(r"^\s+\.loc\s+(\d+)\s+(\d+)")
_FILE = re.compile(r'^\s+\.file\s+(\d+)\s+(?:"([^"]*)"\s+)?"([^"]*)"')
_CALL = re.compile(r"^(?:callq?|blr?)\s+[*%]*([\w.$]+)")
# A function's address on its way into a register: x86; ARM on macOS; ARM on Linux.
_ADDRESS = re.compile(
    r"movabsq\s+\$([A-Za-z_][\w.$]*), %(\w+)|adrp\s+(x\d+), (\w+)@GOTPAGE|mov[zk]\s+(x\d+), #:abs_g\d\w*:([\w.$]+)"
)

_MOVE = re.compile(r"movq\s+(%\w+|-?\d*\(%rsp\)), (%\w+|-?\d*\(%rsp\))")

_X86_REGISTER = re.compile(r"%([xyz])mm\d+")
_ARM_VECTOR = re.compile(r"\bv\d+|\bq\d+")
# Arithmetic on vectors of floats, and conversions between types.
_PACKED = re.compile(
    r"v?(?:fn?m(?:add|sub)\w*|add|sub|mul|div|max|min|sqrt)p[sd]$|f(?:mla|mls|mul|add|sub|div|maxn?m?|minn?m?|sqrt)\.[24]"
    r"|v?cvt(?:p[sdh]|dq|udq|qq|uqq|tp[sd])2\w+$|(?:fcvt\w*|[su]cvtf)\.[24][sd]"
)
# On vectors of integers: where a loop gathers or scatters, these make addresses.
_INTEGERS = re.compile(
    r"v?p(?:add|sub|mull|muludq|muldq|abs|max[su]|min[su])[bwdq]*$|(?:add|sub|mul|ml[as]|abs|[su](?:max|min))\.\d+[bhsd]"
)
_FMA = re.compile(r"vfn?m(?:add|sub)\d+p[sd]$|fml[as]\.[24][sd]")
_SCALAR = re.compile(r"v?(?:add|sub|mul|div|sqrt|fn?m(?:add|sub)\d+)s[sd]$|f(?:n?m?add|n?m?sub|mul|div|sqrt)$")
# Arithmetic on elements of 8 bytes.
_DOUBLE = re.compile(r"v?(?:fn?m|add|sub|mul|div|max|min|sqrt)\w*[ps]d$|v?p(?:add|sub|mull|max[su]|min[su])q$|\w+\.2d")
_ONE_FLOAT = re.compile(r"v?(?:mov|add|sub|mul|div|sqrt|max|min|u?comi|insertp|fn?m(?:add|sub)\d+)(s[sd]?)$")
_DOT = re.compile(r"vpdpbusd|vpmaddubsw|[su]dot\.")
_NARROW = {"vcvtph2ps": 2, "vpmovzxwd": 2, "vpmovsxwd": 2, "vpmovzxbd": 4, "vpmovsxbd": 4}  # width / bytes in memory
_ELEMENT = {"ss": 4, "d": 4, "w": 2, "b": 1, "sd": 8, "q": 8}
_REGISTER_BYTES = {"q": 16, "d": 8, "s": 4, "h": 2, "b": 1}
_ARRANGED = re.compile(r"([a-z]\w*)\t(\{? ?v\d+\.(\d*[bhsd]).*)")
_LINE = 64


@dataclass(frozen=True)
class Instruction:
    """An instruction, its source line, the function that it calls; ``spill``: whether LLVM marks it as one."""

    text: str
    file: str
    line: int
    calls: str
    spill: bool


@dataclass(frozen=True)
class Loop:
    """An innermost loop.

    width: bits of its widest vector arithmetic, 0 if it has none. moved: bits of its widest load or store.
    fma, dot: multiply-add and integer dot-product instructions on vectors. scalar_math: arithmetic on single floats.
    spills: instructions that save or restore vectors on the stack. bytes_read, bytes_written: memory that one
    iteration touches. elements: those of one iteration, counted by ``element``: "multiply-add" where it sums products,
    "store" where it writes, else "load".
    """

    function: str
    file: str
    line: int
    width: int
    moved: int
    fma: int
    dot: int
    loads: int
    stores: int
    scalar_math: int
    spills: int
    calls: tuple[str, ...]
    bytes_read: int
    bytes_written: int
    elements: int
    element: str
    assembly: tuple[Instruction, ...]

    __repr__ = brief

    @property
    def lines_per_element(self) -> float:
        """Cache lines that are read or written for each element: 1/16 for one float32 array read in order."""
        return (self.bytes_read + self.bytes_written) / _LINE / self.elements if self.elements else 0.0


def innermost_loops(assembly: str) -> list[Loop]:
    """The innermost loops in code order, except those that neither load, compute nor call."""
    found = [_loop(function, lines) for function, lines in _bodies(assembly)]
    return [x for x in found if x.loads or x.stores or x.fma or x.dot or x.width or x.scalar_math or x.calls]


def called(assembly: str) -> Counter[str]:
    """Functions that the assembly calls, with their number of call sites."""
    callees = _Callees(assembly)
    return Counter(name for text in assembly.splitlines() if (name := callees.of(text.strip())))


def defined(assembly: str) -> set[str]:
    """Functions whose code is in the assembly."""
    return {_plain(match[1]) for text in assembly.splitlines() if (match := _FUNCTION.match(text))}


class _Callees:
    """Follows a listing and names the targets of calls: these go through registers that were loaded with an address.

    The listing is not in execution order. If a register was last used for something else, the target is the only
    function whose address the listing ever loads into it.
    """

    def __init__(self, assembly: str) -> None:
        self._held: dict[str, str] = {}
        self._ever: dict[str, set[str]] = {}
        for text in assembly.splitlines():
            if match := _ADDRESS.match(text.strip()):
                self._ever.setdefault(_register(match), set()).add(_name(match))

    def of(self, text: str) -> str:
        """The function that this instruction calls, "" if it is not a call."""
        if match := _ADDRESS.match(text):
            self._held[_register(match)] = _name(match)
        elif match := _MOVE.match(text):  # to another register, or to the stack and back
            self._held[match[2].lstrip("%")] = self._held.get(match[1].lstrip("%"), "")
        if match := _CALL.match(text):
            ever = self._ever.get(match[1], set())
            return _plain(self._held.get(match[1]) or (min(ever) if len(ever) == 1 else match[1]))
        return ""


def _register(address: re.Match[str]) -> str:
    return address[2] or address[3] or address[5]


def _name(address: re.Match[str]) -> str:
    return address[1] or address[4] or address[6]


def _plain(symbol: str) -> str:
    """A C function's name without macOS's underscore; of a mangled name of Numba, that of the Python function."""
    if match := re.match(r"_+ZN", symbol):
        name, at = "", match.end()
        while digits := re.match(r"\d+", symbol[at:]):
            at += len(digits[0])
            name, at = symbol[at : at + int(digits[0])], at + int(digits[0])
        return re.sub(r"_[0-9a-f]{12}$", "", name)  # a hash of its closure
    return symbol.removeprefix("_")


def _bodies(assembly: str) -> Iterator[tuple[str, list[Instruction]]]:
    """Each innermost loop: the function that it is in, and the instructions of its blocks."""
    files: dict[str, str] = {}
    where, function, block, owner = ("", 0), "", "", ""
    blocks: dict[tuple[str, str], list[Instruction]] = {}  # by loop: LLVM may put some before the loop's header
    innermost: list[tuple[str, str]] = []
    callees = _Callees(assembly)
    for text in assembly.splitlines():
        if match := _BLOCK.match(text):
            block, owner = match[1] or match[2], ""
        elif match := _FUNCTION.match(text):
            if not match[1].startswith(("Lfunc", "Ltmp", "LCPI", "lCPI", "Ldebug", "l_", "L_")):
                function, block, owner = match[1], "", ""
        if _HEADER.search(text):
            owner = block
            innermost.append((function, owner))
        elif _OUTER.search(text):
            owner = ""
        elif match := _MEMBER.search(text):
            owner = match[1]
        if match := _FILE.match(text):
            files[match[1]] = f"{match[2]}/{match[3]}" if match[2] and not match[3].startswith("/") else match[3]
        elif match := _LOC.match(text):
            if int(match[2]):  # 0: code that belongs to no line
                where = (files.get(match[1], ""), int(match[2]))
        elif text.startswith("\t") and text[1:2].isalpha():
            code, comment = _split(text)
            instruction = Instruction(code, *where, callees.of(code), "Spill" in comment or "Reload" in comment)
            blocks.setdefault((function, owner), []).append(instruction)
    for loop in innermost:
        yield loop[0], blocks[loop]


def _split(text: str) -> tuple[str, str]:
    """Instruction and comment: "#" begins one on x86, ";" on ARM, where "#" marks constants.

    ARM's "fmla v0.4s, v1.4s" is written "fmla.4s v0.4s, v1.4s", as on macOS.
    """
    code, comment = text.strip(), ""
    for mark in (" # ", " ; ", " // ", "\t# ", "\t; ", "\t// "):
        if mark in text:
            code, comment = (part.strip() for part in text.split(mark, 1))
            break
    if match := _ARRANGED.match(code):
        code = f"{match[1]}.{match[3]}\t{match[2]}"
    return code, comment


def _loop(function: str, lines: list[Instruction]) -> Loop:
    code = [x.text for x in lines]
    names = [text.split()[0] for text in code]
    kinds = [_PACKED, _DOT] if any("gather" in n or "scatter" in n for n in names) else [_PACKED, _DOT, _INTEGERS]
    packed = [t for t, name in zip(code, names, strict=True) if any(kind.match(name) for kind in kinds)]
    width = max((_width(text) for text in packed), default=0)
    fma, dot = sum(bool(_FMA.match(n)) for n in names), sum(bool(_DOT.match(n)) for n in names)
    read = [_bytes(t) for t, x in zip(code, lines, strict=True) if not x.spill and _reads(t)]
    written = [_bytes(t) for t, x in zip(code, lines, strict=True) if not x.spill and _writes(t)]
    moved = max((min(_width(t), 8 * _bytes(t)) for t in code if _reads(t) or _writes(t)), default=0)
    size = 8 if any(_DOUBLE.match(n) for n in names) else 4  # bytes of an element
    products = sum(_width(t) // (8 * size) for t, n in zip(code, names, strict=True) if _FMA.match(n))
    products += sum(_width(t) // 8 for t, n in zip(code, names, strict=True) if _DOT.match(n))
    if sum(written) and not dot:
        elements, element = sum(written) // size, "store"
    elif products:
        elements, element = products, "multiply-add"
    else:
        elements, element = sum(read) // size, "load"
    counted = Counter((x.file, x.line) for x in lines if x.line).most_common(1)
    file, line = counted[0][0] if counted else ("", 0)
    return Loop(
        function=function, file=file, line=line, width=width, moved=moved, fma=fma, dot=dot,
        loads=len(read), stores=len(written),
        scalar_math=sum(bool(_SCALAR.match(n)) for n in names),
        spills=sum(x.spill and bool(_X86_REGISTER.search(x.text) or _ARM_VECTOR.search(x.text)) for x in lines),
        calls=tuple(x.calls for x in lines if x.calls),
        bytes_read=sum(read), bytes_written=sum(written), elements=elements, element=element, assembly=tuple(lines),
    )  # fmt: skip


def _width(instruction: str) -> int:
    """Bits of the widest vector register that an instruction names."""
    sizes = {"x": 128, "y": 256, "z": 512}
    found = [sizes[letter] for letter in _X86_REGISTER.findall(instruction)]
    return max(found) if found else 128 if _ARM_VECTOR.search(instruction) else 0


def _reads(instruction: str) -> bool:
    """Whether it reads memory into a floating-point or vector register.

    AT&T syntax has memory operands in parentheses and the destination last; ARM loads begin with ld.
    """
    name, _, operands = instruction.partition("\t")
    if name.startswith("ld"):
        return bool(re.match(r"\{|[vqdshb]\d", operands.strip())) or "." in name
    return bool(_X86_REGISTER.search(operands)) and "(" in operands and not operands.rstrip().endswith(")")


def _writes(instruction: str) -> bool:
    """Whether it writes a floating-point or vector register to memory."""
    name, _, operands = instruction.partition("\t")
    if name.startswith("st"):
        return bool(re.match(r"\{|[vqdshb]\d", operands.strip())) or "." in name
    to_memory = operands.rstrip().endswith(")") or bool(re.search(r"\) \{%k\d\}$", operands))
    return bool(_X86_REGISTER.search(operands)) and to_memory and not name.startswith(("vucomi", "vcomi", "prefetch"))


def _bytes(instruction: str) -> int:
    """Bytes of memory that a load or store touches; a gather, and a broadcast, touch single elements."""
    name, _, operands = instruction.partition("\t")
    if name.startswith(("ld", "st")):  # ARM
        if match := re.match(r"(?:ld|st)\d(r?)\.(\d*)([bhsd])", name):
            lanes = 1 if match[1] or not match[2] else int(match[2])
            return lanes * max(1, len(re.findall(r"v\d+", operands))) * _REGISTER_BYTES[match[3]]
        return sum(_REGISTER_BYTES[kind] for kind in re.findall(r"\b([qdshb])\d+\b", operands.split("[")[0]))
    width = _width(operands) // 8
    if "{1to" in operands:  # embedded broadcast
        return 4
    if match := re.match(r"vp?broadcast(ss|sd|d|w|b|q)$", name):
        return _ELEMENT[match[1]]
    if match := _ONE_FLOAT.match(name):
        return 8 if match[1] == "sd" else 4
    if match := re.match(r"v?(?:mov|pextr|pinsr)([dqwb])$", name):
        return _ELEMENT[match[1]]
    if "gather" in name:
        return width * _LINE // 4  # each lane may be on a cache line of its own
    return width // _NARROW.get(name, 1)
