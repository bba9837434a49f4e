"""The laboratory: measure this machine, and inspect what kernels and models do on it.

Each function returns an object that print() shows as text and a notebook as a table, and whose ``plot()`` draws it on a
matplotlib axis (``pip install 'ruvllm[lab]'``).
"""

from ruvllm.lab.costs import Cost, cost
from ruvllm.lab.drifting import Drift, QuantisationError, drift, quantisation_error
from ruvllm.lab.explanation import TARGETS, Explanation, explain, explain_all
from ruvllm.lab.patching import Patching, patch
from ruvllm.lab.profiling import Profile, profile
from ruvllm.lab.rooflines import Roofline, roofline
from ruvllm.lab.scaling import NETWORKS, Costs, Network, Scaling, scale
from ruvllm.lab.steering import Steering, steering
from ruvllm.lab.swapping import Swap, swap
from ruvllm.measure.peaks import Peaks, measure_peaks

__all__ = [
    "NETWORKS", "TARGETS", "Cost", "Costs", "Drift", "Explanation", "Network", "Patching", "Peaks", "Profile",
    "QuantisationError", "Roofline", "Scaling", "Steering", "Swap", "cost", "drift", "explain", "explain_all",
    "measure_peaks", "patch", "profile", "quantisation_error", "roofline", "scale", "steering", "swap",
]  # fmt: skip
