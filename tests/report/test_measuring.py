"""Measuring: the rows are the Rust report's, each gets figures or a reason, and peers compute the same as kernels."""

import dataclasses
import time
from pathlib import Path

import numpy as np
import pytest

from ruvllm.kernels import KERNELS
from ruvllm.measure import workers
from ruvllm.measure.numpy_peer import OPERATIONS
from ruvllm.measure.peaks import Level, Peaks
from ruvllm.measure.peers import NumPy, relative_error
from ruvllm.measure.timing import Call, Effort
from ruvllm.report import bench, kernel_rows, layer_peers, layer_rows, layers, run
from ruvllm.report.rows import SECTIONS, KernelRow, LayerRow
from ruvllm.report.rust_report import TARGETS
from tests.report.report_cases import ALL_ROWS, SMALL

SHORT = Effort(turns=3, seconds=1e-5, longest=0.01)
LEVELS = (Level("L1", 1 << 15, 1e11), Level("memory", float("inf"), 1e10))
PEAKS = {n: Peaks(n, 1e11 * n, 4e11 * n, LEVELS) for n in (1, 2)}


# --- the rows ------------------------------------------------------------------------------------------------------


def test_the_tables_of_the_rust_report_are_complete() -> None:
    """The number of rows with a figure on the M4 Pro, table by table, as the Rust report prints them."""
    figures = {s.name: sum(getattr(row, "rust_m4", None) is not None for row in s.rows) for s in SECTIONS}
    assert figures == {
        "attention": 7, "gqa": 7, "bandwidth": 5, "norms": 9, "matmul": 8, "rope": 9, "lora": 15, "layers": 6, "kv": 0,
        "memory": 0,
    }  # fmt: skip
    assert [row.label for row in SECTIONS[-1].rows] == ["LLaMA2-7B", "LLaMA2-13B", "LLaMA3-8B", "Mistral-7B"]
    assert len([row for row in ALL_ROWS if isinstance(row, LayerRow) and row.layout == "int4"]) == 6


def test_rows_fit_the_kernels_records() -> None:
    for row in ALL_ROWS:
        if isinstance(row, KernelRow):
            spec = KERNELS[row.kernel]
            assert row.sizes in spec.sizes and tuple(row.sizes) == spec.axes, row.id
            assert spec.flops(**row.sizes) > 0 and spec.bytes(**row.sizes) > 0


def test_a_row_id_means_one_operation() -> None:
    by_id: dict[str, list[object]] = {}
    for row in ALL_ROWS:
        by_id.setdefault(row.id, []).append(row)
    for rows in by_id.values():
        assert len({(getattr(row, "kernel", None), str(getattr(row, "sizes", None))) for row in rows}) == 1


def test_targets_and_quick_name_rows() -> None:
    ids = {row.id for row in ALL_ROWS}
    assert {target.row for target in TARGETS} <= ids
    assert {id for section in SECTIONS for id in section.quick or ()} <= ids


def test_only() -> None:
    assert [len(rows) for _, rows in run.choose([])] == [len(section.rows) for section in SECTIONS]
    assert [(s.name, len(rows)) for s, rows in run.choose(["kv", "RMSNorm 768"])] == [("norms", 1), ("kv", 4)]
    with pytest.raises(ValueError, match="found 'nothing', expected a table"):
        run.choose(["norms", "nothing"])


# --- measuring -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", sorted({row.kernel for row in ALL_ROWS if isinstance(row, KernelRow)}))
def test_kernel_rows_have_all_figures(kernel: str) -> None:
    row = KernelRow("x", kernel, SMALL[kernel], 1.0)
    result = kernel_rows.measure_kernel(row, bench.Bench(SHORT, PEAKS), [NumPy()])
    assert [entry.threads for entry in result.entries] == [1, 2]
    assert result.right and result.error is not None and result.error < 1e-5
    for entry in result.entries:
        assert entry.call.low <= entry.call.median <= entry.call.high and entry.call.turns >= 3
        assert entry.limit > 0 and entry.share > 0
        assert ("numpy" in entry.peers) == (kernel in OPERATIONS) == ("numpy" not in result.missing)
    assert result.flops == KERNELS[kernel].flops(**row.sizes)


