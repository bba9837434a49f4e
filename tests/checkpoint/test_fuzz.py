"""A few thousand mutated files, the same for every run; ``python -m tests.fuzz`` goes on for as long as one likes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests import fuzz

# Files per target, and how many of them must still open for the mutations to be worth something.
COUNTS = {
    "gguf": (2500, 100), "safetensors": (2500, 40), "model": (500, 20), "config": (500, 20), "index": (500, 2),
    "packed": (1000, 20), "tokenizer": (500, 20), "template": (500, 20),
    "adapter config": (400, 10), "adapter": (400, 10), "adapter gguf": (400, 10),
}  # fmt: skip


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, fuzz.Target]:
    return {target.name: target for target in fuzz.targets(tmp_path_factory.mktemp("fuzz"))}


@pytest.mark.parametrize("name", COUNTS)
def test_mutants_open_or_are_refused(name: str, targets: dict[str, fuzz.Target], tmp_path: Path) -> None:
    count, opened = COUNTS[name]
    outcomes = fuzz.run(targets[name], tmp_path, seed=2024, count=count)
    assert outcomes.total() == count
    assert outcomes["opened"] >= opened and outcomes["refused"] >= count // 2


def test_every_target_is_run(targets: dict[str, fuzz.Target]) -> None:
    assert targets.keys() == COUNTS.keys()


def test_other_errors_are_failures(targets: dict[str, fuzz.Target], tmp_path: Path) -> None:
    def breaks(path: Path, mmap: bool) -> None:
        raise IndexError("out of range")

    broken = fuzz.Target("gguf", targets["gguf"].seeds, "model.gguf", breaks)
    with pytest.raises(AssertionError, match="gguf, seed 5, mutant 0: IndexError"):
        fuzz.run(broken, tmp_path, seed=5, count=1, keep=tmp_path / "kept")
    expected = fuzz.mutate(*_first(broken, 5))
    assert (tmp_path / "kept" / "gguf-5-0").read_bytes() == expected


def _first(target: fuzz.Target, seed: int) -> tuple[random.Random, fuzz.Seed]:
    random_ = random.Random(f"{target.name} {seed} 0")
    return random_, random_.choice(target.seeds)
