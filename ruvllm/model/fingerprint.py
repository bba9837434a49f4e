"""A fingerprint of a model: equal for models whose keys and values of a token are the same bits."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from ruvllm.model.layer import parts


def fingerprint(model: Any) -> str:
    """Hexadecimal digest of configuration, layouts, all vectors, three rows of each matrix, and active adapters.

    Three rows tell two trainings of a model apart, whose matrices differ everywhere, without reading all of them.
    """
    state = hashlib.sha256(repr(vars(model.config)).encode())
    for name, linear in model.linears().items():
        rows = np.array([0, linear.rows // 2, linear.rows - 1])
        state.update(f"{name} {linear.layout}".encode())
        state.update(linear.take(rows).tobytes())
        if linear.bias is not None:
            state.update(linear.bias.tobytes())
    for part in parts(model.decoder):
        if isinstance(part, np.ndarray):
            state.update(part.tobytes())
    for name, adapter in ({} if model.adapters is None else model.adapters.matrices).items():
        for array in (adapter.down, adapter.up, adapter.scales):
            state.update(name.encode() + array.tobytes())
    return state.hexdigest()
