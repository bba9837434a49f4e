"""scale(config): tokens/s of a model over several machines, by the bandwidth of each and the network between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil, inf, log2
from typing import Any

import numpy as np

from ruvllm.brief import brief
from ruvllm.display import Table, panels
from ruvllm.lab.work import pass_work
from ruvllm.machine import size
from ruvllm.measure.peaks import Peaks, measured_peaks
from ruvllm.model.checks import is_integer, is_number, require
from ruvllm.model.config import ModelConfig
from ruvllm.model.exchange import require_wire
from ruvllm.model.presets import PRESETS
from ruvllm.model.replay import recorded
from ruvllm.model.share import Share, shares_of
from ruvllm.model.weights import INTEGER_LAYOUTS, LAYOUTS, matrix_bytes

RANKS = (1, 2, 3, 4, 6, 8, 12, 16)
_WORTHWHILE = 1.05  # times the speed of the number of ranks before


@dataclass(frozen=True)
class Network:
    """latency: seconds from one rank to another; bandwidth: bytes/s of each rank, in and out.

    Raises ValueError for a latency below 0 or a bandwidth that is not above 0.
    """

    name: str
    latency: float
    bandwidth: float

    def __post_init__(self) -> None:
        ok = is_number(self.latency) and 0 <= self.latency < inf
        require("latency", self.latency, ok, "seconds, 0 or more")
        require("bandwidth", self.bandwidth, is_number(self.bandwidth) and self.bandwidth > 0, "bytes/s above 0")


# Usual figures of MPI over each: TCP on the first two Ethernets, RDMA on the last.
NETWORKS = (
    Network("shared memory", 1e-6, 8e9),
    Network("1 Gbit/s", 40e-6, 0.117e9),
    Network("10 Gbit/s", 20e-6, 1.17e9),
    Network("100 Gbit/s", 3e-6, 11.7e9),
)


@dataclass(frozen=True)
class Costs:
    """Seconds of what ranks do besides reading weights and waiting for the network; ``benchmarks.scale`` measures them.

    message: of leaving the compiled region for a message of a layer, and entering it again. token: of telling all ranks
    of a pass, of the embedding, and of collecting logits.
    """

    message: float = 7e-6
    token: float = 200e-6


@dataclass(frozen=True)
class Point:
    """A model on so many ranks: bytes of the largest share, seconds of a token, and of them those of the network."""

    model: str
    network: Network
    ranks: int
    nbytes: int
    seconds: float
    waiting: float

    @property
    def speed(self) -> float:
        """Tokens/s."""
        return 1 / self.seconds


@dataclass(frozen=True)
class Scaling(Table):
    """Decoding speeds by model, network and number of ranks, each a machine with the limits of ``peaks``."""

    weights: str
    context: int
    peaks: Peaks
    points: tuple[Point, ...]

    __repr__ = brief

    def heading(self) -> str:
        """One line: what a rank is."""
        return (
            f"decoding at {self.context:,} tokens, {self.weights} weights; each rank reads "
            f"{self.peaks.memory / 1e9:.0f} GB/s"
        )

    def curve(self, model: str, network: str) -> list[Point]:
        """The points of one model over one network, by number of ranks."""
        return [x for x in self.points if (x.model, x.network.name) == (model, network)]

    def pays_until(self, model: str, network: str) -> int:
        """The number of ranks after which the next larger one is less than 5 % faster."""
        curve = self.curve(model, network)
        for before, after in pairwise(curve):
            if after.speed < _WORTHWHILE * before.speed:
                return before.ranks
        return curve[-1].ranks

    def rows(self) -> list[tuple[str, ...]]:
        """A row for each model and network; the first has the headings."""
        counts = sorted({x.ranks for x in self.points})
        headings = (f"{n} rank{'s' * (n > 1)}" for n in counts)
        found: list[tuple[str, ...]] = [
            ("model", "network", *headings, "pays until", "waiting then", "share then"),
        ]
        for model, network in dict.fromkeys((x.model, x.network.name) for x in self.points):
            curve = {x.ranks: x for x in self.curve(model, network)}
            last = curve[self.pays_until(model, network)]
            speeds = (f"{curve[n].speed:.2f}" if n in curve else "-" for n in counts)
            waiting = f"{last.waiting / last.seconds:.0%}"
            found.append((model, network, *speeds, f"{last.ranks}", waiting, size(last.nbytes)))
        return found

    def plot(self, axes: Sequence[Any] | None = None) -> Sequence[Any]:
        """Tokens/s against ranks, a panel for each model; a ring where adding a machine stops paying."""
        models = list(dict.fromkeys(x.model for x in self.points))
        axes = panels(len(models), min(len(models), 3), 4.0) if axes is None else axes
        for ax, model in zip(axes, models, strict=True):
            for name in dict.fromkeys(x.network.name for x in self.points):
                curve = self.curve(model, name)
                (line,) = ax.plot([x.ranks for x in curve], [x.speed for x in curve], "o-", ms=3, label=name)
                last = next(x for x in curve if x.ranks == self.pays_until(model, name))
                ax.plot([last.ranks], [last.speed], "o", ms=9, mfc="none", color=line.get_color())
            ax.set(xscale="log", yscale="log", xlabel="ranks", title=model)
        axes[0].set_ylabel("tokens/s")
        axes[0].legend(frameon=False)
        return axes


def scale(
    config: ModelConfig | str | Sequence[ModelConfig | str] = ("llama3-8b", "llama3-70b", "llama3-405b"),
    networks: Network | Sequence[Network] = NETWORKS,
    ranks: int | Sequence[int] = RANKS,
    weights: str = "int4",
    context: int = 1024,
    peaks: Peaks | None = None,
    costs: Costs = Costs(),
    wire: str = "auto",
) -> Scaling:
    """Tokens/s of models that are split over ranks, and how many ranks pay.

    seconds of a token = max(bytes / read bandwidth, arithmetic / peak) of the rank with the largest share
    + the messages of its layers + an all-reduce of the embedding (E float32) + the gather of logits on rank 0
    + a broadcast + ``costs.token``; where

    - a layer has two all-reduces of E elements, or four all-gathers, of A, E, F and E (A the elements of all heads,
      F the columns of a feed-forward network), see ``load(wire=...)``;
    - an all-reduce takes the shorter of log2 n (latency + bytes / bandwidth) and
      2 (n - 1) (latency + bytes / n / bandwidth), as MPI chooses, + ``costs.message``;
    - an all-gather takes log2 n latency + bytes (n - 1) / n / bandwidth, + ``costs.message``;
    - shares are those of ``model.share``: whole heads and columns, so they may be unequal.

    Numbers of ranks over which a model cannot be split are left out.

    Args:
        config: one or several configurations, or names of known ones.
        networks: between the ranks, one or several.
        ranks: how many, one number or several.
        weights: one of LAYOUTS.
        context: tokens that are in the cache.
        peaks: limits of each rank; None measures those of this machine. Ranks of one machine share its memory: their
            limits are those that they reach while all of them read.
        costs: what ranks need besides.
        wire: what ranks send each other.

    Raises:
        TypeError: networks that are not of class ``Network``.
        ValueError: an unknown name, layout or wire, no model or network, or a number of ranks or a context below 1.
    """
    configs = (config,) if isinstance(config, ModelConfig | str) else tuple(config)
    networks = (networks,) if isinstance(networks, Network) else tuple(networks)
    counts = [ranks] if isinstance(ranks, int | np.integer) else list(ranks)
    if not configs or not networks:
        raise ValueError(f"{'networks' if configs else 'config'}: expected at least one, found none")
    if not all(isinstance(network, Network) for network in networks):
        raise TypeError(f"networks: expected one or several lab.Network, found {networks!r:.60}")
    if weights not in LAYOUTS:
        raise ValueError(f"weights: expected one of {', '.join(LAYOUTS)}, found {weights!r}")
    if not is_integer(context) or context < 1:
        raise ValueError(f"context: expected a positive integer, found {context!r}")
    if not counts or not all(is_integer(n) and n > 0 for n in counts):
        raise ValueError(f"ranks: expected positive integers, found {ranks!r}")
    require_wire(wire)
    rounded = weights in INTEGER_LAYOUTS
    exact = wire == "exact" or (wire == "auto" and rounded)
    peaks = peaks or measured_peaks()
    points = []
    for model in map(_config, configs):
        for n in sorted(set(counts)):
            try:
                shares = shares_of(model, [1.0] * n, rounded, rounded, exact)
            except ValueError:
                continue
            nbytes, computing = max(_of_share(share, weights, context, peaks) for share in shares)
            for network in networks:
                waiting = 0.0
                if n > 1:
                    messages, transfer = (_all_gathers if exact else _all_reduces)(model, n, network, wire)
                    waiting = transfer + messages * costs.message + _outside_layers(model, n, network) + costs.token
                points.append(Point(model.name or "model", network, n, nbytes, computing + waiting, waiting))
    return Scaling(weights, context, peaks, tuple(points))


def _config(given: ModelConfig | str) -> ModelConfig:
    if isinstance(given, ModelConfig):
        return given
    if not isinstance(given, str) or given.lower() not in PRESETS:
        raise ValueError(f"config: expected a ModelConfig or one of {', '.join(PRESETS)}, found {given!r}")
    return PRESETS[given.lower()]


def _of_share(share: Share, weights: str, context: int, peaks: Peaks) -> tuple[int, float]:
    """Bytes of a share's weights, and the least seconds of its part of a token."""
    local = replace(share.local, vocab_size=len(share.tokens), bos_token_id=None, eos_token_ids=())
    work = pass_work(local, recorded(local, ["f32"]).schedule.steps, weights, np.array([context - 1]), "f32")
    nbytes, of_local = (
        sum(matrix_bytes(shape, weights) for shape in shapes if shape is not None and len(shape) == 2)
        for shapes in (
            [share.shape(name, whole) for name, whole in share.config.tensor_shapes().items()],
            local.tensor_shapes().values(),
        )
    )  # fmt: skip
    read = work.weights + work.cached + nbytes - of_local  # they differ where o and down are divided by rows
    arithmetic = work.products / (peaks.int8_dot if weights in INTEGER_LAYOUTS else peaks.fma)
    return nbytes, max(read / peaks.bandwidth(read), arithmetic + work.attention / peaks.fma)


