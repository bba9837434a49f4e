"""Model files of the benchmarks: a fetched one, and llama.cpp's conversions of it; each is made once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ruvllm.checkpoint.hub import pull
from ruvllm.measure.engines import LlamaCpp
from ruvllm.paths import cache_directory

MODEL = "smollm2-135m"
FETCHED = "Q4_1"  # the type of the fetched file
# llama_ftype of the types that llama.cpp converts it to.
FTYPES = {"F32": 0, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18}
TYPES = (FETCHED, *(name for name in FTYPES if name != FETCHED))


def directory() -> Path:
    """The directory of these files, in the user's cache; created if missing."""
    path = cache_directory() / "benchmarks"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def made_once(target: Path, make: Callable[[Path], None]) -> Path:
    """``target``; if missing, written under another name and then renamed, so that it is never incomplete."""
    if not target.exists():
        partial = target.with_name(f".{os.getpid()}-{target.name}")
        try:
            make(partial)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    return target


def smollm2(kind: str, llama: LlamaCpp | None) -> Path | None:
    """SmolLM2-135M-Instruct as one of TYPES; None if llama.cpp would have to convert it and is not installed.

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
