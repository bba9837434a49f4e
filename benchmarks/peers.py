"""ruvllm against llama.cpp and ik_llama.cpp, on the same files, in one run.

python -m benchmarks.peers [--models Q4_1,Q4_0,Q8_0,Q4_K_M] [--threads 1,2] [--cases decode,prefill-512] [--quick]
                           [--seven-b] [--kv f16] [--json OUT] [--llama-python PYTHON]
python -m benchmarks.peers --perplexity [FILE]

Engines are interleaved, A B A B, and never compute at the same time; figures are medians over the rounds. Each row has
the read bandwidth of the machine, measured in the same rounds, and for decoding the share of it that each engine used:
the bytes of its weights over the time of a token. llama.cpp (llama-cpp-python, flash attention on, memory-mapped) runs
in a process of its own; ``--llama-python`` or RUVLLM_LLAMA_PYTHON names a Python that has it. ik_llama.cpp is a column
where RUVLLM_IK_BENCH names its program ``llama-bench`` (flash attention on, weights repacked at load, random tokens).
"decode" feeds given tokens one by one, "prefill" many at once; both end with logits, nothing is sampled.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import ruvllm
from benchmarks import _files, _perplexity
from benchmarks._table import NOT_INSTALLED, Headings, chosen, table_head, table_line
from benchmarks.make_7b import seven_b
from ruvllm import machine
from ruvllm.checkpoint.loader import open_checkpoint
from ruvllm.kernels import read_bandwidth
from ruvllm.measure.engines import Engine, IkLlamaCpp, LlamaCpp, Ruvllm
from ruvllm.measure.workers import python_for

PAUSE_SECONDS = 0.02  # before each turn: the OpenMP team of the last engine spins for some milliseconds


@dataclass(frozen=True)
class Case:
    """``tokens`` timed, after ``context`` tokens that are not."""

    kind: str  # "prefill" or "decode"
    tokens: int
    context: int = 0


CASES = {
    "prefill-32": Case("prefill", 32),
    "prefill-128": Case("prefill", 128),
    "prefill-512": Case("prefill", 512),
    "prefill-2048": Case("prefill", 2048),
    "decode@0": Case("decode", 16),
    "decode": Case("decode", 32, context=32),
    "decode@1k": Case("decode", 16, context=1024),
    "decode@4k": Case("decode", 16, context=4096),
}  # by growing context: each case continues from what the last one left in the KV cache
QUICK = ("prefill-32", "prefill-128", "decode")
SEVEN_B = ("prefill-128", "decode")


@dataclass
class Row:
    """One line of the table: seconds of every round, and what was measured with them."""

    model: str
    case: str
    threads: int
    tokens: int
    seconds: dict[str, list[float]] = field(default_factory=dict)  # by engine
    bandwidth: list[float] = field(default_factory=list)  # bytes/s
    weight_bytes: dict[str, int] = field(default_factory=dict)  # read for a token, by engine

    def speed(self, engine: str) -> float | None:
        """Median tokens per second."""
        return self.tokens / statistics.median(self.seconds[engine]) if engine in self.seconds else None

    def ratio(self, engine: str = LlamaCpp.name) -> float | None:
        """Speed of ruvllm over that of another engine."""
        own, other = self.speed(Ruvllm.name), self.speed(engine)
        return own / other if own and other else None

    def share(self, engine: str) -> float | None:
        """Bytes of weights read per second over the read bandwidth; None unless decoding."""
        speed = self.speed(engine)
        if speed is None or CASES[self.case].kind != "decode":
            return None
        return speed * self.weight_bytes[engine] / statistics.median(self.bandwidth)

    def record(self) -> dict[str, Any]:
        """The whole row, for a JSON file."""
        engines = tuple(self.seconds)
        return asdict(self) | {
            "tokens_per_second": {name: self.speed(name) for name in engines},
            "ratio": self.ratio(),
            "ratios": {name: self.ratio(name) for name in engines if name != Ruvllm.name},
            "share_of_bandwidth": {name: self.share(name) for name in engines},
        }


def measure(engines: list[Engine], model: str, path: Path, names: list[str], threads: int, rounds: int) -> list[Row]:
    """Rows of one model on one number of threads, printed one by one."""
    context = max(case.context + case.tokens for case in map(CASES.get, names) if case)
    for engine in engines:
        engine.load(path, threads, context + 1)
    with open_checkpoint(path) as checkpoint:
        vocabulary = checkpoint.config.vocab_size
    ids = np.random.default_rng(0).integers(0, vocabulary, context).tolist()  # the same for all
    others = columns(engines)
    rows, cached = [], 0
    for name in names:
        case = CASES[name]
        row = Row(model, name, threads, case.tokens)
        for engine in engines:
            if case.context > cached:
                engine.append(ids[cached : case.context])
            row.weight_bytes[engine.name] = engine.weight_bytes
        cached = case.context
        timed = ids[cached : cached + case.tokens]
        for number in range(rounds + 1):  # the first warms up
            bandwidth = read_bandwidth(repeats=3, threads=threads)
            if number:
                row.bandwidth.append(bandwidth)
            for engine in engines:
                time.sleep(PAUSE_SECONDS)
                seconds = engine.seconds(case.kind, timed, cached)
                if number:
                    row.seconds.setdefault(engine.name, []).append(seconds)
        print(_line(row, others), flush=True)
        rows.append(row)
    for engine in engines:
        engine.unload()
    return rows


def columns(engines: list[Engine]) -> list[str]:
    """The engines that ruvllm is compared with; llama.cpp always has a column."""
    return list(dict.fromkeys([LlamaCpp.name, *(engine.name for engine in engines if engine.name != Ruvllm.name)]))


def headings(others: list[str]) -> Headings:
    """The headings of the table."""
    names = [Ruvllm.name, *others]
    ratios = [("ratio" if name == LlamaCpp.name else f"{name} ratio", len(name) + 6) for name in others]
    return (
        ("model", -15), ("case", -12), ("threads", 7), *((f"{name} tok/s", len(name) + 6) for name in names),
        *ratios, ("read GB/s", 9), *((f"{name} % of it", len(name) + 8) for name in names),
    )  # fmt: skip


def _line(row: Row, others: list[str]) -> str:
    names = [Ruvllm.name, *others]
    speeds, ratios, shares = map(row.speed, names), map(row.ratio, others), map(row.share, names)
    return table_line(
        row.model,
        row.case,
        row.threads,
        *(NOT_INSTALLED if speed is None else f"{speed:.1f}" for speed in speeds),
        *("-" if ratio is None else f"{ratio:.2f}x" for ratio in ratios),
        f"{statistics.median(row.bandwidth) / 1e9:.1f}",
        *("-" if share is None else f"{100 * share:.0f}" for share in shares),
        headings=headings(others),
    )


def about(engines: list[Engine]) -> dict[str, str]:
    """The machine, and the engines that ruvllm is compared with."""
    known = {LlamaCpp.name: NOT_INSTALLED} | {engine.name: engine.about for engine in engines}
    return machine.machine() | machine.versions() | machine.threads() | known


def show_perplexity(source: str, kinds: list[str], threads: int, llama: LlamaCpp | None) -> list[dict[str, Any]]:
    """Print the perplexity of a text under both engines; float32 first."""
    text = _perplexity.read(source)
    name = f"pydoc_data.topics of Python {platform.python_version()}" if source == "pydoc" else source
    digest = _perplexity.sha256(text)
    print(f"text: {name}, {len(text)} characters, SHA-256 {digest}")
    print(f"protocol: windows of {_perplexity.CONTEXT} tokens, the second half of each scored, each window alone\n")
    titles = (("weights", -8), ("ruvllm", 10), ("+/-", 8), (LlamaCpp.name, 13), ("difference", 10), ("tokens", 6))
    print(table_head(titles))
    records = []
    for row in _perplexity.compare(text, ["F32", *kinds], threads, llama):
        other = NOT_INSTALLED if row.llama is None else f"{row.llama:.4f}"
        difference = "-" if row.difference is None else f"{100 * row.difference:+.3f} %"
        cells = (row.model, f"{row.ruvllm:.4f}", f"{row.error:.4f}", other, difference, row.tokens)
        print(table_line(*cells, headings=titles), flush=True)
        records.append(asdict(row) | {"difference": row.difference, "text_sha256": digest})
    return records


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.split("\n")[0])
    p.add_argument("--models", default="Q4_1,Q4_0,Q8_0,Q4_K_M", help="types of SmolLM2-135M (default: %(default)s)")
    p.add_argument("--threads", default="1,2", help="thread counts (default: %(default)s)")
    p.add_argument("--cases", help=f"some of {','.join(CASES)} (default: all)")
    p.add_argument("--rounds", type=int, default=5, help="measurements of each engine per row (default: %(default)s)")
    p.add_argument("--quick", action="store_true", help="3 rounds of a few cases, as a smoke test")
    p.add_argument("--seven-b", action="store_true", help="also a synthetic LLaMA-2-7B-shaped Q4_0 file of 3.8 GB")
    p.add_argument("--kv", help="type of ruvllm's KV cache (default: the library's); llama.cpp's is f16")
    p.add_argument("--json", metavar="OUT", help="write all measurements to a file")
    p.add_argument(
        "--llama-python", default=python_for("llama"), metavar="PYTHON",
        help="a Python that has llama-cpp-python (default: RUVLLM_LLAMA_PYTHON, else this one)",
    )  # fmt: skip
    p.add_argument(
        "--perplexity", nargs="?", const=_perplexity.STANDARD_TEXT, metavar="FILE",
        help="instead of speed: perplexity of a text (default: help topics of the standard library)",
    )  # fmt: skip
    return p


def run(args: argparse.Namespace, llama: LlamaCpp | None, ik: IkLlamaCpp | None = None) -> list[dict[str, Any]]:
    """Measure and print as the options say; the records for --json."""
    kinds = chosen("--models", args.models, _files.TYPES)
    threads = [int(n) for n in args.threads.split(",")]
    if min(threads) < 1 or args.rounds < 1:
        raise ValueError("--threads, --rounds: expected positive numbers")
    if args.perplexity is not None:
        return show_perplexity(args.perplexity, kinds, max(threads), llama)
    names = chosen("--cases", args.cases or ",".join(QUICK if args.quick else CASES), tuple(CASES))
    rounds = min(args.rounds, 3) if args.quick else args.rounds
    engines: list[Engine] = [Ruvllm(kv=args.kv), *(engine for engine in (llama, ik) if engine is not None)]
    jobs = [(f"SmolLM2 {kind}", _files.smollm2(kind, llama), names) for kind in kinds]
    if args.seven_b:
        jobs.append(("7B shape Q4_0", seven_b(), [name for name in names if name in SEVEN_B]))
    print(f"medians of {rounds} rounds\n\n{table_head(headings(columns(engines)))}", flush=True)
    rows: list[Row] = []
    for model, path, wanted in jobs:
        for n in threads:
            if path is None:
                print(f"{model}: llama.cpp, which converts its file, is not installed", file=sys.stderr)
            elif wanted:
                rows += measure(engines, model, path, wanted, n, rounds)
    return [row.record() for row in rows]


def main(argv: list[str] | None = None) -> int:
    """Run; 0, or 2 after an error, which is one line."""
    args = parser().parse_args(argv)
    llama = None
    try:
        try:
            llama = LlamaCpp(args.llama_python)
        except ModuleNotFoundError:
            print(f"{args.llama_python} has no llama-cpp-python: that column stays empty", file=sys.stderr)
        ik = IkLlamaCpp(os.environ["RUVLLM_IK_BENCH"]) if os.environ.get("RUVLLM_IK_BENCH") else None
        others: list[Engine] = [engine for engine in (llama, ik) if engine is not None]
        facts = about(others)
        for key, value in facts.items():
            print(f"{key}: {value}")
        records = run(args, llama, ik)
        facts |= {engine.name: engine.about for engine in others}  # llama-bench reports its build with its figures
        if args.json:
            Path(args.json).write_text(json.dumps({"about": facts, "rows": records}, indent=1) + "\n")
    except (ruvllm.RuvllmError, ValueError, OSError, RuntimeError) as error:
        print(f"benchmarks.peers: error: {error}", file=sys.stderr)
        return 2
    finally:
        if llama is not None:
            llama.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
