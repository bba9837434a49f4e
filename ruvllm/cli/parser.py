"""The command line's grammar: every command and option, named as users of llama.cpp and transformers know them."""

from __future__ import annotations

import argparse
import math
import sys
from typing import Any, NoReturn

import ruvllm
from ruvllm.cli import help_texts as texts
from ruvllm.cli.foreign import close_option, is_no_option, what_to_use
from ruvllm.cli.numbers import integer, number, shares
from ruvllm.cli.usage import Help, Parser, UsageError

DEFAULT_MODEL = "smollm2-135m"
WEIGHTS = ("auto", "f32", "f16", "bf16", "int4", "int8")  # as in model.llama, which takes the compiler to import
WIRES = ("auto", "exact", "f32", "f16")  # as in model.exchange
TARGETS = ("host", "apple-m4", "haswell", "znver4")  # as in lab.explanation
TYPES = ("q8_0", "q4_0", "q4_1", "f16", "f32", "bf16")  # as in quantizing
KV = ("auto", "f32", "f16", "int8")  # as in model.kv_cache


def build_parser() -> Parser:
    """The parser of the whole command line; it loads nothing of the library."""
    common = _common()
    parser = Parser(
        prog="ruvllm",
        description="LLM inference on CPUs, its kernels Python compiled by Numba.",
        epilog=texts.EXAMPLES,
        formatter_class=Help,
        allow_abbrev=False,
        parents=[common],
    )
    parser.add_argument("--version", action="version", version=f"ruvllm {ruvllm.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")

    def add(name: str, operands: str, summary: str, description: str, *parents: Parser) -> Parser:
        command: Parser = commands.add_parser(
            name,
            usage=f"ruvllm {name} [options] {operands}".rstrip(),
            help=summary,
            description=description,
            formatter_class=Help,
            allow_abbrev=False,
            parents=[common, *parents],
        )
        command.add_argument("operands", nargs="*", help=argparse.SUPPRESS)
        return command

    pull = add("pull", "[NAME ...]", "fetch a model into the cache", texts.PULL)
    pull.add_argument("--pack", action="store_true", help="also pack the weights, so that the first load is fast")
    pull.add_argument("--verify", action="store_true", help="compare every byte of a cached file with its checksum")

    loading, sampling = _loading(said="as much as the answer needs"), _sampling(max_tokens=256, temperature=0.0)
    asking = loading, sampling, _answering()
    generate = add("generate", "MODEL [PROMPT | -]", "answer one prompt", texts.GENERATE, *asking)
    generate.add_argument("-p", "--prompt", metavar="TEXT", help="the prompt")
    generate.add_argument("-f", "--file", metavar="FILE", help="read the prompt from a file")
    generate.add_argument("--raw", action="store_true", help="no chat template: continue the prompt as plain text")

    sampling = _sampling(max_tokens=1024, temperature=0.7)
    add("chat", "[MODEL]", "talk with a model", texts.CHAT, _loading(), sampling, _answering())

    serve = add("serve", "[MODEL]", "answer HTTP requests as OpenAI's service does", texts.SERVE, _loading())
    _add_serving(serve)

    info = add("info", "[MODEL]", "versions, CPU, threads, memory, caches; a model", texts.INFO)
    info.add_argument(
        "--calibrate", action="store_true", help="measure again where NumPy's BLAS multiplies faster than our kernels"
    )
    _add_division(info)

    train = add("train", "[MODEL]", "train an adapter on a file", texts.TRAIN, _loading(context=512))
    _add_training(train)
    _add_split(train, "data")

    loading = _loading(context=512)
    perplexity = add("perplexity", "[MODEL] FILE", "how well a model predicts a text", texts.PERPLEXITY, loading)
    perplexity.add_argument("-f", "--file", metavar="FILE", help="the text; - is stdin")
    _add_split(perplexity, "model")
    perplexity.add_argument("--kl", action="store_true", help="compare with the same model in float32: KL divergence")

    add("memory", "[CONFIG | MODEL ...]", "memory that a model needs, at several precisions", texts.MEMORY)

    explain = add("explain", "NAME", "how the compiler translated a kernel", texts.EXPLAIN)
    explain.add_argument("--target", choices=TARGETS, default="host", help="the processor (default: this one)")
    explain.add_argument("--asm", action="store_true", help="show the loops' assembly next to their source lines")
    report = add("report", "[REPORT.json]", "measure this machine: kernels, layers, peers, limits", texts.REPORT)
    report.add_argument("--quick", action="store_true", help="half a minute: one thread, fewer measurements and layers")
    report.add_argument("--only", action="append", default=[], metavar="NAME", help=texts.ONLY)
    report.add_argument(
        "-t", "--threads", metavar="N,N", help="thread counts (default: 1 and, unless --quick, physical cores)"
    )
    report.add_argument("--no-peers", action="store_true", help="do not measure NumPy, PyTorch and llama.cpp")
    report.add_argument("--compare", metavar="OLD.json", help="say what changed since an older report")
    report.add_argument("-o", "--output", default="ruvllm-report", metavar="STEM", help="(default: %(default)s)")

    quantize = add("quantize", "MODEL OUT.gguf", "write a model in another precision", texts.QUANTIZE)
    quantize.add_argument("--type", choices=TYPES, required=True, help="of the matrices; vectors become f32")
    quantize.add_argument("--force", action="store_true", help="replace OUT.gguf if it exists")

    add("warmup", "", "compile all kernels into the cache", texts.WARMUP)

    cache = add("cache", "[list | size | prune]", "packed weights that are kept, and their size", texts.CACHE)
    cache.add_argument("--to", metavar="SIZE", help="prune: also the least recently used, until the rest has this size")
    cache.add_argument("--all", action="store_true", help="prune: all of them")
    parser.commands = commands.choices
    return parser


