"""What the report measures: the tables of the Rust report (see ``rust_report``), with its figures on an Apple M4 Pro.

Rows without such a figure are our own. Their sizes are among those of the kernel's record, ``KernelSpec.sizes``.
"""

from __future__ import annotations

from dataclasses import dataclass

from ruvllm.brief import brief

US, MS = 1e-6, 1e-3


@dataclass(frozen=True)
class KernelRow:
    """One call of a kernel on the example arrays of these sizes; rust_m4: seconds in the Rust report."""

    label: str
    kernel: str
    sizes: dict[str, int]
    rust_m4: float | None = None

    @property
    def id(self) -> str:
        """The row's key in any report."""
        return self.kernel + "".join(f" {name}={size}" for name, size in self.sizes.items())


@dataclass(frozen=True)
class LayerRow:
    """One token through the first layers of a model, with the final norm and a small head."""

    label: str
    model: str  # a preset
    layout: str
    layers: int
    rust_m4: float | None = None

    @property
    def id(self) -> str:
        """The row's key in any report."""
        return f"{self.model} {self.layout} layers={self.layers}"


@dataclass(frozen=True)
class MemoryRow:
    """Memory of a model's weights; computed, not measured."""

    label: str
    model: str
    rust_fp16: float  # GB
    rust_int4: float

    @property
    def id(self) -> str:
        """The row's key in any report."""
        return f"{self.model} memory"


Row = KernelRow | LayerRow | MemoryRow


@dataclass(frozen=True)
class Section:
    """One table: ``name`` is what --only takes."""

    name: str
    title: str
    about: str
    rows: tuple[Row, ...]
    quick: tuple[str, ...] | None = None  # ids that --quick measures, None for all

    __repr__ = brief


def _one_head(length: int, dim: int, label: str, rust_m4: float | None) -> KernelRow:
    return KernelRow(label, "softmax_attention", {"length": length, "dim": dim}, rust_m4)


def _gqa(heads: int, kv_heads: int, length: int, rust_m4: float) -> KernelRow:
    sizes = {"heads": heads, "kv_heads": kv_heads, "length": length, "dim": 128}
    return KernelRow(f"{heads} query heads, {kv_heads} kv heads, {length}", "grouped_query_attention", sizes, rust_m4)


def _norm(kernel: str, label: str, n: int, rust_m4: float | None) -> KernelRow:
    return KernelRow(f"{label} {n}", kernel, {"rows": 1, "n": n}, rust_m4)


def _rope(kernel: str, label: str, dim: int, tokens: int, rust_m4: float | None) -> KernelRow:
    return KernelRow(f"{label} {dim} × {tokens}", kernel, {"tokens": tokens, "heads": 1, "dim": dim}, rust_m4)


def _lora(kernel: str, label: str, dim: int, rank: int, rust_m4: float) -> KernelRow:
    return KernelRow(f"{label} {dim} × {dim}, rank {rank}", kernel, {"rows": 1, "dim": dim, "rank": rank}, rust_m4)


def _read(kilobytes: int, rust_m4: float | None) -> tuple[KernelRow, KernelRow]:
    """The Rust report's row, attention over that many KB of keys and values; and a plain read of as many."""
    return (
        _one_head(kilobytes, 128, f"Attention over {kilobytes} KB", rust_m4),
        KernelRow(f"Plain read of {kilobytes} KB", "buffer_sum", {"n": kilobytes * 256}),
    )


def _append(tokens: int) -> KernelRow:
    sizes = {"tokens": tokens, "kv_heads": 32, "dim": 128, "length": tokens}
    return KernelRow(f"KV append, {tokens} tokens", "kv_append", sizes)


ATTENTION = Section(
    "attention", "Attention",
    "One query, one head. In the Rust report, \"Softmax Attention\" is attention with head size 64, and \"Flash "
    "Attention\" the same call with head size 128. Softmax alone, which it does not measure, is below.",
    (
        *(_one_head(s, 64, f"Softmax attention {s}", us * US) for s, us in ((128, 1.74), (256, 3.17), (512, 6.34))),
        *(_one_head(s, 128, f"Flash attention {s}", us * US) for s, us in ((128, 3.31), (256, 6.53), (512, 12.84))),
        _one_head(4096, 128, "Attention scaling 4096", 102.38 * US),
        *(KernelRow(f"Softmax alone {n}", "softmax", {"rows": 1, "n": n}) for n in (128, 256, 512)),
    ),
)  # fmt: skip

GQA = Section(
    "gqa", "Grouped-query attention",
    "One token; head size 128. The Rust report's ratio 4 is 16 query heads on 4 kv heads, its ratio 8 is 16 on 2. "
    "Its headline of 840 us is the last row.",
    (
        *(_gqa(16, 4, s, us * US) for s, us in ((128, 115.58), (256, 219.99), (512, 417.63))),
        *(_gqa(16, 2, s, us * US) for s, us in ((128, 112.03), (256, 209.19), (512, 395.51))),
        _gqa(32, 4, 512, 839.55 * US),
    ),
)  # fmt: skip

BANDWIDTH = Section(
    "bandwidth", "Memory bandwidth",
    "The Rust report's rows are one-head attention whose keys and values together have that size. The row below each "
    "is what they were meant to show: how fast a buffer of that size is read.",
    tuple(row for kb, us in ((256, 6.26), (512, 12.13), (1024, 24.05), (2048, 47.86), (4096, 101.63))
          for row in _read(kb, us * US)) + (KernelRow("Plain read of 256 MB", "buffer_sum", {"n": 1 << 26}),),
)  # fmt: skip

