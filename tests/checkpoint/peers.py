"""The behaviour of the `gguf` and `safetensors` packages on the hostile files that ruvllm refuses.

    python -m tests.checkpoint.peers [--markdown]

Each file is opened, and every tensor read, in a process of its own: at most 1 GB of memory and ten seconds of work.
"""

from __future__ import annotations

import argparse
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.checkpoint import corpus

SECONDS = 10
MEMORY = 1 << 30  # bytes, beyond what the interpreter and the packages take



def open_gguf(path: str) -> None:
    import gguf

    reader = gguf.GGUFReader(path)
    for field in reader.fields.values():
        field.contents()
    for tensor in reader.tensors:
        gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def open_safetensors(path: str) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        file.metadata()
        for name in file.keys():
            file.get_tensor(name)


def open_ruvllm(path: str) -> None:
    from ruvllm.checkpoint.gguf import GGUFFile
    from ruvllm.checkpoint.safetensors import SafetensorsFile

    with (GGUFFile if path.endswith(".gguf") else SafetensorsFile)(path) as file:
        for name in file.tensors:
            file.tensor(name).float32()


READERS: dict[str, Callable[[str], None]] = {
    "gguf": open_gguf, "safetensors": open_safetensors, "ruvllm": open_ruvllm,
}  # fmt: skip


def files() -> Iterator[tuple[str, str, bytes]]:
    """(peer, "row NN name", bytes) of every hostile file; every prefix of a sound one is row 3 (44 for safetensors)."""
    for case in corpus.hostile_gguf():
        yield "gguf", str(case), case.data
    whole = corpus.small_gguf(data=bytes(32 + 68))
    for length in range(4, len(whole), 9):
        yield "gguf", f"row03-cut-at-{length}", whole[:length]
    for case in corpus.hostile_safetensors():
        yield "safetensors", str(case), case.data


def outcome(reader: str, path: Path) -> str:
    """The outcome: "accepts", "refuses" (and the error), "hangs", "memory" or "crashes" (and the signal)."""
    command = [sys.executable, "-m", "tests.checkpoint.peers", "--open", reader, str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60 * SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return "hangs"
    last = (done.stderr.strip().splitlines() or [""])[-1]
    if done.returncode == -signal.SIGXCPU:
        return "hangs"
    if done.returncode < 0:
        return f"crashes (signal {-done.returncode})"
    if done.returncode == 0:
        return "accepts"
    name = last.split(":")[0].split(".")[-1]
    return "memory" if name in ("MemoryError", "_ArrayMemoryError") else f"refuses ({name})"


def _open(reader: str, path: str) -> None:
    """In the process of its own."""
    import gguf
    import safetensors

    import ruvllm.checkpoint.loader

    del gguf, safetensors, ruvllm
    spent = int(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (spent + SECONDS, resource.RLIM_INFINITY))
    taken = Path("/proc/self/statm")
    if taken.exists():
        data = int(taken.read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (data + MEMORY, resource.RLIM_INFINITY))
    READERS[reader](path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--open", nargs=2, metavar=("READER", "FILE"), help=argparse.SUPPRESS)
    parser.add_argument("--markdown", action="store_true", help="one line for each row of the table, as Markdown")
    arguments = parser.parse_args()
    if arguments.open:
        _open(*arguments.open)
        return
    totals: Counter[tuple[str, str]] = Counter()
    found: dict[str, tuple[str, str]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for peer, name, data in files():
            path = Path(directory) / ("model.gguf" if peer == "gguf" else "model.safetensors")
            path.write_bytes(data)
            theirs, ours = outcome(peer, path), outcome("ruvllm", path)
            found[name] = (theirs, ours)
            totals[peer, theirs.split(" ")[0]] += 1
            totals[f"ruvllm ({peer} files)", ours.split(" ")[0]] += 1
            if not arguments.markdown:
                print(f"{name:32s} {peer:12s} {theirs:32s} ruvllm {ours}", flush=True)
    if arguments.markdown:
        print("| file | peer | ruvllm |\n|---|---|---|")
        for name, (theirs, ours) in found.items():
            print(f"| {name} | {theirs} | {ours} |")
    print()
    for (reader, what), count in sorted(totals.items()):
        print(f"{count:5d} {reader}: {what}")


if __name__ == "__main__":
    main()
