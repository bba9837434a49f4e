"""Where ruvllm keeps files of its own: one cache directory per user, parts of which nobody else can write."""

import os
import stat
import sys
import tempfile
from contextlib import suppress
from pathlib import Path


def cache_directory() -> Path:
    """The user's cache directory of ruvllm: compiled kernels and downloaded models.

    ``RUVLLM_CACHE`` if set, else ``$XDG_CACHE_HOME/ruvllm`` (``~/.cache/ruvllm``) on Linux,
    ``~/Library/Caches/ruvllm`` on macOS, ``%LOCALAPPDATA%\\ruvllm\\Cache`` on Windows.
    The directory is not created here.

    Raises:
        FileNotFoundError: none of these is set and the user has no home, as in some containers.
    """
    override = os.environ.get("RUVLLM_CACHE")
    if override:
        return Path(override).expanduser().absolute()
    if sys.platform == "darwin":
        return _home() / "Library" / "Caches" / "ruvllm"
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
        return (Path(base) if base else _home() / "AppData" / "Local") / "ruvllm" / "Cache"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else _home() / ".cache") / "ruvllm"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        raise FileNotFoundError("this user has no home directory: set RUVLLM_CACHE") from None


def require_writable(option: str, directory: Path) -> None:
    """Raise OSError, naming the option, unless files can be written into an existing directory."""
    try:
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise type(error)(f"{option}: nothing can be written into {directory} ({error.strerror})") from None


def private_directory(*names: str) -> Path:
    """A directory below the cache directory that only this user can write; made where there is none.

    Raises:
        OSError: it cannot be made, is a link, belongs to another user, or others can write it or put another in its
            place.
    """
    root = cache_directory()
    paths = [root, *(root.joinpath(*names[: i + 1]) for i in range(len(names)))]
    for path in paths:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    require_steady(root)
    for path in paths[1:]:
        require_private(path)
    return paths[-1]


def require_private(path: Path) -> None:
    """Raise PermissionError unless ``path`` is a real directory that only this user can write."""
    info = os.lstat(path)
    if not stat.S_ISDIR(info.st_mode):
        raise PermissionError(f"{path} is a symbolic link or no directory")
    require_own(path, info)


def require_own(path: Path, info: os.stat_result) -> None:
    """Raise PermissionError unless what ``info`` describes is this user's, and others cannot write it."""
    if hasattr(os, "getuid"):
        if info.st_uid != os.getuid():
            raise PermissionError(f"{path} belongs to user {info.st_uid}, not to {os.getuid()}")
        if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            mode, wanted = stat.S_IMODE(info.st_mode), "700" if stat.S_ISDIR(info.st_mode) else "600"
            raise PermissionError(f"{path} can be written by others (mode {mode:o}): chmod {wanted} it")


def require_steady(path: Path) -> None:
    """Raise PermissionError where another user could put a directory of their own in place of one in ``path``."""
    info = os.stat(path)
    if hasattr(os, "getuid"):
        if info.st_uid not in (os.getuid(), 0):
            raise PermissionError(f"{path} belongs to user {info.st_uid}, not to {os.getuid()}")
        if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not info.st_mode & stat.S_ISVTX:
            mode = stat.S_IMODE(info.st_mode)
            raise PermissionError(f"{path} can be written by others (mode {mode:o}): chmod 700 it")


class replacing:
    """A path next to ``path`` to write to; it replaces ``path`` when the block succeeds."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")

    def __enter__(self) -> Path:
        return self._temporary

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        try:
            if error is None:
                os.replace(self._temporary, self.path)
            elif isinstance(error, OSError) and error.filename in (self._temporary, str(self._temporary)):
                raise error
        except OSError as failed:  # names the path that was given
            raise OSError(failed.errno, failed.strerror, str(self.path)) from None
        finally:
            with suppress(OSError):
                self._temporary.unlink()
