"""How long idle threads of OpenMP and OpenBLAS spin; set before they are loaded, since they read it only then.

By default they spin for 20 ms and up to 130 ms, on cores that others need: those of the next operation, or of another
program. Half a millisecond still spans what Python does between two tokens.
"""

import os

_OURS = {
    "GOMP_SPINCOUNT": "30000",  # pauses, 0.5 to 2 ms; the default is ten times as many
    "OPENBLAS_THREAD_TIMEOUT": "18",  # 2^18 clock ticks, 0.1 ms; the default is 26 or 28
}
_SET_BY_USER = set(os.environ)


def shorten() -> None:
    """Set what the user has not set, in the environment of this process."""
    for name, value in _OURS.items():
        if not (name == "GOMP_SPINCOUNT" and "OMP_WAIT_POLICY" in os.environ):
            os.environ.setdefault(name, value)


def environment_of_others() -> dict[str, str]:
    """The environment without this package's settings, for programs that should run as they do alone."""
    ours = {*_OURS, "NUMBA_NUM_THREADS"} - _SET_BY_USER  # the latter by `container`
    return {name: value for name, value in os.environ.items() if name not in ours}
