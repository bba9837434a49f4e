"""What the settings of an adapter mean, in PEFT's directories and in GGUF files: one table for both forms.

Each setting is followed, or known to change nothing here, or refused by its name unless it has its plain value.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from ruvllm.checkpoint.fields import Fields

_ANY: Collection[object] | None = None
_NOTHING: Collection[object] = (False, 0, "", [], {})  # values that mean "not set" in any setting


@dataclass(frozen=True)
class _Setting:
    """A setting by its name in each form ("" where a form has none), and the values that are understood."""

    peft: str
    gguf: str = ""
    plain: Collection[object] | None = _ANY


_SETTINGS = (
    # These make it an adapter of another kind.
    _Setting("peft_type", plain=("LORA",)),
    _Setting("", "adapter.type", ("lora",)),
    _Setting("bias", plain=("none",)),
    _Setting("use_dora", plain=(False,)),
    _Setting("use_qalora", plain=(False,)),
    _Setting("use_bdlora", plain=(False,)),
    _Setting("lora_bias", plain=(False,)),
    _Setting("fan_in_fan_out", plain=(False,)),
    _Setting("rank_pattern", plain=({},)),
    _Setting("alpha_pattern", plain=({},)),
    _Setting("modules_to_save", plain=([],)),
    _Setting("layer_replication", plain=([],)),
    _Setting("trainable_token_indices", plain=([], {})),
    _Setting("target_parameters", plain=([],)),
    _Setting("alora_invocation_tokens", "adapter.alora.invocation_tokens", ([],)),
    _Setting("arrow_config", plain=()),
    _Setting("kasa_config", plain=()),
    _Setting("monteclora_config", plain=()),
    # These are followed: by the loaders, below (init_lora_weights), or by the names of the tensors.
    _Setting("r"),
    _Setting("lora_alpha", "adapter.lora.alpha"),
    _Setting("lora_dropout"),
    _Setting("use_rslora"),
    _Setting("init_lora_weights"),
    *map(_Setting, ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")),
    # These change nothing: its origin, initialisation and training, how Megatron distributes it, and what llama.cpp
    # only displays.
    _Setting("task_type", "adapter.lora.task_name"),
    _Setting("", "adapter.lora.prompt_prefix"),
    *map(_Setting, ("auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode")),
    *map(_Setting, ("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "runtime_config")),
    *map(_Setting, ("merge_weights", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr")),  # of old PEFT and of ms-swift
    *map(_Setting, ("qalora_group_size", "ensure_weight_tying", "megatron_config", "megatron_core")),
)  # fmt: skip
_PEFT = {setting.peft: setting for setting in _SETTINGS if setting.peft}
_GGUF = {setting.gguf: setting for setting in _SETTINGS if setting.gguf}
_GGUF_PREFIX = "adapter."
_CHANGES_BASE = re.compile(r"pissa|olora|corda|loftq|lora_ga")  # ways of initialising that also change the base weights


def check_peft(fields: Fields) -> None:
    """Raise ModelFormatError for a setting in adapter_config.json that is not followed."""
    fields.default("peft_type", str, "LORA")
    _check(fields, _PEFT, list(fields.values))
    way = fields.values.get("init_lora_weights")
    if isinstance(way, str) and _CHANGES_BASE.match(way.lower()):
        raise fields.error("init_lora_weights", way, "an initialisation that leaves the base weights unchanged")


def check_gguf(fields: Fields) -> None:
    """Raise ModelFormatError for a setting in the metadata of a GGUF adapter that is not followed."""
    _check(fields, _GGUF, [key for key in fields.values if key.startswith(_GGUF_PREFIX)])


def _check(fields: Fields, known: dict[str, _Setting], keys: list[str]) -> None:
    for key in keys:
        if key not in known:
            fields.require_plain(key, _NOTHING, "a known setting: this one may change the adapter's meaning")
        elif (plain := known[key].plain) is not None:
            fields.require_plain(key, plain)
