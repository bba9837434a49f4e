"""Where ruvllm keeps files of its own: one cache directory per user."""

import os
import sys
import tempfile
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
