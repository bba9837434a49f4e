"""Measurements of ruvllm against other engines (``python -m benchmarks.peers``), and their model files."""
