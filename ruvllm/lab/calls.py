"""Which compiled bodies a computation calls, and with which types: found by running it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np

from ruvllm.kernels import KernelSpec
from ruvllm.kernels.jit.decorators import COMPILED
from ruvllm.kernels.jit.small_calls import long_way
from ruvllm.kernels.threads.pool import limited_to
from ruvllm.measure.replacing import replaced

Call = tuple[Any, tuple[Any, ...]]  # a compiled body, and the numba types of its arguments


def calls_of(run: Callable[[], Any]) -> list[Call]:
    """Each body that Python calls inside ``run``, on one thread, in order of the first call."""
    found: dict[tuple[int, tuple[Any, ...]], Call] = {}

    def recorder(body: Any) -> Any:
        def call(*arguments: Any) -> Any:
            signature = tuple(numba.typeof(argument) for argument in arguments)
            found.setdefault((id(body), signature), (body, signature))
            return body(*arguments)

        return call

    bodies = {id(body) for body in COMPILED if not body.targetoptions.get("parallel")}
    with limited_to(1), long_way():
        run()  # compiles what is new here: recorders are not compiled code, which bodies may call
        with replaced(recorder, lambda value: id(value) in bodies):
            run()
    return list(found.values())


def calls_of_kernel(spec: KernelSpec) -> list[Call]:
    """The bodies behind a public kernel, at the first of its example sizes."""
    arguments = spec.example(np.random.default_rng(0), **spec.sizes[0])
    return calls_of(lambda: spec.function(**arguments))


@cache
def calls_of_models() -> dict[str, Call]:
    """The bodies that models call, by name: with 4-bit and with float32 weights, one token and several, adapters."""
    from ruvllm.model.config import ModelConfig
    from ruvllm.model.llama import Llama
    from ruvllm.model.lora import LoraAdapter, LoraConfig, MicroLora

    config = ModelConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip

    def run() -> None:
        for layout in ("int4", "f32"):
            model = Llama(config, layout=layout)
            model.fused = False
            cache = model.new_cache(32)
            model.forward(range(7), cache)
            model.forward([1], cache)
            MicroLora(model).attach(LoraAdapter(config, LoraConfig(16)))
            model.forward([1, 2], cache)
            gate = model.decoder.layers[0].mlp.gate
            dy, dx = np.ones((2, gate.rows), np.float32), np.empty((2, gate.columns), np.float32)
            gate.weights.matmul_transposed(dy, dx, False)

    return {body.py_func.__name__: (body, signature) for body, signature in reversed(calls_of(run))}