def _common() -> Parser:
    """Options of every command, before or after its name."""
    parser = Parser(add_help=False)
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="log more, and show the trace of an error"
    )
    return parser


def _loading(context: int = 8192, said: str | None = None) -> Parser:
    """Options for loading a model; ``context``: the context taken by default, if the model's is not shorter."""
    parser = Parser(add_help=False)
    parser.set_defaults(usual_context=context)
    said = said or f"the model's, at most {context}"
    group = parser.add_argument_group("model")
    group.add_argument("-m", "--model", dest="model_option", metavar="MODEL", help="the model, as an option")
    group.add_argument("-t", "--threads", type=integer(1), metavar="N", help="threads (default: physical cores)")
    group.add_argument(
        "-c", "--ctx-size", "--context", dest="context", type=integer(0), metavar="N",
        help=f"context length in tokens, 0: the model's own (default: {said})",
    )  # fmt: skip
    group.add_argument(
        "--weights", choices=WEIGHTS, default="auto", help="how weights are held in memory (default: %(default)s)"
    )
    group.add_argument(
        "--kv", choices=KV, default="auto",
        help="precision of the KV cache (default: auto, which is f32 where all weights are, else f16)",
    )  # fmt: skip
    group.add_argument(
        "--lora", action="append", metavar="PATH[=WEIGHT]",
        help="an adapter: PEFT's directory, or GGUF; may be repeated, WEIGHT is 1 unless given",
    )  # fmt: skip
    group.add_argument("--no-mmap", action="store_true", help="read the file into memory instead of mapping it")
    _add_division(group)
    return parser


def _add_division(group: Any) -> None:
    """How a model is divided over ranks."""
    group.add_argument(
        "--shares", type=shares, metavar="N,N",
        help="under mpiexec: how much of the model each rank holds, relative to the others; auto: measure memory "
        "bandwidth (default: equal shares)",
    )  # fmt: skip
    group.add_argument(
        "--wire", choices=WIRES, default="auto",
        help="under mpiexec: what ranks send each other: exact results, or sums, in f32 or f16, which are fewer "
        "messages and bytes (default: auto, which is exact for weights of 4 to 8 bits, else f32)",
    )  # fmt: skip


