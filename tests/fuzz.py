"""Mutates small sound model files and opens them: each must open or end in ModelFormatError, never in anything else.

    python -m tests.fuzz --minutes 60 [--seed N] [--keep DIRECTORY]

Mutations know where headers end and which integers are dangerous, and lean towards both. A file that still opens
is read completely: every tensor is decoded. A file that fails is kept with its seed, which repeats the run.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ruvllm.checkpoint.adapters import CONFIG_FILE, WEIGHTS_FILE, load_adapter
from ruvllm.checkpoint.chat import encode_chat
from ruvllm.checkpoint.gguf import GGUFFile
from ruvllm.checkpoint.loader import open_checkpoint
from ruvllm.checkpoint.safetensors import SafetensorsFile, SafetensorsIndex, open_safetensors
from ruvllm.checkpoint.tokenizer import load_tokenizer
from ruvllm.checkpoint.unpacked import UnpackedFiles
from ruvllm.errors import ModelFormatError
from tests import llm_cases
from tests.checkpoint import corpus, hostile_models, test_four_bits, test_packed
from tests.checkpoint.hostile_models import read_all
from tests.model import tiny

# Sizes, counts and offsets that wrap, change sign, or are one off.
_INTEGERS = [0, 1, 2, 3, 4, 5, 7, 8, 12, 13, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 65535, 65536]
_INTEGERS += [(1 << n) + d for n in (31, 32, 60, 61, 62, 63, 64) for d in (-33, -32, -8, -1, 0, 1)]
_JSON = [b"-1", b"0", b"1e999", b"1e-400", b"18446744073709551616", b"NaN", b"null", b"true", b"{}", b"[]", b'"a"']
_HANG_SECONDS = 60


@dataclass(frozen=True)
class Seed:
    """A sound file, and the end of its header."""

    data: bytes
    header: int


@dataclass(frozen=True)
class Target:
    """A target: sound files, the name of a mutated one, and how it is opened."""

    name: str
    seeds: tuple[Seed, ...]
    file: str
    open: Callable[[Path, bool], None]
    siblings: Path | None = None  # a directory whose other files the mutated one needs


def mutate(random_: random.Random, seed: Seed) -> bytes:
    """One to four changes of a sound file, most of them in its header."""
    data = bytearray(seed.data)
    json_length = int.from_bytes(data[:8], "little") if data[8:9] == b"{" else None
    for _ in range(random_.choice((1, 1, 1, 2, 3, 4))):
        _change(random_, data, seed.header)
    if json_length is not None and random_.random() < 0.7:  # else nearly every change only breaks the length
        length = max(0, json_length + len(data) - len(seed.data))
        data[:8] = struct.pack("<Q", length)
    return bytes(data)


def _change(random_: random.Random, data: bytearray, header: int) -> None:
    at = random_.randrange(min(header, len(data)) + 1 if random_.random() < 0.85 else len(data) + 1)
    length = min(random_.choice((1, 2, 4, 8, random_.randrange(1, 65))), len(data) - at)
    match random_.randrange(9):
        case 0 if at < len(data):
            data[at] ^= 1 << random_.randrange(8)
        case 1 if at < len(data):
            data[at] = random_.randrange(256)
        case 2 | 3:
            size = random_.choice((4, 8))
            data[at : at + size] = (random_.choice(_INTEGERS) % (1 << 8 * size)).to_bytes(size, "little")
        case 4:
            del data[at : at + length]
        case 5:
            data[at:at] = random_.randbytes(length)
        case 6:
            other = random_.randrange(len(data) + 1)
            data[at : at + length] = data[other : other + length]
        case 7:
            data[at:at] = data[at : at + length]
        case 8 if random_.random() < 0.3:
            del data[at:]
        case _:
            data[at : at + length] = random_.choice(_JSON)


def targets(directory: Path) -> list[Target]:
    """All targets; ``directory`` holds their files."""
    model = _gguf_seed(tiny.write_gguf("mlp_bias_f16", directory / "seed.gguf", "Q8_0").read_bytes(), directory)
    case = tiny.directory("llama3_scaled_gqa")
    index = (tiny.directory("bf16_sharded_tied") / "model.safetensors.index.json").read_bytes()
    config = (case / "config.json").read_bytes()
    speaker = directory / "speaker"
    speaker.mkdir(exist_ok=True)
    llm_cases.write_byte_tokenizer(speaker)
    names = ("tokenizer.json", "tokenizer_config.json")
    tokenizer, template = (_json_seed((speaker / name).read_bytes()) for name in names)
    sound = [corpus.valid_gguf(), corpus.valid_gguf(2, 8), corpus.small_gguf()]
    flat = [corpus.valid_safetensors(), corpus.safetensors({"a": corpus.st_entry("F32", [2], 0, 8)}, bytes(8))]
    return [
        Target("gguf", tuple(_gguf_seed(data, directory) for data in sound), "model.gguf", _open_gguf),
        Target("safetensors", tuple(map(_safetensors_seed, flat)), "model.safetensors", _open_safetensors),
        Target("model", (model,), "model.gguf", read_all),
        Target("config", (_json_seed(config),), "config.json", _open_directory, siblings=case),
        Target(
            "index",
            (_json_seed(index),),
            "model.safetensors.index.json",
            _open_directory,
            siblings=tiny.directory("bf16_sharded_tied"),
        ),
        Target("tokenizer", (tokenizer,), names[0], _open_tokenizer, siblings=speaker),
        Target("template", (template,), names[1], _open_tokenizer, siblings=speaker),
        _packed(directory),
        *_adapters(directory),
    ]


def _packed(directory: Path) -> Target:
    """GPTQ weights and MXFP4 experts."""
    siblings = directory / "packed"
    siblings.mkdir(exist_ok=True)
    blocks, scales, _ = test_packed.experts()
    experts = {"experts_blocks": blocks, "experts_scales": scales}
    seeds = []
    for symmetric in (True, False):
        tensors = test_four_bits.Matrix(64, symmetric).gptq() | experts
        test_four_bits.write(siblings, tensors, test_four_bits.GPTQ | {"sym": symmetric})
        seeds.append(_safetensors_seed((siblings / "model.safetensors").read_bytes()))
    return Target("packed", tuple(seeds), "model.safetensors", _open_packed, siblings=siblings)


def _open_packed(path: Path, mmap: bool) -> None:
    files = UnpackedFiles(open_safetensors(path, mmap), path.parent)
    try:
        for name in files.tensors:
            if name in ("t.weight", "experts"):
                files.tensor(name).float32()
    finally:
        files.close()


def _adapters(directory: Path) -> list[Target]:
    """PEFT's two files, and llama.cpp's one."""
    peft = tiny.DATA.parent / "lora" / hostile_models.ADAPTED
    config, weights = (_json_seed((peft / name).read_bytes()) for name in (CONFIG_FILE, WEIGHTS_FILE))
    weights = _safetensors_seed(weights.data)
    one = _gguf_seed(hostile_models.write_gguf_adapter(directory / "seed-adapter.gguf").read_bytes(), directory)

    def open_directory(path: Path, mmap: bool) -> None:
        load_adapter(path.parent, model)

    def open_file(path: Path, mmap: bool) -> None:
        load_adapter(path, model)

    model = hostile_models.adapted_model()
    return [
        Target("adapter config", (config,), CONFIG_FILE, open_directory, siblings=peft),
        Target("adapter", (weights,), WEIGHTS_FILE, open_directory, siblings=peft),
        Target("adapter gguf", (one,), "adapter.gguf", open_file),
    ]


def _gguf_seed(data: bytes, directory: Path) -> Seed:
    path = directory / "sound"
    path.write_bytes(data)
    with GGUFFile(path) as file:
        return Seed(data, min(info.offset for info in file.tensors.values()))


def _json_seed(data: bytes) -> Seed:
    return Seed(data, len(data))


def _safetensors_seed(data: bytes) -> Seed:
    return Seed(data, 8 + int.from_bytes(data[:8], "little"))


def _read_all(file: GGUFFile | SafetensorsFile | SafetensorsIndex) -> None:
    for name, info in file.tensors.items():
        try:
            tensor = file.tensor(name)
            if tensor.float32().size != tensor.rows * tensor.columns or tensor.shape != info.shape:
                raise AssertionError(f"{name}: {tensor} is not {info}")
        except ModelFormatError:
            pass


def _open_gguf(path: Path, mmap: bool) -> None:
    with GGUFFile(path, mmap) as file:
        _read_all(file)


def _open_safetensors(path: Path, mmap: bool) -> None:
    with open_safetensors(path, mmap) as file:
        _read_all(file)


def _open_directory(path: Path, mmap: bool) -> None:
    with open_checkpoint(path.parent, mmap) as checkpoint:
        for name in checkpoint.names():
            checkpoint.tensor(name).float32()


def _open_tokenizer(path: Path, mmap: bool) -> None:
    tokenizer = load_tokenizer(path.parent)
    ids = tokenizer.encode("the 1st\u00e9<|end|>", parse_special=mmap)
    tokenizer.decode(ids)
    try:
        encode_chat(tokenizer, [{"role": "user", "content": "<|end|>no"}])
    except ValueError as error:  # a sound template may want other messages, and says so; or there is none
        if isinstance(error, ModelFormatError) or " chat template" not in str(error):
            raise


def run(target: Target, directory: Path, seed: int, count: int, keep: Path | None = None) -> Counter[str]:
    """Open ``count`` mutated files; returns how many were "opened" and "refused".

    Raises:
        AssertionError: one ended in anything else; names target, seed and number, and the file is copied to ``keep``.
    """
    place = directory / f"fuzz-{target.name}"
    if target.siblings is None:
        place.mkdir(exist_ok=True)
    else:
        shutil.copytree(target.siblings, place, dirs_exist_ok=True)
    path = place / target.file
    outcomes: Counter[str] = Counter()
    for number, (random_, data) in enumerate(_mutants(target, seed, count)):
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        try:
            target.open(path, random_.random() < 0.5)
            outcomes["opened"] += 1
        except ModelFormatError as error:
            if not str(error).isprintable():
                raise AssertionError(f"not one printable line: {str(error)!r}") from error
            outcomes["refused"] += 1
        except Exception as error:
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, keep / f"{target.name}-{seed}-{number}")
            raise AssertionError(f"{target.name}, seed {seed}, mutant {number}: {error!r}") from error
    return outcomes


def _mutants(target: Target, seed: int, count: int) -> Iterator[tuple[random.Random, bytes]]:
    for number in range(count):
        random_ = random.Random(f"{target.name} {seed} {number}")
        yield random_, mutate(random_, random_.choice(target.seeds))


def main() -> int:
    parser = argparse.ArgumentParser(description="Open mutated model files: each must open or be refused.")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="where files that failed are kept")
    arguments = parser.parse_args()
    failures = 0
    outcomes: Counter[str] = Counter()
    end = time.monotonic() + arguments.minutes * 60
    with tempfile.TemporaryDirectory() as name:
        everything = targets(Path(name))
        seed = arguments.seed
        while time.monotonic() < end:
            for target in everything:
                faulthandler.dump_traceback_later(_HANG_SECONDS, exit=True)  # a hang is a failure, too
                try:
                    for outcome, count in run(target, Path(name), seed, 200, arguments.keep).items():
                        outcomes[f"{target.name} {outcome}"] += count
                except AssertionError as error:
                    failures += 1
                    print(error, flush=True)
            seed += 1
        faulthandler.cancel_dump_traceback_later()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1 << 20 if sys.platform == "darwin" else 1 << 10)
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:9d} {outcome}")
    print(f"{failures} failures; seeds {arguments.seed} to {seed - 1}; at most {peak} MB of memory")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
