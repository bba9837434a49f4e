"""Continuous batching: many sequences on one model, which join and leave between passes."""

from ruvllm.batching.engine import Engine
from ruvllm.batching.sequence import Embedded, Generated, Scored, Sequence

__all__ = ["Embedded", "Engine", "Generated", "Scored", "Sequence"]
