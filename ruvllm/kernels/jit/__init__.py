"""How kernels are compiled: decorators and flags, the compile cache, views of memory, small calls, private parts."""
