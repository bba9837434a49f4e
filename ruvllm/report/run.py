"""Measure the chosen rows, one after the other, into a Report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any

from ruvllm import machine
from ruvllm.kernels.threads.pool import physical_cores, require_threads
from ruvllm.measure.engines import LlamaCpp
from ruvllm.measure.peaks import Peaks, measure_peaks
from ruvllm.measure.peers import KernelPeer, NumPy, Torch
from ruvllm.measure.timing import FULL, QUICK
from ruvllm.model.presets import PRESETS
from ruvllm.progress import tqdm
from ruvllm.report.bench import Bench
from ruvllm.report.kernel_rows import measure_kernel
from ruvllm.report.layer_peers import LlamaCppLayer, TorchLayer
from ruvllm.report.layer_rows import measure_layers
from ruvllm.report.results import Report, Result, SectionResult
from ruvllm.report.rows import SECTIONS, KernelRow, LayerRow, MemoryRow, Row, Section


def measure(
    quick: bool = False,
    only: Sequence[str] = (),
    threads: Sequence[int] | None = None,
    peers: bool = True,
    progress: bool = True,
) -> Report:
    """Measure the tables of the Rust report on this machine, which must otherwise be idle.

    Args:
        quick: fewer turns, and single layers only; half a minute instead of four.
        only: names of tables or parts of rows' names; empty for all.
        threads: thread counts to measure with; None: one thread and, unless ``quick``, the physical cores.
        peers: also measure NumPy; and PyTorch and llama.cpp where RUVLLM_TORCH_PYTHON and RUVLLM_LLAMA_PYTHON name a
            Python that has them, or this one does.
        progress: show a bar on stderr.

    Raises:
        ValueError: ``only`` names nothing, or threads < 1 or more than numba's pool.
    """
    chosen = choose(only)
    counts = sorted(set(threads or ((1,) if quick else (1, physical_cores()))))
    for count in counts:
        require_threads(count)
    start, created, about = time.perf_counter(), datetime.now(UTC), machine.machine()
    with ExitStack() as stack:
        total = sum(len(rows) for _, rows in chosen)
        bar = stack.enter_context(tqdm(total=total, desc="measuring", unit="row", disable=not progress))
        found = stack.enter_context(_Peers(peers))
        bar.set_postfix_str("limits of this machine")
        bench = Bench(QUICK if quick else FULL, {n: measure_peaks(n) for n in counts})
        sections = tuple(
            SectionResult(
                section.name, section.title, section.about, tuple(_results(section, rows, quick, bench, found, bar))
            )
            for section, rows in chosen
        )
    return Report(
        created=created.strftime("%Y-%m-%dT%H:%M:%SZ"),
        quick=quick,
        threads=tuple(counts),
        about={"versions": machine.versions(), "machine": about, "threads": machine.threads()},
        peaks={str(n): _by_name(peaks) for n, peaks in bench.peaks.items()},
        peers=found.about,
        sections=sections,
        seconds=round(time.perf_counter() - start, 1),
    )


def choose(only: Sequence[str]) -> list[tuple[Section, tuple[Row, ...]]]:
    """The tables, each with the rows that ``only`` names. Raises ValueError for a name without rows."""
    names = [name.lower() for name in only]

    tables = [section.name for section in SECTIONS]

    def named(section: Section, row: Row, name: str) -> bool:
        return name == section.name if name in tables else name in row.label.lower()

    for name in names:
        if not any(named(section, row, name) for section in SECTIONS for row in section.rows):
            raise ValueError(f"only: found {name!r}, expected a table ({', '.join(tables)}) or a part of a row's name")
    chosen = [
        (section, tuple(row for row in section.rows if not names or any(named(section, row, name) for name in names)))
        for section in SECTIONS
    ]
    return [(section, rows) for section, rows in chosen if rows]


class _Peers:
    """The peers of this machine; ``about`` describes each, or says why it is missing."""

    def __init__(self, wanted: bool) -> None:
        self.kernels: list[KernelPeer] = []
        self.torch: TorchLayer | None = None
        self.llama: LlamaCppLayer | None = None
        self.about: dict[str, str] = {}
        self._stack = ExitStack()
        if wanted:
            self.kernels.append(NumPy())
            self.about[NumPy.name] = NumPy.about
            if (torch := self._started(Torch)) is not None:
                self.kernels.append(torch)
                self.torch = TorchLayer(torch)
            if (llama := self._started(LlamaCpp)) is not None:
                self.llama = LlamaCppLayer(llama)

    def _started(self, kind: Any) -> Any:
        try:
            peer = kind()
        except ModuleNotFoundError:
            self.about[kind.name] = "not installed"
        except (OSError, RuntimeError) as error:
            self.about[kind.name] = f"not measured: {error}"
        else:
            self._stack.callback(peer.close)
            self.about[kind.name] = peer.about
            return peer
        return None

    def __enter__(self) -> _Peers:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _results(
    section: Section, rows: tuple[Row, ...], quick: bool, bench: Bench, peers: _Peers, bar: Any
) -> Iterator[Result]:
    """The results of a table's rows, in their order."""
    skipped = {row.id for row in rows if quick and section.quick is not None and row.id not in section.quick}
    layers = measure_layers(
        [row for row in rows if isinstance(row, LayerRow) and row.id not in skipped], bench, peers.torch, peers.llama
    )
    for row in rows:
        bar.set_postfix_str(row.label)
        if isinstance(row, MemoryRow):
            yield memory(row)
        elif row.id in skipped:
            yield Result(row.id, row.label, row.rust_m4, reason="skipped by --quick")
        elif isinstance(row, KernelRow):
            yield measure_kernel(row, bench, peers.kernels)
        else:
            yield next(layers)
        bar.update()


def memory(row: MemoryRow) -> Result:
    """Memory of a model, and what the Rust report says of it."""
    estimate = PRESETS[row.model].memory_estimate()
    return Result(
        row.id, row.label,
        sizes={
            "parameters": estimate.parameters, "fp16": estimate.fp16, "int8": estimate.int8, "int4": estimate.int4,
            "rust_fp16": row.rust_fp16 * 1e9, "rust_int4": row.rust_int4 * 1e9,
        },
    )  # fmt: skip


def _by_name(peaks: Peaks) -> dict[str, float]:
    reads = {f"read {level.name}": level.bandwidth for level in peaks.levels}
    return {"multiply-add, float32": peaks.fma, "dot product, int8": peaks.int8_dot, **reads}
