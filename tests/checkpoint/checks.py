"""Checks of opened models: their configuration, their logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ruvllm.checkpoint.loader import Checkpoint, open_checkpoint
from ruvllm.model.config import ModelConfig
from ruvllm.model.reference import reference_logits
from tests.model import tiny

# Tolerance between the float64 reference and transformers in float32; a wrong model differs by whole units.
TOLERANCE = 2e-4


def close_to_golden(checkpoint: Checkpoint, case: str) -> None:
    ids, expected = tiny.golden(case)
    found = reference_logits(checkpoint, ids)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    assert (found.argmax(1) == expected.argmax(1)).all()


def config_of(path: Path) -> ModelConfig:
    with open_checkpoint(path) as checkpoint:
        return checkpoint.config
