"""Makes tests/data/named_tokens.json: the tokens that transformers reads from the files next to tokenizer.json.

Run `python tests/data/make_named_tokens.py` where transformers 5 is installed. Each case is the content of the files of
a directory; tokenizer.json is always a vocabulary of 256 bytes, then "<s>". Kept are the tokens that were added, those
that have a name, and the ids of a text that spells them.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import transformers  # type: ignore[import-not-found]
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

OUT = Path(__file__).parent / "named_tokens.json"
TEXT = "<s>a <|im_end|> b<think> <q>  <img><pad>"


def token(content: str, **flags: bool) -> dict[str, Any]:
    common = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {"content": content, **common, **flags}


# Files of the directory without their ".json".
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "listed by id": {
        "tokenizer_config": {
            "added_tokens_decoder": {
                "256": token("<s>", rstrip=True), "258": token("<think>", special=False), "257": token("<|im_end|>"),
            },
            "eos_token": "<|im_end|>",
        },
        "special_tokens_map": {"eos_token": "<s>", "additional_special_tokens": ["<q>"]},  # not read beside a list
    },
    "listed by spelling": {"tokenizer_config": {"additional_special_tokens": ["<|im_end|>", "<q>"]}},
    "listed with flags": {
        "tokenizer_config": {"extra_special_tokens": [{"__type": "AddedToken", **token("<|im_end|>", lstrip=True)}]}
    },
    "named": {
        "tokenizer_config": {
            "image_token": "<img>", "pad_token": "<pad>", "eos_token": "<|im_end|>", "bos_token": "<s>",
        }
    },
    "named in an object": {"tokenizer_config": {"extra_special_tokens": {"quote_token": "<q>", "image": "<img>"}}},
    "older files": {
        "tokenizer_config": {"eos_token": "<s>"},
        "special_tokens_map": {"eos_token": "<|im_end|>", "additional_special_tokens": ["<q>"]},
        "added_tokens": {"<think>": 257, "<|im_end|>": 258},
    },
    "no tokenizer_config.json": {"special_tokens_map": {"eos_token": {"content": "<|im_end|>", "rstrip": True}}},
    "an ordinary token": {"tokenizer_config": {"eos_token": "a"}},
}  # fmt: skip


def write_tokenizer(directory: Path) -> None:
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    engine = Tokenizer(models.BPE(vocabulary, []))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens([AddedToken("<s>", normalized=False)])
    engine.save(str(directory / "tokenizer.json"))


def main() -> None:
    made = {}
    for name, files in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder)
            write_tokenizer(directory)
            for file, content in files.items():
                (directory / f"{file}.json").write_text(json.dumps(content))
            theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
            made[name] = {
                "files": files,
                "added": {i: [t.content, t.special] for i, t in theirs.added_tokens_decoder.items()},
                "names": theirs.special_tokens_map,
                "eos_id": theirs.eos_token_id,
                "ids": theirs.encode(TEXT),
            }
    OUT.write_text(json.dumps({"text": TEXT, "cases": made}, indent=1) + "\n")


if __name__ == "__main__":
    main()
