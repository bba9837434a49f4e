"""Attention: public functions, and kernels for prompts, single tokens and plain rows; the KV cache's layout."""
