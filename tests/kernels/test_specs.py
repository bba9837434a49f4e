"""Every kernel of KERNELS against its float64 reference, at its own sizes and at odd ones."""

import json
import re
import sys

import numpy as np
import pytest

from ruvllm import kernels
from ruvllm.kernels import KERNELS, KernelSpec
from ruvllm.kernels.jit.small_calls import long_way
from tests.kernels import spec_cases as cases
from tests.processes import ROOT, python

EVERY_SPEC = pytest.mark.parametrize("spec", KERNELS.values(), ids=KERNELS.keys())
CANARY = np.float32(-12345.0)


@EVERY_SPEC
def test_record_is_complete(spec: KernelSpec) -> None:
    assert getattr(kernels, spec.name) is spec.function
    assert spec.function.__doc__ and "Raises:" in (spec.function.__doc__ or "")
    for sizes in spec.sizes:
        assert tuple(sizes) == spec.axes
        assert spec.flops(**sizes) > 0
        assert spec.bytes(**sizes) > 0
    assert spec.examples[0] == spec.sizes[0] and len({str(sizes) for sizes in spec.sizes}) == len(spec.sizes)
    assert spec.name in repr(spec) and spec.formula in repr(spec)


def test_examples_leave_out_what_takes_long_in_float64() -> None:
    assert [sizes["n"] for sizes in KERNELS["gemm"].examples] == [128, 256, 512]
    reads = KERNELS["buffer_sum"]
    assert [sizes for sizes in reads.sizes if sizes not in reads.examples] == [{"n": 1 << 26}]


@EVERY_SPEC
def test_reference_at_named_sizes(spec: KernelSpec) -> None:
    for sizes in spec.examples:
        arguments = cases.example(spec, sizes)
        cases.assert_close(spec, arguments, cases.run(spec, arguments), sizes)


@EVERY_SPEC
def test_reference_at_odd_sizes(spec: KernelSpec) -> None:
    for sizes in cases.odd_sizes(spec):
        arguments = cases.example(spec, sizes)
        cases.assert_close(spec, arguments, cases.run(spec, arguments), sizes)


@EVERY_SPEC
def test_arguments_are_left_alone(spec: KernelSpec) -> None:
    for sizes in cases.odd_sizes(spec, (1, 16, 35)):
        arguments = cases.example(spec, sizes)
        before = {name: array.copy() for name, array in cases.arrays(arguments).items()}
        cases.run(spec, arguments)
        for name, array in before.items():
            np.testing.assert_array_equal(arguments[name], array, err_msg=name)


