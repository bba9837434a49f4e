"""Vocabularies of Qwen, GPT-OSS and Gemma as these are published, and as GGUF files that are written of them."""

import json
import random
import unicodedata
from functools import partial

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ruvllm.checkpoint.gguf_metadata import tokenizer_metadata
from ruvllm.checkpoint.tokenizer import Kind, load_tokenizer
from tests.checkpoint.tokenizer_cases import STRINGS, from_metadata, kinds_of, metadata_of, read, trained_sentencepiece

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DECOMPOSED = ("cafe\u0301", "e\u0301 A\u030a", "한", "<|im_end|>e\u0301")


def ids_of(tokenizer, text, parse=False):
    return tokenizer.encode(text, add_special=False, parse_special=parse)


def save(engine, directory, **config):
    engine.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(directory)


# Qwen2, Qwen3 and GPT-OSS: byte-level, by regular expressions of their own


@pytest.fixture(params=["qwen2", "o200k"])
def byte_level(request, tmp_path):
    """What tiktoken makes of STRINGS, and the vocabulary as the models' tokenizer.json has it."""
    golden = read(request.param)
    metadata = golden["metadata"]
    tokens, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    qwen = request.param == "qwen2"
    engine = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)}, [tuple(merge.split(" ")) for merge in merges],
            ignore_merges=not qwen,
        )
    )  # fmt: skip
    if qwen:
        engine.normalizer = normalizers.NFC()
    engine.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN2 if qwen else O200K), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    engine.decoder = decoders.ByteLevel()
    engine.post_processor = processors.ByteLevel(trim_offsets=False)
    controls = [i for i, kind in enumerate(metadata["tokenizer.ggml.token_type"]) if kind == Kind.CONTROL]
    engine.add_special_tokens([AddedToken(tokens[i], special=True, normalized=False) for i in controls])
    engine.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    end = "<|im_end|>" if qwen else "<|return|>"
    return request.param, golden, save(engine, tmp_path, eos_token=end, add_bos_token=False), tmp_path


def test_directories_of_qwen_and_gpt_oss_give_the_ids_of_tiktoken(byte_level):
    name, golden, tokenizer, _ = byte_level
    composed = partial(unicodedata.normalize, "NFC") if name == "qwen2" else str
    seen = 0
    for text, ids in zip(STRINGS, golden["ids"], strict=True):
        if composed(text) == text:
            assert ids_of(tokenizer, text) == ids, text
            seen += 1
        else:
            assert ids_of(tokenizer, text) == ids_of(tokenizer, composed(text))
        assert tokenizer.decode(ids_of(tokenizer, text)) == composed(text)
    assert seen > 880
    assert not tokenizer.add_bos
    ends = {tokenizer.id_to_piece(i) for i in tokenizer.eos_ids}
    assert ends == ({"<|im_end|>", "<|endoftext|>"} if name == "qwen2" else {"<|return|>", "<|call|>", "<|endoftext|>"})


def test_what_is_written_of_them_as_gguf_means_the_same(byte_level):
    name, _, tokenizer, directory = byte_level
    values = tokenizer_metadata(directory, tokenizer.vocab_size + 7)
    assert values["tokenizer.ggml.pre"] == {"qwen2": "qwen2", "o200k": "gpt-4o"}[name]
    assert values.get("tokenizer.ggml.normalizer.nfc", False) == (name == "qwen2")
    copy = from_metadata(values)
    for text in (*STRINGS, *DECOMPOSED, "<think>\na</think>"):
        for parse in (True, False):
            assert ids_of(copy, text, parse) == ids_of(tokenizer, text, parse), text
    assert copy.eos_ids == tokenizer.eos_ids and copy.special_ids == tokenizer.special_ids


