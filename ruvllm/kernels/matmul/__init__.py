"""Float matrix products: public functions, packing into panels, tiles and micro-kernels, BLAS where it is faster."""
