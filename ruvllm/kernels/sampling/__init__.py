"""Choosing the next token: sampling, ranking, log-probabilities."""
