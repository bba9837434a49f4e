"""Operations of a tape: what one member of a team does for one row of the tape, with the bodies of the public kernels.

Each is ``body(m, *arguments)``: ``m`` is the ``Member``, an argument is an integer or an operand (``kernels.tape``). By
convention array arguments come first, then sizes. ``m.rows`` is the number of rows (tokens) that it computes in this
pass, all members together.
"""

from ruvllm.kernels.operations.attention import append, append_blocks, attend, attend_runs, attend_token, merge
from ruvllm.kernels.operations.experts import (
    add_grouped_bias,
    combine,
    gather,
    grouped_float_matmul,
    grouped_integer_matmul,
    quantize_runs,
    route,
    sigmoid_scale,
)
from ruvllm.kernels.operations.matmul import adapter_down, adapter_up, add_bias, float_matmul, integer_matmul
from ruvllm.kernels.operations.rows import (
    add,
    broadcast,
    chosen_rows,
    clamped_swiglu,
    gelu_mul,
    last_rows,
    quantize,
    rms_norm,
    rope,
    scale,
    silu_mul,
    softcap,
)

__all__ = [
    "adapter_down", "adapter_up", "add", "add_bias", "add_grouped_bias", "append", "append_blocks", "attend",
    "attend_runs", "attend_token", "broadcast", "chosen_rows", "clamped_swiglu", "combine", "float_matmul", "gather",
    "gelu_mul", "grouped_float_matmul", "grouped_integer_matmul", "integer_matmul", "last_rows", "merge", "quantize",
    "quantize_runs", "rms_norm", "rope", "route", "scale", "sigmoid_scale", "silu_mul", "softcap",
]  # fmt: skip
