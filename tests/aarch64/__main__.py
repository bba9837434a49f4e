"""The kernel and model tests on an emulated 64-bit ARM processor, and their results compared with this machine's.

``make test-aarch64``, or ``python -m tests.aarch64 [FOLDER]``: downloads and compiled code stay in FOLDER
(.venv-aarch64). It needs Debian or Ubuntu with the package qemu-user-static, and to be run by the version of Python
that the system has (/usr/bin/python3): Python for ARM comes from the system's packages, NumPy and numba for ARM from
PyPI, in the versions that run this.

1. This machine runs the tests and notes which functions they have compiled.
2. Those are compiled for the other processor here, which takes a twentieth of the time.
3. The emulated Python runs the tests. Its integers, kernels and logits must have the bits that they have here.

Emulation on x86 does not show what goes wrong where a processor orders its reads and writes more weakly.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

from ruvllm.checkpoint.hub import pull
from ruvllm.kernels.jit.private.target import FOREIGN
from tests.aarch64.recorder import read
from tests.kernels.spec_cases import BY_WIDTH

ROOT = Path(__file__).parents[2]
QEMU = "qemu-aarch64-static"
CPU, FEATURES = "neoverse-n1", "+aes,+crc,+dotprod,+fp-armv8,+fullfp16,+lse,+neon,+sha2"
TRIPLE = "aarch64-unknown-linux-gnu"
WHEELS = (
    "numpy", "numba", "llvmlite", "psutil", "threadpoolctl", "tokenizers", "huggingface_hub", "jinja2", "tqdm", "rich",
    "pytest", "pytest-xdist", "hypothesis", "ml_dtypes", "gguf", "safetensors", "sentencepiece",
)  # fmt: skip
PROCESSES = 2
# Files, and which of their tests; each line a process. Left out are those that start further processes, which would
# compile under emulation.
PIECES = (
    ("tests/kernels/test_quant.py", "not other_cpus and not instructions and not plain_python"),
    ("tests/kernels/test_simd.py tests/kernels/test_math.py", "not older and not dot_product"),
    ("tests/kernels/test_team.py", "not python_threads and not plain_python"),
    ("tests/kernels/test_attention.py", ""),
    ("tests/kernels/test_norm.py tests/kernels/test_activation.py tests/kernels/test_rope.py", ""),
    ("tests/kernels/test_specs.py", "named_sizes or odd_sizes"),
    ("tests/kernels/test_matmul.py tests/kernels/test_lora.py", ""),
    ("tests/model/test_llama.py tests/model/test_kv_cache.py", "not processes and not plain_python"),
)
LOGITS = 1e-3  # how far logits in float32 may be apart for that


class Stage:
    """Prints what begins, and its duration in wall time and processor time."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        self.start = time.perf_counter(), _processor_time()
        print(f"{self.what} ...", flush=True)

    def __exit__(self, *_: object) -> None:
        clock, processor = time.perf_counter() - self.start[0], _processor_time() - self.start[1]
        print(f"    {clock:.0f} s, {processor:.0f} s of a core", flush=True)


def _processor_time() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _run(command: list[str], log: Path, **settings: str) -> str:
    """The output of a program. Exits if it fails."""
    with log.open("w") as file:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | settings, stdout=subprocess.PIPE, stderr=file, text=True, check=False
        )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-3000:]}\n{log.read_text()[-3000:]}")
    return done.stdout


