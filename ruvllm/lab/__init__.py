"""The laboratory: measure this machine, and look into what kernels and models do on it."""

from ruvllm.lab.peaks import Peaks, measure_peaks

__all__ = ["Peaks", "measure_peaks"]
