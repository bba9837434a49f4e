"""Everything that ruvllm uses of numba and llvmlite beyond what they document; of NumPy it uses nothing such.

A *part* is one thing that another version may no longer have (``parts``). It has a name, a test of itself when it is
first used, and a documented way that takes its place where the test fails: slower, and right. The one exception is
``cross``, without which ``ruvllm.lab.explain`` says that it does not work. Nothing outside of this package names
``numba.core``, ``numba.np`` or an underscored attribute of theirs (tests/test_layout.py). Objects that
``numba.extending.intrinsic`` hands to its functions, context and builder, are its interface.
"""
