"""Quantised weights and activations: their layout, how they are made, and their integer products."""
