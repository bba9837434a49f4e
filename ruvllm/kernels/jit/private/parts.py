"""The parts (internals of numba) by name, each with its test, and the variable that disables them.

    RUVLLM_WITHOUT=libraries,cache ruvllm generate ...

runs without these parts, as on a version of numba that no longer has them (``all``: without any).
"""

import logging
import os
from collections.abc import Callable
from functools import cache

import numba

log = logging.getLogger(__name__)

# For each part, the function that tells whether it may be used.
PARTS: dict[str, Callable[[], bool]] = {}

# Those that change the machine code of functions: the cache keeps code with and without them apart.
_CHANGE_CODE = frozenset({"all", "counting", "libraries", "loops", "width"})

_asked = os.environ.get("RUVLLM_WITHOUT", "")
WITHOUT = frozenset(name.strip() for name in _asked.split(",") if name.strip())

OTHER_CODE = tuple(sorted(WITHOUT & _CHANGE_CODE))


def part(name: str, otherwise: str) -> Callable[[Callable[[], bool]], Callable[[], bool]]:
    """Turn a test into a function that tells whether the part ``name`` may be used; the test runs once in a process.

    otherwise: the consequence, which a warning tells the user if the test returns False or raises.
    """

    def decorate(test: Callable[[], bool]) -> Callable[[], bool]:
        @cache
        def usable() -> bool:
            if WITHOUT & {name, "all"}:
                return False
            try:
                if test():
                    return True
                reason = "it does not do what it should"
            except Exception as error:  # whatever another version raises
                reason = f"{type(error).__name__}: {error}"
            version = numba.__version__
            log.warning("numba %s differs from those tested in its %s (%s): %s", version, name, reason, otherwise)
            return False

        usable.__doc__ = test.__doc__
        PARTS[name] = usable
        return usable

    return decorate
