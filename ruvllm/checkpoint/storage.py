"""Storage types: the byte layouts of tensor elements in GGUF and safetensors files.

Elements are stored in blocks along a row: (elements per block, bytes per block). Source of the GGUF codes and sizes:
ggml's ``ggml_type`` enumeration; of the safetensors names: its format description.
"""

from __future__ import annotations

# Types whose values ruvllm can decode (dequant.py), under the one name used for both file formats.
BLOCKS: dict[str, tuple[int, int]] = {
    "F64": (1, 8),
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136),
    "MXFP4": (32, 17),
    "TQ1_0": (256, 54),
    "TQ2_0": (256, 66),
    # In no file: GPTQ and AWQ tensors are read as these (four_bits.py).
    "Q4_Z": (32, 20),  # 16-bit scale, zero point, a byte that is 0, and codes as in Q4_0
    "Q4_P": (1, 4),  # float32 values, where the columns of a group are not neighbours
}

# GGUF: type code -> name, for the types that ruvllm reads ...
GGUF_TYPES: dict[int, str] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 20: "IQ4_NL", 23: "IQ4_XS", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip

# ... for those that exist and that it does not read ...
GGUF_UNSUPPORTED: dict[int, str] = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 24: "I8",
    25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip

# ... and for those that ggml itself has removed.
GGUF_REMOVED: dict[int, str] = {
    4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}  # fmt: skip

# safetensors: dtype name -> bits per element. Those without an entry in BLOCKS can be listed but not decoded.
SAFETENSORS_BITS: dict[str, int] = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32,
    "I32": 32, "U64": 64, "I64": 64, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6,
    "F4": 4,
}  # fmt: skip


def row_bytes(dtype: str, elements: int) -> int:
    """Bytes of one row: ``elements / per_block * bytes_per_block``; ``elements`` must be whole blocks."""
    per_block, block_bytes = BLOCKS[dtype]
    return elements // per_block * block_bytes
