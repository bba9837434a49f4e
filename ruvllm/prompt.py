"""What a prompt may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message] | np.ndarray
