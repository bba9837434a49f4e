"""A tiny model without a tokenizer, and a machine's limits as round numbers."""

import math
from pathlib import Path

from ruvllm.checkpoint.loader import open_checkpoint
from ruvllm.llm import LLM
from ruvllm.measure.peaks import Level, Peaks
from ruvllm.model import Llama
from tests.model import tiny

LIMITS = Peaks(
    2, 1e11, 4e11, (Level("L1", 32 << 10, 4e11), Level("L2", 1 << 20, 2e11), Level("memory", math.inf, 2e10))
)
IDS = [5, 9, 2, 11, 3, 7]


def loaded(case: str, layout: str = "f32") -> LLM:
    """A tiny model with no tokenizer, from its file."""
    path = tiny.directory(case)
    with open_checkpoint(path) as checkpoint:
        return LLM(Llama(checkpoint.config, checkpoint, layout, threads=1), NoText(), Path(path))


class NoText:
    """A tokenizer that turns every token into nothing."""

    eos_ids = ()

    def stream_decoder(self, **_):
        return self

    def push(self, token):
        return ""

    def finish(self):
        return ""
