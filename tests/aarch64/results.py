"""Results to be compared between processors: integers, kernels, and a real model's logits.

``python -m tests.aarch64.results MODEL LOGITS`` prints hashes as JSON, and writes the logits to a file.
"""

import json
import sys
from pathlib import Path

import numba
import numpy as np

from tests.aarch64 import recorder  # noqa: F401  it begins where a file is named
from tests.kernels import quant_cases, spec_cases
from tests.model.model_cases import load, run

IDS = (504, 5535, 314, 260, 30, 198, 42, 7)


def logits_of(model: Path, layout: str) -> np.ndarray:
    """Logits of a prompt of six tokens and of the two after it."""
    llama = load(model, layout, threads=1)
    return run(llama, llama.new_cache(8), np.array(IDS), [6, 1, 1])


if __name__ == "__main__":
    numba.set_num_threads(1)
    found = {"integers": quant_cases.check_integers((1, 6, 13)), "rounding": quant_cases.check_rounding()}
    np.save(sys.argv[2], np.stack([logits_of(Path(sys.argv[1]), layout) for layout in ("auto", "f32")]))
    print(json.dumps(found | spec_cases.digest()))
