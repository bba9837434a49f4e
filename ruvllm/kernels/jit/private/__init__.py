"""All internals of numba and llvmlite that ruvllm uses, beyond what they document; of NumPy it uses none.

A *part* is one thing that another version may no longer have (``parts``). It has a name, a test that runs when it is
first used, and a documented substitute, slower but correct, for when the test fails. The one exception is ``cross``,
without which ``ruvllm.lab.explain`` says that it does not work. Nothing outside of this package names ``numba.core``,
``numba.np`` or an underscored attribute of theirs (tests/test_layout.py). The context and the builder that
``numba.extending.intrinsic`` passes to its functions count as documented.
"""
