"""Odd arguments of every public function: the right answer, or an error that begins with the argument's name.

KERNELS drives it; what has no record stands in OTHERS, and a test holds the two lists to the package's ``__all__``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numba.core.errors import NumbaError

import ruvllm.kernels as K
from ruvllm.kernels import KERNELS, KernelSpec, reference
from ruvllm.kernels.activation import softmax_rows
from ruvllm.kernels.jit.decorators import kernel
from ruvllm.kernels.norm import rms_norm_rows
from ruvllm.kernels.quant.activations import quantize_activations
from ruvllm.kernels.quant.layout import Rounded
from ruvllm.kernels.rope.frequencies import rope_inv_freq, rope_tables
from ruvllm.kernels.sampling.ranking import argmax_index
from ruvllm.kernels.simd.vectors import f32_load, f32_store
from ruvllm.kernels.training.adamw import AdamW, adamw
from tests.kernels import spec_cases as cases

EVERY_SPEC = pytest.mark.parametrize("spec", KERNELS.values(), ids=KERNELS.keys())

_X = np.linspace(-2, 2, 12, dtype=np.float32)
# Public functions without a record, and arguments that they take.
OTHERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "top_logprobs": (K.top_logprobs, {"logits": _X, "n": 3}),
    "rope_inv_freq": (
        K.rope_inv_freq,
        {"head_dim": 8, "theta": 1e4, "scaling": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0, "original_max_position": 8192},
    ),
    "rope_tables": (K.rope_tables, {"positions": np.arange(4), "head_dim": 8, "theta": 1e4, "factors": np.ones(4)}),
    "read_bandwidth": (K.read_bandwidth, {"nbytes": 64, "repeats": 1, "threads": 1}),
    "pack_quantized": (
        K.pack_quantized, {"codes": np.ones((2, 64), np.int8), "scales": np.ones((2, 2), np.uint16), "columns": 50},
    ),
}  # fmt: skip


def test_every_public_function_is_here() -> None:
    functions = {name for name in K.__all__ if inspect.isfunction(getattr(K, name))}
    assert functions <= KERNELS.keys() | OTHERS.keys()


def odd_arrays(array: np.ndarray) -> Iterator[tuple[str, Any]]:
    """Things that are no such array, and arrays of other types, shapes and sizes."""
    yield from (("None", None), ("text", "x"), ("object", object()), ("number", 3.5), ("ragged", [[1.0], [1.0, 2.0]]))
    for dtype in ("f8", "f2", "c8", "?", "i4", "S3", "M8[s]", object):
        with np.errstate(all="ignore"):
            try:
                yield f"of {dtype}", array.astype(dtype)
            except (TypeError, ValueError):  # NumPy itself cannot
                continue
    yield "an axis more in front", array[None]
    yield "an axis more behind", array[..., None]
    yield "no axis", np.asarray(array.reshape(-1)[0])
    for axis in range(array.ndim):
        yield f"longer along {axis}", np.concatenate([array, array.take([0], axis)], axis)
        yield f"shorter along {axis}", array.take(range(array.shape[axis] - 1), axis)
        yield f"nothing along {axis}", array.take([], axis)
    huge = np.broadcast_to(array.dtype.type(1), (1 << 28,) * min(array.ndim, 2) + (1,) * (array.ndim - 2))
    if huge.ndim > 1:  # 2^56 numbers, which no copy can hold
        yield "huge", huge


ODD_NUMBERS = (None, "x", "1", [1], 1j, object(), math.nan, math.inf, -1, 0, 1.5, 1 << 70, 10**400)


def refuses_by_name(function: Callable[..., Any], arguments: dict[str, Any]) -> bool:
    """Whether it is refused in one line that begins with an argument's name; else the error, if there is one, goes on.

    Memory that cannot be had for a copy is refused by NumPy with the numbers.
    """
    try:
        function(**arguments)
    except (TypeError, ValueError) as error:
        message = str(error)
        names = {*inspect.signature(function).parameters}
        if function is rope_tables:  # which hands the rest on
            names |= {*inspect.signature(rope_inv_freq).parameters}
        if function is adamw:  # whose settings are a tuple
            names |= {*AdamW._fields}
        assert message.split(":")[0].split("[")[0] in names, repr(error)
        assert message.isprintable(), repr(error)
        return True
    except MemoryError as error:
        assert str(error)
        return True
    return False


@EVERY_SPEC
def test_odd_arguments_of_kernels(spec: KernelSpec) -> None:
    example = cases.example(spec, {axis: cases.SMALL[axis] for axis in spec.axes})
    for name, value in example.items():
        for label, odd in odd_arrays(value) if isinstance(value, np.ndarray) else [(repr(v), v) for v in ODD_NUMBERS]:
            copies = {n: example[n].copy() for n in cases.IN_PLACE.get(spec.name, ())}
            arguments = {**example, **copies, name: odd}
            if refuses_by_name(spec.function, arguments) or odd is None:  # None stands for a default
                continue
            got = cases.run(spec, {**example, name: odd})
            if all(y.size for y in got) and not (isinstance(odd, float) and not math.isfinite(odd)):
                with np.errstate(all="ignore"):
                    expected = cases.results(spec.reference(**{**example, name: odd}))
                for y, r in zip(got, expected, strict=True):
                    np.testing.assert_allclose(y, r.astype(np.float32), rtol=1e-3, atol=1e-4, err_msg=f"{name} {label}")


@pytest.mark.parametrize("name", OTHERS)
def test_odd_arguments_of_other_functions(name: str) -> None:
    function, sound = OTHERS[name]
    refused = 0
    for argument, value in sound.items():
        is_array = isinstance(value, np.ndarray)
        for _, odd in odd_arrays(value) if is_array else [(repr(v), v) for v in ODD_NUMBERS]:
            if argument == "repeats" and isinstance(odd, int) and odd > 1:
                continue  # it would take as long as that was asked for
            arguments = {n: v.copy() if isinstance(v, np.ndarray) else v for n, v in sound.items()}
            refused += refuses_by_name(function, {**arguments, argument: odd})
    assert refused >= 3 * len(sound)


@EVERY_SPEC
def test_a_nan_or_infinity_goes_where_the_formula_takes_it(spec: KernelSpec) -> None:
    sizes = {axis: cases.SMALL[axis] for axis in spec.axes}
    for name, array in cases.arrays(cases.example(spec, sizes)).items():
        for bad in (np.nan, np.inf, -np.inf):
            for at in (0, array.size // 2, array.size - 1):
                arguments = cases.example(spec, sizes)
                arguments[name] = array.copy()
                arguments[name].flat[at] = bad
                if refuses_by_name(spec.function, arguments):
                    continue
                arguments = cases.example(spec, sizes)
                arguments[name] = array.copy()
                arguments[name].flat[at] = bad
                with np.errstate(all="ignore"):
                    expected = cases.results(spec.reference(**arguments))
                got = cases.run(spec, arguments)
                if spec.name == "attention_backward":
                    # The reference multiplies all that is masked by 0, the kernel some of it: a NaN comes out where one
                    # comes in to what is seen, and where one is masked it may.
                    with np.errstate(all="ignore"):
                        seen = cases.attention_backward_of_the_seen(**arguments)
                    for y, r, least in zip(got, expected, seen, strict=True):
                        assert (np.isfinite(y) <= np.isfinite(least)).all(), f"{name} {bad} at {at}: lost"
                        assert (np.isfinite(y) >= np.isfinite(r)).all(), f"{name} {bad} at {at}: more than there is"
                    continue
                for y, r in zip(got, expected, strict=True):
                    np.testing.assert_array_equal(np.isfinite(y), np.isfinite(r), err_msg=f"{name} {bad} at {at}")


@pytest.mark.parametrize("name", ["gemv", "gemm", "gemm_nt", "batched_gemm", "flash_attention", "lora_forward"])
def test_an_output_that_shares_memory_with_an_input_is_refused(name: str) -> None:
    spec = KERNELS[name]
    arguments = cases.example(spec, dict.fromkeys(spec.axes, 4))
    (expected,) = cases.run(spec, arguments)
    tried = 0
    for argument, array in cases.arrays(arguments).items():
        if array.shape == expected.shape:
            with pytest.raises(ValueError, match="^out: shares memory with an input$"):
                spec.function(**arguments, out=array)
        buffer = np.zeros(array.size + expected.size, np.float32)
        inside = buffer[: array.size].reshape(array.shape)
        inside[...] = array
        with pytest.raises(ValueError, match="^out: shares memory with an input$"):
            overlapping = buffer[array.size - 1 :][: expected.size].reshape(expected.shape)
            spec.function(**{**arguments, argument: inside}, out=overlapping)
        after = buffer[array.size :].reshape(expected.shape)
        np.testing.assert_array_equal(spec.function(**{**arguments, argument: inside}, out=after), expected)
        tried += 1
    assert tried >= 2


@EVERY_SPEC
def test_an_output_over_a_piece_of_an_input_is_refused_or_right(spec: KernelSpec) -> None:
    if "out" not in inspect.signature(spec.function).parameters or spec.name in cases.IN_PLACE:
        return
    arguments = cases.example(spec, dict.fromkeys(spec.axes, 4))
    (expected,) = cases.run(spec, arguments)
    for argument, array in cases.arrays(arguments).items():
        for shift in (-1, 1, 5):
            buffer = np.zeros(array.size + expected.size + 10, np.float32)
            inside = buffer[5:][: array.size].reshape(array.shape)
            inside[...] = array
            over = buffer[5 + shift :][: expected.size].reshape(expected.shape)
            try:
                found = spec.function(**{**arguments, argument: inside}, out=over)
            except ValueError as error:
                assert str(error).startswith(("out: overlaps an input", "out: shares memory")), argument
            else:
                np.testing.assert_array_equal(found, expected, err_msg=argument)


@pytest.mark.parametrize("name", ["softmax", "silu_mul", "rms_norm", "layer_norm", "add", "scale", "apply_rope"])
def test_an_output_may_be_the_input_itself(name: str) -> None:
    spec = KERNELS[name]
    arguments = cases.example(spec, dict.fromkeys(spec.axes, 6))
    (expected,) = cases.run(spec, arguments)
    for argument, array in cases.arrays(arguments).items():
        if array.shape == expected.shape:
            for own in (array.copy(), np.concatenate([array, array])[: len(array)]):  # the second is a view
                np.testing.assert_array_equal(spec.function(**{**arguments, argument: own}, out=own), expected)


RNG = np.random.default_rng(0)
ODD: dict[str, Any] = {
    "f64": RNG.standard_normal((4, 8)),
    "F": np.asfortranarray(RNG.standard_normal((4, 8)).astype(np.float32)),
}


@pytest.mark.parametrize("name", ODD)
def test_bodies_of_plain_loops_read_any_array_right(name: str) -> None:
    """A function of the user's calls a body without the checks of its public function."""
    x, weight, out = ODD[name], np.ones(8, np.float32), np.empty((4, 8), np.float32)
    rms_norm_rows(x, weight, 1e-5, out, 0, 4)
    np.testing.assert_allclose(out, reference.rms_norm(x, weight, 1e-5), rtol=1e-5)
    softmax_rows(x, out, 0, 4)
    np.testing.assert_allclose(out, reference.softmax(x), rtol=1e-5)


