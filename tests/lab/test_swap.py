"""lab.swap: another function in place of a kernel, wherever models call it."""

import inspect
from pathlib import Path

import numba
import numpy as np
import pytest

import ruvllm.kernels as K
from ruvllm import lab
from ruvllm.kernels import KERNELS
from ruvllm.llm import LLM
from ruvllm.model.ops.swapped import SWAPPED
from tests.lab.cases import IDS, NoText, loaded
from tests.model.architectures import build


def numpy_rms_norm(x, weight, eps=1e-5):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * weight


@numba.njit
def compiled_rms_norm(x, weight, eps):
    out = np.empty_like(x)
    for row in range(x.shape[0]):
        s = np.float32(0)
        for i in range(x.shape[1]):
            s += x[row, i] * x[row, i]
        scale = np.float32(1) / np.sqrt(s / np.float32(x.shape[1]) + np.float32(eps))
        for i in range(x.shape[1]):
            out[row, i] = x[row, i] * scale * weight[i]
    return out


@pytest.mark.parametrize("fused", [True, False])
def test_a_swapped_kernel_is_what_a_model_uses(fused: bool) -> None:
    llm = loaded("llama2_mha")
    llm.model.fused = fused
    before = llm.logits(IDS)
    with lab.swap(rms_norm=numpy_rms_norm) as swapped:
        assert K.rms_norm is not KERNELS["rms_norm"].function
        during = llm.logits(IDS)
        assert swapped["rms_norm"].calls == 2 * llm.config.num_hidden_layers + 1
    np.testing.assert_allclose(during, before, atol=1e-4)
    assert np.any(during != before)
    np.testing.assert_array_equal(llm.logits(IDS), before)
    assert K.rms_norm is KERNELS["rms_norm"].function
    assert all(error < 1e-12 for error in swapped["rms_norm"].errors)
    for text in (str(swapped), swapped._repr_html_()):
        assert "rows 1, n 768" in text
    assert len(swapped.plot().patches) == 2 * len(KERNELS["rms_norm"].sizes)


def off_by(factor: float, name: str):
    """The kernel itself, whose result is then a little larger."""

    def larger(**arguments):
        return np.float32(factor) * np.asarray(getattr(K, name)(**arguments))

    spec = KERNELS[name]
    parameters = [p for p in inspect.signature(spec.function).parameters.values() if p.name != "out"]

    def call(*given, **named):
        return larger(**dict(zip((p.name for p in parameters), given, strict=False)), **named)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return call


@pytest.mark.parametrize(
    ("variant", "names"),
    [
        ("llama", ("rms_norm", "silu_mul", "apply_rope_tables")),
        ("gemma", ("rms_norm", "gelu_mul")),
        ("bounded", ("clamped_swiglu", "scale", "softcap")),
        ("mixture", ("silu_mul",)),
    ],
)
def test_both_paths_call_what_is_swapped(variant: str, names: tuple[str, ...]) -> None:
    """With the same bits and as often; for a prompt, for one token, and together with a hook."""
    model = build(variant, "int8")
    llm = LLM(model, NoText(), Path())
    plain = llm.logits(IDS)
    for name in names:
        found, calls = [], []
        for model.fused in (True, False):
            with lab.swap(tolerance=1e-3, **{name: off_by(1.01, name)}) as swapped:
                cache = llm.new_cache(20)
                with llm.edit("final.residual", scale=0.5):
                    rows = [llm.logits(IDS, cache), llm.logits([3], cache)]
                found.append(np.concatenate([*rows, llm.logits(IDS)]))
                calls.append(swapped[name].calls)
        np.testing.assert_array_equal(found[0], found[1], err_msg=name)
        assert calls[0] == calls[1] > 0 and np.any(found[0][-len(IDS) :] != plain), name
    model.fused = True
    np.testing.assert_array_equal(llm.logits(IDS), plain)


