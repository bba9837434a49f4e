"""Write a GGUF file of LLaMA-2-7B's shape with random Q4_0 weights: it runs as fast as the real model.

python -m benchmarks.make_7b [FILE]     (3.8 GB; default: in the cache directory, where benchmarks.peers looks)

Codes are uniform, scales such that activations neither vanish nor overflow; the vocabulary is made up, the output
meaningless.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from benchmarks._files import directory, made_once
from ruvllm.checkpoint.storage import BLOCKS
from ruvllm.measure import gguf_file
from ruvllm.model.config import ModelConfig
from ruvllm.model.presets import PRESETS

SEVEN_B = PRESETS["llama2-7b"]
GROUP, BLOCK_BYTES = BLOCKS["Q4_0"]
CODE_DEVIATION = 4.61  # standard deviation of the integers -8 .. 7, all equally likely


def random_blocks(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Q4_0 rows (rows, bytes) uint8 whose weights have the standard deviation 1 / sqrt(columns)."""
    blocks = np.frombuffer(rng.bytes(rows * columns // GROUP * BLOCK_BYTES), np.uint8).reshape(-1, BLOCK_BYTES).copy()
    scale = 1 / (CODE_DEVIATION * np.sqrt(columns))
    scales = rng.uniform(0.5 * scale, 1.3 * scale, len(blocks)).astype(np.float16)
    blocks[:, :2] = scales[:, None].view(np.uint8)
    return blocks.reshape(rows, -1)


def write(path: Path, config: ModelConfig, seed: int = 0, progress: bool = True) -> None:
    """Write the file, a tensor at a time.

    Raises:
        ValueError: a matrix's columns are not a multiple of 32.
    """
    rng, total = np.random.default_rng(seed), config.parameter_count()
    with tqdm(total=total, desc=f"writing {path.name}", unit="", unit_scale=True, disable=not progress) as bar:

        def stored(name: str, shape: tuple[int, ...]) -> np.ndarray:
            bar.update(math.prod(shape))
            return random_blocks(rng, *shape) if len(shape) == 2 else np.ones(shape, np.float32)

        gguf_file.write(path, config, "Q4_0", stored)


def seven_b() -> Path:
    """The LLaMA-2-7B-shaped file in the cache, 3.8 GB; written if missing."""
    return made_once(directory() / "llama2-7b-shape.Q4_0.gguf", lambda partial: write(partial, SEVEN_B))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        write(Path(sys.argv[1]), SEVEN_B)
    else:
        print(seven_b())
