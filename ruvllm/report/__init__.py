"""`ruvllm report`: every row of the seed's benchmark report measured on this machine, beside its peers and limits."""
