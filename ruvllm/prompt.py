"""What a prompt may be, and what becomes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ruvllm.brief import brief

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message] | np.ndarray


@dataclass(frozen=True)
class Encoded:
    """The token ids (T,) of a prompt, and whether it is a chat."""

    ids: np.ndarray
    is_chat: bool

    __repr__ = brief
