"""The laboratory: measure this machine, and look into what kernels and models do on it."""

from ruvllm.lab.explanation import TARGETS, Explanation, explain, explain_all
from ruvllm.lab.peaks import Peaks, measure_peaks

__all__ = ["TARGETS", "Explanation", "Peaks", "explain", "explain_all", "measure_peaks"]
