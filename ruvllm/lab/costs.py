"""cost(config): memory, bytes and arithmetic of a token, and the tokens/s that this machine's limits allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ruvllm.brief import brief
from ruvllm.display import Table, axis
from ruvllm.lab.work import PassWork, pass_work
from ruvllm.machine import size
from ruvllm.measure.peaks import Peaks, measured_peaks
from ruvllm.model.config import ModelConfig
from ruvllm.model.kv_blocks import DTYPES as KV_DTYPES
from ruvllm.model.kv_size import cache_bytes, chosen_kv
from ruvllm.model.ops.schedule import Step
from ruvllm.model.presets import PRESETS
from ruvllm.model.replay import recorded
from ruvllm.model.weights import INTEGER_LAYOUTS, LAYOUTS, weight_bytes


@dataclass(frozen=True)
class Layout:
    """The cost under one layout of weights.

    weights, cache: bytes in memory, of the cache at the context's length. bytes_per_token, flops_per_token: read and
    computed for one token at the end of the context. bytes_of_prompt: weights that a prompt of the context's length
    reads, each once. decode, prefill: tokens/s that the limits allow. limit: what bounds decoding, "memory" or
    "arithmetic".
    """

    name: str
    weights: int
    cache: int
    bytes_per_token: float
    flops_per_token: float
    bytes_of_prompt: float
    decode: float
    prefill: float
    limit: str


@dataclass(frozen=True)
class Cost(Table):
    """What a model costs at a context of ``context`` tokens, by layout of weights.

    parameters: all; active: those used for one token, fewer for a mixture of experts.
    """

    name: str
    parameters: int
    active: int
    context: int
    peaks: Peaks
    layouts: tuple[Layout, ...]

    __repr__ = brief

    def __getitem__(self, layout: str) -> Layout:
        return {x.name: x for x in self.layouts}[layout]

    def heading(self) -> str:
        """One line: the model, and the machine's limits."""
        threads = f"{self.peaks.threads} thread{'s' * (self.peaks.threads > 1)}"
        memory = f"memory {self.peaks.memory / 1e9:.0f} GB/s"
        active = f" ({self.active / 1e9:.2f} B active)" if self.active < self.parameters else ""
        return (
            f"{self.name}: {self.parameters / 1e9:.2f} B parameters{active}, context {self.context:,}; "
            f"bounds for {threads} of this machine ({memory}, {self.peaks.fma / 1e9:.0f} GFLOP/s float32, "
            f"{self.peaks.int8_dot / 1e9:.0f} GOP/s int8)"
        )

    def rows(self) -> list[tuple[str, ...]]:
        """A table, as text; the first row has the headings."""
        found: list[tuple[str, ...]] = [
            (
                "weights", "memory", "KV cache", "read per token", "GFLOP per token", "decode tok/s <=",
                "prefill tok/s <=", "decode bound by",
            )
        ]  # fmt: skip
        return found + [
            (
                x.name, size(x.weights), size(x.cache), size(x.bytes_per_token), f"{x.flops_per_token / 1e9:.2f}",
                f"{x.decode:.1f}", f"{x.prefill:.1f}", x.limit,
            )
            for x in self.layouts
        ]  # fmt: skip

    def plot(self, ax: Any = None) -> Any:
        """Bounds of decoding and prefill by layout; returns the matplotlib axis."""
        ax = axis(ax)
        for shift, what in ((-0.2, "decode"), (0.2, "prefill")):
            bars = ax.bar([i + shift for i in range(len(self.layouts))], [getattr(x, what) for x in self.layouts], 0.4)
            bars.set_label(what)
            ax.bar_label(bars, fmt="%.3g", padding=2)
        ax.set_xticks(range(len(self.layouts)), [x.name for x in self.layouts])
        ax.set_yscale("log")
        ax.set_ylim(top=4 * max(max(x.decode, x.prefill) for x in self.layouts))  # room for labels and the legend
        ax.set_ylabel("tokens/s at most")
        ax.set_title(f"{self.name}, context {self.context:,}")
        ax.legend(frameon=False, loc="upper left", ncols=2)
        return ax