def _between_canaries(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """An array of this shape, full of NaN, inside a larger buffer of canaries."""
    size = int(np.prod(shape))
    buffer = np.full(size + 128, CANARY, np.float32)
    inside = buffer[64 : 64 + size].reshape(shape)
    inside[...] = np.nan
    return buffer, inside


@pytest.mark.parametrize("spec", [s for s in KERNELS.values() if cases.takes_out(s)], ids=lambda s: s.name)
def test_out_is_filled_and_nothing_around_it(spec: KernelSpec) -> None:
    for sizes in cases.odd_sizes(spec, (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 129)):
        arguments = cases.example(spec, sizes)
        (expected,) = cases.run(spec, arguments)
        buffer, out = _between_canaries(expected.shape)
        assert spec.function(**arguments, out=out) is out
        np.testing.assert_array_equal(out, expected, err_msg=str(sizes))
        assert (buffer[:64] == CANARY).all() and (buffer[-64:] == CANARY).all(), sizes


@pytest.mark.parametrize("name", cases.IN_PLACE)
def test_what_is_changed_in_place_and_nothing_around_it(name: str) -> None:
    spec = KERNELS[name]
    for sizes in cases.odd_sizes(spec, (1, 2, 15, 16, 17, 33, 65)):
        arguments = cases.example(spec, sizes)
        expected = cases.run(spec, arguments)
        buffers = []
        for argument in cases.IN_PLACE[name]:
            buffer, inside = _between_canaries(arguments[argument].shape)
            inside[...] = arguments[argument]
            arguments[argument] = inside
            buffers.append(buffer)
        for got, wanted in zip(cases.results(spec.function(**arguments)), expected, strict=True):
            np.testing.assert_array_equal(got, wanted, err_msg=str(sizes))
        for buffer in buffers:
            assert (buffer[:64] == CANARY).all() and (buffer[-64:] == CANARY).all(), sizes


@pytest.mark.parametrize("threads", [2, 3, 7])
@EVERY_SPEC
def test_split_over_threads_at_odd_sizes(spec: KernelSpec, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More threads than the work is worth, or than there are rows: the same bits, and nothing written outside."""
    for sizes in cases.odd_sizes(spec, (1, 2, 15, 16, 17, 33, 50, 130)):
        arguments = cases.example(spec, sizes)
        expected = cases.run(spec, arguments)
        with monkeypatch.context() as patched:
            for name, module in list(sys.modules.items()):
                if name.startswith("ruvllm.kernels.") and hasattr(module, "threads_for"):
                    patched.setattr(module, "threads_for", lambda work, threshold, pieces: threads)
            buffer, out = _between_canaries(expected[0].shape)
            with long_way():
                got = cases.run(spec, arguments, **({"out": out} if cases.takes_out(spec) else {}))
        assert (buffer[:64] == CANARY).all() and (buffer[-64:] == CANARY).all(), sizes
        for y, r in zip(got, expected, strict=True):
            np.testing.assert_array_equal(y, r, err_msg=str(sizes))


@pytest.mark.parametrize("spec", [s for s in KERNELS.values() if cases.takes_out(s)], ids=lambda s: s.name)
def test_out_that_cannot_take_the_result_is_refused(spec: KernelSpec) -> None:
    arguments = cases.example(spec, spec.sizes[0])
    (y,) = cases.run(spec, arguments)
    with pytest.raises(TypeError, match="out: expected a float32"):
        spec.function(**arguments, out=np.empty(y.shape, np.float64))
    with pytest.raises(TypeError, match="out: expected a float32"):
        spec.function(**arguments, out=y.tolist())
    with pytest.raises(ValueError, match="out: expected shape"):
        spec.function(**arguments, out=np.empty((*y.shape, 2), np.float32))
    read_only = np.empty(y.shape, np.float32)
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="out: must be C-contiguous"):
        spec.function(**arguments, out=read_only)
    strided = np.empty((*y.shape, 2), np.float32)[..., 0]
    if strided.size > 1:
        with pytest.raises(ValueError, match="out: must be C-contiguous"):
            spec.function(**arguments, out=strided)


def _strided(array: np.ndarray) -> np.ndarray:
    """The same numbers with NaN between them in memory."""
    wide = np.full((*array.shape, 2), np.nan, np.float32)
    wide[..., 0] = array
    return wide[..., 0]


def _read_only(array: np.ndarray) -> np.ndarray:
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def _misaligned(array: np.ndarray) -> np.ndarray:
    raw = np.zeros(array.nbytes + 1, np.uint8)
    raw[1:] = array.reshape(-1).view(np.uint8)
    return raw[1:].view(np.float32).reshape(array.shape)


def _other_byte_order(array: np.ndarray) -> np.ndarray:
    return array.astype(array.dtype.newbyteorder())


@pytest.mark.parametrize("changed", [_strided, _read_only, _misaligned, _other_byte_order])
@EVERY_SPEC
def test_layout_of_inputs_does_not_matter(spec: KernelSpec, changed) -> None:
    for sizes in cases.odd_sizes(spec, (1, 17, 33)):
        arguments = cases.example(spec, sizes)
        expected = cases.run(spec, arguments)
        inputs = {n: a for n, a in cases.arrays(arguments).items() if n not in cases.IN_PLACE.get(spec.name, ())}
        got = cases.run(spec, {**arguments, **{name: changed(array) for name, array in inputs.items()}})
        for y, r in zip(got, expected, strict=True):
            np.testing.assert_array_equal(y, r, err_msg=str(sizes))


@EVERY_SPEC
def test_wrong_dtype_is_refused_by_name(spec: KernelSpec) -> None:
    arguments = cases.example(spec, spec.sizes[0])
    for name, array in cases.arrays(arguments).items():
        for dtype in (np.float64, np.int32):
            with pytest.raises(TypeError, match=f"^{name}: expected .*float32.*{np.dtype(dtype)}"):
                spec.function(**{**arguments, name: array.astype(dtype)})


@EVERY_SPEC
def test_read_only_inputs_need_no_second_compilation(spec: KernelSpec) -> None:
    sizes = {**spec.sizes[0]}
    arguments = cases.example(spec, sizes)
    cases.run(spec, arguments)
    before = [len(function.signatures) for function in spec.compiled]
    inputs = {n: a for n, a in cases.arrays(arguments).items() if n not in cases.IN_PLACE.get(spec.name, ())}
    cases.run(spec, {**arguments, **{name: _read_only(array) for name, array in inputs.items()}})
    assert [len(function.signatures) for function in spec.compiled] == before


def _in_a_process(*arguments: str, **environment: str) -> str:
    """spec_cases.py as a program; it must succeed."""
    return python("-m", "tests.kernels.spec_cases", *arguments, **environment)


def test_results_are_the_same_for_any_number_of_threads_and_in_two_processes() -> None:
    one_to_four = json.loads(_in_a_process("digest", "1", "2", "3", "4", NUMBA_NUM_THREADS="4"))
    another = json.loads(_in_a_process("digest", "2", NUMBA_NUM_THREADS="2"))
    expected = one_to_four["1"]
    assert set(expected) == set(KERNELS)
    assert one_to_four == dict.fromkeys("1234", expected)
    assert another["2"] == expected


def test_every_kernel_runs_as_plain_python() -> None:
    """All indices are then checked, those of vectors too; test_guarded.py catches what compiled code does outside."""
    assert "every kernel agrees" in _in_a_process("check", NUMBA_DISABLE_JIT="1")


def test_the_documentation_names_the_kernels_that_differ_between_processors() -> None:
    page = (ROOT / "docs" / "explanations" / "bits.md").read_text(encoding="utf-8")
    line = next(line for line in page.splitlines() if line.startswith("| `add_rms_norm`"))
    assert set(re.findall(r"`(\w+)`", line)) == cases.BY_WIDTH
