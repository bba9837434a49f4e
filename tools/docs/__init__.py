"""The documentation site: pages of kernels, drawn figures, and the figures that were measured for them."""
