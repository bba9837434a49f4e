"""The benchmark report of RuvLLM, the Rust library this project started from: its targets, figures and errors."""

from __future__ import annotations

from dataclasses import dataclass

RUST_REPORT = "the report of RuvLLM in Rust (Apple M4 Pro, one thread, 2026-01-18)"


@dataclass(frozen=True)
class Target:
    """``row`` (its id) must take less than ``seconds``, called from Python on one thread."""

    label: str
    row: str
    seconds: float


TARGETS = (
    Target("Flash attention, one head, 256 positions", "softmax_attention length=256 dim=128", 2e-3),
    Target(
        "Attention of 32 query heads, 512 positions",
        "grouped_query_attention heads=32 kv_heads=4 length=512 dim=128",
        2e-3,
    ),
    Target("RMSNorm, 4096", "rms_norm rows=1 n=4096", 10e-6),
    Target("GEMV, 4096 × 4096", "gemv m=4096 k=4096", 5e-3),
    Target("MicroLoRA forward, 4096, rank 2", "lora_forward rows=1 dim=4096 rank=2", 1e-3),
    Target("RoPE with tables, 128, 32 tokens", "apply_rope_tables tokens=32 heads=1 dim=128", 50e-6),
)

# (what it says, what is true); found by running its programs again
ERRATA = (
    (
        "“Softmax Attention” and “Flash Attention” are two kernels.",
        "They are one call with head size 64 and 128; softmax alone is not measured. The first table here measures it.",
    ),
    (
        "KV append of 256 tokens takes 6 us, 512 take 12 us.",
        "These are the figures of its memory bandwidth table under another heading: 256 tokens of LLaMA2-7B are 8 MB, "
        "which in 6 us would be 1.4 TB/s. Its memory column (0.25 MB for 256 tokens) is too small by a factor of 32.",
    ),
    (
        "“Flash Attention (256 seq)” takes 840 us.",
        "The 840 us are of 32 query heads on 4 kv heads at 512 positions. So it has “ratio 8, 512” twice, as "
        "395.5 us (16 heads) and as 839.6 us (32 heads). Here each has a row.",
    ),
    (
        "GEMV reaches 21.1 GFLOP/s at 256 and 12.4 at 4096.",
        "It counts a multiplication and its addition as one operation there, and as two in GEMM. At its latencies GEMV "
        "reaches twice that rate.",
    ),
    (
        "RoPE with tables takes 1.33 us for 32 tokens of size 128, and 135 ns for 8.",
        "Marked as estimates, and never measured. They are measured here.",
    ),
    (
        "LLaMA2-7B takes 13.64 GB in FP16 and 3.41 GB in INT4; LLaMA3-8B 16.01 and 4.00.",
        "With grouped-query attention counted, its four models take 13.48, 26.03, 16.06 and 14.48 GB in FP16; and INT4 "
        "needs its scales: the last table counts one of 16 bits for 32 weights, which makes 4.5 bits a weight.",
    ),
    (
        "A full layer of LLaMA2-7B takes 570 ms.",
        "Its layer rotates one head only, has no KV cache, and leaves softmax unnormalised. The layers here are those "
        "that models run: every head rotated, a cache of 17 positions, logits checked against float64.",
    ),
    (
        "LayerNorm, causal attention, long contexts and paged attention work.",
        "Its LayerNorm computes E[x²] − mean², which cancels where the mean is large; its causal flag is ignored; its "
        "float32 angles are off by 3e-3 at position 131071; its paged attention mistakes heads for tokens. The "
        "tests of this library compare each of these with float64.",
    ),
)

# Seconds of its kernels on a Zen 4, one thread, by row id: its programs run again; its report has the M4 Pro alone.
RUST_ZEN4 = {
    "gemm m=128 n=128 k=128": 82e-6, "gemm m=256 n=256 k=256": 682e-6, "gemm m=512 n=512 k=512": 6450e-6,
    "gemv m=256 k=256": 2.87e-6, "gemv m=512 k=512": 12.8e-6, "gemv m=1024 k=1024": 55.0e-6,
    "gemv m=2048 k=2048": 257e-6, "gemv m=4096 k=4096": 2160e-6,
    "softmax_attention length=512 dim=64": 12.3e-6, "softmax_attention length=512 dim=128": 22.1e-6,
    "softmax_attention length=4096 dim=128": 179e-6,
    "grouped_query_attention heads=16 kv_heads=4 length=512 dim=128": 702e-6,
    "grouped_query_attention heads=32 kv_heads=4 length=512 dim=128": 1140e-6,
    "rms_norm rows=1 n=768": 180e-9, "rms_norm rows=1 n=4096": 806e-9, "rms_norm rows=1 n=8192": 1840e-9,
    "layer_norm rows=1 n=768": 256e-9, "layer_norm rows=1 n=4096": 1360e-9,
    "apply_rope tokens=1 heads=1 dim=128": 0.525e-6, "apply_rope tokens=32 heads=1 dim=128": 8.34e-6,
    "apply_rope tokens=128 heads=1 dim=128": 35.0e-6,
    "apply_rope_tables tokens=1 heads=1 dim=64": 27e-9, "apply_rope_tables tokens=32 heads=1 dim=128": 785e-9,
    "lora_forward_add rows=1 dim=4096 rank=1": 2.40e-6, "lora_forward_add rows=1 dim=4096 rank=2": 3.80e-6,
    "lora_accumulate_grad rows=1 dim=768 rank=2": 4.21e-6, "lora_accumulate_grad rows=1 dim=2048 rank=2": 11.2e-6,
    "lora_accumulate_grad rows=1 dim=4096 rank=2": 22.3e-6,
    "kv_append tokens=512 kv_heads=32 dim=128 length=512": 8.7e-3,
}  # fmt: skip
