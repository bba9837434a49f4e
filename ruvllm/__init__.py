"""ruvllm: LLM inference kernels in readable Python, compiled by Numba, and the models made of them."""
