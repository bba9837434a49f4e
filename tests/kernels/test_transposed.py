"""dy W on packed weights against NumPy: every layout, odd sizes, one thread and two, written and added to."""

import numpy as np
import pytest

from ruvllm.kernels.matmul.panels import pack, panel_count, take_rows
from ruvllm.kernels.memory import aligned_empty
from ruvllm.kernels.quant.panels import empty_panels, pack_groups, take_quant_rows
from ruvllm.kernels.threads.pool import limited_to
from ruvllm.kernels.training.transposed import linear_transposed, quant_transposed
from tests.kernels.quant_cases import CODES, KINDS

SHAPES = [(1, 1), (15, 16), (17, 33), (50, 75), (530, 40), (1030, 129)]
TOKENS = (1, 5, 6, 13)


def close(got: np.ndarray, expected: np.ndarray) -> bool:
    return bool(((got - expected) ** 2).sum() <= 1e-10 * (expected**2).sum())


def check(product, w: np.ndarray) -> None:
    """product(dy, dx, add) against dy w."""
    rows, columns = w.shape
    for tokens in TOKENS:
        rng = np.random.default_rng(tokens)
        dy = rng.standard_normal((tokens, rows), np.float32)
        before = rng.standard_normal((tokens, columns), np.float32)
        results = []
        for threads in (1, 2):
            with limited_to(threads):
                dx, added = np.full_like(before, np.nan), before.copy()
                product(dy, dx, False)
                product(dy, added, True)
            results += [dx, added]
        expected = dy.astype(np.float64) @ w
        assert close(results[0], expected) and close(results[1] - before, expected)
        np.testing.assert_array_equal(results[2:], results[:2])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.uint16, np.int16], ids=["f32", "f16", "bf16"])
def test_floats(dtype: type, shape: tuple[int, int]) -> None:
    rows, columns = shape
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    if dtype is np.uint16:
        values = values.astype(np.float16).view(np.uint16)
    elif dtype is np.int16:
        values = (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16).view(np.int16)
    panels = aligned_empty((panel_count(rows), columns, 16), dtype)
    pack(np.ascontiguousarray(values), panels)
    w = take_rows(panels, np.arange(rows), np.empty(shape, np.float32)).astype(np.float64)
    check(lambda dy, dx, add: linear_transposed(panels, dy, dx, add), w)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("kind", "mins"), KINDS)
def test_integers(kind: int, mins: bool, shape: tuple[int, int]) -> None:
    rows, columns = shape
    rng = np.random.default_rng(1)
    groups = -(-columns // 32)
    codes = rng.integers(0, CODES[kind], (rows, groups * 32)).astype(np.uint8)
    scales, lows = (rng.uniform(0.01, 0.1, (2, rows, groups)).astype(np.float16)).view(np.uint16)
    panels = empty_panels(kind, rows, columns, mins)
    pack_groups(codes, np.ascontiguousarray(scales), np.ascontiguousarray(lows) if mins else None, panels)
    w = take_quant_rows(panels, np.arange(rows), np.empty(shape, np.float32)).astype(np.float64)
    check(lambda dy, dx, add: quant_transposed(panels, dy, dx, add), w)