def _add_split(parser: Parser, default: str) -> None:
    parser.add_argument(
        "--split", choices=("model", "data"), default=default,
        help="under mpiexec: each rank holds a share of the model, or the whole and takes a share of the text "
        "(default: %(default)s)",
    )  # fmt: skip


def _add_serving(parser: Parser) -> None:
    """Options of the address, and of what clients may ask."""
    address = parser.add_argument_group("address")
    address.add_argument("--host", default="127.0.0.1", metavar="HOST", help="0.0.0.0: all (default: %(default)s)")
    address.add_argument(
        "--port", type=integer(0), default=8080, metavar="N", help="0: a free one (default: %(default)s)"
    )
    address.add_argument("--api-key", metavar="KEY", help="what clients must send as a bearer token")
    address.add_argument("-a", "--alias", metavar="NAME", help="name of the model for clients (default: as given)")
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--sequences", "--parallel", dest="sequences", type=integer(1), default=8, metavar="N",
        help="answers that are computed together (default: %(default)s)",
    )  # fmt: skip
    limits.add_argument(
        "--queue", type=integer(0), default=64, metavar="N",
        help="answers that may wait; more are refused with 429 (default: %(default)s)",
    )  # fmt: skip
    limits.add_argument(
        "--memory", metavar="SIZE", help="for keys and values, such as 4GB (default: what the sequences need, at most "
        "half of what is free)",
    )  # fmt: skip
    limits.add_argument(
        "--timeout", type=number(0, above=True), default=600.0, metavar="SECONDS",
        help="of a request (default: %(default)g)",
    )  # fmt: skip


def _add_training(parser: Parser) -> None:
    """Options for the training data, the adapter, and the training."""
    files = parser.add_argument_group("data")
    files.add_argument("-d", "--data", metavar="FILE", help="training data: .jsonl or text")
    files.add_argument("--eval", metavar="FILE", help="evaluation data, used before and after")
    files.add_argument(
        "--eval-share", type=float, default=0.1, metavar="P",
        help="without --eval: share of the examples held out for evaluation (default: %(default)s)",
    )  # fmt: skip
    files.add_argument("-o", "--out", default="adapter", metavar="DIR", help="where to write (default: %(default)s)")
    files.add_argument("--resume", action="store_true", help="continue the run in --out")
    files.add_argument("--save-every", type=int, default=0, metavar="N", help="write a checkpoint every N steps")
    adapter = parser.add_argument_group("adapter")
    adapter.add_argument("--rank", "--lora-r", type=int, default=8, metavar="R", help="rank (default: %(default)s)")
    adapter.add_argument("--alpha", "--lora-alpha", type=float, default=16.0, metavar="A", help="(default: 16)")
    adapter.add_argument("--dropout", "--lora-dropout", type=float, default=0.0, metavar="P", help="of its inputs")
    adapter.add_argument(
        "--targets", "--target-modules", default="q,v", metavar="LIST",
        help="matrices to adapt, of q,k,v,o,gate,up,down (default: %(default)s)",
    )  # fmt: skip
    adapter.add_argument("--rslora", action="store_true", help="scale by alpha / sqrt(rank) instead of alpha / rank")
    learning = parser.add_argument_group("training")
    learning.add_argument("--epochs", type=float, default=3.0, metavar="N", help="(default: %(default)s)")
    learning.add_argument("--steps", "--max-steps", type=int, metavar="N", help="number of steps, instead of --epochs")
    learning.add_argument("-b", "--batch-size", type=int, default=8, metavar="N", help="(default: %(default)s)")
    learning.add_argument("--accumulation", type=int, default=1, metavar="N", help="batches per step")
    learning.add_argument("--lr", "--learning-rate", type=float, default=1e-3, metavar="X", help="(default: 0.001)")
    learning.add_argument("--schedule", choices=("cosine", "linear", "constant"), default="cosine", help="of lr")
    learning.add_argument(
        "--warmup", type=float, default=0.1, metavar="N", help="steps, or share of all steps, until lr is reached"
    )
    learning.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw", help="(default: %(default)s)")
    learning.add_argument("--momentum", type=float, default=0.0, metavar="X", help="of sgd")
    learning.add_argument("--weight-decay", type=float, default=0.0, metavar="X", help="(default: %(default)s)")
    learning.add_argument("--max-grad-norm", type=float, default=1.0, metavar="X", help="0: no clipping")
    learning.add_argument("-s", "--seed", type=int, default=0, metavar="N", help="same seed, same adapter")
    learning.add_argument("--checkpointing", action="store_true", help="a tenth of the memory for activations, slower")


