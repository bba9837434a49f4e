"""Checkpoints of a training run: a directory with all that a later run needs to continue exactly."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ruvllm.checkpoint.adapters import save_adapter
from ruvllm.checkpoint.fields import Fields
from ruvllm.checkpoint.safetensors import SafetensorsFile
from ruvllm.checkpoint.safetensors_writer import write_safetensors
from ruvllm.checkpoint.strict_json import read_json_object
from ruvllm.errors import ModelFormatError
from ruvllm.model.training import Trainer
from ruvllm.paths import replacing

STATE_FILE = "trainer_state.json"
_ARRAYS = "trainer_state-{step}.safetensors"
_MAX_STATE_BYTES = 1 << 24


def save_training(trainer: Trainer, path: str | os.PathLike[str], base: str | None = None) -> Path:
    """Write the adapter as PEFT does, and the state of the run.

    The arrays of each step go into a new file, which the description, written last, names: if this is killed, either
    the previous or the new state is there.

    Args:
        trainer: the run.
        path: the directory; created if needed.
        base: name or path of the base model, noted for PEFT.
    """
    path = save_adapter(trainer.adapter, path, trainer.model.config, base)
    arrays, description = trainer.state()
    kept = path / _ARRAYS.format(step=description["done"])
    write_safetensors(kept, arrays, {"step": str(description["done"])})
    with replacing(path / STATE_FILE) as temporary:
        temporary.write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    for older in path.glob(_ARRAYS.format(step="*")):
        if older != kept:
            older.unlink()
    return path


def resume_training(trainer: Trainer, path: str | os.PathLike[str]) -> None:
    """Continue from a checkpoint: the next steps are those that the run which wrote it would have made.

    Raises:
        FileNotFoundError: there is no checkpoint at ``path``.
        ModelFormatError: it is unsound, or of a run with another model, adapter, data or other settings.
    """
    state_path = Path(path) / STATE_FILE
    description = read_json_object(state_path, _MAX_STATE_BYTES)
    fields = Fields(state_path, description)
    done = fields.require("done", int)
    fields.require("fingerprint", dict)
    fields.require("history", list)
    arrays_path = Path(path) / _ARRAYS.format(step=done)
    if not arrays_path.is_file():
        raise ModelFormatError(state_path, field="done", found=done, expected=f"{arrays_path.name} next to it")
    with SafetensorsFile(arrays_path) as file:
        if file.metadata.get("step") != str(done):
            found = f"step {file.metadata.get('step')}"
            raise ModelFormatError(arrays_path, field="step", found=found, expected=f"step {done}, as {STATE_FILE} has")
        missing = {"parameters", "m", "v"} - file.tensors.keys()
        if missing:
            raise ModelFormatError(arrays_path, field="tensors", found=f"no {min(missing)}", expected="a run's state")
        arrays = {name: file.tensor(name).float32().reshape(-1).copy() for name in ("parameters", "m", "v")}
    try:
        trainer.restore(arrays, description)
    except (TypeError, KeyError, ValueError) as error:
        raise ModelFormatError(state_path, field="run", found=error, expected="a checkpoint of this run") from None