def test_a_large_row_is_compared_with_the_kernel_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float64 would take minutes."""
    spec = KERNELS["rms_norm"]
    row = KernelRow("x", "rms_norm", SMALL["rms_norm"])
    monkeypatch.setattr(kernel_rows, "LARGE", spec.flops(**row.sizes))
    monkeypatch.setitem(KERNELS, "rms_norm", dataclasses.replace(spec, reference=None))  # type: ignore[arg-type]
    result = kernel_rows.measure_kernel(row, bench.Bench(SHORT, {1: PEAKS[1]}), [NumPy()])
    assert result.error is None and result.right is None
    assert "numpy" in result.entries[0].peers and not result.missing


def test_a_wrong_kernel_is_not_right(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = KERNELS["rms_norm"]
    off = dataclasses.replace(spec, reference=lambda **inputs: spec.reference(**inputs) * 1.001)
    monkeypatch.setitem(KERNELS, "rms_norm", off)
    row = KernelRow("x", "rms_norm", SMALL["rms_norm"])
    result = kernel_rows.measure_kernel(row, bench.Bench(SHORT, {1: PEAKS[1]}), [])
    assert result.right is False
    assert result.error == pytest.approx(1e-3, rel=0.01)


def test_reads_from_memory_are_measured_with_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_BUFFER_BYTES", 4096)
    monkeypatch.setattr(bench, "buffer_sum", lambda x: time.sleep(2e-3))
    timed = bench.Bench(SHORT, {1: PEAKS[1]})
    entry = timed.entry(1, {bench.OWN: Call(lambda: None)}, 10, 1e6)
    assert entry.bound == "memory" and not entry.peers
    assert entry.limit > 1e6 / (4096 / 2e-3)  # a sleep takes at least as long as given
    assert timed.entry(1, {bench.OWN: Call(lambda: None)}, 10, 1000).limit == 1000 / 1e11


# --- layers --------------------------------------------------------------------------------------------------------

TINY = dataclasses.replace(
    layers.layer_config("llama3-8b", 3), hidden_size=128, intermediate_size=320, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32,
)  # fmt: skip


@pytest.mark.parametrize("layout", ["f32", "int4"])
def test_layers_compute_what_float64_does(layout: str) -> None:
    model = layers.layer_model(TINY, layout)
    for count in (1, 3):
        config = dataclasses.replace(TINY, num_hidden_layers=count)
        token = layers.OneToken(layers.first_layers(model, count, 1))
        first = token().copy()
        assert relative_error(first, layers.exact_logits(config, layout)) < layer_rows._TOLERANCES[layout]
        np.testing.assert_array_equal(token(), first)
    other = dataclasses.replace(TINY, num_hidden_layers=2)
    assert relative_error(first, layers.exact_logits(other, layout)) > 0.1


def test_layers_that_do_not_fit_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "layer_config", lambda model, count: dataclasses.replace(TINY, num_hidden_layers=count))
    monkeypatch.setattr(layer_rows, "lacking_memory", lambda nbytes: "too large" if nbytes > 2e6 else "")
    rows = [LayerRow(f"{n} layers", "m", "f32", n) for n in (1, 2, 8)]
    found = list(layer_rows.measure_layers(rows, bench.Bench(SHORT, {1: PEAKS[1]}), None, None))
    assert [(len(result.entries), result.reason) for result in found] == [(1, ""), (1, ""), (0, "too large")]
    assert all(result.right for result in found[:2])
    assert "GB are free" in bench.lacking_memory(1e15) and bench.lacking_memory(1.0) == ""


def test_the_file_for_llama_cpp_holds_the_same_model(tmp_path: Path) -> None:
    """Our own loader reads what was written for llama.cpp."""
    import ruvllm

    for layout in ("f32", "int4"):
        path = tmp_path / f"{layout}.gguf"
        layer_peers._write(path, TINY, layout)
        llm = ruvllm.load(path, threads=1)
        ids = np.append(layers.context_ids(), layers.TOKEN)
        found = llm.model.forward(ids, llm.new_cache(20), last_only=True)
        assert relative_error(found, layers.exact_logits(TINY, layout)) < layer_rows._TOLERANCES[layout]


# --- peers that are not there, or fail -----------------------------------------------------------------------------


def test_peers_that_are_missing_or_broken_have_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUVLLM_TORCH_PYTHON", str(tmp_path / "none"))
    empty = tmp_path / "llama_worker.py"
    empty.write_text("import json; input(); print(json.dumps({'error': 'no module', 'missing': True}))")
    monkeypatch.setattr(workers, "_PROGRAMS", tmp_path)
    with run._Peers(True) as found:
        assert [peer.name for peer in found.kernels] == ["numpy"]
        assert found.llama is None and found.about["llama.cpp"] == "not installed"
        assert found.about["torch"].startswith("not measured: ")
    with run._Peers(False) as found:
        assert not found.kernels and not found.about