def _sampling(max_tokens: int, temperature: float) -> Parser:
    """Options for sampling."""
    parser = Parser(add_help=False)
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "-n", "--max-tokens", "--n-predict", "--max-new-tokens", dest="max_tokens", type=integer(1, -1, -2),
        default=max_tokens, metavar="N",
        help="at most N tokens, -1 or -2: until the context is full (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--temp", "--temperature", dest="temperature", type=number(0), default=temperature, metavar="T",
        help="0 always takes the likeliest token, higher is more varied (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--top-k", type=integer(0), metavar="K", help="choose among the K likeliest tokens, 0: all")
    group.add_argument(
        "--top-p", type=number(0, 1, above=True), metavar="P", help="choose among the likeliest that sum to P"
    )
    group.add_argument(
        "--min-p", type=number(0, 1), metavar="P", help="drop tokens less likely than P times the likeliest"
    )
    group.add_argument(
        "--repeat-penalty", "--repetition-penalty", dest="repetition_penalty", metavar="R",
        type=number(0, above=True), help="above 1 makes tokens that already occurred less likely",
    )  # fmt: skip
    group.add_argument(
        "--presence-penalty", type=number(-math.inf), metavar="X", help="taken off the logit of a token that occurred"
    )
    group.add_argument(
        "--frequency-penalty", type=number(-math.inf), metavar="X", help="taken off it once for each time"
    )
    group.add_argument(
        "--repeat-last-n", type=integer(0, -1), metavar="N", help="these penalties look at N tokens (default: -1, all)"
    )
    group.add_argument(
        "--typical-p", "--typical", dest="typical_p", type=number(0, 1, above=True), metavar="P",
        help="choose among tokens of typical surprise that sum to P",
    )  # fmt: skip
    group.add_argument(
        "--dry-multiplier", type=number(0), metavar="X", help="penalty on repeated runs of tokens; 0.8 is usual"
    )
    group.add_argument("--dry-base", type=number(1), metavar="X", help="its growth with each token (default: 1.75)")
    group.add_argument(
        "--dry-allowed-length", type=integer(1), metavar="N", help="shorter runs go unpunished (default: 2)"
    )
    group.add_argument(
        "--xtc-probability", type=number(0, 1), metavar="P", help="how often to drop all likely tokens but the least"
    )
    group.add_argument("--xtc-threshold", type=number(0, 1), metavar="P", help="which are likely (default: 0.1)")
    group.add_argument(
        "--mirostat", type=int, choices=(0, 1, 2), help="keep the surprise of the text even, in place of the filters"
    )
    group.add_argument(
        "--mirostat-ent", "--mirostat-tau", dest="mirostat_tau", type=number(0), metavar="BITS",
        help="the surprise of a token (default: 5)",
    )  # fmt: skip
    group.add_argument(
        "--mirostat-lr", "--mirostat-eta", dest="mirostat_eta", type=number(0), metavar="X",
        help="how fast it is corrected (default: 0.1)",
    )  # fmt: skip
    group.add_argument(
        "-l", "--logit-bias", action="append", metavar="ID+X",
        help="add X to the logit of a token: 42+1.5, 42-1, 42-inf forbids it; may be repeated",
    )  # fmt: skip
    group.add_argument(
        "-s", "--seed", type=integer(0, -1), metavar="N",
        help="same seed, same answer; -1: a new one each time (the default)",
    )  # fmt: skip
    group.add_argument(
        "--model-draft", "--draft-model", dest="draft", metavar="MODEL",
        help="guess tokens (speculative decoding): a smaller model of the same vocabulary, or `lookup`: from the text "
        "so far; the answer stays the same, and comes sooner where guesses are right",
    )  # fmt: skip
    group.add_argument(
        "-j", "--json-schema", "--json-schema-file", dest="schema", metavar="SCHEMA",
        help="the answer is JSON that follows this schema: its text, or a file; {} allows any JSON",
    )  # fmt: skip
    group.add_argument(
        "--grammar", "--grammar-file", dest="grammar", metavar="GRAMMAR",
        help="the answer follows this grammar: its text (GBNF or Lark), or a file",
    )  # fmt: skip
    group.add_argument("--regex", metavar="PATTERN", help="the answer matches this regular expression")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end the answer at this text; may be repeated")
    return parser


