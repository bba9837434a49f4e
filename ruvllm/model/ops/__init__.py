"""What layer code computes with: ``Eager`` at once, ``Recorder`` as a tape, ``Float64`` exactly, ``Gradients`` back.

A model is written once, in ``model.layer``, as plain Python that calls the functions of ``Ops``. Which ``ops`` it is
given decides what happens: nothing else in the library describes a layer.
"""

from ruvllm.model.ops.protocol import Ops

__all__ = ["Ops"]
