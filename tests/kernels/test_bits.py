"""Results are the same bits on any number of threads, whether a process has compiled its kernels or found them."""

import json
from pathlib import Path
from typing import Any

from tests.processes import python


def _run(cache: Path, *arguments: str) -> tuple[dict[str, dict[str, Any]], int]:
    """The hashes for each number of threads, and how many kernels were compiled, by a process with this cache."""
    program = "-m", "tests.kernels.bits_cases", *arguments
    found: dict[str, Any] = json.loads(python(*program, RUVLLM_CACHE=str(cache), NUMBA_NUM_THREADS="2"))
    return found["hashes"], found["compiled"]


def test_bits_of_kernels(tmp_path: Path) -> None:
    """Also where a parallel kernel is compiled around a body that was in the cache."""
    cold, compiled = _run(tmp_path / "a", "kernels", "1", "2")
    assert compiled >= 12
    bodies, _ = _run(tmp_path / "b", "kernels", "1")
    parallel, compiled = _run(tmp_path / "b", "kernels", "2")
    assert compiled >= 5
    warm, compiled = _run(tmp_path / "b", "kernels", "1", "2")
    assert compiled == 0
    for name in cold["1"]:
        kernel = name.split(",")[0]
        found = {hashes[f"{kernel}, together"] for run in (cold, bodies, parallel, warm) for hashes in run.values()}
        found |= {hashes[f"{kernel}, alone"] for run in (cold, bodies, parallel, warm) for hashes in run.values()}
        assert len(found) == 1, kernel


def test_bits_of_a_model(tmp_path: Path) -> None:
    """Of the fused pass; layer by layer the bits are the same (tests/model/test_llama.py)."""
    cold, _ = _run(tmp_path, "model", "1", "2")
    warm, compiled = _run(tmp_path, "model", "1", "2")
    assert compiled == 0
    assert len({found for run in (cold, warm) for hashes in run.values() for found in hashes.values()}) == 1


def test_a_sum_is_the_same_code_in_every_kernel(tmp_path: Path) -> None:
    """LLVM chooses its order once: before a kernel is optimised, and without what is around the call."""
    sums = _run(tmp_path, "sums", "2")[0]["2"]
    for name in (
        "maximum", "sum_of_squares", "sum_of_products", "sum_of_few", "exp_and_sum", "mean_and_variance",
        "squares_and_products",
    ):  # fmt: skip
        (codes,) = (codes for symbol, codes in sums.items() if f"{len(name)}{name}" in symbol)
        assert len(set(codes)) == 1 < len(codes), name