def test_bodies_refuse_arrays_that_they_would_misread() -> None:
    assert argmax_index(ODD["F"][1]) == ODD["F"][1].argmax()
    with pytest.raises(NumbaError, match="kernels take arrays of float32, found"):
        argmax_index(ODD["f64"][1])
    with pytest.raises(NumbaError, match="kernels take C-contiguous arrays of float32, found"):
        copy_vector(ODD["F"])


@kernel
def copy_vector(x: Any) -> None:
    """What a body made of vectors does."""
    f32_store(x, 0, f32_load(x, 0))


def test_bodies_refuse_to_write_what_they_would_spoil() -> None:
    x, read_only = np.ones((4, 8), np.float32), np.ones((4, 8), np.float32)
    read_only.flags.writeable = False
    with pytest.raises(NumbaError, match="readonly array"):
        softmax_rows(x, read_only, 0, 4)
    wrong, scales = np.zeros((1, 1, 4, 32), np.int32), np.zeros((1, 1, 4), np.float32)
    rounded = Rounded(wrong, scales, np.zeros((1, 1, 4, 4), np.int32), scales, np.zeros((4, 4, 2), np.float32))
    with pytest.raises(NumbaError, match="kernels take C-contiguous arrays of int8 or uint8, found"):
        quantize_activations(x, rounded, 0, 0, 4)
