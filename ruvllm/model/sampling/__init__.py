"""Sampling: how the next token of a sequence is chosen from the logits."""