def _answering() -> Parser:
    """Options that say how a conversation is framed and shown."""
    parser = Parser(add_help=False)
    parser.add_argument("--system", "--system-prompt", dest="system", metavar="TEXT", help="the system message")
    parser.add_argument(
        "--chat-template", "--chat-template-file", dest="template", metavar="TEMPLATE",
        help="a chat template in place of the usual one: its text (Jinja), a file, or a name that the model knows",
    )  # fmt: skip
    parser.add_argument(
        "--template-args", "--chat-template-kwargs", dest="template_args", metavar="JSON",
        help='further variables of the template, such as \'{"reasoning_effort": "low"}\'',
    )  # fmt: skip
    parser.add_argument(
        "--think", action=argparse.BooleanOptionalAction,
        help="whether a model that can do both thinks before it answers (default: as its template has it)",
    )  # fmt: skip
    parser.add_argument("-q", "--quiet", action="store_true", help="print answers alone, no times and no reasoning")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse a command line; `operands` holds the arguments that are no options, wherever they stood.

    argparse alone refuses `generate MODEL -n 5 PROMPT`: operands after an option come back as leftovers. Nothing after
    "--" is an option, whatever it begins with. Raises UsageError where it cannot be read.
    """
    given = sys.argv[1:] if argv is None else argv
    end = given.index("--") if "--" in given else len(given)
    parser = build_parser()
    command = next((argument for argument in given[:end] if not argument.startswith("-")), "")
    for argument in filter(is_no_option, given[:end]):
        _refuse_option(parser, argument, command)
    args, leftovers = parser.parse_known_args(given[:end])
    for argument in leftovers:
        if argument.startswith("-") and argument != "-":
            _refuse_option(parser, argument, args.command)
        args.operands.append(argument)
    args.operands += given[end + 1 :]
    return args


def _refuse_option(parser: Parser, argument: str, command: str) -> NoReturn:
    """Raise a UsageError that names an unknown option, and what to use instead: of llama.cpp's, or mistyped."""
    known = parser.commands.get(command, parser).options
    hint, meant = what_to_use(argument), close_option(argument, known)
    if hint is not None:
        said = f"{argument.partition('=')[0]} is an option of llama.cpp that ruvllm lacks: {hint}"
    elif meant is not None:
        said = f"unknown option {argument.partition('=')[0]}: did you mean {meant}?"
    else:
        shown = argument if argument.isprintable() and " " not in argument else repr(argument)
        said = f'unknown option {shown}; a text that begins with "-" goes last, after "--"'
    raise UsageError(f"{said} (see `{f'ruvllm {command}'.rstrip()} --help`)")


def take_model(args: argparse.Namespace, default: str | None = None) -> str:
    """The model that -m names, else the first operand (taken off), else the default."""
    if args.model_option is not None:
        return str(args.model_option)
    if args.operands:
        return str(args.operands.pop(0))
    if default is None:
        raise ValueError(f"which model? for example: ruvllm {args.command} {DEFAULT_MODEL}")
    return default


def take_last(args: argparse.Namespace) -> str | None:
    """The one operand that is left, if any."""
    operand = args.operands.pop(0) if args.operands else None
    if args.operands:
        raise ValueError(f"unexpected argument {args.operands[0]!r}; quote a text that has spaces")
    return operand
