"""Speculative decoding: several tokens are guessed, and one pass of the model tells how many of them were right."""
