"""Small calls: they do all of the work or none, and what they leave alone the long way does or refuses."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ruvllm.kernels import KERNELS, activation, norm, vector
from ruvllm.kernels.attention import public as attention
from ruvllm.kernels.jit.decorators import DISABLE_JIT
from ruvllm.kernels.jit.small_calls import SMALL, long_way
from ruvllm.kernels.lora import public as lora
from ruvllm.kernels.matmul import public as matmul
from ruvllm.kernels.rope import rotate as rope
from ruvllm.kernels.training import lora as lora_grad
from tests.processes import python

pytestmark = pytest.mark.skipif(DISABLE_JIT, reason="small calls are compiled, or do nothing")


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def empty(*shape: int) -> np.ndarray:
    return np.full(shape, np.nan, np.float32)


# kernel, its module and the small call in it, arguments by position
CALLS: list[tuple[str, Any, str, Callable[[tuple[int, ...]], tuple[Any, ...]]]] = [
    ("rms_norm", norm, "rms_norm_small", lambda lead: (normal(*lead, 37), normal(37), 1e-5, empty(*lead, 37))),
    (
        "layer_norm", norm, "layer_norm_small",
        lambda lead: (normal(*lead, 37), normal(37), normal(37), 1e-5, empty(*lead, 37)),
    ),
    ("softmax", activation, "softmax_small", lambda lead: (normal(*lead, 37), empty(*lead, 37))),
    ("silu_mul", activation, "silu_mul_small", lambda lead: (normal(*lead, 37), normal(*lead, 37), empty(*lead, 37))),
    ("dot", vector, "dot_small", lambda lead: (normal(*lead, 37), normal(*lead, 37), empty(*lead))),
    ("scale", vector, "scale_small", lambda lead: (normal(*lead, 37), 0.3, empty(*lead, 37))),
    ("add", vector, "add_small", lambda lead: (normal(*lead, 37), normal(*lead, 37), empty(*lead, 37))),
    (
        "lora_forward", lora, "lora_small",
        lambda lead: (normal(*lead, 37), normal(37, 3), normal(3, 21), 2.0, empty(*lead, 21)),
    ),
    (
        "lora_forward_add", lora, "lora_small",
        lambda lead: (normal(*lead, 37), normal(37, 3), normal(3, 21), 2.0, normal(*lead, 21)),
    ),
    (
        "lora_accumulate_grad", lora_grad, "lora_grad_small",
        lambda lead: (
            normal(*lead, 37), normal(*lead, 21), normal(37, 3), normal(3, 21), 2.0, normal(37, 3), normal(3, 21),
        ),
    ),
]  # fmt: skip
ROWS_ONLY = [
    (
        "grouped_query_attention", attention, "grouped_query_small",
        lambda lead: (normal(6, 33), normal(17, 3, 33), normal(17, 3, 33), 0.3, empty(6, 33)),
    ),
    ("gemm", matmul, "gemm_small", lambda lead: (normal(*lead, 37), normal(37, 21), empty(*lead, 21))),
    ("gemm_nt", matmul, "gemm_small", lambda lead: (normal(*lead, 37), normal(21, 37), empty(*lead, 21))),
    ("gemv", matmul, "gemv_small", lambda lead: (normal(*lead, 37), normal(37), empty(*lead))),
    (
        "apply_rope_tables", rope, "rope_small",
        lambda lead: (normal(*lead, 3, 8), normal(*lead, 4), normal(*lead, 4), False, True, empty(*lead, 3, 8)),
    ),
]  # fmt: skip
ONE_HEAD = (
    "softmax_attention", attention, "softmax_attention_small",
    lambda lead: (normal(33), normal(270, 33), normal(270, 33), 0.3, empty(33)),
)  # fmt: skip
CASES = [(*call, lead) for call in CALLS for lead in ((), (5,))] + [(*call, (5,)) for call in ROWS_ONLY]
CASES.append((*ONE_HEAD, ()))
EVERY_CALL = pytest.mark.parametrize(
    ("kernel", "module", "small", "make", "lead"), CASES, ids=[f"{c[0]}-{len(c[4]) + 1}d" for c in CASES]
)


def changed(arguments: tuple[Any, ...]) -> list[np.ndarray]:
    return [argument for argument in arguments if isinstance(argument, np.ndarray)]


def copies(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.copy() if isinstance(a, np.ndarray) else a for a in arguments)


def watch(monkeypatch: pytest.MonkeyPatch, module: Any, small: str) -> list[bool]:
    """What the small call answers from now on."""
    answers: list[bool] = []
    body = getattr(module, small)

    def watched(*arguments: Any) -> bool:
        answers.append(body(*arguments))
        return answers[-1]

    monkeypatch.setattr(module, small, watched)
    return answers


@EVERY_CALL
def test_they_are_taken_and_give_the_same_bits(
    kernel: str, module: Any, small: str, make: Any, lead: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    function, arguments = KERNELS[kernel].function, make(lead)
    again = copies(arguments)
    answers = watch(monkeypatch, module, small)
    function(*arguments)
    assert answers == [True]
    with long_way():
        function(*again)
    for got, expected in zip(changed(arguments), changed(again), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert not any(np.isnan(array).any() for array in changed(arguments))


class Subclass(np.ndarray):
    """Numba types it as the array that it is a view of, once it has code for that."""


def outcome(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """What a call gives, or how it fails."""
    try:
        result = function(*arguments)
    except (TypeError, ValueError) as error:
        return type(error), str(error)
    return [np.asarray(r).tolist() for r in (result if isinstance(result, tuple) else (result,))]


def spoiled(arguments: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """The arguments with one thing wrong, or merely unusual, in each."""
    found = []
    for i, a in enumerate(arguments):
        if isinstance(a, np.ndarray):
            wide = np.repeat(a[..., None], 2, -1)
            locked = a.copy()
            locked.flags.writeable = False
            others: list[Any] = [
                a.astype(np.float64), [], a[None], a[..., :-1].copy() if a.ndim else a[None], a.tolist(), locked, None,
                a.view(Subclass), wide[..., 0], a.reshape(-1)[:0], a.astype(">f4"), a.astype(np.float16),
                np.asfortranarray(a),
            ]  # fmt: skip
            if a.ndim > 1:
                others += [a[:-1].copy(), a.reshape(-1), a[..., None]]
            # all other arrays of this size are pieces of the same memory
            for k, b in enumerate(arguments):
                if k != i and isinstance(b, np.ndarray) and b.ndim and a.ndim:
                    both = np.zeros(a.size + b.size, np.float32)
                    both[: a.size] = a.ravel()
                    one = list(copies(arguments))
                    one[i], one[k] = both[: a.size].reshape(a.shape), both[1 : 1 + b.size].reshape(b.shape)
                    found.append(tuple(one))
                    same = list(copies(arguments))
                    same[k] = same[i]
                    found.append(tuple(same))
        elif isinstance(a, bool):
            others = [int(a), np.bool_(a)]
        else:
            others = [-a, 0, 1, float("nan"), float("inf"), np.float32(a), "1", None, True]
        for other in others:
            one = list(copies(arguments))
            one[i] = other
            found.append(tuple(one))
    return found


@EVERY_CALL
def test_whatever_is_given_they_change_nothing_that_the_long_way_would_not(
    kernel: str, module: Any, small: str, make: Any, lead: tuple[int, ...]
) -> None:
    """The same result or the same error, with the small call and without."""
    function = KERNELS[kernel].function
    calls = spoiled(make(lead))
    again = spoiled(make(lead))
    with_it = [outcome(function, arguments) for arguments in calls]
    with long_way():
        without = [outcome(function, arguments) for arguments in again]
    for got, expected, arguments in zip(with_it, without, calls, strict=True):
        np.testing.assert_equal(got, expected, err_msg=str([np.shape(a) for a in arguments]))


def test_every_small_call_is_tested() -> None:
    tested = {id(getattr(module, small)) for _, module, small, *_ in CASES}
    assert tested == {id(attempt) for attempt in SMALL}


def test_they_leave_large_work_alone() -> None:
    x = normal(128, 768)
    assert norm.rms_norm_small(x, normal(768), 1e-5, np.empty_like(x)) is False
    assert matmul.gemv_small(normal(512, 512), normal(512), empty(512)) is False


def test_no_threads_are_started() -> None:
    """A process that has started them cannot use them in its forked children."""
    code = """if True:
        import numpy as np
        from ruvllm.kernels import gemm, gemm_nt, grouped_query_attention, rms_norm
        x = np.ones((8, 8), np.float32)
        gemm(x, x), gemm_nt(x, x), rms_norm(x, x[0]), grouped_query_attention(x, x[:, None], x[:, None])
        from ruvllm.kernels.threads import pool
        assert not pool._pool_runs()
    """
    python("-c", code)


def test_the_other_byte_order_is_seen() -> None:
    """In a process whose first array that is not plain begins at an odd address: numba takes later ones for plain."""
    code = """if True:
        import numpy as np
        from ruvllm.kernels import vector
        x = np.arange(12, dtype=np.float32).reshape(3, 4)
        odd = np.zeros(49, np.uint8)[1:].view(np.float32).reshape(3, 4)
        odd[...] = x
        for given in (x, odd, x.astype(">f4")):
            out = np.empty((3, 4), np.float32)
            assert vector.scale_small(given, 2.0, out) == (given is x)
            assert (vector.scale(given, 2.0, out) == 2 * x).all()
        for out in (odd, x.astype(">f4")):
            assert vector.scale_small(x, 2.0, out) is False
    """
    python("-c", code)


def test_no_memory_is_taken_for_what_will_be_refused() -> None:
    many = np.broadcast_to(np.float64(0), (2**45, 1))
    with pytest.raises(TypeError, match="expected float32, found float64"):
        norm.rms_norm(many, normal(1))
    with pytest.raises(TypeError, match="expected float32, found float64"):
        matmul.gemv(many, normal(1))
    with pytest.raises(ValueError, match="b: expected shape"):
        lora.lora_forward(normal(10**6, 8), normal(8, 2), np.empty((0, 2**40), np.float32))


def test_no_form_is_compiled_that_was_not_asked_for() -> None:
    endless: list[Any] = []
    endless.append(endless)  # numba would look into it until the stack ends
    before = [len(body.signatures) for body in SMALL.values()]
    for attempt, body in SMALL.items():
        count = body.py_func.__code__.co_argcount
        for argument in (np.zeros((2, 2, 2, 2), np.float32), "x", [], [1.0], endless, None):
            assert attempt(*[argument] * count) is False
    assert [len(body.signatures) for body in SMALL.values()] == before
