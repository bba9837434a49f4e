"""16-bit floats in and out of the public kernels: the bits of float32 kernels on widened inputs, rounded at the end."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import ruvllm.kernels as K
from ruvllm.kernels import KERNELS, KernelSpec, check
from tests.kernels import spec_cases as cases

HALVES = pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
EVERY_SPEC = pytest.mark.parametrize("spec", KERNELS.values(), ids=KERNELS.keys())
BY_HALVES = [
    "softmax", "silu_mul", "gelu_mul", "clamped_swiglu", "softcap", "rms_norm", "rms", "layer_norm", "dot", "scale",
    "add", "apply_rope", "apply_rope_tables", "gemv", "gemm", "gemm_nt", "batched_gemm", "grouped_gemm",
    "flash_attention", "ragged_attention", "grouped_query_attention", "multi_query_attention", "softmax_attention",
    "paged_attention", "quant_matmul", "dequantize",
]  # fmt: skip


@HALVES
@EVERY_SPEC
def test_inputs_are_widened(spec: KernelSpec, dtype: Any) -> None:
    arguments = cases.example(spec, {axis: cases.SMALL[axis] for axis in spec.axes})
    inputs = {name: array.astype(dtype) for name, array in cases.arrays(arguments).items()}
    for name in cases.IN_PLACE.get(spec.name, ()):
        del inputs[name]
    got = cases.run(spec, {**arguments, **inputs})
    wide = cases.run(spec, {**arguments, **{name: array.astype(np.float32) for name, array in inputs.items()}})
    for y, r in zip(got, wide, strict=True):
        np.testing.assert_array_equal(y, r)


@HALVES
@pytest.mark.parametrize("name", BY_HALVES)
def test_results_are_rounded_into_out(name: str, dtype: Any) -> None:
    spec = KERNELS[name]
    arguments = cases.example(spec, {axis: cases.SMALL[axis] for axis in spec.axes})
    (expected,) = cases.run(spec, arguments)
    out = np.empty(expected.shape, dtype)
    assert spec.function(**arguments, out=out) is out
    np.testing.assert_array_equal(out, expected.astype(dtype))
    with pytest.raises(ValueError, match="^out: expected shape"):
        spec.function(**arguments, out=np.empty((*expected.shape, 2), dtype))
    out.flags.writeable = False
    with pytest.raises(ValueError, match="^out: must be writable"):
        spec.function(**arguments, out=out)


@HALVES
@pytest.mark.parametrize("name", cases.IN_PLACE)
def test_what_changes_in_place_must_be_float32(name: str, dtype: Any) -> None:
    """A widened copy would take the change, and the caller's array would not."""
    spec = KERNELS[name]
    arguments = cases.example(spec, {axis: cases.SMALL[axis] for axis in spec.axes})
    for argument in cases.IN_PLACE[name]:
        with pytest.raises(TypeError, match=f"^{argument}: expected .*float32"):
            spec.function(**{**arguments, argument: arguments[argument].astype(dtype)})


def test_every_bfloat16_is_widened_exactly() -> None:
    bits = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    x = check.float32("x", bits.view(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(x.view(np.uint32), bits.astype(np.uint32) << np.uint32(16))


class _Tensor:
    """A bfloat16 tensor as another library hands it out: float32 memory would do, but NumPy must not know its type."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: object) -> object:
        if options:
            raise BufferError("bfloat16 is\nnot supported")  # as NumPy asks
        return _with_code(self.array.view(np.uint16).__dlpack__(), 4)


def _with_code(capsule: Any, code: int) -> Any:
    import ctypes

    from ruvllm.kernels import halves

    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    halves._Tensor.from_address(pointer(capsule, b"dltensor")).code = code
    return capsule


@pytest.mark.parametrize("cut", [np.s_[:], np.s_[1:], np.s_[:, ::3], np.s_[::-1, 2:5], np.s_[:0]])
def test_a_dlpack_tensor_of_bfloat16(cut: Any) -> None:
    x = np.random.default_rng(0).standard_normal((5, 7)).astype(ml_dtypes.bfloat16)[cut]
    tensor: Any = _Tensor(x)
    np.testing.assert_array_equal(check.float32("x", tensor), x.astype(np.float32))
    np.testing.assert_array_equal(K.softcap(tensor, 3.0), K.softcap(x.astype(np.float32), 3.0))


def test_a_tensor_that_numpy_cannot_view_is_refused_in_one_line() -> None:
    class Elsewhere(_Tensor):
        def __dlpack__(self, **options: object) -> object:
            raise BufferError("on a\ndevice")

    with pytest.raises(TypeError, match="^x: expected an array that NumPy can view, found on a device$"):
        K.rms(Elsewhere(np.ones(3, np.uint16)))


def test_float64_is_refused_with_what_helps() -> None:
    with pytest.raises(TypeError, match=r"x: expected float32, found float64; convert it: x.astype\(np.float32\)"):
        K.rms(np.ones(3))


def test_tensors_of_torch() -> None:
    torch = pytest.importorskip("torch", reason="torch is not a requirement; a stand-in is tested above")
    x = torch.randn(3, 40)
    np.testing.assert_array_equal(K.rms(x), K.rms(x.numpy()))
    for dtype in (torch.bfloat16, torch.float16):
        half = x.to(dtype)
        np.testing.assert_array_equal(K.rms(half.T), K.rms(half.float().numpy().T))
    with pytest.raises(TypeError, match="^x: expected an array that NumPy can view"):
        K.rms(x.requires_grad_())