def cost(
    config: ModelConfig | str,
    weights: str | Sequence[str] = LAYOUTS,
    context: int = 1024,
    kv: str = "auto",
    peaks: Peaks | None = None,
) -> Cost:
    """Memory, bytes and arithmetic of a model per token, and the tokens/s that this machine's limits allow.

    decode <= 1 / max(bytes / read bandwidth, arithmetic / peak); prefill <= context / the same of a prompt of that
    length, whose tokens see half of it on average, and of which only the last needs the head; where

    - bytes = all weights (of the embedding one row for each token) + keys and values of the context, or of the window;
    - arithmetic = 2 N K of each matrix + 4 context H D of each layer's attention, at the float32 peak; matrices of
      integers at the integer peak;
    - of a mixture, a token uses the experts that it is sent to, a prompt as many as its tokens can reach.

    The operations are those of the layer code: see ``lab.work``.

    Args:
        config: a configuration, or the name of a known one ("llama3-8b").
        weights: one or several of LAYOUTS.
        context: tokens that are in the cache.
        kv: precision of the KV cache, see ``KVCache``; "auto": "f32" with float32 weights, else "f16".
        peaks: limits; None measures those of this machine, once in a process (three seconds).

    Raises:
        TypeError: not a configuration, or a context that is not an integer.
        ValueError: an unknown name, layout or kv, or context < 1.
    """
    if isinstance(config, str):
        if config.lower() not in PRESETS:
            raise ValueError(f"config: expected a ModelConfig or one of {', '.join(PRESETS)}, found {config!r}")
        config = PRESETS[config.lower()]
    if not isinstance(config, ModelConfig):
        raise TypeError(f"config: expected a ModelConfig or a name, found {type(config).__name__}")
    if not isinstance(context, int):
        raise TypeError(f"context: expected an integer, found {context!r}")
    if kv not in ("auto", *KV_DTYPES):
        raise ValueError(f"kv: expected one of {', '.join(('auto', *KV_DTYPES))}, found {kv!r}")
    if context < 1:
        raise ValueError(f"context: expected at least 1, found {context}")
    chosen = (weights,) if isinstance(weights, str) else tuple(weights)
    for layout in chosen:
        if layout not in LAYOUTS:
            raise ValueError(f"weights: expected some of {', '.join(LAYOUTS)}, found {layout!r}")
    peaks = peaks or measured_peaks()
    steps = recorded(config, ["f32"]).schedule.steps
    found = tuple(_layout(config, steps, layout, context, kv, peaks) for layout in chosen)
    name, active = config.name or "model", config.active_parameter_count()
    return Cost(name, config.parameter_count(), active, context, peaks, found)


def _layout(config: ModelConfig, steps: Sequence[Step], layout: str, context: int, kv: str, peaks: Peaks) -> Layout:
    kv = chosen_kv(kv, [layout])
    token = pass_work(config, steps, layout, np.array([context - 1]), kv)
    prompt = pass_work(config, steps, layout, np.arange(context), kv)
    nbytes = token.weights + token.cached
    waiting, computing = nbytes / peaks.bandwidth(nbytes), _seconds(token, layout, peaks)
    reading = prompt.weights / peaks.bandwidth(prompt.weights)
    return Layout(
        name=layout, weights=weight_bytes(config, layout), cache=cache_bytes(config, context, kv),
        bytes_per_token=nbytes, flops_per_token=token.flops, bytes_of_prompt=prompt.weights,
        decode=1 / max(computing, waiting), prefill=context / max(reading, _seconds(prompt, layout, peaks)),
        limit="memory" if waiting > computing else "arithmetic",
    )  # fmt: skip


def _seconds(work: PassWork, layout: str, peaks: Peaks) -> float:
    """The arithmetic at its peaks."""
    return work.products / (peaks.int8_dot if layout in INTEGER_LAYOUTS else peaks.fma) + work.attention / peaks.fma
