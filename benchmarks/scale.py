"""A token of one model over the ranks of this run: measured, and as ``ruvllm.lab.scale`` predicts it from its parts.

    mpiexec -n 2 python -m benchmarks.scale [--model smollm2-135m] [--weights f32] [--wire auto] [--rounds 5]

Each rank uses one thread. The parts are measured interleaved with the token, because the bandwidth of a machine changes
from second to second:

- the whole model on all ranks at once: ranks of one machine share its memory's bandwidth;
- the same with messages that cost nothing: what leaving the compiled code costs;
- sums of two sizes: latency and bandwidth of the network;
- what a pass needs besides its layers: telling ranks of it, an embedding, collecting logits.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ruvllm.checkpoint.hub import resolve
from ruvllm.checkpoint.loader import Checkpoint, open_checkpoint
from ruvllm.checkpoint.part import PartOfCheckpoint
from ruvllm.dividing import divide
from ruvllm.lab.scaling import Costs, Network, scale
from ruvllm.measure.peaks import Level, Peaks
from ruvllm.model.exchange import exchange_of
from ruvllm.model.llama import Llama, choose_layouts
from ruvllm.model.ranks import Ranks
from ruvllm.model.split import SplitLlama

PROMPT = np.arange(5, 37)
LARGE = 1 << 20  # bytes of a sum that bandwidth decides
TIMES = 12  # of each part in a round
FIRST = 2  # of them, which are not counted


class _OneRank:
    """In place of ``Ranks``: messages that cost nothing."""

    rank, size = 0, 1

    def add(self, x: np.ndarray) -> None:
        pass

    add_halves = add

    def join(self, part: np.ndarray, out: np.ndarray, columns: object) -> None:
        out[...] = part


class Rounds:
    """Times of all parts, in this rank."""

    def __init__(self, ranks: Ranks, checkpoint: Checkpoint, weights: str, wire: str) -> None:
        self.ranks, self.checkpoint, self.weights, self.wire = ranks, checkpoint, weights, wire
        self.config = config = checkpoint.config
        self.layouts = choose_layouts(config, checkpoint, weights)
        one: Any = _OneRank()
        exchange = exchange_of(one, divide(config, [1.0], self.layouts, wire), wire)
        calling: type[Llama] = type("Calling", (Llama,), {"exchange": exchange})
        self.whole, self.calling = (kind(config, checkpoint, weights, threads=1) for kind in (Llama, calling))
        self.found: dict[str, list[float]] = defaultdict(list)
        self.messages = self.waited = 0.0  # of a token

    def run(self) -> None:
        """One round."""
        shares = divide(self.config, [1.0] * self.ranks.size, self.layouts, self.wire)
        held = PartOfCheckpoint(self.checkpoint, shares[self.ranks.rank])
        split = SplitLlama(shares, self.ranks, held, self.weights, threads=1, wire=self.wire)
        self._tokens({"whole": self.whole, "calling": self.calling})
        for name, nbytes in (("small", 4 * self.config.hidden_size), ("large", LARGE)):
            x = np.zeros(nbytes // 4, np.float32)
            for i in range(TIMES):
                self._time(name, i, partial(self.ranks.add, x))
        self._passes(split, [share.tokens for share in shares])
        if self.ranks.rank:
            split.follow()
            return
        self.ranks.waited, self.ranks.messages = 0.0, 0
        self._tokens({"together": split})
        passes = TIMES + 1  # the prompt's, too
        self.messages, self.waited = self.ranks.messages / passes, self.ranks.waited / passes
        split.end()

    def _tokens(self, models: dict[str, Llama]) -> None:
        """Tokens after a short prompt, each of one model after another."""
        caches = {name: model.new_cache(len(PROMPT) + TIMES) for name, model in models.items()}
        for name, model in models.items():
            model.forward(PROMPT, caches[name], last_only=True)
        out = np.empty(self.config.vocab_size, np.float32)
        for i in range(TIMES):
            for name, model in models.items():
                token = partial(model.forward, [7], caches[name], last_only=True, out=out)
                self._time(name, i, token, meet="together" not in models)

    def _passes(self, split: SplitLlama, tokens: list[range]) -> None:
        """What all ranks do for a token besides its layers, whose weights were in the cache before."""
        command, out = np.zeros(300, np.int64), np.empty((1, self.config.vocab_size), np.float32)
        part = np.zeros((1, len(tokens[self.ranks.rank])), np.float32)

        def all_besides() -> None:
            (self.ranks.listen if self.ranks.rank else self.ranks.announce)(command)
            split.decoder.embed.take(np.array([7]))
            self.ranks.gather_columns(part, tokens, out)

        cache = self.whole.new_cache(TIMES)
        for i in range(TIMES):
            self.whole.forward([7], cache, last_only=True)
            self._time("pass", i, all_besides)

    def _time(self, name: str, i: int, call: Callable[[], object], meet: bool = True) -> None:
        """One call; the first of a round are not counted."""
        if meet:
            self.ranks.comm.Barrier()
        started = time.perf_counter()
        call()
        if i >= FIRST:
            self.found[name].append(time.perf_counter() - started)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--weights", default="f32", help="of all matrices (default: %(default)s)")
    parser.add_argument("--wire", default="auto", help="as for ruvllm.load (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    from mpi4py import MPI

    ranks = Ranks(MPI.COMM_WORLD)
    with open_checkpoint(resolve(args.model)) as checkpoint:
        rounds = Rounds(ranks, checkpoint, args.weights, args.wire)
        for _ in range(args.rounds):
            rounds.run()
    if ranks.rank == 0:
        report(rounds, args.weights, args.wire)


def report(rounds: Rounds, weights: str, wire: str) -> None:
    """Predict a token from the parts, and print both."""
    config, size = rounds.config, rounds.ranks.size
    part = {name: float(np.median(times)) for name, times in rounds.found.items()}
    hops = max(1.0, np.ceil(np.log2(size)))
    bandwidth = LARGE / part["large"] * hops
    latency = max(0.0, part["small"] / hops - 4 * config.hidden_size / bandwidth)
    pairs = np.subtract(rounds.found["calling"], rounds.found["whole"])
    left = max(0.0, float(np.median(pairs))) / (rounds.messages - 1)
    network = Network("measured", latency, bandwidth)
    limits = Peaks(1, 1e15, 1e15, (Level("memory", 0, 1e9),))
    read = scale(config, [network], [1], weights, len(PROMPT), limits).points[0].seconds * 1e9
    limits = limits.with_memory(read / part["whole"])
    found = scale(config, [network], [size], weights, len(PROMPT), limits, Costs(0, 0), wire).points[0]
    logits = 4 * config.vocab_size * (size - 1) / size / bandwidth
    beside = max(0.0, part["pass"] - part["small"] - logits - 2 * hops * latency)  # what the network does not explain
    point = scale(config, [network], [size], weights, len(PROMPT), limits, Costs(left, beside), wire).points[0]
    calls, together = left * (rounds.messages - 1), part["together"]
    print(
        f"{config.name}, {weights}, wire {wire}, {size} ranks: {together * 1e3:.2f} ms a token; predicted "
        f"{point.seconds * 1e3:.2f} ms ({(point.seconds / together - 1) * 100:+.0f} %)\n"
        f"  weights {(point.seconds - point.waiting) * 1e3:.2f} ms (the whole model on all ranks at once "
        f"{part['whole'] * 1e3:.2f} ms), network {found.waiting * 1e3:.2f} ms, leaving the compiled code "
        f"{calls * 1e3:.2f} ms ({left * 1e6:.1f} us each), besides {beside * 1e3:.2f} ms\n"
        f"  a sum of {4 * config.hidden_size} bytes {part['small'] * 1e6:.1f} us, of 1 MB "
        f"{part['large'] * 1e6:.0f} us; {rounds.messages:.0f} messages a token, in which rank 0 spends "
        f"{rounds.waited * 1e3:.2f} ms"
    )


if __name__ == "__main__":
    main()
