"""The compile cache: machine code on disk that is never stale, never another user's, never half a file.

Numba's own cache keys a function by its own file alone, so an edited callee in another file silently
runs old machine code, and it unpickles whatever it finds. Here

- the directory's name holds a hash of every kernel source, sub-packages included, of numba, llvmlite and of the
  compile options;
- the directory must belong to this user alone (0700, no symlink), because a pickle is code;
- each entry is one file, written atomically, carrying its key and a SHA-256 of its content:
  two processes may compile at once, and a truncated or damaged entry is compiled again.
"""

import contextlib
import hashlib
import logging
import os
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba import config

from ruvllm.kernels.jit.private.dispatch import from_bytes, make_ready, to_bytes
from ruvllm.kernels.jit.private.parts import OTHER_CODE
from ruvllm.kernels.jit.private.target import target
from ruvllm.paths import private_directory

log = logging.getLogger(__name__)

_KEPT_GENERATIONS = 16  # directories of other sources kept, so that switching versions does not recompile
# numba's settings that change the code of a kernel without being part of its signature
_OPTIONS = ("OPT", "BOUNDSCHECK", "LOOP_VECTORIZE", "SLP_VECTORIZE", "ENABLE_AVX", "DEBUGINFO_DEFAULT")


def _hash_sources() -> str:
    """Hash of everything that decides what machine code a kernel becomes, its own signature and CPU apart."""
    digest = hashlib.sha256()
    options = [f"{name}={getattr(config, name, None)}" for name in _OPTIONS]
    for part in (numba.__version__, llvmlite.__version__, sys.version, *options, *OTHER_CODE):
        digest.update(part.encode() + b"\0")
    for path in sorted(_SOURCES.rglob("*.py")):
        digest.update(path.relative_to(_SOURCES).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


# Taken before any kernel is imported. Where the files have changed since, nobody knows which version runs here, and
# this process neither reads the cache nor writes to it.
_SOURCES = Path(__file__).parents[1]  # ruvllm/kernels
SOURCES_STAMP = _hash_sources()


@cache
def kernel_cache_directory() -> Path | None:
    """The private directory that holds this version's machine code, or None where there cannot be one."""
    if _hash_sources() != SOURCES_STAMP:
        log.warning("kernels have changed on disk since they were imported: compiling without a cache")
        return None
    try:
        directory = private_directory("kernels", SOURCES_STAMP)
    except OSError as error:
        log.warning("compiled kernels are not cached, so each start compiles them again: %s", error)
        return None
    _drop_old_generations(directory.parent, keep=directory)
    return directory


def _warm_marker(what: str) -> Path | None:
    """The empty file that says that all kernels for ``what`` were compiled for this CPU and threading layer."""
    directory = kernel_cache_directory()
    if directory is None:
        return None
    code = f"{what} {tuple(target())} {getattr(config, 'THREADING_LAYER', None)}"
    return directory / f"warm-{hashlib.sha256(code.encode()).hexdigest()[:16]}"


def is_warm(what: str) -> bool:
    """Whether every kernel for ``what`` (any description) has been compiled into the cache before."""
    marker = _warm_marker(what)
    return marker is not None and marker.exists()


def mark_warm(what: str) -> None:
    """Note that every kernel for ``what`` has been compiled; without a cache directory nothing is noted."""
    marker = _warm_marker(what)
    if marker is not None:
        with contextlib.suppress(OSError):
            marker.touch()


def _drop_old_generations(root: Path, keep: Path) -> None:
    """Remove all but the newest few sibling directories; failures do not matter."""
    try:
        os.utime(keep)
        others = sorted((p for p in root.iterdir() if p.is_dir() and p != keep), key=lambda p: p.stat().st_mtime)
        for old in others[: max(0, len(others) - _KEPT_GENERATIONS)]:
            for entry in old.iterdir():
                entry.unlink()
            old.rmdir()
    except OSError:
        pass


class KernelCache:
    """The cache of one compiled function, with the methods that numba's dispatcher calls."""

    def __init__(self, py_func: Any, flags: str, closure: str = "") -> None:
        """flags: the compile options; closure: a description of the values that ``py_func`` closes over.

        They are in no source file, so a closure is cached only if the caller describes it.
        """
        self._py_func = py_func
        self._flags = flags + closure
        self._source = source_of(py_func)
        self._enabled = self._may_cache = bool(self._source) and (py_func.__closure__ is None or bool(closure))

    @property
    def cache_path(self) -> str:
        directory = kernel_cache_directory()
        return str(directory) if directory else ""

    def enable(self) -> None:
        self._enabled = self._may_cache

    def disable(self) -> None:
        self._enabled = False

    def flush(self) -> None:
        """Forget nothing on disk: entries are keyed by content and cannot be stale."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        make_ready(target_context)
        path, key = self._entry(sig)
        if path is None:
            return None
        try:
            blob = path.read_bytes()
        except OSError:
            return None
        if len(blob) < 64 or hashlib.sha256(blob[32:]).digest() != blob[:32] or blob[32:64] != key:
            log.warning("damaged entry in the compile cache, compiling again: %s", path)
            return None
        try:
            return from_bytes(blob[64:], target_context)
        except Exception as error:  # whatever a pickle of another build raises: compile instead
            log.warning("unusable entry in the compile cache (%s), compiling again: %s", error, path)
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        path, key = self._entry(sig)
        if path is None or _hash_sources() != SOURCES_STAMP:
            return
        try:
            written = to_bytes(data)
        except Exception as error:  # whatever another version of numba raises
            _say_that_nothing_is_kept(f"{type(error).__name__}: {error}")
            return
        if written is None:
            return
        temporary = None
        try:
            content = key + written
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(content).digest() + content)
            os.replace(temporary, path)
        except OSError as error:  # disk full, read-only: this process has the code, the next compiles again
            _say_that_nothing_is_kept(error.strerror or str(error))
            if temporary is not None and os.path.exists(temporary):
                os.unlink(temporary)

    def _entry(self, sig: Any) -> tuple[Path | None, bytes]:
        """The file for one signature on one CPU, and the 32-byte key that it must carry."""
        directory = kernel_cache_directory() if self._enabled else None
        if directory is None:
            return None, b""
        code = self._py_func.__code__
        identity = (self._source, code.co_firstlineno, code.co_qualname, self._flags)
        key = hashlib.sha256(repr((identity, sig, tuple(target()))).encode()).digest()
        return directory / f"{code.co_name}-{key.hex()[:24]}.nbc", key


@cache
def _say_that_nothing_is_kept(reason: str) -> None:
    """Once for each reason: the next kernel will hardly fare better."""
    log.warning("could not write to the compile cache, so each start compiles again: %s", reason)


def source_of(py_func: Any) -> str:
    """The name of a function's file, with a hash of it where it is not of this package; "" where there is no file.

    Code that was typed at a prompt is in no file: another process could not tell whether its own is the same.
    """
    path = Path(py_func.__code__.co_filename)
    inside = path.is_relative_to(_SOURCES)
    return path.relative_to(_SOURCES).as_posix() if inside else _file_stamp(path)


@cache
def _file_stamp(path: Path) -> str:
    return f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" if path.is_file() else ""
