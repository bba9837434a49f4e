"""Where the seed's own report is wrong, found by running its programs again; and the targets that it set itself."""

from __future__ import annotations

from dataclasses import dataclass

SEED = "the seed's report (RuvLLM in Rust, Apple M4 Pro, one thread, 2026-01-18)"


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

# (what the seed's report says, what is so)
ERRATA = (
    (
        "“Softmax Attention” and “Flash Attention” are two kernels.",
        "They are one call with head size 64 and 128; softmax alone is not measured. Here it is, in the first table.",
    ),
    (
        "KV append of 256 tokens takes 6 us, 512 take 12 us.",
        "These are the figures of its memory bandwidth table under another heading: 256 tokens of LLaMA2-7B are 8 MB, "
        "which in 6 us would be 1.4 TB/s. Its memory column (0.25 MB for 256 tokens) is too small by a factor of 32.",
    ),
    (
        "“Flash Attention (256 seq)” takes 840 us.",
        "The 840 us are of 32 query heads on 4 kv heads at 512 positions. So “ratio 8, 512” stands in it twice, as "
        "395.5 us (16 heads) and as 839.6 us (32 heads). Here both have rows.",
    ),
    (
        "GEMV reaches 21.1 GFLOP/s at 256 and 12.4 at 4096.",
        "It counts a multiplication and its addition as one operation there, and as two in GEMM. At its latencies GEMV "
        "does twice as much as it says.",
    ),
    (
        "RoPE with tables takes 1.33 us for 32 tokens of size 128, and 135 ns for 8.",
        "Marked as estimates, and never measured. Here they are.",
    ),
    (
        "LLaMA2-7B takes 13.64 GB in FP16 and 3.41 GB in INT4; LLaMA3-8B 16.01 and 4.00.",
        "With grouped-query attention counted, its four models take 13.48, 26.03, 16.06 and 14.48 GB in FP16; and INT4 "
        "needs its scales: the last table counts one of 16 bits for 32 weights, which makes 4.5 bits a weight.",
    ),
    (
        "A full layer of LLaMA2-7B takes 570 ms.",
        "Its layer turns one head alone by its position, has no KV cache, and leaves softmax unnormalised. The layers "
        "here are those that models run: every head turned, a cache of 17 positions, logits checked against float64.",
    ),
    (
        "LayerNorm, causal attention, long contexts and paged attention work.",
        "Its LayerNorm computes E[x²] − mean², which cancels where the mean is large; its causal flag is ignored; its "
        "float32 angles are off by 3e-3 at position 131071; its paged attention takes heads for tokens. This "
        "library's tests hold each of these to float64.",
    ),
)
