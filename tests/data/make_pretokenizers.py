"""Makes tests/data/tokenizers/pre.json: ids of strings under each pre-tokenizer that a GGUF file may name.

Run `python tests/data/make_pretokenizers.py` after make_tokenizers.py, where llama-cpp-python 0.3, gguf, tiktoken and
regex are installed. The vocabulary is always the part of LLaMA-3's in llama3.json, since only the split before
merging differs. The reference is llama.cpp, but for "tekken" and "gpt-4o", whose regular expressions it approximates:
there it is tiktoken with Mistral's and OpenAI's own; and for those of BY_REGEX: their published expressions, in the
words of the library `regex` (the letters that DeepSeek lists one by one are those with two cases), before tiktoken.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import gguf
import llama_cpp  # type: ignore[import-not-found]
import regex  # type: ignore[import-untyped]
import tiktoken  # type: ignore[import-not-found]

HERE = Path(__file__).parent / "tokenizers"
STRINGS = 150

BY_LLAMA_CPP = ["default", "gpt-2", "smollm", "llama-bpe", "qwen2", "falcon", "deepseek-coder", "deepseek-v3",
                "seed-coder", "starcoder", "falcon3", "dbrx"]  # fmt: skip

_CASE = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_END = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
BY_TIKTOKEN = {
    "tekken": rf"{_CASE}*{_LOWER}+|{_CASE}+{_LOWER}*|\p{{N}}|{_END}",
    "gpt-4o": rf"{_CASE}*{_LOWER}+{_SHORT}|{_CASE}+{_LOWER}*{_SHORT}|\p{{N}}{{1,3}}|{_END}",
}

_POROS = r" ?[^(\s|.,!?…。，、।۔،)]+"
BY_REGEX: dict[str, tuple[str, ...]] = {
    "deepseek-llm": (
        r"[\r\n]", r"\s?[\p{Lu}\p{Ll}\p{Lt}]+", r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+", r"\s+$",
        r"[一-龥ࠀ-一가-퟿]+", r"\p{N}+",
    ),
    "poro-chat": (_POROS,),
    "viking": (_POROS, r"\p{N}"),
    "bailingmoe": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
        r"|\s+(?!\S)|\s+",
    ),
}  # fmt: skip


def by_llama_cpp(metadata: dict[str, Any], pre: str, texts: list[str]) -> list[list[int]]:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/vocabulary.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_context_length(512)
        writer.add_embedding_length(32)
        writer.add_block_count(1)
        writer.add_feed_forward_length(64)
        writer.add_head_count(2)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(metadata["tokenizer.ggml.tokens"])
        writer.add_token_types(metadata["tokenizer.ggml.token_type"])
        writer.add_token_merges(metadata["tokenizer.ggml.merges"])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        model = llama_cpp.Llama(path, vocab_only=True, verbose=False)
        return [model.tokenize(text.encode(), add_bos=False, special=False) for text in texts]


def by_tiktoken(metadata: dict[str, Any], pattern: str, texts: list[str]) -> list[list[int]]:
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    byte_of = {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}
    kinds = metadata["tokenizer.ggml.token_type"]
    pieces = [piece for piece, kind in zip(metadata["tokenizer.ggml.tokens"], kinds, strict=True) if kind == 1]
    ranks = {bytes(byte_of[letter] for letter in piece): i for i, piece in enumerate(pieces)}
    reference = tiktoken.Encoding("pre", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return [reference.encode(text, disallowed_special=()) for text in texts]


def by_regex(metadata: dict[str, Any], patterns: tuple[str, ...], texts: list[str]) -> list[list[int]]:
    return [[i for ids in by_tiktoken(metadata, "(?s:.+)", _words(patterns, text)) for i in ids] for text in texts]


def _words(patterns: tuple[str, ...], text: str) -> list[str]:
    """The text, split by one expression after the other: what each matches, and what lies between."""
    words = [text]
    for pattern in patterns:
        words = [part for word in words for part in regex.split(f"({pattern})", word) if part]
    return words


def main() -> None:
    metadata = json.loads((HERE / "llama3.json").read_text("utf-8"))["metadata"]
    # llama.cpp takes a string to end at a NUL, and knows white space beyond ASCII in some expressions only.
    odd = set("\x00\x85\u00a0\u2003\u2028\u3000")
    texts = [text for text in json.loads((HERE / "strings.json").read_text("utf-8")) if not odd & set(text)]
    texts = texts[-STRINGS:]
    ids = {pre: by_llama_cpp(metadata, pre, texts) for pre in BY_LLAMA_CPP}
    ids |= {pre: by_tiktoken(metadata, pattern, texts) for pre, pattern in BY_TIKTOKEN.items()}
    ids |= {pre: by_regex(metadata, patterns, texts) for pre, patterns in BY_REGEX.items()}
    path = HERE / "pre.json"
    path.write_text(json.dumps({"texts": texts, "ids": ids}, separators=(",", ":")), "utf-8")
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
