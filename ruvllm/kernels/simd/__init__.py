"""SIMD vectors as values of compiled Python, what each processor makes of them, exp and sums built on them."""
