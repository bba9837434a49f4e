"""A pytest plugin: records the functions, with their types, that a test run looked up in the compile cache.

``python -m pytest -p tests.aarch64.recorder ...`` appends them to the file that RECORD_COMPILED names. Programs call
``begin`` themselves.
"""

import atexit
import os
import pickle
from pathlib import Path
from typing import Any

Wanted = tuple[str, str, Any]  # module, qualified name, signature


def begin(path: Path) -> None:
    """Record until the process ends."""
    from ruvllm.kernels.jit.cache import KernelCache

    seen: dict[Wanted, None] = {}
    load = KernelCache.load_overload

    def load_and_record(self: Any, sig: Any, target_context: Any) -> Any:
        seen[self._py_func.__module__, self._py_func.__qualname__, sig] = None
        return load(self, sig, target_context)

    KernelCache.load_overload = load_and_record  # type: ignore[method-assign]

    def write() -> None:
        with path.open("ab") as file:
            file.write(pickle.dumps(list(seen)))

    atexit.register(write)


def read(path: Path) -> list[Wanted]:
    """Everything that was recorded in a file, once."""
    found: dict[Wanted, None] = {}
    with path.open("rb") as file:
        while file.peek(1):
            found.update(dict.fromkeys(pickle.load(file)))
    return list(found)


if "RECORD_COMPILED" in os.environ:
    begin(Path(os.environ["RECORD_COMPILED"]))