NORMS = Section(
    "norms", "RMSNorm and LayerNorm",
    "One row.",
    (
        *(_norm("rms_norm", "RMSNorm", n, ns * 1e-9)
          for n, ns in ((768, 143.65), (1024, 179.06), (2048, 342.72), (4096, 620.40), (8192, 1193.6))),
        *(_norm("layer_norm", "LayerNorm", n, ns * 1e-9)
          for n, ns in ((768, 192.06), (1024, 252.64), (2048, 489.09), (4096, 938.30))),
    ),
)  # fmt: skip

MATMUL = Section(
    "matmul", "GEMV and GEMM",
    "Row-major float32.",
    (
        *(KernelRow(f"GEMV {n} × {n}", "gemv", {"m": n, "k": n}, us * US)
          for n, us in ((256, 3.12), (512, 13.83), (1024, 58.09), (2048, 263.76), (4096, 1360.0))),
        *(KernelRow(f"GEMM {n} × {n} × {n}", "gemm", {"m": n, "n": n, "k": n}, us * US)
          for n, us in ((128, 216.89), (256, 1760.0), (512, 16710.0))),
    ),
)  # fmt: skip

ROPE = Section(
    "rope", "Rotary position embedding",
    "Head size × tokens, one head. \"Apply\" computes cosines and sines in the call; \"tables\" has them.",
    (
        *(_rope("apply_rope", "RoPE apply", 64, t, us * US)
          for t, us in ((1, 0.15173), (8, 0.71337), (32, 2.68), (128, 10.46))),
        *(_rope("apply_rope", "RoPE apply", 128, t, us * US)
          for t, us in ((1, 0.2888), (8, 1.33), (32, 5.21), (128, 24.28))),
        _rope("apply_rope_tables", "RoPE with tables", 64, 1, 22.76e-9),
        _rope("apply_rope_tables", "RoPE with tables", 128, 8, None),
        _rope("apply_rope_tables", "RoPE with tables", 128, 32, None),
    ),
)  # fmt: skip

_LORA = ((768, 1, 0.95409, 0.30688), (768, 2, 1.58, 0.48419), (2048, 1, 2.52, 0.82257), (2048, 2, 4.31, 1.33),
         (4096, 1, 5.07, 1.65), (4096, 2, 8.56, 2.61))  # fmt: skip
LORA = Section(
    "lora", "MicroLoRA",
    "One token. \"Forward\" allocates its output (the scalar table of the Rust report), \"forward, added\" adds to the "
    "caller's (its SIMD table). Gradients are those of A and B, rank 2.",
    (
        *(_lora("lora_forward", "Forward", d, r, us * US) for d, r, us, _ in _LORA),
        *(_lora("lora_forward_add", "Forward, added", d, r, us * US) for d, r, _, us in _LORA),
        *(_lora("lora_accumulate_grad", "Gradients", d, 2, us * US)
          for d, us in ((768, 2.6), (2048, 6.5), (4096, 21.9))),
    ),
)  # fmt: skip

_MODELS = (("LLaMA2-7B", "llama2-7b", 569.67), ("LLaMA3-8B", "llama3-8b", 657.20), ("Mistral-7B", "mistral-7b", 656.04))
LAYERS = Section(
    "layers", "Transformer layers",
    "One token after 16 others: attention over a KV cache with rotary positions in every head, feed-forward, "
    "residuals; then the final norm and a head of 512 tokens. Each layer has its own memory. In INT4, weights have "
    "4 bits and activations 8; errors are against float64 on the quantised weights.",
    (
        *(LayerRow(f"{label}, 1 layer, f32", name, "f32", 1, ms * MS) for label, name, ms in _MODELS),
        *(LayerRow(f"{label}, 1 layer, INT4", name, "int4", 1) for label, name, _ in _MODELS),
        *(LayerRow(f"LLaMA2-7B, {n} layers, f32", "llama2-7b", "f32", n, seconds)
          for n, seconds in ((4, 2.29), (8, 4.57), (16, 9.19))),
        *(LayerRow(f"LLaMA2-7B, {n} layers, INT4", "llama2-7b", "int4", n) for n in (4, 8, 16)),
    ),
    quick=("llama2-7b f32 layers=1", "llama2-7b int4 layers=1", "llama3-8b int4 layers=1", "mistral-7b int4 layers=1"),
)  # fmt: skip

KV = Section(
    "kv", "KV cache",
    "Keys and values of all tokens into an empty cache of one layer, LLaMA2-7B: 32 heads of size 128, 32 KB a "
    "token. The Rust report's figures are its bandwidth column under another heading, so none is shown.",
    tuple(_append(tokens) for tokens in (256, 512, 1024, 2048)),
)  # fmt: skip

MEMORY = Section(
    "memory", "Model memory",
    "Computed from the shapes, grouped-query attention counted; INT4 with one 16-bit scale for 32 weights.",
    (
        MemoryRow("LLaMA2-7B", "llama2-7b", 13.64, 3.41),
        MemoryRow("LLaMA2-13B", "llama2-13b", 26.01, 6.50),
        MemoryRow("LLaMA3-8B", "llama3-8b", 16.01, 4.00),
        MemoryRow("Mistral-7B", "mistral-7b", 14.48, 3.62),
    ),
)  # fmt: skip

SECTIONS = (ATTENTION, GQA, BANDWIDTH, NORMS, MATMUL, ROPE, LORA, LAYERS, KV, MEMORY)