def test_a_wrong_function_never_goes_live() -> None:
    for wrong, message in (
        (lambda x, weight, eps: x, "rms_norm: at .* error is .*: not swapped"),
        (lambda x, weight, eps: x[0], "rms_norm: expected results of shape"),
    ):
        with pytest.raises(ValueError, match=message), lab.swap(rms_norm=wrong):
            raise AssertionError("unreachable")
        assert K.rms_norm is KERNELS["rms_norm"].function
    with pytest.raises(ValueError, match="no kernel 'rmsnorm'"), lab.swap(rmsnorm=numpy_rms_norm):
        pass
    with pytest.raises(TypeError, match="rms_norm: expected a function"), lab.swap(rms_norm=3):  # type: ignore[arg-type]
        pass
    with pytest.raises(ValueError, match="expected at least one"), lab.swap():
        pass


def test_a_function_that_spoils_its_arguments_never_goes_live() -> None:
    def in_place(x, weight, eps):
        x *= weight / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
        return x

    with pytest.raises(ValueError, match="^rms_norm: the function changes its arguments: x$"):
        with lab.swap(rms_norm=in_place):
            raise AssertionError("unreachable")
    with lab.swap(kv_append=lambda *args, **named: KERNELS["kv_append"].function(*args, **named)):
        pass  # what the kernel itself changes may be changed


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x, weight, eps, out: out, r"expected a function of \(x, weight, eps\), found one of .*'out'"),
        (lambda a, b, c: a, r"expected a function of \(x, weight, eps\), found one of \(a, b, c\)"),
        (lambda x, weight, eps: None, "expected a result of real numbers, found NoneType"),
        (lambda x, weight, eps: "hello", "expected a result of real numbers, found str"),
        (lambda x, weight, eps: x * 1j, "expected a result of real numbers, found an array of complex64"),
    ],
)
def test_a_function_of_another_kind_is_refused(wrong, message) -> None:
    with pytest.raises(TypeError, match=f"^rms_norm: {message}"), lab.swap(rms_norm=wrong):
        raise AssertionError("unreachable")


def test_a_kernel_is_swapped_once_at_a_time_and_others_with_it() -> None:
    with lab.swap(rms_norm=lambda x, weight, eps: K.rms_norm(x, weight, eps)) as outer:
        with pytest.raises(ValueError, match="^rms_norm: swapped already"), lab.swap(rms_norm=numpy_rms_norm):
            raise AssertionError("unreachable")
        K.rms_norm(np.ones((2, 8), np.float32), np.ones(8, np.float32), 1e-5)
        assert outer["rms_norm"].calls == 1
        inner = lab.swap(silu_mul=lambda gate, up: gate / (1 + np.exp(-gate)) * up)
        inner.__enter__()
    assert SWAPPED == {"silu_mul"}  # the other block, begun later, goes on
    assert K.rms_norm is KERNELS["rms_norm"].function and K.silu_mul is not KERNELS["silu_mul"].function
    inner.__exit__(None, None, None)
    assert not SWAPPED and K.silu_mul is KERNELS["silu_mul"].function


def test_a_compiled_function_can_be_swapped_in() -> None:
    with lab.swap(rms_norm=compiled_rms_norm) as swapped:
        x = np.ones((2, 8), np.float32)
        out = np.empty_like(x)
        assert K.rms_norm(x, x[0], 1e-5, out=out) is out
    assert swapped["rms_norm"].calls == 1 and np.allclose(out, 1, atol=1e-4)


def test_an_error_inside_puts_the_kernel_back() -> None:
    with pytest.raises(ZeroDivisionError), lab.swap(silu_mul=lambda gate, up: gate / (1 + np.exp(-gate)) * up):
        raise ZeroDivisionError
    assert K.silu_mul is KERNELS["silu_mul"].function and not SWAPPED


def test_tolerance_lets_an_approximation_in() -> None:
    rough = lambda x, weight, eps: numpy_rms_norm(x, weight, eps) * np.float32(1.001)
    llm = loaded("llama2_mha")
    exact = lab.drift(llm, IDS, progress=False)
    with lab.swap(tolerance=1e-5, rms_norm=rough):
        rougher = lab.drift(llm, IDS, progress=False)
    assert rougher.errors[-1] > 50 * exact.errors[-1]
