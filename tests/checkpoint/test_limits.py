"""A hostile file or model costs little: each is refused within 50 MB and, on an idle machine, half a second.

Run as a program, this file is that process: ``python -m tests.checkpoint.test_limits DIRECTORY``.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

from ruvllm.checkpoint.gguf import GGUFFile
from ruvllm.checkpoint.safetensors import SafetensorsFile
from ruvllm.errors import ModelFormatError
from tests.checkpoint import corpus
from tests.checkpoint.hostile_models import hostile_adapters, hostile_models, read_adapter, read_all
from tests.model import tiny
from tests.processes import python

ALLOWED_BYTES = 50_000_000
ALLOWED_SECONDS = 2.0  # of the processor: four times the slowest here, to tell a slow machine from a hang
SPARSE = 8 << 30  # a file of 8 GB that takes no room on disk


def costly_gguf() -> Iterator[tuple[str, bytes, int]]:
    """(name, first bytes, size of the file): as expensive as numbers in a file can make it."""
    for count in (SPARSE - 4096, 1 << 63):
        payload = corpus.array(corpus.U8, count, b"")
        yield f"array of {count} bytes", corpus.small_gguf(entries=[corpus.entry("k", corpus.ARRAY, payload)]), SPARSE
    for count in (1 << 20, 1 << 29):  # zeros: so many empty strings
        payload = corpus.array(corpus.STRING, count, b"")
        entry = corpus.entry("k", corpus.ARRAY, payload)
        yield f"{count} strings", corpus.gguf([entry], [], b"", n_tensors=1)[: 24 + len(entry)], SPARSE
    yield "string of 4 GB", corpus.gguf([corpus.entry("k", corpus.STRING, corpus.u64(1 << 32))], [], b""), SPARSE
    yield "zeros", corpus.gguf([], [], b"", n_tensors=1 << 14, n_entries=1 << 14), SPARSE
    entries = [corpus.entry(f"key.{i}", corpus.U8, b"\0") for i in range(1 << 14)]
    yield "16384 keys", corpus.gguf(entries, [], b"", n_tensors=1), 0
    tensors = [corpus.description(f"{i:060d}", (1, 1, 1, 1), 0, 32 * i) for i in range(1 << 14)]
    yield "16384 tensors, the last of them short", corpus.gguf([], tensors, bytes(32 * 16383 + 3)), 0
    tensor = corpus.description("a", (1 << 40, 1 << 20), 0, 0)
    yield "tensor of 2^62 bytes", corpus.gguf([], [tensor], b""), SPARSE


def costly_safetensors() -> Iterator[tuple[str, bytes, int]]:
    yield "100 MB of header", corpus.safetensors(b"{", length=100_000_000), SPARSE
    yield "6 MB of blanks", corpus.safetensors(b"{".ljust(6_000_000)), 0
    yield "6 MB of header with wide characters", corpus.safetensors('{"🦙":"'.encode().ljust(6_000_000, b"a")), 0
    yield "brackets", corpus.safetensors(b'{"a":' + b"[" * (1 << 18)), 0
    entry = b'"%06d":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]},'
    header = b"{" + b"".join(entry % i for i in range(30_000)) + b'"a":1}'
    yield "30000 tensors, the last of them no tensor", corpus.safetensors(header), 0
    yield "2^18 values", corpus.safetensors(b'{"a":[' + b"1234567," * 250_000 + b"0]}"), 0


def opens(directory: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every hostile file, written one at a time, and the call that must refuse it; mapped and read."""
    small_gguf = ((str(case), case.data, 0) for case in corpus.hostile_gguf())
    small_safetensors = ((str(case), case.data, 0) for case in corpus.hostile_safetensors())
    readers: tuple[tuple[Callable[[Path, bool], object], Iterable[tuple[str, bytes, int]]], ...] = (
        (GGUFFile, chain(small_gguf, costly_gguf())),
        (SafetensorsFile, chain(small_safetensors, costly_safetensors())),
    )
    path = directory / "model"
    for reader, files in readers:
        for name, data, size in files:
            path.write_bytes(data)
            if size:
                os.truncate(path, size)
            for mmap in (True, False):
                yield f"{name} ({'mapped' if mmap else 'read'})", partial(reader, path, mmap)
    for case in hostile_models():
        with tempfile.TemporaryDirectory(dir=directory) as place:
            model = case.write(Path(place))
            for mmap in (True, False):
                yield f"{case} ({'mapped' if mmap else 'read'})", partial(read_all, model, mmap)
    for case in hostile_adapters():
        with tempfile.TemporaryDirectory(dir=directory) as place:
            yield str(case), partial(read_adapter, case.write(Path(place)))


def main(directory: Path) -> None:
    read_all(tiny.write_gguf("mlp_bias_f16", directory / "sound.gguf", "Q8_0"), mmap=True)  # what is compiled, stays
    status = Path("/proc/self/statm")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    checked = 0
    for name, call in opens(directory):
        if status.exists():  # Linux: the system itself refuses to give more memory
            data = int(status.read_text().split()[5]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_DATA, (data + ALLOWED_BYTES, resource.RLIM_INFINITY))
        start = time.process_time()
        try:
            call()
        except ModelFormatError:
            pass
        else:
            raise SystemExit(f"{name}: accepted")
        seconds = time.process_time() - start
        if seconds > ALLOWED_SECONDS:
            raise SystemExit(f"{name}: {seconds:.2f} s of processor time")
        if status.exists():
            resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        checked += 1
        if len(sys.argv) > 2:
            now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            print(f"{seconds:6.3f} s {now - peak:8d} KB {name}")
            peak = now
    print(f"{checked} refused")


def test_every_hostile_file_is_cheap(tmp_path: Path) -> None:
    shown = python("-m", "tests.checkpoint.test_limits", tmp_path)
    cases = len(corpus.hostile_gguf()) + len(corpus.hostile_safetensors()) + len(hostile_models())
    assert int(shown.split()[0]) > 2 * cases


if __name__ == "__main__":
    main(Path(sys.argv[1]))
