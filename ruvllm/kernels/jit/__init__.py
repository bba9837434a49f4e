"""How kernels are compiled: decorators and flags, the compile cache, array views, small calls, Numba's internals."""
