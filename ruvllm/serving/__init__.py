"""Serving: OpenAI's HTTP interface over one model, which ``ruvllm serve`` runs; extra ``ruvllm[serve]``."""
