"""Answers of a given form: JSON schemas, regular expressions, grammars, choices; calls of tools.

llguidance (``pip install 'ruvllm[structured]'``) tells which tokens can follow.
"""
