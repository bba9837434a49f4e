"""The limits of one rendering of a chat template: processor time, characters made, size of any value."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any, NamedTuple

from jinja2.runtime import LoopContext
from jinja2.utils import Namespace

MAX_TEXT = 1 << 22  # characters of any one value, what it contains included, and of the whole output
MAX_ITEMS = 1 << 18  # items of a list, nested ones included
MAX_TOTAL = 1 << 26  # characters made in one rendering, kept or not
MAX_BITS = 4096  # of a number
SECONDS = 0.5  # of this thread's processor time: the load of the machine does not count

_CLOCK_EVERY = 1 << 14  # units of work between two readings of the clock
_OPERATION = 64  # units of work of one operation, in addition to those per character
_CONTAINERS: Any = (list, tuple, dict, type({}.items()), type({}.keys()), type({}.values()))


class Refused(Exception):
    """A template exceeds a limit; the message says which."""


class Weight(NamedTuple):
    """How large a value is: items (nested ones counted), characters, levels of nesting.

    ``opaque``: it holds namespaces or loops. These count as things, not as what can be reached through them: printed or
    copied they are small, but what looks into them by itself (a format, a filter with ``attribute=``) must be refused.
    """

    items: int
    characters: int
    depth: int = 0
    opaque: bool = False


class Budget:
    """Payments of one rendering, and the weights of the containers in it."""

    def __init__(self) -> None:
        self._deadline = time.thread_time() + SECONDS
        self._until_clock = _CLOCK_EVERY
        self._left = MAX_TOTAL
        # No container changes once it is made (the sandbox is an immutable one), but for namespaces in it, which weigh
        # the same whatever they hold; so each is weighed once. It is kept with its weight, since an id is unique
        # among the living only.
        self._weights: dict[int, tuple[Any, Weight]] = {}

    def spend(self, made: int = 0, read: int = 0) -> None:
        """Pay for one operation that makes and reads so many characters. Raises: Refused."""
        self._left -= made
        if self._left < 0:
            raise Refused(f"it makes more than {MAX_TOTAL} characters")
        self._until_clock -= _OPERATION + made + read // 8
        if self._until_clock < 0:
            self._until_clock = _CLOCK_EVERY
            if time.thread_time() > self._deadline:
                raise Refused(f"it takes more than {SECONDS} s")

    def weigh(self, value: Any) -> Weight:
        """The weight of a value. Raises: Refused if it is too heavy."""
        if isinstance(value, str):
            return allow(1, len(value))
        if isinstance(value, int):
            return allow(1, value.bit_length() // 3 + 1)
        if isinstance(value, Namespace | LoopContext):
            return Weight(1, 16, opaque=True)
        if not isinstance(value, _CONTAINERS):
            return Weight(1, 16)
        known = self._weights.get(id(value))
        if known is None:
            self.spend(made=8 * len(value))
            children = [*value, *value.values()] if isinstance(value, dict) else list(value)
            known = self._weights[id(value)] = (value, self.weigh_all(children))
        return known[1]

    def weigh_all(self, values: Iterable[Any]) -> Weight:
        """The weight of a list of these values. Raises: Refused if it is too heavy."""
        items, characters, depth, opaque = 1, 0, 0, False
        for value in values:
            weight = self.weigh(value)
            items += weight.items
            characters += weight.characters + 4  # brackets, commas, quotes
            depth = max(depth, weight.depth)
            opaque = opaque or weight.opaque
            allow(items, characters)
        return Weight(items, characters, depth + 1, opaque)

    def checked(self, value: Any) -> Any:
        """A value that was just made, weighed and paid for; one that makes its items later makes them now."""
        if isinstance(value, str):
            allow(1, len(value))
            self.spend(made=len(value))
        elif isinstance(value, int):
            if value.bit_length() > MAX_BITS:
                raise Refused(f"it makes a number of more than {MAX_BITS} bits")
        elif isinstance(value, _CONTAINERS):
            self.weigh(value)
        return value

    def collect(self, values: Iterable[Any]) -> list[Any]:
        """The items of an iterator as a list. Raises: Refused."""
        collected: list[Any] = []
        for value in values:
            self.spend()
            collected.append(value)
            allow(len(collected), 0)
        return collected


def transparent(weight: Weight, what: str) -> Weight:
    """The same weight. Raises: Refused if it does not count all that ``what`` would look into."""
    if weight.opaque:
        raise Refused(f"{what} looks into a namespace or a loop")
    return weight


def allow(items: int, characters: int) -> Weight:
    """The weight of a value of this size. Raises: Refused if no value may be so large."""
    if characters > MAX_TEXT:
        raise Refused(f"it makes a value of more than {MAX_TEXT} characters")
    if items > MAX_ITEMS:
        raise Refused(f"it makes a value of more than {MAX_ITEMS} items")
    return Weight(items, characters)


current: ContextVar[Budget] = ContextVar("budget")
