"""Decoding several sequences at once, in ruvllm and in llama.cpp, in total tokens per second.

    python -m benchmarks.sequences [--kind Q4_0] [--threads 1,2] [--sequences 1,2,4,8,16] [--rounds 7]
                                   [--llama-python PYTHON]

Every sequence has a text of its own. The engines are interleaved, with the same random tokens; both compute the
logits after each token, and nothing is sampled. "answers" is what ``LLM.generate_many`` reaches with greedy sampling
and text.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

import ruvllm
from benchmarks import _files
from benchmarks._table import NOT_INSTALLED, table_head, table_line
from ruvllm.llm import LLM
from ruvllm.measure.engines import LlamaCpp
from ruvllm.measure.workers import python_for
from ruvllm.model.kv_pool import BLOCK, KVPool, block_bytes
from ruvllm.model.many import Many, Run

STEPS = 48  # tokens of each sequence
HEADINGS = (
    ("sequences", 9), ("threads", 7), ("ruvllm tok/s", 12), ("over one", 8), ("llama.cpp tok/s", 15), ("ratio", 6),
    ("answers tok/s", 13), ("over one", 8),
)  # fmt: skip


class _Passes:
    """Passes of one new token for each sequence."""

    def __init__(self, llm: LLM, sequences: int) -> None:
        blocks = -(-STEPS // BLOCK)
        self.pool = KVPool(llm.config, sequences * blocks * block_bytes(llm.config, "f16"), "f16")
        self.many = Many(llm.model, self.pool)
        self.blocks = [self.pool.layout.new_block(0) for _ in range(sequences * blocks)]
        self.tables = np.array([block.address for block in self.blocks]).reshape(sequences, 1, blocks)

    def seconds(self, ids: np.ndarray) -> float:
        """Seconds for tokens (steps, sequences)."""
        start = time.perf_counter()
        for position, tokens in enumerate(ids):
            self.many.forward(
                [Run(tokens[i : i + 1], position, table, 1, STEPS) for i, table in enumerate(self.tables)]
            )
        return time.perf_counter() - start


def answers(llm: LLM, sequences: int) -> float:
    """Tokens per second of ``generate_many``, from one-token prompts on."""
    prompts = [[100 + i] for i in range(sequences)]
    endless = dict.fromkeys(llm.tokenizer.eos_ids, -1e9)
    start = time.perf_counter()
    found = llm.generate_many(prompts, max_tokens=STEPS, temperature=0, logit_bias=endless, progress=False)
    return sum(len(answer.ids) for answer in found) / (time.perf_counter() - start)


def measure(path: Path, threads: int, counts: list[int], rounds: int, llama: LlamaCpp | None) -> None:
    """A row for each number of sequences."""
    llm = ruvllm.load(path, threads=threads)
    ids = np.random.default_rng(0).integers(0, llm.config.vocab_size, (STEPS, max(counts)))
    passes = {count: _Passes(llm, count) for count in counts}
    own: dict[int, list[float]] = {count: [] for count in counts}
    answered: dict[int, list[float]] = {count: [] for count in counts}
    other: dict[int, list[float]] = {count: [] for count in counts}
    if llama is not None:
        llama.call("load_many", path=str(path), threads=threads, context=STEPS, sequences=max(counts))
    for number in range(rounds + 1):  # the first warms up
        for count in counts:
            speed = count * STEPS / passes[count].seconds(ids[:, :count])
            peer = 0.0
            if llama is not None:
                peer = count * STEPS / float(llama.call("decode_many", ids=ids[:, :count].tolist()))
            generated = answers(llm, count)
            if number:
                own[count].append(speed)
                other[count].append(peer)
                answered[count].append(generated)
    first = min(counts)
    for count in counts:
        mine, peer, text = (statistics.median(found[count]) for found in (own, other, answered))
        one, text_of_one = statistics.median(own[first]), statistics.median(answered[first])
        print(
            table_line(
                count, threads, f"{mine:.1f}", f"{mine / one:.2f}x",
                f"{peer:.1f}" if peer else NOT_INSTALLED, f"{mine / peer:.2f}x" if peer else "-",
                f"{text:.1f}", f"{text / text_of_one:.2f}x", headings=HEADINGS,
            ),
            flush=True,
        )  # fmt: skip
    if llama is not None:
        llama.call("unload")


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kind", default="Q4_0", choices=_files.TYPES, help="of SmolLM2-135M (default: %(default)s)")
    parser.add_argument("--threads", default="1,2", help="(default: %(default)s)")
    parser.add_argument("--sequences", default="1,2,4,8,16", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    parser.add_argument("--llama-python", default=python_for("llama"), help="a Python that has llama-cpp-python")
    arguments = parser.parse_args()
    try:
        llama = LlamaCpp(arguments.llama_python)
    except ModuleNotFoundError:
        llama = None
    path = _files.smollm2(arguments.kind, llama)
    if path is None:
        parser.error(f"{arguments.kind}: llama.cpp, which converts its file, is not installed")
    print(table_head(HEADINGS))
    for threads in map(int, arguments.threads.split(",")):
        measure(path, threads, [int(n) for n in arguments.sequences.split(",")], arguments.rounds, llama)
    if llama is not None:
        llama.close()


if __name__ == "__main__":
    main()
