"""How LLVM vectorises loops: marks in its IR that llvmlite has no function for."""

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

from ruvllm.kernels.jit.private.parts import part

_WHOLE_REGISTERS = '"prefer-vector-width"="512"'
_INTERLEAVE = 4  # vectors per iteration; by itself LLVM takes one where the body is long (exp), at 0.8 of the speed


def mark_independent(module: ir.Module) -> None:
    """Mark every loop, and every load and store of an array's element, as independent.

    LLVM vectorises a loop only if no iteration reads what another one writes. Compiled code tests that when the loop
    begins, by the addresses of the arrays. Where the output is an input, the test fails and a scalar loop runs. This
    metadata is what C compilers make of "#pragma ivdep": loads and stores belong to a group, and each loop says that
    the accesses of the group are parallel. Without it such loops are correct, but slower. Each iteration takes
    _INTERLEAVE vectors.
    """
    if can_mark():
        _mark(module)


def _mark(module: ir.Module) -> None:
    group = _DistinctNode(module, "")
    interleave = module.add_metadata(["llvm.loop.interleave.count", ir.IntType(32)(_INTERLEAVE)])
    accesses = module.add_metadata(["llvm.loop.parallel_accesses", group])  # not distinct: LLVM aborts on inlining it
    for function in module.functions:
        order = {block: i for i, block in enumerate(function.blocks)}
        loops: dict[Any, _DistinctNode] = {}
        for block, position in order.items():
            for instruction in block.instructions:
                if instruction.opname in ("load", "store") and _is_of_an_array(instruction):
                    instruction.set_metadata("llvm.access.group", group)
            for target in block.terminator.operands if block.terminator.opname == "br" else ():
                if order.get(target, position + 1) <= position:  # a back edge: the target is a loop's header
                    if target not in loops:
                        loops[target] = _DistinctNode(module, f"SELF, !{accesses.name}, !{interleave.name}")
                    block.terminator.set_metadata("llvm.loop", loops[target])


class _DistinctNode(ir.MDValue):
    """A "distinct" metadata node, which llvmlite cannot write; SELF in its text is replaced by the node's name."""

    def __init__(self, module: ir.Module, text: str) -> None:
        super().__init__(module, (), str(len(module.metadata)))
        self._text = text.replace("SELF", f"!{self.name}")

    def descr(self, buf: list[str]) -> None:
        buf.append(f"distinct !{{ {self._text} }}\n")

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


def _is_of_an_array(access: Any) -> bool:
    """Whether the address comes from anything but a local variable (an alloca)."""
    pointer = access.operands[-1]
    while isinstance(pointer, (ir.GEPInstr, ir.CastInstr)):
        pointer = pointer.operands[0]
    return not isinstance(pointer, ir.AllocaInstr)


@part("loops", "kernels run several times slower where their output is one of their inputs")
def can_mark() -> bool:
    """Whether LLVM parses the metadata of a loop as intended."""
    module, word = ir.Module(), ir.IntType(64)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [word.as_pointer(), word]), "f")
    pointer, count = function.args
    entry, loop, end = (function.append_basic_block() for _ in range(3))
    ir.IRBuilder(entry).branch(loop)
    builder = ir.IRBuilder(loop)
    i = builder.phi(word)
    element = builder.gep(pointer, [i])
    builder.store(builder.load(element), element)
    following = builder.add(i, word(1))
    i.add_incoming(word(0), entry)
    i.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, end)
    ir.IRBuilder(end).ret_void()
    _mark(module)
    text = str(llvm.parse_assembly(str(module)))
    marks = ("distinct !{}", "!\"llvm.loop.parallel_accesses\"", "!\"llvm.loop.interleave.count\"", "br i1 ")
    return all(mark in text for mark in marks) and text.count("!llvm.access.group !") == 2 and "!llvm.loop !" in text


def take_whole_registers(module: ir.Module) -> None:
    """Let LLVM vectorise loops with all of an AVX-512 register.

    For Intel's processors it takes half by default, because early ones lowered their clock. SIMD vectors take all of it
    anyway, and loops of exp run 1.1 to 1.3 times as fast (measured on an Emerald Rapids: softmax, silu_mul, gelu_mul).
    """
    if can_widen():
        for function in module.functions:
            if not function.is_declaration:
                _prefer(function)


def _prefer(function: ir.Function) -> None:
    set.add(function.attributes, _WHOLE_REGISTERS)  # its own ``add`` refuses attributes that llvmlite does not know


@part("width", "loops use half of each register on Intel's processors with AVX-512")
def can_widen() -> bool:
    """Whether LLVM parses the attribute of a function as intended."""
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), []), "f")
    ir.IRBuilder(function.append_basic_block()).ret_void()
    _prefer(function)
    return _WHOLE_REGISTERS in str(llvm.parse_assembly(str(module)))
