"""The ways to run layer code: ``Eager`` at once, ``Recorder`` to a tape, ``Float64`` exactly, ``Gradients`` backward.

A model is written once, in ``model.layer``, as plain Python that calls the functions of ``Ops``. The ``ops`` that it
is given decide what happens: nothing else in the library describes a layer.
"""

from ruvllm.model.ops.protocol import Ops

__all__ = ["Ops"]
