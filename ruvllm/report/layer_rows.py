"""Rows that are transformer layers: one token through one or several, against PyTorch and llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby

from ruvllm.measure.peers import PeerError, relative_error
from ruvllm.measure.timing import Call, Engine
from ruvllm.model import Llama, ModelConfig
from ruvllm.model.weights import weight_bytes
from ruvllm.report import layers
from ruvllm.report.bench import OWN, Bench, lacking_memory
from ruvllm.report.layer_peers import LlamaCppLayer, TorchLayer
from ruvllm.report.results import Result
from ruvllm.report.rows import LayerRow

_TOLERANCES = {"f32": 1e-4, "int4": 3e-2}  # relative error of logits; int4 includes rounding activations to 8 bits


def measure_layers(
    rows: Sequence[LayerRow], bench: Bench, torch: TorchLayer | None, llama: LlamaCppLayer | None
) -> Iterator[Result]:
    """Measure rows in order; consecutive rows of the same model and layout share its weights."""
    for (name, layout), group in groupby(rows, lambda row: (row.model, row.layout)):
        of_model = list(group)
        reasons = [lacking_memory(weight_bytes(_config(row), layout)) for row in of_model]
        largest = max((row.layers for row, why in zip(of_model, reasons, strict=True) if not why), default=0)
        model = layers.layer_model(layers.layer_config(name, largest), layout) if largest else None
        for row, why in zip(of_model, reasons, strict=True):
            if model is None or why:
                yield Result(row.id, row.label, row.rust_m4, reason=why)
            else:
                yield _measure(row, model, bench, torch, llama)


def _config(row: LayerRow) -> ModelConfig:
    return layers.layer_config(row.model, row.layers)


def _measure(
    row: LayerRow, model: Llama, bench: Bench, torch: TorchLayer | None, llama: LlamaCppLayer | None
) -> Result:
    config = _config(row)
    exact = layers.exact_logits(config, row.layout)
    flops, nbytes = layers.flops(config), weight_bytes(config, row.layout)
    entries, missing, error = [], {}, 0.0
    with ExitStack() as stack:
        file = None
        if llama is not None:
            try:
                file = stack.enter_context(llama.file(config, row.layout))
            except PeerError as why:
                missing[llama.name] = str(why)
        for threads in bench.peaks:
            with bench.limited(threads):
                call = layers.OneToken(layers.first_layers(model, row.layers, threads))
                error = max(error, relative_error(call(), exact))
                engines: dict[str, Engine] = {OWN: Call(call)}
                if torch is not None:
                    try:
                        engines[torch.name] = torch.engine(config, row.layout, exact, threads)
                    except PeerError as why:
                        missing[torch.name] = str(why)
                if llama is not None and file is not None:
                    try:
                        engines[llama.name] = llama.engine(file, exact, threads)
                    except PeerError as why:
                        missing[llama.name] = str(why)
                entries.append(bench.entry(threads, engines, flops, nbytes, integer=row.layout == "int4"))
    return Result(
        row.id, row.label, row.rust_m4, flops, nbytes, error, _TOLERANCES[row.layout], tuple(entries), missing
    )
