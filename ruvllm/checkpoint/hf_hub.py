"""Models on the Hugging Face Hub: what a name such as OWNER/NAME:Q4_K_M means, and its files, fetched and cached.

`huggingface_hub` talks to the Hub: endpoint, token, cache, offline mode, retries and progress bars are those that its
users know. This module decides which files a name stands for, so that no others are fetched:

- ``OWNER/NAME``: the directory: config.json, tokenizer and safetensors (never pickles). A repository that holds one
  GGUF model and nothing else to load: that model.
- ``OWNER/NAME:Q4_K_M``: its GGUF model of this type, or the only one whose type begins with this.
- ``OWNER/NAME/path/file.gguf``: that file, or the only model whose path begins so. All parts come with any of them.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from ruvllm.checkpoint.gguf_split import part_name, split_name
from ruvllm.checkpoint.hf_config import refuse_other_architectures
from ruvllm.checkpoint.safetensors import INDEX_FILE, PICKLES, SINGLE_FILE, shards_of
from ruvllm.checkpoint.tokenizer.hf import NAMED_TEMPLATES
from ruvllm.errors import DownloadError, ModelFormatError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile, RepoSibling

logger = logging.getLogger(__name__)

# The files of a directory besides its weights.
_SMALL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "quantize_config.json", "quant_config.json",
)  # fmt: skip
_NOT_MODELS = re.compile(r"mmproj|imatrix", re.IGNORECASE)  # GGUF files that accompany a model

_PART = r"[A-Za-z0-9][\w.-]*"
_NAME = re.compile(rf"(?P<repo>{_PART}/{_PART})(?::(?P<tag>[^/:\s]+)|/(?P<file>[^:]+))?", re.ASCII)
_TYPE = re.compile(r"(?:^|[-._/])((?:UD-)?(?:I?Q\d\w*|TQ\d\w*|MXFP\d\w*|BF16|F16|F32))$", re.IGNORECASE)
_SHOWN = 40  # of the choices that an error lists
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class HubName:
    """A name on the Hub: the repository, and which of its models: by type (``tag``) or by ``file``; see the module."""

    repo: str
    tag: str = ""
    file: str = ""

    def __str__(self) -> str:
        return self.repo + (f":{self.tag}" if self.tag else "") + (f"/{self.file}" if self.file else "")


def parse(text: str) -> HubName | None:
    """The name on the Hub that a text is, or None. ``directory/file.gguf`` is a path: a file has its repository's name
    before it, which has two parts."""
    match = _NAME.fullmatch(text)
    if match is None or (match["tag"] is None and match["file"] is None and text.endswith(".gguf")):
        return None
    return HubName(match["repo"], match["tag"] or "", match["file"] or "")


def fetch(name: HubName, progress: bool = True, verify: bool = False) -> Path:
    """The directory or the GGUF file (of several parts the first) that a name stands for, in `huggingface_hub`'s cache.

    Files that are current in the cache are not fetched again. If the Hub cannot be reached, or in offline mode, the
    cache is used alone if it is complete.

    Args:
        name: see the module's docstring.
        progress: show `huggingface_hub`'s progress bars, where stderr is a terminal or a notebook.
        verify: read what the cache has and compare its checksums with the Hub's; fetch what differs again.

    Raises:
        DownloadError: no such repository or file, several that the name may mean (they are listed), a gated one, no
            connection, or no space.
        ModelFormatError: its architecture is not supported; found before the weights are fetched.
    """
    with _one_line(name), _quiet(progress):
        try:
            files = _listed(name.repo)
        except Exception as error:
            cached = _from_cache(name)
            if cached is None:
                raise
            logger.warning("%s: %s; taken from the cache", name.repo, _reason(error))
            return cached
        return _Repository(name, files, verify).fetch()


def _listed(repo: str) -> dict[str, RepoFile | RepoSibling]:
    """The files of a repository by their paths, which all lie in it."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.hf_api import RepoFile

    timeout = float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
    info = HfApi().model_info(repo, revision=constants.DEFAULT_REVISION, files_metadata=True, timeout=timeout)
    found: list[RepoFile | RepoSibling] = list(info.siblings or ())
    if not found:  # a mirror may only have the other list
        found = [entry for entry in HfApi().list_repo_tree(repo, recursive=True) if isinstance(entry, RepoFile)]
    return {file.rfilename: file for file in found if _is_plain(file.rfilename)}


