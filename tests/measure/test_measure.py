"""Measuring: engines are interleaved and settle, peers compute the same as kernels, workers answer."""

import dataclasses
import re
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from ruvllm.kernels import KERNELS
from ruvllm.measure.inside import Inside
from ruvllm.measure.numpy_peer import OPERATIONS
from ruvllm.measure.peaks import Level, Peaks
from ruvllm.measure.peers import NumPy, PeerError, Torch
from ruvllm.measure.timing import Call, Effort, alternate
from ruvllm.measure.workers.quiet import wait_until_quiet
from tests.report.report_cases import SMALL


@pytest.mark.parametrize("kernel", sorted(OPERATIONS))
def test_numpy_computes_the_same(kernel: str) -> None:
    inputs = KERNELS[kernel].example(np.random.default_rng(1), **SMALL[kernel])
    exact = KERNELS[kernel].reference(**inputs)
    NumPy().engine(KERNELS[kernel], inputs, exact, 1)
    wrong = tuple(2 * r for r in exact) if isinstance(exact, tuple) else 2 * exact
    with pytest.raises(PeerError, match="computes something else"):
        NumPy().engine(KERNELS[kernel], inputs, wrong, 1)


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
    with pytest.raises(LookupError, match="rms_norm: parallel was not seen"):
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


def test_engines_with_several_threads_work_before_each_turn() -> None:
    class Counted(Call):
        calls, settled = 0, 0

        def seconds(self, calls: int) -> float:
            self.calls += 1
            return 1e-3

        def settle(self) -> None:
            self.settled += 1

    counts = []
    for settle in (False, True):
        engine = Counted(lambda: None)
        alternate({"a": engine}, Effort(turns=3, seconds=0.0, awake=0.01), settle)
        counts.append((engine.calls, engine.settled))
    assert counts[0] == (4, 0)  # one to estimate, then three turns
    assert counts[1][0] > 4 + 3 and counts[1][1] == 4


def test_limit_is_the_longer_of_arithmetic_and_reads() -> None:
    peaks = Peaks(1, 1e11, 4e11, (Level("L1", 1 << 15, 1e11), Level("memory", float("inf"), 1e10)))

    def least(flops: float, nbytes: float, integer: bool = False) -> list[str | float]:
        seconds, bound = peaks.least_seconds(flops, nbytes, integer)
        return [round(seconds * 1e9), bound]

    assert least(1e6, 1000) == [10_000, "FMA"]
    assert least(1e6, 1000, integer=True) == [2_500, "int8 dot"]
    assert least(10, 1000) == [10, "L1"]
    assert least(10, 1e6) == [100_000, "memory"]


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
