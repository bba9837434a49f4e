"""The cache of packed weights: which file belongs to a model, and how much is kept of all.

The directory ``packed`` of the cache holds a file for each model and choice of ``weights``. Its key is a hash of the
identities of the model's files (size, times, inode), of the layout of every matrix, and of the sources that pack. A
file whose key is another one is written anew. Files that were not used for the longest time are removed when all are
larger than the limit.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ruvllm.checkpoint.loader import Checkpoint
from ruvllm.checkpoint.packed_file import Matrix, UnusableError, open_packed, read_facts, write_packed
from ruvllm.checkpoint.source import identity_of
from ruvllm.checkpoint.tensor import Tensor
from ruvllm.kernels.jit.cache import SOURCES_STAMP
from ruvllm.model.checks import parse_size
from ruvllm.model.weights import PackedMatrix
from ruvllm.paths import private_directory

logger = logging.getLogger(__name__)

VARIABLE = "RUVLLM_PACKED_CACHE"
DEFAULT_LIMIT = 20 * 10**9  # bytes of all files
_SPARED = 5 * 10**9  # bytes that stay free on the disk, or a tenth of it where that is less
_ABANDONED_SECONDS = 3600  # of a file that was not completed


class Kept(NamedTuple):
    """A file of the cache: of which model, as which ``weights``, bytes, when it was last used (seconds).

    fault: why it cannot be used, or "".
    """

    path: Path
    model: str
    weights: str
    nbytes: int
    used: float
    fault: str


class Place(NamedTuple):
    """Where the packed weights of a model belong, the key that they must have there, and what the file says of them."""

    path: Path
    key: str
    facts: dict[str, str]

    def find(self) -> dict[str, Matrix] | None:
        """The packed matrices, mapped; None if there are none that can be used."""
        try:
            return open_packed(self.path, self.key)
        except FileNotFoundError:
            return None
        except (OSError, UnusableError) as error:
            logger.info("packed weights are not used, but made again: %s: %s", self.path, error)
            return None

    def keep(self, matrices: Mapping[str, Matrix]) -> Path:
        """Write packed matrices, in place of what is there, and remove others where the limit demands it.

        Raises:
            OSError: they are larger than the limit, the disk would be short, or they cannot be written.
        """
        self._write(matrices, threading.Event())
        return self.path

    def keep_later(self, matrices: Mapping[str, Matrix]) -> threading.Thread:
        """``keep`` in another thread, for which Python waits when it ends, unless Ctrl-C is pressed then."""
        stop = threading.Event()

        def run() -> None:
            try:
                self._write(matrices, stop)
            except OSError as error:
                logger.info("packed weights are not kept: %s", error)

        def wait() -> None:
            try:
                thread.join()
            except KeyboardInterrupt:
                stop.set()
                thread.join()

        thread = threading.Thread(target=run, name="ruvllm packed weights", daemon=True)
        atexit.register(wait)
        thread.start()
        return thread

    def _write(self, matrices: Mapping[str, Matrix], stop: threading.Event) -> None:
        nbytes = sum(matrix.nbytes for matrix in matrices.values())
        _evict(self.path, nbytes)
        if write_packed(self.path, matrices, {"key": self.key, **self.facts}, lambda: not stop.is_set()):
            logger.debug("kept packed weights: %s, %.0f MB", self.path, nbytes / 1e6)


class PackedModel:
    """The tensors of a checkpoint, its matrices packed; see ``model.llama.Weights``."""

    def __init__(self, checkpoint: Checkpoint, matrices: Mapping[str, Matrix]) -> None:
        self._checkpoint, self._matrices = checkpoint, matrices

    def tensor(self, name: str) -> Tensor | PackedMatrix:
        """The tensor of a canonical name."""
        stored = self._checkpoint.tensor(name)
        return PackedMatrix(self._matrices[name], stored.dtype) if name in self._matrices else stored

    def __contains__(self, name: str) -> bool:
        return name in self._checkpoint


def limit() -> int:
    """The most bytes that are kept: what RUVLLM_PACKED_CACHE says, "0" or a size as "50GB"; else 20 GB.

    Raises:
        ValueError: it says something else.
    """
    said = os.environ.get(VARIABLE, "").strip()
    return parse_size(VARIABLE, said) if said else DEFAULT_LIMIT


def place_of(checkpoint: Checkpoint, weights: str, layouts: Mapping[str, str]) -> Place | None:
    """Where the packed weights of a model belong; None where none are kept.

    Args:
        checkpoint: the open model.
        weights: the user's choice.
        layouts: the layout of every matrix.
    """
    if limit() == 0:
        return None
    try:
        directory = private_directory("packed")
    except OSError as error:
        logger.info("packed weights are not kept: %s", error)
        return None
    model = str(checkpoint.path.resolve())
    made_from = [_stamp(), checkpoint.identities, sorted(layouts.items())]
    key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
    name = hashlib.sha256(f"{model}\0{weights}".encode()).hexdigest()[:16]
    stem = re.sub(r"[^\w.-]", "_", checkpoint.path.stem)[:60]
    facts = {"model": model, "weights": weights, "sources": _stamp(), "files": json.dumps(checkpoint.identities)}
    return Place(directory / f"{stem}-{name}.safetensors", key, facts)


@cache
def _stamp() -> str:
    """Hash of the sources that decide what is packed, and how."""
    digest = hashlib.sha256(SOURCES_STAMP.encode())
    here = Path(__file__).parent
    for path in sorted([*here.rglob("*.py"), here.parent / "model" / "weights.py"]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def kept() -> list[Kept]:
    """All files of the cache, the one used last first."""
    try:
        directory = private_directory("packed")
        paths = [path for path in directory.iterdir() if path.suffix in (".safetensors", ".part")]
    except OSError:
        return []
    return sorted((found for path in paths if (found := _look_at(path))), key=lambda found: -found.used)


def _look_at(path: Path) -> Kept | None:
    try:
        info = path.lstat()
        facts = read_facts(path)
    except FileNotFoundError:  # removed meanwhile
        return None
    except (OSError, UnusableError) as error:
        return Kept(path, "", "", info.st_size, info.st_atime, str(error))
    model, weights = facts.get("model", ""), facts.get("weights", "")
    return Kept(path, model, weights, info.st_size, info.st_atime, _fault(model, facts))


def _fault(model: str, facts: Mapping[str, str]) -> str:
    """Why a sound file is of no use, as far as it is known without opening the model."""
    if facts.get("sources") != _stamp():
        return "made by another version of ruvllm"
    if not os.path.exists(model):
        return "the model is gone"
    if os.path.isfile(model) and list(identity_of(os.stat(model))) != json.loads(facts["files"])[0]:
        return "the model has changed"
    return ""


def remove(files: Iterable[Kept]) -> int:
    """Remove files; how many bytes that freed. A process that has one mapped goes on with it."""
    freed = 0
    for file in files:
        with suppress(OSError):
            file.path.unlink()
            freed += file.nbytes
    return freed


def least_used(files: Iterable[Kept], most: int) -> list[Kept]:
    """Those to remove, the least recently used first, so that the rest has at most so many bytes."""
    files = sorted(files, key=lambda file: file.used)
    total = sum(file.nbytes for file in files)
    chosen = []
    for file in files:
        if total <= most:
            break
        chosen.append(file)
        total -= file.nbytes
    return chosen


def _evict(path: Path, nbytes: int) -> None:
    """Remove what must go for a file of so many bytes. Raises OSError where it cannot be kept."""
    if nbytes > limit():
        raise OSError(f"{nbytes / 1e9:.1f} GB are more than the limit of {limit() / 1e9:.1f} GB ({VARIABLE})")
    others = [file for file in kept() if file.path != path]
    late = time.time() - _ABANDONED_SECONDS
    remove(file for file in others if file.path.suffix == ".part" and file.used < late)
    remove(least_used((file for file in others if file.path.suffix != ".part"), limit() - nbytes))
    disk = shutil.disk_usage(path.parent)
    spared = min(_SPARED, disk.total // 10)
    if disk.free - nbytes < spared:
        raise OSError(f"the disk is short: {disk.free / 1e9:.1f} GB are free, {nbytes / 1e9:.1f} GB would be taken")
