"""Low-rank adapters: public functions on plain matrices, and kernels on packed ones."""
