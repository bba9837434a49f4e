"""A token of one model over the ranks of this run: measured, and as ``ruvllm.lab.scale`` predicts it from one rank.

    mpiexec -n 2 python -m benchmarks.scale [--model smollm2-135m] [--weights f32] [--tokens 60]

Each rank uses one thread. Rank 0 first measures the model alone, and what it costs to leave the compiled code for each
sum; then all measure sums of two sizes, and a token together.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ruvllm.checkpoint.hub import resolve
from ruvllm.checkpoint.loader import open_checkpoint
from ruvllm.checkpoint.part import PartOfCheckpoint
from ruvllm.dividing import divide
from ruvllm.lab.scaling import Network, scale
from ruvllm.measure.peaks import Level, Peaks
from ruvllm.model.llama import Llama, choose_layouts
from ruvllm.model.ranks import Ranks
from ruvllm.model.split import SplitLlama

PROMPT = np.arange(5, 37)
LARGE = 1 << 20  # bytes of a sum that bandwidth decides


class _NoSum:
    """In place of ``Ranks``: sums that cost nothing, to see what calling them costs."""

    def add(self, x: np.ndarray) -> None:
        pass


class _Calling(Llama):
    ranks: Any = _NoSum()


def median_seconds(call: Callable[[], object], times: int) -> float:
    """Of so many calls, after a few others."""
    found = []
    for _ in range(times + 5):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return float(np.median(found[5:]))


def token_seconds(model: Llama, tokens: int) -> float:
    """The median time of a token after a short prompt."""
    cache = model.new_cache(len(PROMPT) + tokens + 5)
    model.forward(PROMPT, cache, last_only=True)
    out = np.empty(model.config.vocab_size, np.float32)
    return median_seconds(lambda: model.forward([7], cache, last_only=True, out=out), tokens)


def sum_seconds(ranks: Ranks, nbytes: int) -> float:
    """The median time of a sum of so many bytes over all ranks."""
    x = np.zeros(nbytes // 4, np.float32)
    return median_seconds(lambda: ranks.add(x), 300)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--weights", default="f32", help="of all matrices (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=60)
    args = parser.parse_args()
    from mpi4py import MPI

    ranks = Ranks(MPI.COMM_WORLD)
    with open_checkpoint(resolve(args.model)) as checkpoint:
        config, layouts = checkpoint.config, choose_layouts(checkpoint.config, checkpoint, args.weights)
        alone = called = 0.0
        if ranks.rank == 0:
            alone, called = (
                token_seconds(kind(config, checkpoint, args.weights, threads=1), args.tokens)
                for kind in (Llama, _Calling)
            )  # fmt: skip
            ranks.announce(np.zeros(1, np.int64))
        else:
            ranks.listen(np.zeros(1, np.int64))  # without taking a core meanwhile
        small, large = sum_seconds(ranks, 4 * config.hidden_size), sum_seconds(ranks, LARGE)
        shares = divide(config, [1.0] * ranks.size, layouts)
        model = SplitLlama(shares, ranks, PartOfCheckpoint(checkpoint, shares[ranks.rank]), args.weights, threads=1)
    if ranks.rank:
        model.follow()
        return
    ranks.waited, ranks.messages, ranks.sent = 0.0, 0, 0
    together = token_seconds(model, args.tokens)
    passes = ranks.messages / (2 * config.num_hidden_layers + 1)
    model.end()

    bandwidth = LARGE / large
    latency = max(0.0, small - 4 * config.hidden_size / bandwidth)
    call = max(0.0, called - alone) / (2 * config.num_hidden_layers)
    network = Network("measured", latency / max(1, np.ceil(np.log2(ranks.size))), bandwidth)
    limits = Peaks(1, 1e15, 1e15, (Level("memory", 0, 1e9),))
    read = scale(config, [network], [1], args.weights, len(PROMPT), limits).points[0].seconds * 1e9
    limits = limits.with_memory(read / alone)
    predicted = scale(config, [network], [ranks.size], args.weights, len(PROMPT), limits, call).points[0]
    print(
        f"{config.name}, {args.weights}: one rank {alone * 1e3:.2f} ms a token, {ranks.size} ranks "
        f"{together * 1e3:.2f} ms; predicted {predicted.seconds * 1e3:.2f} ms "
        f"({(predicted.seconds / together - 1) * 100:+.0f} %)\n"
        f"a sum of {4 * config.hidden_size} bytes {small * 1e6:.1f} us, of 1 MB {large * 1e6:.0f} us; leaving "
        f"the compiled code {call * 1e6:.1f} us\n"
        f"of a token {ranks.waited / passes * 1e3:.2f} ms in sums, {ranks.sent / passes:.0f} bytes sent by rank 0"
    )


if __name__ == "__main__":
    main()
