"""Results whose bits must be those of every processor: integers, kernels, and a real model's logits.

``python -m tests.aarch64.results MODEL`` prints them as JSON.
"""

import hashlib
import json
import sys
from pathlib import Path

from tests.aarch64 import recorder  # noqa: F401  it begins where a file is named
from tests.kernels import quant_cases, spec_cases
from tests.model.model_cases import load, run

IDS = (504, 5535, 314, 260, 30, 198, 42, 7)


def logits_of(model: Path) -> str:
    """A hash of the logits of a prompt of six tokens and of the two after it."""
    import numpy as np

    llama = load(model, threads=1)
    return hashlib.sha256(run(llama, llama.new_cache(8), np.array(IDS), [6, 1, 1]).tobytes()).hexdigest()


if __name__ == "__main__":
    import numba

    numba.set_num_threads(1)
    found = {"integers": quant_cases.check_integers((1, 6, 13)), "rounding": quant_cases.check_rounding()}
    found |= {"logits": logits_of(Path(sys.argv[1]))} | spec_cases.digest()
    print(json.dumps(found))