class Emulated:
    """A Python for ARM in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.python = folder, folder / "python"
        self.cache, self.record, self.logs = folder / "cache", folder / "compiled", folder / "logs"
        # Machine code of either Python is the same wherever these are.
        self.settings = {"NUMBA_CPU_NAME": CPU, "NUMBA_CPU_FEATURES": FEATURES, "NUMBA_ENABLE_AVX": "1"}

    def set_up(self) -> None:
        """Fetch and unpack what is not there yet."""
        wanted = "\n".join(f"{name}=={version(name)}" for name in WHEELS)
        ready = self.folder / "ready"
        if ready.exists() and ready.read_text() == wanted:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in ("apt/state/lists/partial", "apt/cache/archives/partial", "root", "wheels", "site", "logs"):
            (self.folder / name).mkdir(parents=True)
        self._unpack_system()
        self._unpack_wheels(wanted.split())
        self.python.write_text(
            f'#!/bin/sh\nexport PYTHONPATH="{ROOT}:{self.folder}/site"\n'
            f'exec {QEMU} -cpu max,sve=off,sme=off -L "{self.folder}/root" -0 "$0" "{self._interpreter()}" "$@"\n'
        )
        self.python.chmod(0o755)
        ready.write_text(wanted)

    def _unpack_system(self) -> None:
        apt, log = self.folder / "apt", self.folder / "logs" / "apt"
        (apt / "status").touch()
        configuration = apt / "configuration"
        configuration.write_text(
            'APT::Architecture "arm64";\nAPT::Architectures { "arm64"; };\n'
            f'Dir::State "{apt}/state";\nDir::State::status "{apt}/status";\nDir::Cache "{apt}/cache";\n'
        )
        command = ["apt-get", "-c", str(configuration)]
        _run([*command, "update"], log)
        packages = ["python3", "libgomp1", "libstdc++6"]
        _run([*command, "install", "--no-install-recommends", "-y", "--download-only", *packages], log)
        for package in sorted((apt / "cache" / "archives").glob("*.deb")):
            _run(["dpkg", "-x", str(package), str(self.folder / "root")], log)

    def _unpack_wheels(self, wanted: list[str]) -> None:
        log, to = self.folder / "logs" / "pip", self.folder / "wheels"
        here = f"{sys.version_info.major}.{sys.version_info.minor}"
        platforms = [f"--platform=manylinux{name}_aarch64" for name in ("2014", "_2_17", "_2_27", "_2_28")]
        options = ["--only-binary=:all:", f"--python-version={here}", "--implementation=cp", *platforms]
        _run([sys.executable, "-m", "pip", "download", "-q", *options, "-d", str(to), *wanted], log)
        for wheel in sorted(to.glob("*.whl")):
            _run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(self.folder / "site")], log)

    def _interpreter(self) -> Path:
        found = self.folder / "root" / "usr" / "bin" / f"python3.{sys.version_info.minor}"
        if not found.exists():
            there = ", ".join(path.name for path in found.parent.glob("python3.*"))
            raise SystemExit(f"this system has {there} for ARM: run this by the same version, as /usr/bin/python3 is")
        return found

    def precompile(self) -> None:
        """Compile natively what was recorded."""
        told = _run([str(self.python), "-c", "import sys; print(sys.version)"], self.logs / "version").strip()
        settings = {"RUVLLM_CACHE": str(self.cache), FOREIGN: f"{TRIPLE} {CPU} {FEATURES}", "NUMBA_ENABLE_AVX": "1"}
        module, count = [sys.executable, "-m", "tests.aarch64.precompile", str(self.record)], str(PROCESSES)
        with ThreadPoolExecutor(PROCESSES) as pool:
            parts = range(PROCESSES)
            for text in pool.map(
                lambda i: _run([*module, str(i), count, told], self.logs / f"precompile-{i}", **settings), parts
            ):
                print("    " + text.strip().splitlines()[-1])

    def run(self, *arguments: str, log: str) -> str:
        """Run its Python."""
        return _run(
            [str(self.python), *arguments], self.logs / log, RUVLLM_CACHE=str(self.cache), PYTHONDONTWRITEBYTECODE="1",
            **self.settings,
        )  # fmt: skip


def _log(where: str, piece: tuple[str, str]) -> str:
    return f"{where}-{Path(piece[0].split()[0]).stem}"


def _pytest(piece: tuple[str, str]) -> list[str]:
    files, chosen = piece
    return ["-m", "pytest", "-q", "--durations=5", *files.split(), "-k", chosen]


def _native(emulated: Emulated, *arguments: str, log: str) -> str:
    settings = {"RECORD_COMPILED": str(emulated.record)}
    return _run([sys.executable, *arguments], emulated.logs / log, **settings)


def main(folder: Path) -> None:
    if shutil.which(QEMU) is None or shutil.which("apt-get") is None:
        raise SystemExit(f"needs {QEMU}: on Debian or Ubuntu, apt-get install qemu-user-static")
    begin = time.perf_counter()
    emulated = Emulated(folder)
    with Stage(f"a Python for ARM in {folder}"):
        emulated.set_up()
    emulated.record.unlink(missing_ok=True)
    results = ["-m", "tests.aarch64.results", str(pull("smollm2-135m"))]
    logits = [str(folder / "logits-here.npy"), str(folder / "logits-there.npy")]
    recorded = ["-p", "tests.aarch64.recorder"]
    with Stage("the tests on this machine"), ThreadPoolExecutor(PROCESSES) as pool:
        expected = pool.submit(_native, emulated, *results, logits[0], log="results-here")
        natively = partial(_native, emulated)
        list(pool.map(lambda piece: natively(*_pytest(piece), *recorded, log=_log("here", piece)), PIECES))
        here = json.loads(expected.result())
    with Stage(f"compiling {len(read(emulated.record))} functions for {CPU}"):
        emulated.precompile()
    with Stage(f"the tests on an emulated {CPU}"), ThreadPoolExecutor(PROCESSES) as pool:
        found = pool.submit(emulated.run, *results, logits[1], log="results-there")
        texts = pool.map(lambda piece: emulated.run(*_pytest(piece), log=_log("there", piece)), PIECES)
        for piece, text in zip(PIECES, texts, strict=True):
            print(f"    {piece[0]}: {text.strip().splitlines()[-1]}", flush=True)
        there = json.loads(found.result())
    differ = {name for name in here if here[name] != there[name]}
    print(f"{len(here) - len(differ)} of {len(here)} results have the same bits as here; others: {sorted(differ)}")
    # With rounded activations one last bit may become a step of a 127th: there the likeliest tokens are compared.
    (rounded, floats), (rounded_there, floats_there) = (np.load(path) for path in logits)
    distance = float(np.abs(floats - floats_there).max())
    same_tokens = bool((rounded.argmax(-1) == rounded_there.argmax(-1)).all())
    print(f"logits: {distance:.1e} apart at most in float32; {time.perf_counter() - begin:.0f} s in all")
    if differ - BY_WIDTH or not distance <= LOGITS or not same_tokens:
        raise SystemExit(f"expected the same bits of {sorted(differ - BY_WIDTH)} and tokens, logits within {LOGITS}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / ".venv-aarch64").absolute())
