"""A page for each kernel, made from its KernelSpec: formula, shapes, reference, sizes, compiled loops, roofline.

The loops and the speed come from docs/kernels.json, which ``python -m tools.docs.measure`` writes: building the site
measures and compiles nothing.
"""

import inspect
import json
from functools import cache
from pathlib import Path
from typing import Any

from ruvllm.kernels import KERNELS, KernelSpec
from tools.docs import roofline

DOCS = Path(__file__).parents[2] / "docs"

# Every kernel, by subject, in the order of the navigation.
SUBJECTS = {
    "Rows and elements": (
        "rms_norm", "add_rms_norm", "layer_norm", "rms", "softmax", "silu_mul", "gelu_mul", "clamped_swiglu", "softcap",
        "apply_rope", "apply_rope_tables", "dot", "scale", "add", "buffer_sum",
    ),
    "Attention": (
        "flash_attention", "ragged_attention", "grouped_query_attention", "multi_query_attention", "softmax_attention",
        "paged_attention", "kv_append",
    ),
    "Matrix products": ("gemv", "gemm", "gemm_nt", "batched_gemm", "grouped_gemm"),
    "Quantisation": ("quant_matmul", "quantize_int4", "quantize_int8", "dequantize", "quantize_activations"),
    "Choosing a token": ("sample", "argmax", "top_k", "log_softmax", "apply_repetition_penalty"),
    "Adapters and training": (
        "lora_forward", "lora_forward_add", "lora_accumulate_grad", "attention_backward", "rms_norm_backward",
        "silu_mul_backward", "cross_entropy", "adamw",
    ),
}  # fmt: skip


@cache
def formulas() -> dict[str, str]:
    """The LaTeX of each kernel's formula."""
    return json.loads((DOCS / "formulas.json").read_text(encoding="utf-8"))


@cache
def measured() -> dict[str, Any]:
    """What tools/docs/measure.py has written: "loops" by kernel; "points", "peaks", "machine", "date" of the speed."""
    path = DOCS / "kernels.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def navigation() -> list[dict[str, list[str]]]:
    """The pages by subject, for mkdocs."""
    return [{subject: [f"kernels/{name}.md" for name in names]} for subject, names in SUBJECTS.items()]


def pages() -> dict[str, str]:
    """The Markdown of each kernel's page, and that of the list of kernels, by name."""
    return {"index": _index(), **{name: _page(spec) for name, spec in KERNELS.items()}}


def example(spec: KernelSpec) -> str:
    """Lines of Python that try the kernel at its first size."""
    sizes = ", ".join(f"{axis}={n}" for axis, n in spec.sizes[0].items())
    return (
        "import numpy as np\n"
        "from ruvllm.kernels import KERNELS\n\n"
        f'spec = KERNELS["{spec.name}"]\n'
        f"inputs = spec.example(np.random.default_rng(0), {sizes})\n"
        "print({name: getattr(value, 'shape', value) for name, value in inputs.items()})\n"
        f"got = spec.function(**inputs)  # ruvllm.kernels.{spec.name}\n"
        "expected = spec.reference(**inputs)  # in float64\n"
    )


def _index() -> str:
    lines = [
        "# Kernels", "",
        "Each kernel is a public function of `ruvllm.kernels`, on NumPy arrays and without any model. `KERNELS` holds",
        "a record of each, a `KernelSpec`, from which its tests, its benchmarks and its page here are made.", "",
    ]  # fmt: skip
    for subject, names in SUBJECTS.items():
        lines += [f"## {subject}", "", "| kernel | computes |", "|---|---|"]
        lines += [f"| [`{name}`]({name}.md) | `{_cell(KERNELS[name].formula)}` |" for name in names]
        lines.append("")
    machine = measured()
    if "points" in machine:
        lines += [
            "## All of them under the limits of one machine", "",
            roofline.draw(machine, ()), "",
            _measured_on(), "",
        ]  # fmt: skip
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _page(spec: KernelSpec) -> str:
    from latex2mathml.converter import convert

    function = f"{spec.function.__module__}.{spec.function.__name__}"
    reference = inspect.getsource(spec.reference)
    beginning = any(name.startswith(spec.name) for name in KERNELS if name != spec.name)
    return "\n".join(
        [
            # Searched for by its name, rms_norm comes before rms_norm_backward.
            "---", "search:", f"  boost: {2 if beginning else 1}", "---", "",
            f"# {spec.name}", "",
            f'<div class="formula">{convert(formulas()[spec.name], display="block")}</div>', "",
            f"In plain text: `{spec.formula}`", "",
            f"::: {function}", "    options:", "      heading: Signature", "      heading_level: 2",
            "      show_root_toc_entry: true", "      toc_label: Signature", "",
            "## Try it", "",
            "```python", example(spec) + "```", "",
            "## Reference", "",
            "The same in float64, in plain NumPy. Tests compare every kernel with it, at the sizes below and at odd"
            f" ones; the normalised squared error of this one must stay below {spec.tolerance:.0e}.", "",
            "```python", reference.rstrip(), "```", "",
            "## Sizes", "",
            "At which it is tested and measured. Operations and bytes are those that any implementation needs.", "",
            *_sizes(spec), "",
            *_loops(spec.name), "",
            *_speed(spec.name), "",
        ]
    )  # fmt: skip


def _sizes(spec: KernelSpec) -> list[str]:
    lines = [
        f"| {' | '.join(spec.axes)} | operations | bytes | operations per byte |",
        "|" + "--:|" * (len(spec.axes) + 3),
    ]
    for sizes in spec.sizes:
        flops, nbytes = spec.flops(**sizes), spec.bytes(**sizes)
        numbers = " | ".join(map(str, sizes.values()))
        lines.append(f"| {numbers} | {flops:,.0f} | {nbytes:,.0f} | {flops / nbytes:.2f} |")
    return lines


def _loops(name: str) -> list[str]:
    found = measured().get("loops", {}).get(name)
    if found is None:
        return []
    lines = [
        "## Compiled loops", "",
        "The innermost loops, as compiled for three processors. \"bits\" is the width of vector arithmetic, \"fma\" and"
        ' "int dot" count instructions of one iteration. `lab.explain` shows the assembly next to the source.', "",
    ]  # fmt: skip
    for target, table in found.items():
        heading, *rows = table["rows"]
        lines += [f"**{target}**: {table['verdict']}", ""]
        if rows:
            lines += ["| " + " | ".join(heading[1:]) + " |", "|---|" + "--:|" * (len(heading) - 2)]
            lines += ["| " + " | ".join(map(_cell, row[1:])) + " |" for row in rows]
            lines.append("")
    return lines


def _speed(name: str) -> list[str]:
    machine = measured()
    points = [point for point in machine.get("points", ()) if point["name"] == name]
    if not points:
        return []
    lines = ["## On a roofline", "", roofline.draw(machine, (name,)), ""]
    for point in points:
        lines += [
            f"At {point['sizes']}, one thread takes {point['us']:.1f} us: {point['gflops']:.1f} Gop/s and"
            f" {point['gbs']:.1f} GB/s, {point['share']:.0%} of what {point['bound']} allows.", "",
        ]  # fmt: skip
    return [*lines, _measured_on()]


def _measured_on() -> str:
    machine = measured()
    return f"Measured on {machine['date']}, one thread, on {machine['machine']}."
