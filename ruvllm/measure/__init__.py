"""Measure ruvllm and its peers: interleaved runs on a quiet machine, compared with the machine's limits.

| module | contents |
|---|---|
| ``timing`` | engines interleaved; medians and quartiles |
| ``workers`` | a peer in a process of its own, and the programs that run there |
| ``peaks`` | the limits of this machine: arithmetic, and reads from each cache and from memory |
| ``inside`` | a kernel's body without Python's call |
| ``peers`` | NumPy and PyTorch as peers of a kernel |
| ``engines`` | ruvllm, llama.cpp and ik_llama.cpp on one model file |
| ``gguf_file`` | model files with made-up weights |
| ``replacing`` | other objects in place of the library's own: recorders, swapped kernels |
"""