@pytest.mark.parametrize(
    ("control", "eos", "ends"),
    [
        (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", {"<|im_end|>", "<|endoftext|>"}),  # Qwen
        (["<|begin_of_text|>", "<|end_of_text|>", "<|im_end|>"], "<|im_end|>", {"<|im_end|>", "<|end_of_text|>"}),
        (["<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"], "<|end_of_text|>", {"<|end_of_text|>"}),
        (["<|endoftext|>", "<|assistant|>", "<|end|>"], "<|endoftext|>", {"<|endoftext|>", "<|end|>"}),  # Phi
        (["<|endoftext|>", "<|pad|>"], "<|endoftext|>", {"<|endoftext|>"}),  # OLMo
        (["<|return|>", "<|call|>", "<|end|>", "<|channel|>"], "<|return|>", {"<|return|>", "<|call|>"}),  # GPT-OSS
        (["<|return|>", "<|call|>", "<|end|>", "<|channel|>"], "<|end|>", {"<|return|>", "<|call|>"}),  # that errs
        (["<eos>", "<start_of_turn>", "<end_of_turn>"], "<eos>", {"<eos>", "<end_of_turn>"}),  # Gemma
    ],
)
def test_a_turn_of_each_family_ends(control, eos, ends):
    """Also where the file names one end alone, as files of base models do."""
    metadata = metadata_of("qwen2")
    count = sum(kind == Kind.NORMAL for kind in metadata["tokenizer.ggml.token_type"])
    metadata["tokenizer.ggml.tokens"] = metadata["tokenizer.ggml.tokens"][:count] + control
    metadata["tokenizer.ggml.token_type"] = [Kind.NORMAL] * count + [Kind.CONTROL] * len(control)
    metadata["tokenizer.ggml.eos_token_id"] = count + control.index(eos)
    tokenizer = from_metadata(metadata)
    assert {tokenizer.id_to_piece(i) for i in tokenizer.eos_ids} == ends
    assert eos not in ends or tokenizer.id_to_piece(tokenizer.eos_ids[0]) == eos


# Gemma: SentencePiece without a space in front, runs of white space and tags of HTML cut out of text

RUNS = ["\n", "\n\n", "\n\n\n", "\t", "\t\t", "▁▁", "▁▁▁", "▁▁▁▁", "<s>", "</s>", "<b>", "</b>"]
CONTROLS = ("<pad>", "</eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
WHITE = (" ", "  ", "   ", " " * 9, "\n", "\n\n\n\n", "\t", "\t\t\t", "\r\n", "a", "def", "<s>", "</s>x", "日本")


@pytest.fixture(scope="module")
def gemma():
    """A SentencePiece processor with Gemma's settings, trained on this suite's own strings."""
    return trained_sentencepiece(
        5, add_dummy_prefix=False, user_defined_symbols=RUNS, control_symbols=list(CONTROLS[4:]), pad_id=0, eos_id=1,
        bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="</eos>", bos_piece="<bos>",
    )  # fmt: skip


def texts_of_gemma():
    rng = random.Random(6)
    yield from STRINGS
    for _ in range(500):
        yield "".join(rng.choices(WHITE, k=rng.randrange(1, 9)))


def gemma_gguf(sp):
    """As llama.cpp's converter writes it: runs of spaces as spaces."""
    ids = range(sp.vocab_size())
    pieces = [sp.id_to_piece(i) for i in ids]
    kinds = [Kind.USER_DEFINED if piece in RUNS else kind for piece, kind in zip(pieces, kinds_of(sp), strict=True)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [
            piece.replace("▁", " ") if kind == Kind.USER_DEFINED else piece
            for piece, kind in zip(pieces, kinds, strict=True)
        ],
        "tokenizer.ggml.scores": [sp.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_space_prefix": False,
    }


def gemma_directory(sp, directory):
    """As Google publishes it: merges, byte fallback, runs as added tokens, and a pre-tokenizer that does nothing."""
    pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    normal = [i for i in vocab.values() if pieces[i] not in (*CONTROLS, *RUNS) and not sp.is_byte(i)]
    ranked = [pieces[i] for i in sorted(normal, key=lambda i: -sp.get_score(i))]
    runs = sorted((run for run in RUNS if len(set(run)) == 1), key=len, reverse=True)
    cuts = [(piece[:n], piece[n:]) for piece in runs + ranked for n in range(len(piece) - 1, 0, -1)]
    merges = [(left, right) for left, right in cuts if left in vocab and right in vocab]
    engine = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    engine.normalizer = normalizers.Replace(" ", "▁")
    engine.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    engine.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    engine.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    engine.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in CONTROLS])
    engine.add_tokens([AddedToken(run, normalized=False) for run in RUNS])
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, vocab["<end_of_turn>"]]}))
    return save(engine, directory, bos_token="<bos>", eos_token="</eos>", unk_token="<unk>", add_bos_token=True)


@pytest.mark.parametrize("form", ["gguf", "directory", "written"])
def test_gemmas_vocabulary_gives_the_ids_and_texts_of_sentencepiece(form, gemma, tmp_path):
    tokenizer = from_metadata(gemma_gguf(gemma)) if form == "gguf" else gemma_directory(gemma, tmp_path)
    if form == "written":
        tokenizer = from_metadata(tokenizer_metadata(tmp_path, tokenizer.vocab_size))
    for text in texts_of_gemma():
        ids = gemma.encode(text)
        assert ids_of(tokenizer, text) == ids, text
        assert tokenizer.decode(ids) == gemma.decode(ids), text
    for text in ("a▁▁b", "▁▁▁▁▁") + (("▁▁  a ▁", " ▁▁") if form != "directory" else ()):  # which sees runs of "▁" alone
        assert ids_of(tokenizer, text) == gemma.encode(text), text
    assert tokenizer.encode("  a")[0] == tokenizer.bos_id == 2
    assert tokenizer.decode(ids_of(tokenizer, "    def f(x):\n\t\t  x")) == "    def f(x):\n\t\t  x"


@pytest.mark.parametrize("form", ["gguf", "directory"])
def test_a_tag_of_html_is_no_end(form, gemma, tmp_path):
    """llama.cpp takes any </s> for one, and breaks off where Gemma strikes text out."""
    tokenizer = from_metadata(gemma_gguf(gemma)) if form == "gguf" else gemma_directory(gemma, tmp_path)
    assert [tokenizer.id_to_piece(i) for i in tokenizer.eos_ids] == ["</eos>", "<end_of_turn>"]
    tag = ids_of(tokenizer, "</s>", parse=True)
    assert len(tag) == 1 and tag[0] not in tokenizer.special_ids
    metadata = gemma_gguf(gemma)
    named = from_metadata({**metadata, "tokenizer.ggml.eos_token_id": tag[0]})  # then the file says that it is
    assert named.eos_ids[0] == tag[0] and tag[0] in named.special_ids
