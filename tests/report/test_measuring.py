"""Measuring: the rows are the Rust report's, each gets figures or a reason, and peers compute the same as kernels."""

import dataclasses
import re
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from ruvllm.kernels import KERNELS
from ruvllm.measure import workers
from ruvllm.measure.inside import Inside
from ruvllm.measure.numpy_peer import OPERATIONS
from ruvllm.measure.peaks import Level, Peaks
from ruvllm.measure.peers import NumPy, PeerError, Torch, relative_error
from ruvllm.measure.timing import Call, Effort, alternate
from ruvllm.measure.workers.quiet import wait_until_quiet
from ruvllm.report import bench, kernel_rows, layer_peers, layer_rows, layers, run
from ruvllm.report.rows import SECTIONS, KernelRow, LayerRow
from ruvllm.report.rust_report import TARGETS
from tests.report.report_cases import ALL_ROWS

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
    with pytest.raises(ValueError, match="'nothing' is none of the tables"):
        run.choose(["norms", "nothing"])


# --- measuring -----------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("kernel", sorted(OPERATIONS))
def test_numpy_computes_the_same(kernel: str) -> None:
    inputs = KERNELS[kernel].example(np.random.default_rng(1), **SMALL[kernel])
    exact = KERNELS[kernel].reference(**inputs)
    NumPy().engine(KERNELS[kernel], inputs, exact, 1)
    wrong = tuple(2 * r for r in exact) if isinstance(exact, tuple) else 2 * exact
    with pytest.raises(PeerError, match="computes something else"):
        NumPy().engine(KERNELS[kernel], inputs, wrong, 1)


def test_a_wrong_kernel_is_not_right(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = KERNELS["rms_norm"]
    off = dataclasses.replace(spec, reference=lambda **inputs: spec.reference(**inputs) * 1.001)
    monkeypatch.setitem(KERNELS, "rms_norm", off)
    row = KernelRow("x", "rms_norm", SMALL["rms_norm"])
    result = kernel_rows.measure_kernel(row, bench.Bench(SHORT, {1: PEAKS[1]}), [])
    assert result.right is False
    assert result.error == pytest.approx(1e-3, rel=0.01)


def test_inside_calls_the_body_the_given_number_of_times() -> None:
    spec = KERNELS["lora_forward_add"]
    inputs = spec.example(np.random.default_rng(0), rows=1, dim=64, rank=2)
    out = inputs["out"]
    step = spec.reference(**inputs) - out
    engine = Inside(spec, tuple(inputs.values()))  # calls it twice
    before = out.copy()
    engine.seconds(7)  # and once more
    np.testing.assert_allclose(out - before, 8 * step, rtol=1e-4, atol=1e-4)


def test_inside_refuses_what_is_not_one_call() -> None:
    spec = KERNELS["gemm"]
    inputs = spec.example(np.random.default_rng(0), m=4, n=4, k=4)
    with pytest.raises(LookupError, match="compiled calls"):
        Inside(dataclasses.replace(spec, compiled=()), tuple(inputs.values()))
    spec = KERNELS["rms_norm"]
    inputs = spec.example(np.random.default_rng(0), rows=1, n=64)
    with pytest.raises(LookupError, match="rms_norm_parallel was not seen"):
        Inside(dataclasses.replace(spec, compiled=spec.compiled[::-1]), tuple(inputs.values()))


def test_engines_take_turns() -> None:
    order: list[str] = []
    engines = {name: Call(lambda name=name: order.append(name)) for name in "ab"}  # type: ignore[misc]
    found = alternate(engines, Effort(turns=4, seconds=0.0))
    turns = re.sub(r"(.)\1*", r"\1", "".join(order))
    assert turns == "abababa"  # ab to estimate, then four turns: ab, ba, ab, ba
    assert [found[name].turns for name in "ab"] == [4, 4]


def test_long_calls_get_fewer_turns() -> None:
    effort = Effort(turns=15, seconds=2.0, longest=10.0)
    assert [effort.turns_of(one) for one in (0.5, 1.0, 5.0)] == [15, 10, 3]
    assert [effort.calls(one) for one in (0.3, 0.5, 5.0)] == [7, 4, 1]


def test_limit_is_the_longer_of_arithmetic_and_reads() -> None:
    def least(flops: float, nbytes: float, integer: bool = False) -> list[str | float]:
        seconds, bound = PEAKS[1].least_seconds(flops, nbytes, integer)
        return [round(seconds * 1e9), bound]

    assert least(1e6, 1000) == [10_000, "FMA"]
    assert least(1e6, 1000, integer=True) == [2_500, "int8 dot"]
    assert least(10, 1000) == [10, "L1"]
    assert least(10, 1e6) == [100_000, "memory"]


def test_reads_from_memory_are_measured_beside_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_torch_worker_answers_and_its_answer_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for torch: NumPy arrays behind the calls that the worker makes of it."""
    stand_in = tmp_path / "torch.py"
    stand_in.write_text(
        "import contextlib, types, numpy as np\n"
        "__version__ = '0'\n"
        "class T(np.ndarray):\n"
        "    def numpy(self): return np.asarray(self)\n"
        "    def sum(self): return np.asarray(np.ndarray.sum(self)).view(T)\n"
        "from_numpy = lambda a: a.view(T)\n"
        "set_num_threads = lambda n: None\n"
        "inference_mode = contextlib.nullcontext\n"
        "softmax = lambda x, axis: np.exp(x) / np.exp(x).sum()\n"
        "nn = types.SimpleNamespace(functional=None)\n"
        "backends = types.SimpleNamespace(cpu=types.SimpleNamespace(get_cpu_capability=lambda: 'none'))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    torch = Torch(sys.executable)
    try:
        spec = KERNELS["buffer_sum"]
        inputs = spec.example(np.random.default_rng(0), n=100)
        assert torch.about == "PyTorch 0 (none)"
        assert torch.engine(spec, inputs, spec.reference(**inputs), 1).seconds(3) > 0
        with pytest.raises(PeerError, match="something else: relative error 5.0e-01"):
            torch.engine(spec, inputs, 2 * spec.reference(**inputs), 1)
        spec = KERNELS["kv_append"]
        with pytest.raises(PeerError, match="no counterpart"):
            torch.engine(spec, spec.example(np.random.default_rng(0), **SMALL["kv_append"]), (0.0, 0.0), 1)
    finally:
        torch.close()


def test_an_engine_is_quiet_when_its_threads_no_longer_spin() -> None:
    done = threading.Event()

    def spin() -> None:
        end = time.thread_time() + 0.05
        while time.thread_time() < end:
            pass
        done.set()

    threading.Thread(target=spin).start()
    wait_until_quiet()
    assert done.is_set()


def test_waiting_for_quiet_ends_where_threads_spin_for_ever() -> None:
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    wait_until_quiet()
    assert not stop.is_set() and thread.is_alive()
    stop.set()
    thread.join()
