"""A regular file as bytes: memory-mapped, or read piece by piece; never a pipe, a device or a directory."""

from __future__ import annotations

import mmap as _mmap
import os
import stat
import sys
import threading
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import Any, NamedTuple, Protocol, Self

import numpy as np

from ruvllm.errors import ModelFormatError

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISSOCK, "a socket"),
)

_MADV_POPULATE_READ = 22  # of Linux, which Python's mmap does not name
# Bytes: Linux maps up to a huge page around the byte that is read, if its page cache holds the file in such pages.
_MAP_UNIT = max(2 << 20, _mmap.PAGESIZE)


class Closing(ABC):
    """What a ``with`` block closes when it ends."""

    @abstractmethod
    def close(self) -> None:
        """Close it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Readable(Protocol):
    """The source of a tensor's bytes: a file, or an assembly of several of its tensors."""

    path: str

    def read(self, offset: int, count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """``count`` bytes from ``offset``."""
        ...

    def prefetch(self, offset: int, count: int) -> None:
        """All of them are needed now."""
        ...

    def release(self, offset: int, count: int) -> None:
        """They are not needed for now."""
        ...


class Identity(NamedTuple):
    """What tells one state of a file from every other: writing, replacing and renaming it change one of these."""

    size: int
    modified: int  # nanoseconds
    changed: int  # nanoseconds; no program can set it
    device: int
    inode: int


def identity_of(info: os.stat_result) -> Identity:
    """The identity of the file that ``info`` describes."""
    return Identity(info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_dev, info.st_ino)


class Source(Closing):
    """Bytes ``[0, size)`` of one file, read-only; ``identity`` is the file's when it was opened.

    With ``mmap=True`` arrays are views of the file's pages: nothing is copied, and a file that another process
    shortens while it is mapped ends this process with SIGBUS. With ``mmap=False`` every array is read on
    demand, and a shortened file is a ``ModelFormatError``.

    Raises:
        FileNotFoundError: there is no such file.
        ModelFormatError: it is not a regular file, or cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], *, mmap: bool = True) -> None:
        self.path = os.fspath(path)
        self.mapped = mmap
        self._lock = threading.Lock()
        descriptor = _open_regular(self.path)
        self.identity = identity_of(os.fstat(descriptor))
        self.size = self.identity.size
        self._map: _mmap.mmap | None = None
        self._descriptor: int | None = descriptor
        if mmap:
            try:
                if self.size > 0:  # an empty file cannot be mapped; its reader refuses it anyway
                    self._map = _mmap.mmap(descriptor, self.size, access=_mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise ModelFormatError(self.path, field="file", found=error, expected="a file to map") from error
            finally:
                os.close(descriptor)  # the map has its own descriptor
                self._descriptor = None

    def read(self, offset: int, count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """``count`` bytes from ``offset`` as a read-only uint8 array: a view when mapped, else freshly read.

        Raises:
            ValueError: the range is not inside the file (a caller's mistake), or the file is closed.
            ModelFormatError: the file has become shorter since it was opened (``mmap=False``).
        """
        if not 0 <= offset <= offset + count <= self.size:
            raise ValueError(f"bytes {offset}:{offset + count} are outside of {self.path} ({self.size} bytes)")
        if self._map is not None:
            return np.frombuffer(self._map, np.uint8, count, offset)
        if self._descriptor is None and self.size > 0:
            raise ValueError(f"{self.path} is closed")
        array = np.empty(count, np.uint8)
        self._read_into(offset, array.data)
        array.flags.writeable = False
        return array

    def _read_into(self, offset: int, buffer: memoryview) -> None:
        with self._lock:  # seek and read are two steps
            while buffer:
                assert self._descriptor is not None
                try:
                    os.lseek(self._descriptor, offset, os.SEEK_SET)
                    piece = os.read(self._descriptor, min(len(buffer), 1 << 24))
                except OSError as error:
                    raise ModelFormatError(
                        self.path, field="file", found=error, expected="readable data", offset=offset
                    ) from error
                if not piece:
                    raise ModelFormatError(
                        self.path,
                        field="file size",
                        found=f"{offset} bytes while reading",
                        expected=f"{self.size} bytes, as when it was opened",
                        offset=offset,
                    )
                buffer[: len(piece)] = piece
                buffer = buffer[len(piece) :]
                offset += len(piece)

    def prefetch(self, offset: int, count: int) -> None:
        """Read these mapped pages in one go, where the system can: else each few of them cost a fault."""
        if self._map is None or sys.platform != "linux":
            return
        start = offset // _mmap.PAGESIZE * _mmap.PAGESIZE
        with suppress(OSError):  # Linux before 5.14, or a file that has become shorter
            self._map.madvise(_MADV_POPULATE_READ, start, offset + count - start)

    def release(self, offset: int, count: int) -> None:
        """Tell the system that these mapped pages are not needed for now; reading them again still works."""
        if self._map is None or not hasattr(_mmap, "MADV_DONTNEED"):
            return
        start = offset // _MAP_UNIT * _MAP_UNIT  # neighbours were mapped too
        end = min(-(-(offset + count) // _MAP_UNIT) * _MAP_UNIT, self.size)
        if end > start:
            self._map.madvise(_mmap.MADV_DONTNEED, start, end - start)

    def close(self) -> None:
        """Close the file. Arrays taken from a map stay valid: the map ends with the last of them."""
        if self._map is not None:
            try:
                self._map.close()
            except BufferError:  # arrays still refer to it
                pass
            self._map = None
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            self.close()


def _open_regular(path: str) -> int:
    """An open descriptor of a regular file; O_NONBLOCK because opening a FIFO would wait for its writer for ever."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise
    except OSError as error:
        found = "a directory" if os.path.isdir(path) else (error.strerror or str(error))
        raise ModelFormatError(path, field="file", found=found, expected="a readable regular file") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = next((name for test, name in _KINDS if test(mode)), "a special file")
        raise ModelFormatError(path, field="file", found=kind, expected="a regular file")
    return descriptor
