"""Tokens named in the files next to tokenizer.json, which it may lack: read and added as transformers does.

tokenizer_config.json lists them (`added_tokens_decoder`, `additional_special_tokens`, `extra_special_tokens`) and
names the special ones (`bos_token`, `eos_token`, ..., and any other key that ends in `_token`). Where it has no
`added_tokens_decoder`, special_tokens_map.json takes precedence, and added_tokens.json gives the list. Source:
`PreTrainedTokenizerBase._from_pretrained` and `TokenizersBackend.__init__` of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruvllm.checkpoint.fields import Fields
from ruvllm.checkpoint.hf_files import MAX_TOKENS_BYTES, read_if_there

_STANDARD = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MORE = ("extra_special_tokens", "additional_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass
class NamedTokens:
    """The tokens in the files, each as a `tokenizers.AddedToken`.

    named: by the name that templates know. more: without a name. listed: by id.
    """

    config: Fields
    named: dict[str, Any] = field(default_factory=dict)
    more: list[Any] = field(default_factory=list)
    listed: dict[int, Any] = field(default_factory=dict)


def read_named_tokens(root: Path, config: Fields) -> NamedTokens:
    """The tokens that tokenizer_config.json (``config``) and the files next to it name. Raises: ModelFormatError."""
    found = NamedTokens(config)
    _read_names(found, config)
    if "added_tokens_decoder" in config:
        for key, value in (config.get("added_tokens_decoder", dict) or {}).items():
            if not (key.isascii() and key.isdigit() and len(key) < 10) or not isinstance(value, dict):
                raise config.error("added_tokens_decoder", f"{key!r}: {value!r}", "objects by their token ids")
            found.listed[int(key)] = _token(config, "added_tokens_decoder", value)
    else:
        _read_names(found, read_if_there(root / "special_tokens_map.json", MAX_TOKENS_BYTES))
        added = read_if_there(root / "added_tokens.json", MAX_TOKENS_BYTES)
        special = {token.content for token in (*found.named.values(), *found.more)}
        for content in added.values:
            how = {"special": content in special, "normalized": content not in special}
            found.listed[added.require(content, int)] = _token(added, content, {"content": content, **how})
    for token in found.listed.values():
        token.special = token.special or token.content in {named.content for named in found.named.values()}
    return found


def _read_names(found: NamedTokens, keys: Fields) -> None:
    for key, value in keys.values.items():
        if value is None or value == "":
            continue
        if key in _STANDARD:
            found.named[key] = _token(keys, key, value)
        elif key.endswith("_token") and (isinstance(value, str) or _is_token(value)):
            found.named[key] = _token(keys, key, value)
    listed = next((key for key in _MORE if keys.values.get(key)), None)
    if listed is None:
        return
    value = keys.values[listed]
    if isinstance(value, dict) and not _is_token(value):
        found.named |= {key: _token(keys, f"{listed}.{key}", item) for key, item in value.items()}
    elif isinstance(value, list):
        found.more = found.more or [_token(keys, listed, item) for item in value]
    else:
        raise keys.error(listed, repr(value), "a list of tokens")


def _is_token(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("content"), str)


def _token(keys: Fields, key: str, value: Any) -> Any:
    """A string, or an object with `content` and flags, as an AddedToken: special unless it says otherwise."""
    from tokenizers import AddedToken

    if isinstance(value, str):
        value = {"content": value}
    if not _is_token(value) or not value["content"]:
        raise keys.error(key, repr(value), "a string, or an object with a `content`")
    flags: Mapping[str, Any] = {name: value[name] for name in _FLAGS if value.get(name) is not None}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise keys.error(key, repr(value), "flags that are true or false")
    listed = key == "added_tokens_decoder"  # only there does a missing flag mean false
    return AddedToken(value["content"], **{"special": not listed, **flags})


def add_named_tokens(engine: Any, tokens: NamedTokens) -> None:
    """Add to the engine what it lacks; listed tokens that it has are as the list says (transformers does the same).

    Raises: ModelFormatError where a listed token would get another id than the list says.
    """
    listed = sorted(tokens.listed.items())
    engine.add_tokens([token for _, token in listed])
    for i, token in listed:
        if engine.token_to_id(token.content) != i:
            found = f"the id {i} for {token.content!r}"
            expected = f"{engine.token_to_id(token.content)}, the next that tokenizer.json leaves free"
            raise tokens.config.error("added_tokens_decoder", found, expected)
    known = {token.content for token in (*engine.get_added_tokens_decoder().values(), *tokens.listed.values())}
    named = {**dict.fromkeys(_STANDARD), **tokens.named}  # in the order in which transformers adds them
    added = []  # all at once: each call sorts the added tokens anew
    for token in (*(token for token in named.values() if token is not None), *tokens.more):
        if token.content not in known:
            added.append(token)
        known.add(token.content)
    engine.add_tokens(added)
