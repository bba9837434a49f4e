"""The keys that transformers or llama.cpp read of a tokenizer: followed, ignored as meaningless, or refused.

The readers (`gguf`, `hf`, `added_tokens`) follow the keys that they name. This file lists the others: keys that would
change the tokens of a text, or the choice of tokens, in an unsupported way, with the values that change nothing. Any
other value is refused by the key's name. Sources: llama.cpp's `llama-vocab.cpp`, and `tokenization_utils_base.py` and
`generation/configuration_utils.py` of transformers.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ruvllm.checkpoint.fields import Fields

logger = logging.getLogger(__name__)

PREFIX = "tokenizer.ggml."
# Our own: text is first normalised to Unicode's form NFC (Qwen2). llama.cpp has no key for it, and skips it.
NFC = PREFIX + "normalizer.nfc"
# Names of tokens in keys (one is misspelt there) and in templates.
NAMED = {
    "bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token", "seperator": "sep_token",
    "mask": "mask_token", "cls": "cls_token",
}  # fmt: skip
END_NAMES = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")  # of tokens that end a generation

GGUF_NEUTRAL: dict[str, tuple[Any, ...]] = {
    PREFIX + "add_sep_token": (False,),
    PREFIX + "remove_extra_whitespaces": (False,),
    PREFIX + "precompiled_charsmap": ([],),  # how SentencePiece normalises text
    PREFIX + "normalizer.lowercase": (False,),
    PREFIX + "normalizer.strip_accents": (False,),
    PREFIX + "suppress_tokens": ([],),
}
_GGUF_FOLLOWED = {
    PREFIX + key for key in (
        "model", "pre", "tokens", "token_type", "scores", "merges", "add_bos_token", "add_eos_token",
        "add_space_prefix", "eos_token_ids", "normalizer.nfc", *(f"{name}_token_id" for name in (*NAMED, *END_NAMES)),
    )
}  # fmt: skip
_GGUF_WITHOUT_MEANING = {
    PREFIX + key for key in (
        "added_tokens",  # which tokens came later: their kinds say how they are read
        "token_type_count",  # of BERT's segments
        # Fill-in-the-middle is not supported, and these do not end a text.
        "fim_pre_token_id", "fim_suf_token_id", "fim_mid_token_id", "prefix_token_id", "suffix_token_id",
        "middle_token_id",
    )
}  # fmt: skip

# Of tokenizer_config.json. Not named, since they mean nothing here: how batches are padded and cut (padding_side,
# model_max_length, ...), which Python class reads the files (tokenizer_class, auto_map, legacy, sp_model_kwargs, ...:
# tokenizer.json holds the result), and clean_up_tokenization_spaces, which transformers ignores for BPE.
TOKENIZER_CONFIG_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "split_special_tokens": (False,),
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": (False,),
    "fast_tokenizer_files": ([], ["tokenizer.json"]),
}
# Of generation_config.json: what forbids or forces tokens. Its sampling options (do_sample, temperature, top_k, ...)
# and lengths are the caller's choice, and beams, caches and assistants are not supported.
GENERATION_CONFIG_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "bad_words_ids": ([],),
    "sequence_bias": ([], {}),
    "force_words_ids": ([],),
    "constraints": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1,),
    "watermarking_config": (),
    "token_healing": (False,),
}


def require_neutral(keys: Fields, neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse by its name a key whose value asks for an unsupported feature. Raises: ModelFormatError."""
    for key, values in neutral.items():
        keys.require_plain(key, values)


def check_gguf_keys(keys: Fields) -> None:
    """Refuse unsupported features, and warn of unknown keys. Raises: ModelFormatError."""
    require_neutral(keys, GGUF_NEUTRAL)
    known = _GGUF_FOLLOWED | _GGUF_WITHOUT_MEANING | GGUF_NEUTRAL.keys()
    for key in keys.values:
        if key.startswith(PREFIX) and key not in known:
            logger.warning("%s: the key %s is not known and not followed", keys.path, key)
