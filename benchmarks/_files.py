"""Model files of the benchmarks: the fetched one, what llama.cpp makes of it, a synthetic one; each made once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from benchmarks._engines import LlamaCpp
from ruvllm.checkpoint.hub import pull
from ruvllm.paths import cache_directory

MODEL = "smollm2-135m"
FETCHED = "Q4_1"  # the type that the fetched file has
# llama.cpp's numbers (llama_ftype) of the types that it makes of the fetched file.
FTYPES = {"F32": 0, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18}
TYPES = (FETCHED, *(name for name in FTYPES if name != FETCHED))


def directory() -> Path:
    """Where made files are kept, in the user's cache; created."""
    path = cache_directory() / "benchmarks"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def made_once(target: Path, make: Callable[[Path], None]) -> Path:
    """``target``, made beside itself and then renamed, unless it is there: never half a file."""
    if not target.exists():
        partial = target.with_name(f".{os.getpid()}-{target.name}")
        try:
            make(partial)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    return target


def smollm2(kind: str, llama: LlamaCpp | None) -> Path | None:
    """SmolLM2-135M-Instruct as one of TYPES; None where it would have to be made, and llama.cpp is not there.

    The Q4_0, Q8_0, Q4_K_M ... files are requantised from the Q4_1 one by llama.cpp's own ``llama_model_quantize``.
    """
    source = pull(MODEL)
    if kind == FETCHED:
        return source
    target = directory() / f"{MODEL}.{kind}.gguf"
    if llama is None:
        return target if target.exists() else None
    threads = os.cpu_count() or 1
    return made_once(
        target,
        lambda partial: llama.call(
            "quantize", source=str(source), target=str(partial), ftype=FTYPES[kind], threads=threads
        ),
    )


def seven_b() -> Path:
    """The LLaMA-2-7B-shaped random Q4_0 file, 3.8 GB."""
    from benchmarks.make_7b import SEVEN_B, write

    return made_once(directory() / "llama2-7b-shape.Q4_0.gguf", lambda partial: write(partial, SEVEN_B))
