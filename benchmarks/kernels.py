"""Float32 kernels against NumPy and PyTorch, on one and two threads, and against the limits of the machine.

python -m benchmarks.kernels [--only gemm,norm,...] [--threads 1,2] [--quick] [--json OUT] [--torch-python PYTHON]

Every size of the kernels' records is measured as ``ruvllm report`` measures its rows: engines are interleaved, A B B A,
and never compute at the same time; figures are medians. NumPy (OpenBLAS) runs in this process, PyTorch in its own:
``--torch-python`` or RUVLLM_TORCH_PYTHON names a Python that has it. Where cores differ, as next to busy programs,
``taskset -c 1`` and ``--threads 1`` keep everything on one core.

Rows "linear" and "cached" use the layouts that a model keeps: weights packed at load, keys and values of a cache.
"call" is a call from Python, "kernel" the compiled body alone, in a loop of compiled code. "rust" is the Rust library
on a Zen 4. "ratio" is the fastest peer's time over that of the call. "limit" is the share of what the machine could
reach at most: multiply-adds at their peak, or reads at the bandwidth of the cache or memory that holds the arrays.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

import ruvllm
from benchmarks._table import NOT_INSTALLED, Headings, chosen, table_head, table_line
from ruvllm.kernels import KERNELS, KernelSpec
from ruvllm.kernels.attention.kv import append
from ruvllm.kernels.attention.prefill import attend_cache, prompt_scratch_size, scoring_of
from ruvllm.kernels.attention.tile import plain_cache
from ruvllm.kernels.matmul.panels import linear_panels, pack, panel_count, panels_matmul, panels_matmul_parallel
from ruvllm.kernels.memory import aligned_empty
from ruvllm.kernels.threads.pool import num_threads
from ruvllm.measure.peaks import Peaks, measure_peaks
from ruvllm.measure.peers import Inputs, KernelPeer, NumPy, Torch
from ruvllm.measure.timing import Effort
from ruvllm.measure.workers import python_for
from ruvllm.report.bench import Bench
from ruvllm.report.kernel_rows import LARGE, measure_kernel, public
from ruvllm.report.results import Entry, Result
from ruvllm.report.rows import KernelRow
from ruvllm.report.rust_report import RUST_ZEN4
from ruvllm.report.tables import duration

FULL = Effort(turns=9, seconds=2e-3, longest=6.0, awake=0.05)
QUICK = Effort(turns=3, seconds=5e-4, longest=0.2, awake=0.05)
HEADINGS: Headings = (
    ("case", -63), ("threads", 7), ("call", 9), ("kernel", 9), ("numpy", 9), ("torch", 9), ("rust", 9), ("ratio", 6),
    ("limit", 10),
)  # fmt: skip
LINEAR, CACHED = "linear", "cached"  # names of rows in a model's layouts
GROUPS: dict[str, tuple[str, ...]] = {
    "gemm": ("gemm",),
    LINEAR: (LINEAR,),
    "gemv": ("gemv",),
    "attention": ("softmax_attention", "grouped_query_attention", CACHED, "flash_attention"),
    "norm": ("rms_norm", "layer_norm", "softmax", "silu_mul"),
    "rope": ("apply_rope", "apply_rope_tables"),
    "lora": ("lora_forward", "lora_forward_add", "lora_accumulate_grad"),
    "kv": ("kv_append",),
}


def rows_of(name: str) -> Iterator[KernelRow]:
    """Every size of a kernel, or of LINEAR or CACHED."""
    spec = KERNELS[{LINEAR: "gemm_nt", CACHED: "grouped_query_attention"}.get(name, name)]
    for sizes in spec.sizes:
        row = KernelRow(name, spec.name, sizes)
        yield replace(row, label=row.id.replace(spec.name, name, 1))


def packed_linear(spec: KernelSpec, inputs: Inputs) -> tuple[KernelSpec, tuple[Any, ...]]:
    """The product of a linear layer, its weights packed."""
    a, b = inputs["a"], inputs["b"]
    panels = aligned_empty((panel_count(len(b)), b.shape[1], 16))
    pack(b, panels)
    spec = replace(spec, function=linear_panels, compiled=(panels_matmul, panels_matmul_parallel))
    return spec, (panels, a, np.empty((len(a), len(b)), np.float32))


def cached(spec: KernelSpec, inputs: Inputs) -> tuple[KernelSpec, tuple[Any, ...]]:
    """One token's attention over a model's KV cache."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    length, kv_heads, dim = k.shape
    keys, values = aligned_empty((kv_heads, length // 16, dim, 16)), aligned_empty((kv_heads, length, dim))
    cache, positions = plain_cache(keys, values), np.array([length - 1])
    append(k, v, cache, np.arange(length))
    scratch = np.empty((num_threads(), prompt_scratch_size(dim)), np.float32)
    out = np.empty((1, *q.shape), np.float32)
    spec = replace(spec, function=attend_cache, compiled=())
    return spec, (q[None], cache, positions, scoring_of(None, dim**-0.5), out, scratch)


FORMS = {LINEAR: packed_linear, CACHED: cached}


def ratio(entry: Entry) -> float | None:
    """Time of the fastest peer over ours."""
    best = min((timing.median for timing in entry.peers.values()), default=None)
    return best / entry.call.median if best else None


def line(result: Result, entry: Entry, torch: bool) -> str:
    """A row on one number of threads, as a line of the table."""
    peers = {name: duration(timing.median) for name, timing in entry.peers.items()}
    rust, faster = RUST_ZEN4.get(result.id) if entry.threads == 1 else None, ratio(entry)
    return table_line(
        result.label, entry.threads, duration(entry.call.median),
        duration(entry.inside.median) if entry.inside else "-", peers.get("numpy", "-"),
        peers.get("torch", "-" if torch else NOT_INSTALLED), duration(rust) if rust else "-",
        f"{faster:.2f}x" if faster else "-", f"{100 * entry.share:.0f} % {entry.bound}", headings=HEADINGS,
    )  # fmt: skip


def limits(threads: list[int]) -> dict[int, Peaks]:
    """The machine's limits, measured and printed."""
    found = {n: measure_peaks(n) for n in threads}
    for peaks in found.values():
        print(peaks, end="\n\n")
    return found


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.split("\n")[0])
    p.add_argument("--only", default=",".join(GROUPS), help="groups of rows (default: %(default)s)")
    p.add_argument("--threads", default="1,2", help="thread counts (default: %(default)s)")
    p.add_argument("--quick", action="store_true", help="a few turns of the smaller rows, as a smoke test")
    p.add_argument("--json", metavar="OUT", help="write all measurements to a file")
    p.add_argument(
        "--torch-python", default=python_for("torch"), metavar="PYTHON",
        help="a Python that has PyTorch (default: RUVLLM_TORCH_PYTHON, else this one)",
    )  # fmt: skip
    return p


def run(args: argparse.Namespace, torch: Torch | None) -> list[dict[str, Any]]:
    """Measure and print the chosen rows; the records for --json."""
    groups = chosen("--only", args.only, tuple(GROUPS))
    threads = [int(n) for n in args.threads.split(",")]
    if min(threads) < 1:
        raise ValueError("--threads: expected positive numbers")
    bench = Bench(QUICK if args.quick else FULL, limits(threads))
    peers: list[KernelPeer] = [NumPy()] if torch is None else [NumPy(), torch]
    print(table_head(HEADINGS), flush=True)
    records = []
    rows = [(group, name, row) for group in groups for name in GROUPS[group] for row in rows_of(name)]
    for group, name, row in rows:
        if args.quick and KERNELS[row.kernel].flops(**row.sizes) > LARGE:
            continue
        result = measure_kernel(row, bench, peers, FORMS.get(name, public))
        for entry in result.entries:
            print(line(result, entry, torch is not None), flush=True)
            about = {"group": group, "case": result.label, "error": result.error, "missing": result.missing}
            derived = {"ratio": ratio(entry), "share": entry.share, "rust_zen4": RUST_ZEN4.get(result.id)}
            records.append(about | asdict(entry) | derived)
    return records


def main(argv: list[str] | None = None) -> int:
    """Run; 0, or 2 after an error, which is one line."""
    args = parser().parse_args(argv)
    torch = None
    try:
        try:
            torch = Torch(args.torch_python)
        except ModuleNotFoundError:
            print(f"{args.torch_python} has no PyTorch: that column stays empty", file=sys.stderr)
        about = {"ruvllm": ruvllm.__version__, "numpy": NumPy.about, "torch": torch.about if torch else NOT_INSTALLED}
        for key, value in about.items():
            print(f"{key}: {value}")
        records = run(args, torch)
        if args.json:
            Path(args.json).write_text(json.dumps({"about": about, "rows": records}, indent=1) + "\n")
    except (ruvllm.RuvllmError, ValueError, OSError, RuntimeError) as error:
        print(f"benchmarks.kernels: error: {error}", file=sys.stderr)
        return 2
    finally:
        if torch is not None:
            torch.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
