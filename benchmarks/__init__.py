"""Measurements of ruvllm: against other engines (``python -m benchmarks.peers``), and the files they need."""
