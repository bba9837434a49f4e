"""RoPE frequencies with every scaling rule, and tables of cosines and sines: plain NumPy, once per model.

Angles are float64 throughout: at position 131071 a float32 angle is off by 3e-3.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ruvllm.kernels import check

_LARGEST_HEAD = 1 << 16


def rope_inv_freq(
    head_dim: int,
    theta: float = 10000.0,
    scaling: str | None = None,
    factor: float = 1.0,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    original_max_position: int = 8192,
    factors: Sequence[float] | np.ndarray | None = None,
) -> np.ndarray:
    """inv_freq[i] = theta^(-2i/D), radians per position of pair i, after scaling.

    - ``None``: as it stands.
    - ``"linear"``: inv_freq / factor (positions interpolated).
    - ``"ntk"``: theta' = theta factor^(D/(D-2)), so that the slowest pair is slowed by ``factor``, the fastest not.
    - ``"llama3"``: with wavelength w = 2 pi / inv_freq and L = original_max_position: inv_freq where
      w < L / high_freq_factor; inv_freq / factor where w > L / low_freq_factor; between them
      ((1 - s) / factor + s) inv_freq with s = (L / w - low_freq_factor) / (high_freq_factor - low_freq_factor).
    - ``"factors"``: inv_freq / factors, one divisor per pair (the tensor ``rope_freqs`` of GGUF files).
    - ``"yarn"``: a pair that makes r rotations within L = original_max_position keeps inv_freq where r is above
      high_freq_factor and gets inv_freq / factor where r is below low_freq_factor ("beta_fast" and "beta_slow", usually
      32 and 1); between the two indices i that belong to these, rounded outwards to integers, both are mixed in
      proportion to i.
    - ``"yarn_unrounded"``: the same with indices that are not rounded.

    Args:
        head_dim: D, even (of a partly rotated head the number of elements that are rotated).
        theta: base of the frequencies, > 0.

    Returns:
        (D/2,) float64.

    Raises:
        ValueError: an unknown scaling, an odd head_dim, a number that is not positive, or factors of a wrong length.

    Source: Su et al. 2021, "RoFormer"; Chen et al. 2023, "Extending Context Window of Large Language Models via
    Positional Interpolation" (linear); bloc97 2023, "NTK-aware scaled RoPE"; Llama 3.1 (llama3, as in transformers);
    Peng et al. 2023, "YaRN: Efficient Context Window Extension of Large Language Models".
    """
    head_dim = check.integer("head_dim", head_dim)
    if not 2 <= head_dim <= _LARGEST_HEAD or head_dim % 2:
        raise ValueError(f"head_dim: expected an even number from 2 to {_LARGEST_HEAD}, found {head_dim}")
    theta = check.positive("theta", theta)
    factor = check.positive("factor", factor)
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    if scaling == "ntk" and head_dim > 2:
        theta *= factor ** (head_dim / (head_dim - 2))
    inv_freq: np.ndarray = theta**-exponents
    if scaling is None or scaling == "ntk":
        return inv_freq
    if scaling == "linear":
        return inv_freq / factor
    if scaling == "llama3":
        low = check.positive("low_freq_factor", low_freq_factor)
        high = check.positive("high_freq_factor", high_freq_factor)
        length = check.positive("original_max_position", original_max_position)
        if high <= low:
            raise ValueError(f"high_freq_factor: expected more than low_freq_factor {low}, found {high}")
        rotations = length * inv_freq / (2 * np.pi)  # L / wavelength
        smooth = np.clip((rotations - low) / (high - low), 0, 1)
        return ((1 - smooth) / factor + smooth) * inv_freq
    if scaling == "factors":
        divisors = check.float64("factors", factors if factors is not None else ())
        if divisors.shape != inv_freq.shape or not np.all(divisors > 0):
            raise ValueError(f"factors: expected {len(inv_freq)} positive numbers, found shape {divisors.shape}")
        return inv_freq / divisors
    if scaling in ("yarn", "yarn_unrounded"):
        length = check.positive("original_max_position", original_max_position)
        first, last = (
            head_dim * np.log(length / (check.positive(name, rotations) * 2 * np.pi)) / (2 * np.log(theta))
            for name, rotations in (("high_freq_factor", high_freq_factor), ("low_freq_factor", low_freq_factor))
        )
        if scaling == "yarn":
            first, last = np.floor(first), np.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        stretched = np.clip((np.arange(head_dim // 2) - first) / max(last - first, 0.001), 0, 1)
        return inv_freq / factor * stretched + inv_freq * (1 - stretched)
    expected = "None, 'linear', 'ntk', 'llama3', 'factors', 'yarn' or 'yarn_unrounded'"
    raise ValueError(f"scaling: expected {expected}, found {scaling!r}")


def rope_tables(
    positions: Any, head_dim: int, *frequencies: Any, out: tuple[np.ndarray, np.ndarray] | None = None, **scaling: Any
) -> tuple[np.ndarray, np.ndarray]:
    """cos[t, i] = cos(positions[t] inv_freq[i]), and sin alike; frequencies as in ``rope_inv_freq``.

    Args:
        positions: (T,) integers.
        head_dim: D, even. ``frequencies`` and ``scaling`` are the other arguments of ``rope_inv_freq``.
        out: (cos, sin), each (T, D/2) float32, to write into.

    Returns:
        (cos, sin), each (T, D/2) float32, from float64 angles.

    Raises:
        TypeError: positions are not integers, or ``out`` is not a pair of float32 arrays.
        ValueError: as ``rope_inv_freq``; or ``out`` has another shape.
    """
    angles = check.integers("positions", positions)[:, None] * rope_inv_freq(head_dim, *frequencies, **scaling)
    if out is not None and (not isinstance(out, tuple | list) or len(out) != 2):
        raise TypeError(f"out: expected two arrays, (cos, sin), found {type(out).__name__}")
    cos, sin = (check.output("out", table, angles.shape) for table in out or (None, None))
    cos[:], sin[:] = np.cos(angles), np.sin(angles)
    return cos, sin
