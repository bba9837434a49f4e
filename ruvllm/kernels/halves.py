"""16-bit floats from outside: float16 and bfloat16 arrays of NumPy, and of any library that speaks DLPack.

NumPy has no bfloat16 of its own. The type of ml_dtypes is known by its name, a DLPack tensor by the type code in
its header, so that neither ml_dtypes nor torch has to be imported.
"""

import ctypes
from typing import Any, TypeGuard

import numpy as np

_BFLOAT, _CPU = 4, 1  # codes of DLPack's DLDataTypeCode and DLDeviceType
_FLOAT32 = np.dtype(np.float32)  # one object for every native float32 array


class _Tensor(ctypes.Structure):
    """DLPack's DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p), ("device", ctypes.c_int32), ("device_id", ctypes.c_int32), ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )  # fmt: skip


class _Bits:
    """A tensor shown to NumPy as uint16. It keeps the capsule, which frees the tensor when NumPy lets go of it."""

    def __init__(self, capsule: Any, tensor: _Tensor) -> None:
        self._keep = capsule
        self.__array_interface__ = {
            "version": 3,
            "typestr": np.dtype(np.uint16).str,
            "data": ((tensor.data or 0) + tensor.byte_offset, False),
            "shape": tuple(tensor.shape[: tensor.ndim]),
            "strides": tuple(2 * n for n in tensor.strides[: tensor.ndim]) if tensor.strides else None,
        }


def bfloat16_bits(array: Any) -> np.ndarray | None:
    """A view, as uint16, of a bfloat16 tensor in main memory that has ``__dlpack__``; None if it is something else."""
    capsule = array.__dlpack__()
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    tensor = _Tensor.from_address(pointer(capsule, b"dltensor"))
    if (tensor.code, tensor.bits, tensor.lanes, tensor.device) != (_BFLOAT, 16, 1, _CPU):
        return None
    return np.asarray(_Bits(capsule, tensor))


def is_bfloat16(dtype: Any) -> bool:
    """Whether a NumPy dtype is the bfloat16 of ml_dtypes."""
    return dtype.kind == "V" and dtype.name == "bfloat16"


def is_half(array: Any) -> TypeGuard[np.ndarray]:
    """Whether ``array`` is a NumPy array of float16 or bfloat16."""
    if not isinstance(array, np.ndarray) or array.dtype is _FLOAT32:  # the usual case: comparing types takes 0.2 us
        return False
    return array.dtype == np.float16 or is_bfloat16(array.dtype)


def widened(array: np.ndarray) -> np.ndarray:
    """The float32 elements of an array of float16 or of bfloat16, or of the latter's bits as uint16. Exact."""
    if array.dtype == np.float16:
        return array.astype(np.float32)
    bits = array if array.dtype == np.uint16 else array.view(np.uint16)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
