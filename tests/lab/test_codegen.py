"""Code generation: on each kind of processor every kernel's loops are vectors of full width, and call no function.

Nothing is timed and nothing runs: the assembly is read, of an x86 and of an ARM processor.
"""

from itertools import product

import pytest

from ruvllm.kernels import KERNELS
from ruvllm.lab import Explanation, explain_all
from ruvllm.lab.calls import calls_of_models

WIDTHS = {"haswell": 256, "apple-m4": 128}
MODEL_BODIES = (
    "panels_matmul", "attend_token", "merge_chunks",
    "low_rank_down", "low_rank_up", "transposed_quant", "transposed_float",
)  # fmt: skip
MOVE_ONLY = {"kv_append"}  # nothing is computed
SINGLE_TOKENS = {"apply_repetition_penalty": 0, "sample": 256}  # dealt with one by one; bits of the rest


@pytest.fixture(scope="module")
def explanations() -> dict[tuple[str, str], Explanation]:
    return explain_all([*KERNELS, *MODEL_BODIES], [*WIDTHS])


def test_bodies_of_models_are_those_that_models_call() -> None:
    assert set(MODEL_BODIES) <= set(calls_of_models())


@pytest.mark.parametrize(("name", "target"), [*product((*KERNELS, *MODEL_BODIES), WIDTHS)])
def test_loops_are_vectors(explanations: dict[tuple[str, str], Explanation], name: str, target: str) -> None:
    found = explanations[name, target]
    if name in MOVE_ONLY:
        assert found.moves_only and found.moved >= 128, str(found)
        assert f"moves memory, up to {found.moved} bits at a time" in str(found)
        return
    if name in SINGLE_TOKENS:
        assert not found.scalar_calls and found.width >= min(SINGLE_TOKENS[name], WIDTHS[target]), str(found)
        return
    assert found.vectorized, str(found)
    assert found.width == WIDTHS[target], str(found)


@pytest.mark.parametrize("target", WIDTHS)
def test_quantised_products_use_the_integer_dot_product(
    explanations: dict[tuple[str, str], Explanation], target: str
) -> None:
    found = explanations["quant_matmul", target]
    assert sum(loop.dot for loop in found.loops) >= 48, str(found)
    assert {"apple-m4": "sdot", "haswell": "vpmaddubsw"}[target] in found.assembly
    assert any(loop.dot and loop.lines_per_element < 1 / 64 for loop in found.loops)


@pytest.mark.parametrize("name", ["gemv", "panels_matmul", "dot", "lora_forward"])
def test_products_are_fused(explanations: dict[tuple[str, str], Explanation], name: str) -> None:
    for target in WIDTHS:
        widest = max(explanations[name, target].loops, key=lambda loop: loop.fma)
        assert widest.fma >= 4, str(explanations[name, target])
