"""What becomes of each key that transformers or llama.cpp reads of a tokenizer: followed, without meaning, refused.

The readers (`gguf`, `hf`, `added_tokens`) follow what they name themselves. This file holds
the others: keys that would change which tokens a text becomes, or which are chosen, in a way that is not done here,
with the values that change nothing. Any other value is refused by the key's name. Sources: llama.cpp's
`llama-vocab.cpp`, and `tokenization_utils_base.py` and `generation/configuration_utils.py` of transformers.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ruvllm.checkpoint.fields import Fields

logger = logging.getLogger(__name__)

PREFIX = "tokenizer.ggml."
# Ours: text is brought into Unicode's form NFC first (Qwen2). llama.cpp has no key for it, and leaves it out.
NFC = PREFIX + "normalizer.nfc"
# Names of tokens in keys, the wrong spelling of one of them included, and in templates.
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
        # Text is not filled in here, and these do not end it.
        "fim_pre_token_id", "fim_suf_token_id", "fim_mid_token_id", "prefix_token_id", "suffix_token_id",
        "middle_token_id",
    )
}  # fmt: skip

# Of tokenizer_config.json. Not named, since they mean nothing here: how batches are padded and cut (padding_side,
# model_max_length, ...), which Python class reads the files (tokenizer_class, auto_map, legacy, sp_model_kwargs, ...:
# tokenizer.json holds what comes of it), and clean_up_tokenization_spaces, which transformers passes over for BPE.
TOKENIZER_CONFIG_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "split_special_tokens": (False,),
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": (False,),
    "fast_tokenizer_files": ([], ["tokenizer.json"]),
}
# Of generation_config.json: what forbids or forces tokens. Its sampling options (do_sample, temperature, top_k, ...)
# and lengths are a choice of whoever asks, and beams, caches and assistants are not offered.
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
    """Refuse by its name a key whose value asks for what is not done here. Raises: ModelFormatError."""
    for key, values in neutral.items():
        keys.require_plain(key, values)


def check_gguf_keys(keys: Fields) -> None:
    """Refuse what is not done, and warn of keys that nobody has heard of. Raises: ModelFormatError."""
    require_neutral(keys, GGUF_NEUTRAL)
    known = _GGUF_FOLLOWED | _GGUF_WITHOUT_MEANING | GGUF_NEUTRAL.keys()
    for key in keys.values:
        if key.startswith(PREFIX) and key not in known:
            logger.warning("%s: the key %s is not known and not followed", keys.path, key)
