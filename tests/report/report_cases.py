"""Invented reports for tests."""

import dataclasses

from ruvllm.measure.timing import Timing
from ruvllm.report import run
from ruvllm.report.results import Entry, Report, Result, SectionResult
from ruvllm.report.rows import SECTIONS

ALL_ROWS = [row for section in SECTIONS for row in section.rows]
# Sizes of each row's kernel that run fast.
SMALL = {
    "softmax_attention": {"length": 37, "dim": 64},
    "grouped_query_attention": {"heads": 6, "kv_heads": 2, "length": 19, "dim": 32},
    "softmax": {"rows": 1, "n": 77},
    "rms_norm": {"rows": 1, "n": 77},
    "layer_norm": {"rows": 1, "n": 77},
    "gemv": {"m": 33, "k": 47},
    "gemm": {"m": 17, "n": 33, "k": 9},
    "gemm_nt": {"m": 17, "n": 33, "k": 9},
    "apply_rope": {"tokens": 3, "heads": 1, "dim": 64},
    "apply_rope_tables": {"tokens": 3, "heads": 1, "dim": 64},
    "lora_forward": {"rows": 1, "dim": 77, "rank": 2},
    "lora_forward_add": {"rows": 1, "dim": 77, "rank": 2},
    "lora_accumulate_grad": {"rows": 1, "dim": 77, "rank": 2},
    "buffer_sum": {"n": 1000},
    "kv_append": {"tokens": 5, "kv_heads": 2, "dim": 32, "length": 5},
}


def timing(seconds: float, spread: float = 0.0) -> Timing:
    return Timing(seconds, seconds * (1 - spread / 2), seconds * (1 + spread / 2), 9)


def a_report(seconds: dict[str, float], threads: tuple[int, ...] = (1,), **changes: object) -> Report:
    """A report in which the named rows took these times; every other row has a reason."""
    sections = []
    for section in SECTIONS:
        results = []
        for row in section.rows:
            if section.name == "memory":
                results.append(run.memory(row))  # type: ignore[arg-type]
            elif row.id in seconds:
                entries = tuple(
                    Entry(n, timing(seconds[row.id] / n), None, 1e-7, "L1", {"numpy": timing(2 * seconds[row.id] / n)})
                    for n in threads
                )
                results.append(Result(row.id, row.label, row.rust_m4, 1e6, 1e5, 1e-7, 1e-5, entries))  # type: ignore[union-attr]
            else:
                results.append(Result(row.id, row.label, reason="left out"))
        sections.append(SectionResult(section.name, section.title, section.about, tuple(results)))
    about = {
        "versions": dict.fromkeys(("ruvllm", "python", "numba", "numpy"), "1"),
        "machine": dict.fromkeys(("CPU", "cores", "memory", "system"), "x"),
    }
    report = Report(
        "2026-01-01T00:00:00Z", False, threads, about, {str(n): {"read L1": 1e11} for n in threads},
        {"numpy": "NumPy 2"}, tuple(sections), 1.0,
    )  # fmt: skip
    return dataclasses.replace(report, **changes)  # type: ignore[arg-type]