class _Repository:
    """The files that the Hub lists, and those that have been fetched."""

    def __init__(self, name: HubName, files: Mapping[str, RepoFile | RepoSibling], verify: bool) -> None:
        self._name = name
        self._listed = files
        self._verify = verify
        self._commit: str | None = None  # known from the first file; the others are of the same

    def fetch(self) -> Path:
        files = _choose(self._name, {name: file.size for name, file in self._listed.items()})
        if files is not None:
            return self._download(files) / files[0]
        named = [file for file in self._listed if PurePosixPath(file).match(f"{NAMED_TEMPLATES}/*.jinja")]
        first = [file for file in _SMALL_FILES if file in self._listed] + named
        folder = self._download(first + ([] if SINGLE_FILE in self._listed else [INDEX_FILE]))
        refuse_other_architectures(folder)
        self._download(_weights(folder, self._listed))
        return folder

    def _download(self, files: Sequence[str]) -> Path:
        """Fetch files, unless they are in the cache, and return the directory that they are in."""
        from huggingface_hub import hf_hub_download

        self._require_space(files)
        folder = Path()
        for file in files:
            path = Path(hf_hub_download(self._name.repo, file, revision=self._commit))
            if self._verify and not _is_intact(path, self._listed[file]):
                logger.warning("%s: not what the Hub has; it is fetched again", path)
                path = Path(hf_hub_download(self._name.repo, file, revision=self._commit, force_download=True))
                if not _is_intact(path, self._listed[file]):
                    raise DownloadError(f"{self._name.repo}: {file} does not have the checksum that the Hub gives")
            folder = path.parents[file.count("/")]
            self._commit = folder.name
        return folder

    def _require_space(self, files: Sequence[str]) -> None:
        from huggingface_hub import constants, try_to_load_from_cache

        sizes = [
            self._listed[file].size or 0
            for file in files
            if not isinstance(try_to_load_from_cache(self._name.repo, file, revision=self._commit), str)
        ]
        place = Path(constants.HF_HUB_CACHE).expanduser().absolute()
        exists = next(parent for parent in (place, *place.parents) if parent.exists())
        free = shutil.disk_usage(exists).free
        if sum(sizes) > free:
            raise DownloadError(
                f"{self._name.repo}: {_megabytes(sum(sizes))} needed in {place}, {_megabytes(free)} free; "
                "free some space or choose another directory with HF_HOME"
            )


def _from_cache(name: HubName) -> Path | None:
    """The cached files of a name, if they are complete."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name.repo, local_files_only=True, allow_patterns=[]))
        sizes = {
            path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()
        }
        files = _choose(name, sizes)
        if files is None:
            _weights(folder, sizes)
            return folder
        return folder / files[0]
    except (LocalEntryNotFoundError, DownloadError):
        return None


def _weights(folder: Path, listed: Mapping[str, object]) -> list[str]:
    """The files of safetensors in a directory whose index, if it has one, is there."""
    if SINGLE_FILE in listed:
        return [SINGLE_FILE]
    shards = list(shards_of(str(folder / INDEX_FILE)))
    missing = next((shard for shard in shards if shard not in listed), None)
    if missing is not None:
        raise DownloadError(f"{INDEX_FILE} names {missing}, which is not there")
    return shards


# --- what a name stands for ------------------------------------------------------------------------------------------


def _choose(name: HubName, sizes: Mapping[str, int | None]) -> list[str] | None:
    """The GGUF files that a name stands for, first part first; None: the directory of safetensors."""
    directory = "config.json" in sizes and (SINGLE_FILE in sizes or INDEX_FILE in sizes)
    if directory and not name.tag and not name.file:
        return None
    models = _gguf_models(sizes)
    if not models:
        pickles = next((file for file in sizes if file.endswith(PICKLES)), None)
        found = "no GGUF file" if directory else "neither GGUF files nor config.json with safetensors"
        raise DownloadError(f"{name}: {found}" + (f", only pickles ({pickles}), which can run code" if pickles else ""))
    matches = _matches(name, models)
    if len(matches) != 1:
        what = "which file?" if matches else "no such file;"
        raise DownloadError(f"{name}: {what} there are {_choices(name.repo, matches or list(models), models, sizes)}")
    files = models[matches[0]]
    missing = next((file for file in files if file not in sizes), None)
    if missing is not None:
        raise DownloadError(f"{name}: {missing}, a part of it, is not there")
    return files


def _gguf_models(sizes: Mapping[str, object]) -> dict[str, list[str]]:
    """Path of each GGUF model, of a split one without its numbers -> its files."""
    models: dict[str, list[str]] = {}
    for file in sorted(sizes):
        if not file.lower().endswith(".gguf") or _NOT_MODELS.search(PurePosixPath(file).name):
            continue
        split = split_name(file)
        if split is None:
            models[file] = [file]
        else:
            models[f"{split.stem}.gguf"] = [part_name(split.stem, n, split.parts) for n in range(split.parts)]
    return models


def _matches(name: HubName, models: Mapping[str, list[str]]) -> list[str]:
    """The models that a name may mean: those that it names in full, or else those whose name begins so."""

    def those(test: Callable[[str], bool]) -> list[str]:
        return [model for model in models if test(model)]

    if name.file:
        whole = those(lambda model: name.file == model or name.file in models[model])
        return whole or those(lambda model: model.startswith(name.file))
    if name.tag:
        tag = name.tag.lower()
        whole = those(lambda model: _type(model).lower() == tag)
        return (
            whole
            or those(lambda model: _type(model).lower().startswith(tag))
            or those(lambda model: model.lower().startswith(tag))
        )
    return list(models)


def _type(model: str) -> str:
    """The type in a model's file name (``Q4_K_M``), or its last part."""
    stem = model[: -len(".gguf")]
    match = _TYPE.search(stem)
    return match[1] if match is not None else stem.rpartition("-")[2]