def _all_reduce(nbytes: int, ranks: int, network: Network) -> float:
    """Seconds of one all-reduce."""
    doubling = ceil(log2(ranks)) * (network.latency + nbytes / network.bandwidth)
    ring = 2 * (ranks - 1) * (network.latency + nbytes / ranks / network.bandwidth)
    return min(doubling, ring)


def _all_reduces(config: ModelConfig, ranks: int, network: Network, wire: str) -> tuple[int, float]:
    """How many all-reduces all layers have, and their seconds."""
    count = 2 * config.num_hidden_layers
    return count, count * _all_reduce((2 if wire == "f16" else 4) * config.hidden_size, ranks, network)


def _all_gathers(config: ModelConfig, ranks: int, network: Network, wire: str) -> tuple[int, float]:
    """How many all-gathers all layers have, and their seconds; of a mixture, of the experts that a token goes to."""
    columns, messages = config.intermediate_size, 4
    if (experts := config.experts) is not None:
        columns = experts.per_token * experts.intermediate_size + experts.shared_intermediate_size
        messages += experts.shared_intermediate_size > 0
    elements = config.num_attention_heads * config.head_dim + columns + 2 * config.hidden_size
    moved = 4 * elements * (ranks - 1) / ranks / network.bandwidth
    layer = messages * ceil(log2(ranks)) * network.latency + moved
    return config.num_hidden_layers * messages, config.num_hidden_layers * layer


def _outside_layers(config: ModelConfig, ranks: int, network: Network) -> float:
    """Seconds of a token's messages before and after the layers."""
    steps = ceil(log2(ranks))
    logits = steps * network.latency + 4 * config.vocab_size * (ranks - 1) / ranks / network.bandwidth
    return _all_reduce(4 * config.hidden_size, ranks, network) + logits + steps * network.latency
