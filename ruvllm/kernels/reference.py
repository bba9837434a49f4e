"""Every kernel in plain NumPy float64: the oracle that tests and the laboratory compare with."""

from typing import Any

import numpy as np


def rms_norm(x: Any, weight: Any, eps: float = 1e-5) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    x = np.asarray(x, np.float64)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * np.asarray(weight, np.float64)
