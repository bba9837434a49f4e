"""Tiny models with real tokenizers, as files and in memory: for tests of the facade."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ruvllm.checkpoint.tokenizer import load_tokenizer
from ruvllm.llm import LLM
from ruvllm.model import Llama, ModelConfig
from tests.model import tiny, tiny_gguf

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONTROLS = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
USER = [{"role": "user", "content": "hi"}]
END = 256
VOCABULARY = 256 + len(CONTROLS)
CONFIG = ModelConfig(
    vocab_size=VOCABULARY, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=12, max_position_embeddings=256, eos_token_ids=(END,), name="bytes",
)  # fmt: skip


def write_byte_tokenizer(directory: Path) -> Path:
    """A tokenizer.json with one token for each byte, then the control tokens of ``TEMPLATE``."""
    letters = {byte: letter for letter, byte in _byte_letters().items()}
    engine = Tokenizer(models.BPE({letters[byte]: byte for byte in range(256)}, []))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens([AddedToken(text, normalized=False) for text in CONTROLS])
    engine.save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<|end|>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def _byte_letters() -> dict[str, int]:
    """GPT-2's letter of each byte: printable Latin-1 itself, the others from U+0100 on, in order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def byte_llm(directory: Path, layout: str = "f32", threads: int | None = None, config: ModelConfig = CONFIG) -> LLM:
    """Random weights on a vocabulary of bytes: half of the output is not UTF-8."""
    tokenizer = load_tokenizer(write_byte_tokenizer(directory))
    return LLM(Llama(config, layout=layout, threads=threads, seed=3), tokenizer, directory)


def write_directory(directory: Path, case: str = "llama2_mha") -> Path:
    """A tiny Hugging Face checkpoint with the vocabulary that ``tiny.write_gguf`` gives the same weights."""
    shutil.copytree(tiny.directory(case), directory, dirs_exist_ok=True)
    size = json.loads((directory / "config.json").read_text())["vocab_size"]
    pieces = tiny_gguf.vocabulary(size)
    merges = [(piece[0], piece[1]) for piece in pieces if len(piece) == 2]
    ids = {piece: i for i, piece in enumerate(pieces)}
    engine = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True))
    engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    engine.decoder = decoders.Metaspace("▁")
    engine.add_special_tokens([AddedToken(text, normalized=False) for text in pieces[:3]])
    engine.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
