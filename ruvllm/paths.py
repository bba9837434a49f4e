"""Where ruvllm keeps files of its own: one cache directory per user."""

import os
import sys
from pathlib import Path


def cache_directory() -> Path:
    """The user's cache directory of ruvllm: compiled kernels and downloaded models.

    ``RUVLLM_CACHE`` if set, else ``$XDG_CACHE_HOME/ruvllm`` (``~/.cache/ruvllm``) on Linux,
    ``~/Library/Caches/ruvllm`` on macOS, ``%LOCALAPPDATA%\\ruvllm\\Cache`` on Windows.
    The directory is not created here.
    """
    override = os.environ.get("RUVLLM_CACHE")
    if override:
        return Path(override).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "ruvllm"
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
        return (Path(base) if base else Path.home() / "AppData" / "Local") / "ruvllm" / "Cache"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ruvllm"
