"""ruvllm.torch: operators against PyTorch's own, fake shapes, and transformers models on them."""

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'ruvllm[torch]'")

import ruvllm.torch as rt  # noqa: E402
from ruvllm.torch import operators  # noqa: E402

OPS = torch.ops.ruvllm


def normal(*shape: int, seed: int = 0) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cases() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    x, y, w = normal(3, 5, 48), normal(3, 5, 48, seed=1), normal(48, seed=2)
    q, k = normal(2, 7, 4, 16), normal(2, 9, 2, 16, seed=1)
    angles = torch.arange(7.0)[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001])
    weight = normal(37, 48, seed=3)
    return {
        "rms_norm": (OPS.rms_norm, (x, w, 1e-5)),
        "add_rms_norm": (OPS.add_rms_norm, (x, y, w, 1e-5)),
        "silu_mul": (OPS.silu_mul, (x, y)),
        "gelu_mul": (OPS.gelu_mul, (x, y)),
        "rope": (OPS.rope, (q, angles.cos(), angles.sin())),
        "attention": (OPS.attention, (q, k, k + 1, True, 3, 0.2)),
        "linear": (OPS.linear, (x, operators.pack_float(weight), 37)),
        "quant_linear": (OPS.quant_linear, (x, rt.pack_int8(weight), 37, 8)),
    }


@pytest.mark.parametrize("name", cases())
def test_operators_keep_their_contract(name: str) -> None:
    """Schema, shapes of fake tensors, and tracing, as PyTorch checks them."""
    operator, arguments = cases()[name]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(operator.default, arguments, test_utils=checks)


def test_results_are_those_of_pytorch() -> None:
    found = {name: operator(*arguments) for name, (operator, arguments) in cases().items()}
    x, y, w = normal(3, 5, 48), normal(3, 5, 48, seed=1), normal(48, seed=2)
    torch.testing.assert_close(found["rms_norm"], torch.nn.functional.rms_norm(x, (48,), w, 1e-5))
    torch.testing.assert_close(found["add_rms_norm"][0], torch.nn.functional.rms_norm(x + y, (48,), w, 1e-5))
    torch.testing.assert_close(found["add_rms_norm"][1], x + y)
    torch.testing.assert_close(found["silu_mul"], torch.nn.functional.silu(x) * y)
    torch.testing.assert_close(found["gelu_mul"], torch.nn.functional.gelu(x, approximate="tanh") * y)
    weight = normal(37, 48, seed=3)
    torch.testing.assert_close(found["linear"], x @ weight.T, rtol=1e-4, atol=1e-4)
    for bits, packed, most in ((8, rt.pack_int8(weight), 0.01), (4, rt.pack_int4(weight), 0.1)):
        error = OPS.quant_linear(x, packed, 37, bits) - x @ weight.T
        assert error.square().mean().sqrt() < most * (x @ weight.T).square().mean().sqrt()


def test_half_tensors_come_back_as_such() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        x, w = normal(3, 48).to(dtype), normal(48, seed=2).to(dtype)
        y = OPS.rms_norm(x, w, 1e-5)
        assert y.dtype == dtype
        torch.testing.assert_close(y, OPS.rms_norm(x.float(), w.float(), 1e-5).to(dtype))


def test_compiled_graphs_keep_the_operators() -> None:
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True)
    def block(x: Any, w: Any) -> Any:
        return OPS.silu_mul(OPS.rms_norm(x, w, 1e-5) * 2, x)

    x, w = normal(3, 48), normal(48, seed=2)
    torch.testing.assert_close(block(x, w), torch.nn.functional.silu(2 * OPS.rms_norm(x, w, 1e-5)) * x)
    assert "ruvllm" in graphs[0].print_readable(print_output=False)


CONFIG: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def model_of(family: str) -> Any:
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'ruvllm[torch]'")
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**CONFIG)).eval()


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_a_patched_model_gives_the_same_logits(family: str) -> None:
    own, ours = model_of(family), rt.patch(model_of(family))
    ids = torch.randint(0, 99, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, got = own(ids), ours(ids)
        torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=1e-4)
        more = ids[:, :1]
        after = own(more, past_key_values=expected.past_key_values).logits
        torch.testing.assert_close(ours(more, past_key_values=got.past_key_values).logits, after, rtol=0, atol=1e-4)
        mask = torch.ones_like(ids)
        mask[0, :4] = 0  # padding: attention is PyTorch's
        torch.testing.assert_close(
            ours(ids, attention_mask=mask).logits[:, -1], own(ids, attention_mask=mask).logits[:, -1], rtol=0, atol=1e-4
        )
        assert own.generate(ids, max_new_tokens=5, do_sample=False).equal(
            ours.generate(ids, max_new_tokens=5, do_sample=False)
        )


def test_a_patched_model_in_fewer_bits() -> None:
    own = model_of("Llama")
    ids = torch.arange(11)[None]
    with torch.no_grad():
        expected = own(ids).logits
        eight, four = (rt.patch(model_of("Llama"), weights)(ids).logits for weights in ("int8", "int4"))
    size = expected.square().mean().sqrt()
    lost8, lost4 = ((logits - expected).square().mean().sqrt() / size for logits in (eight, four))
    assert lost8 < 0.03 < lost4 < 0.4
    assert "weights=int4" in repr(rt.patch(model_of("Llama"), "int4"))


def test_what_cannot_be_patched_is_refused() -> None:
    with pytest.raises(TypeError, match="^model: expected a LlamaForCausalLM, .*, found Linear"):
        rt.patch(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="^weights: expected one of f32, int8, int4, found 'int3'"):
        rt.patch(torch.nn.Linear(2, 2), "int3")
