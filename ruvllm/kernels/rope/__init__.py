"""Rotary position embedding: the rotation, and the frequencies of each kind of scaling."""