def _choices(repo: str, chosen: Sequence[str], models: Mapping[str, list[str]], sizes: Mapping[str, int | None]) -> str:
    """The names of these models, as short as they can be, with their sizes."""
    types = [_type(model) for model in chosen]
    shown = []
    for model, kind in zip(chosen, types, strict=True):
        nbytes = sum(sizes.get(file) or 0 for file in models[model])
        name = f"{repo}:{kind}" if types.count(kind) == 1 else f"{repo}/{model}"
        shown.append(f"{name} ({_megabytes(nbytes)})" if nbytes else name)
    return ", ".join(shown[:_SHOWN]) + (f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else "")


def _is_plain(file: str) -> bool:
    """Whether a listed path stays inside of its directory on any system."""
    return not any(mark in file for mark in ("\\", ":", "\0")) and not {"", ".", ".."} & set(file.split("/"))


def _is_intact(path: Path, file: RepoFile | RepoSibling) -> bool:
    """Whether a file has the checksum that the Hub gives: SHA-256 of a large one, git's of a small one."""
    with path.open("rb") as content:
        if file.lfs is not None:
            return hashlib.file_digest(content, "sha256").hexdigest() == file.lfs.sha256
        blob = content.read()
    return file.blob_id in (None, hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest())


def _megabytes(nbytes: float) -> str:
    return f"{nbytes / 1e6:.0f} MB" if nbytes >= 1e6 else f"{nbytes:.0f} bytes"


# --- what can go wrong -----------------------------------------------------------------------------------------------


@contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """`huggingface_hub` without its log messages (failures are reported here, once) and, by default, without bars."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )
    from huggingface_hub.utils import logging as library

    level, silenced = library.get_verbosity(), not progress and not are_progress_bars_disabled()
    if level >= logging.WARNING and not logger.isEnabledFor(logging.DEBUG):
        library.set_verbosity_error()
    if silenced:
        disable_progress_bars()
    try:
        yield
    finally:
        library.set_verbosity(level)
        if silenced:
            enable_progress_bars()


@contextmanager
def _one_line(name: HubName) -> Iterator[None]:
    try:
        yield
    except (DownloadError, ModelFormatError):
        raise
    except Exception as error:
        raise DownloadError(f"{name.repo}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Why nothing was fetched, in words."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    login = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return f"gated: ask for access at {constants.ENDPOINT} on the model's page, then {login}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such model on {constants.ENDPOINT}; if it is a private one, {login}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "not in the cache, and HF_HUB_OFFLINE forbids fetching it"
    if isinstance(error, errors.HFValidationError):
        return "not a valid name: expected OWNER/NAME of letters, digits, '-', '_' and '.'"
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        if status == 401:
            return f"{constants.ENDPOINT} asks for a token, or does not accept the one that is set: {login}"
        return f"{constants.ENDPOINT} answers with status {status}; try again later"
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return f"no space left in {constants.HF_HUB_CACHE}; free some, or choose another directory with HF_HOME"
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        where = error.filename or constants.HF_HUB_CACHE
        return f"cannot write {where}: {error.strerror}; choose another directory with HF_HOME"
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    return (
        f"the connection to {constants.ENDPOINT} failed ({type(error).__name__}: {said}); "
        "check the network and the proxy settings, then try again"
    )
