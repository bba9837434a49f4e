"""Serving: OpenAI's HTTP interface over one model. ``ruvllm serve`` runs it; it needs ``pip install 'ruvllm[serve]'``."""
