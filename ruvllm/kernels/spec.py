"""KernelSpec: one record per kernel, from which its tests, benchmarks, documentation and roofline follow."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

_EXAMPLE_FLOPS, _EXAMPLE_BYTES = 1e9, 1e8


def grid(**axes: int | tuple[int, ...]) -> tuple[dict[str, int], ...]:
    """Every combination of the axes' values, the last axis fastest."""
    values = [value if isinstance(value, tuple) else (value,) for value in axes.values()]
    return tuple(dict(zip(axes, combination, strict=True)) for combination in product(*values))


@dataclass(frozen=True)
class KernelSpec:
    """What a kernel computes, what it costs and how to try it.

    ``function`` is the public function; ``compiled`` are the compiled functions that it calls, but for its small
    call: as a rule the body, then its parallel kernel. ``example(rng, **sizes)`` returns the keyword arguments of
    ``function`` (without ``out``); ``reference`` takes the same arguments and returns the answer in float64.
    ``flops`` and ``bytes`` take the sizes and count the floating-point operations of one call (exp counts as one) and
    its compulsory memory traffic (each array once in each direction). ``sizes`` is the one list of sizes at which the
    kernel is tested and measured. ``tolerance`` bounds the normalised mean squared error sum((y - r)^2) / sum(r^2)
    against the reference.
    """

    name: str
    function: Callable[..., Any]
    compiled: tuple[Any, ...]
    reference: Callable[..., Any]
    formula: str
    example: Callable[..., dict[str, Any]]
    flops: Callable[..., float]
    bytes: Callable[..., float]
    sizes: tuple[dict[str, int], ...]
    tolerance: float = 1e-10

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the sizes, in the order of the first example."""
        return tuple(self.sizes[0])

    @property
    def examples(self) -> tuple[dict[str, int], ...]:
        """Those of the sizes whose float64 reference takes little time and memory."""
        return tuple(
            sizes
            for sizes in self.sizes
            if self.flops(**sizes) <= _EXAMPLE_FLOPS and self.bytes(**sizes) <= _EXAMPLE_BYTES
        )

    def __repr__(self) -> str:
        return f"KernelSpec({self.name}: {self.formula}; axes {', '.join(self.axes)})"
