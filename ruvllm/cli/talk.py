"""Commands that run a model: generate, chat, perplexity."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruvllm.cli.input import checked, read_line, read_text
from ruvllm.cli.parser import DEFAULT_MODEL, take_last, take_model
from ruvllm.cli.ranks import splits_model
from ruvllm.cli.show import show
from ruvllm.errors import ContextFullError

if TYPE_CHECKING:
    from ruvllm.llm import LLM
    from ruvllm.model.kv_cache import KVCache
    from ruvllm.streaming import Generation, Stream

_SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "repeat_last_n", "regex", "stop",
)  # fmt: skip
_CHAT_HELP = """\
/help   this list
/reset  forget the conversation
/exit   leave (also Ctrl-D)
Ctrl-C  end the answer"""

Message = dict[str, Any]


def generate(args: argparse.Namespace) -> None:
    """Answer one prompt, or continue it with --raw."""
    model = take_model(args)
    operand = take_last(args)
    if operand is not None and args.prompt is not None:
        raise ValueError("prompt given twice: as an argument and as --prompt")
    prompt = read_text(args.prompt if operand is None else operand, args.file, "prompt").removesuffix("\n")
    of_chats = {"--system": args.system, "--template-args": args.template_args, "--think, --no-think": args.think}
    for option, value in {**of_chats, "--chat-template": args.template}.items():
        if args.raw and value is not None:
            raise ValueError(f"{option}: only for chats, but --raw is given")
    options = _options(args)
    llm = load_model(args, model)
    if args.raw or not _has_template(llm, args.template, model):
        for option, value in of_chats.items():
            if value is not None:
                raise ValueError(f"{option}: only for chats, but {model} has no chat template (see --chat-template)")
        request: str | list[Message] = prompt
    else:
        request = [*_system(args), {"role": "user", "content": prompt}]
    # Without a limit of tokens the facade makes a cache as long as the prompt and the answer.
    cache = None if args.context is None and args.max_tokens >= 0 else _cache(llm, args)
    options = _with_draft(args, options)
    _show_answer(llm.stream(request, cache=cache, kv=args.kv, **options), cache, args)


def chat(args: argparse.Namespace) -> None:
    """Answer messages, each with those before as its context."""
    model = take_model(args, DEFAULT_MODEL)
    if (operand := take_last(args)) is not None:
        raise ValueError(f"unexpected argument {operand!r}")
    interactive = sys.stdin.isatty()
    options = _options(args)
    llm = load_model(args, model)
    if not _has_template(llm, args.template, model):
        raise ValueError(
            llm.tokenizer.missing
            or f"{model} has no chat template: set one with --chat-template, or continue a text with: "
            f"ruvllm generate {model} --raw"
        )
    options = _with_draft(args, options)
    cache = _cache(llm, args)
    # mpiexec hands rank 0 what is typed through a pipe, so whether somebody types cannot be known.
    prompted = interactive or (args.comm is not None and not args.quiet)
    if interactive:
        _enable_line_editing()
    if prompted:
        _note(f"{llm.config.name or model}: /help lists the commands, Ctrl-D leaves")
    messages = _system(args)
    while (line := _next_line(interactive, prompted)) is not None:
        text = line.strip()
        if text.startswith("/"):
            if text in ("/exit", "/quit", "/bye"):
                break
            if text == "/reset":
                messages = _system(args)
                _note("a new conversation")
            else:
                _note(_CHAT_HELP if text == "/help" else f"no command {text!r}\n{_CHAT_HELP}")
        elif text:
            _turn(llm, messages, text, cache, args, options)


def _turn(
    llm: LLM, messages: list[Message], text: str, cache: KVCache, args: argparse.Namespace, options: dict[str, Any]
) -> None:
    """Answer one message and add both to the conversation; a message that does not fit is dropped."""
    question = {"role": "user", "content": text}
    interactive = sys.stdin.isatty()
    try:
        stream = llm.stream([*messages, question], cache=cache, **options)
    except ContextFullError as error:
        if not interactive:
            raise
        _note(f"{error}\nthe message was dropped; /reset starts a new conversation, --context (-c) sets more")
        return
    try:
        _show_answer(stream, cache, args)
    except KeyboardInterrupt:
        if not interactive:
            raise
        print(flush=True)
        _note("interrupted")
    result = stream.result
    # The template drops the reasoning of past turns, or keeps it if the model expects it.
    thoughts = {"reasoning_content": result.reasoning} if result.reasoning else {}
    messages += [question, {"role": "assistant", "content": result.text, **thoughts}]


def perplexity(args: argparse.Namespace) -> None:
    """Print the perplexity of a text, and with --kl the distance of its predictions from those of float32."""
    file = args.file
    if file is None:
        file = args.operands.pop() if args.operands else None
    model = take_model(args, DEFAULT_MODEL)
    if (operand := take_last(args)) is not None:
        raise ValueError(f"unexpected argument {operand!r}")
    together = None if splits_model(args) else args.comm
    text = read_text(None, file, "text") if together is None or together.Get_rank() == 0 else ""
    if together is not None:
        text = together.bcast(text)  # only rank 0 has stdin
    llm = load_model(args, model)
    context = context_of(llm, args)
    if not args.kl:
        print(llm.perplexity(text, context=context, kv=args.kv, comm=together))
        return
    if args.comm is not None:
        raise ValueError("--kl: compares two models on one rank; run it without mpiexec")
    exact = argparse.Namespace(**{**vars(args), "weights": "f32"})
    print(llm.divergence(text, load_model(exact, model), context=context, kv=args.kv))


def follow(args: argparse.Namespace) -> None:
    """What ranks other than 0 do in commands that run a model split over ranks."""
    if args.command == "perplexity" and args.file is None and args.operands:
        args.operands.pop()  # the text
    args.lora = None  # rank 0 reads adapters, and sends each rank its share
    load_model(args, take_model(args, DEFAULT_MODEL)).follow()


def load_model(args: argparse.Namespace, model: str) -> LLM:
    """The model of the command line, with its adapters."""
    import ruvllm

    llm = ruvllm.load(
        model, weights=args.weights, threads=args.threads, mmap=not args.no_mmap,
        comm=args.comm if splits_model(args) else None, shares=args.shares, wire=args.wire,
    )  # fmt: skip
    for number, given in enumerate(args.lora or ()):
        path, weight = _adapter(given)
        llm.load_adapter(path, weight, name=f"{number}: {path}")
    return llm


def _with_draft(args: argparse.Namespace, options: dict[str, Any]) -> dict[str, Any]:
    """The options with the draft model of --model-draft, loaded."""
    if args.draft is None:
        return options
    import ruvllm

    return {**options, "draft": args.draft if args.draft == "lookup" else ruvllm.load(args.draft, threads=args.threads)}


def _adapter(given: str) -> tuple[str, float]:
    """PATH[=WEIGHT]: a path and a number."""
    path, equals, weight = given.rpartition("=")
    if equals and not Path(given).exists():
        try:
            return path, float(weight)
        except ValueError:
            pass  # a path with "=" in it
    return given, 1.0


def _has_template(llm: LLM, given: str | None, model: str) -> bool:
    """Whether there is a chat template: --chat-template (``given``), or the model's. Raises: ValueError."""
    named = llm.tokenizer.named_templates
    names = ", ".join(sorted(named))
    if given is None:
        if llm.tokenizer.chat_template is None and named:
            raise ValueError(f"{model} has only chat templates of the names {names}: choose one with --chat-template")
        return llm.tokenizer.chat_template is not None
    if not (_is_template(given) or given in named):
        choice = f", a file that holds one, or one of {names}" if named else ", or a file that holds one"
        raise ValueError(f"--chat-template: expected a template in Jinja{choice}, found {given!r}")
    return True


def _system(args: argparse.Namespace) -> list[Message]:
    return [] if args.system is None else [{"role": "system", "content": checked(args.system, "--system")}]


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The given options of the answer, as `LLM.stream` takes them."""
    given = {name: getattr(args, name) for name in _SAMPLING if getattr(args, name) is not None}
    for text in given.get("stop", ()):
        checked(text, "--stop")
    given |= _samplers(args)
    for name, option in (("schema", "JSON schema"), ("grammar", "grammar")):
        if (text := getattr(args, name)) is not None:
            given[name] = read_text(None, text, option) if Path(text).is_file() else text
    if args.template is not None:
        given["template"] = _template(args.template)
    if args.think is not None:
        given["enable_thinking"] = args.think
    if args.template_args is not None:
        given["template_args"] = _json_object(args.template_args)
    seed = None if args.seed == -1 else args.seed
    return given | {"seed": seed, "max_tokens": None if args.max_tokens < 0 else args.max_tokens}


def _samplers(args: argparse.Namespace) -> dict[str, Any]:
    """The samplers that have several options each."""
    from ruvllm.model.sampling.options import Dry, Mirostat, Xtc

    found: dict[str, Any] = {}
    for name, kind, switch, others in (
        ("dry", Dry, "dry_multiplier", {"base": "dry_base", "allowed_length": "dry_allowed_length"}),
        ("xtc", Xtc, "xtc_probability", {"threshold": "xtc_threshold"}),
        ("mirostat", Mirostat, "mirostat", {"tau": "mirostat_tau", "eta": "mirostat_eta"}),
    ):
        values = {field: value for field, option in others.items() if (value := getattr(args, option)) is not None}
        first = getattr(args, switch)
        if first:
            found[name] = kind(first, **values)
        elif values:
            option = others[next(iter(values))]
            raise ValueError(f"--{option.replace('_', '-')}: only with --{switch.replace('_', '-')}")
    if args.logit_bias:
        found["logit_bias"] = dict(map(_bias, args.logit_bias))
    return found


def _bias(given: str) -> tuple[int, float]:
    """ID+X or ID-X: a token id and a number."""
    found = re.fullmatch(r"(\d+)([+-](?:\d+\.?\d*|\.\d+|inf))", given)
    if found is None or found[2] == "+inf":
        raise ValueError(f"--logit-bias: expected ID+X or ID-X, such as 42-1.5, found {given!r}")
    return int(found[1]), float(found[2])


def _template(given: str) -> str:
    """A chat template: the given text, or that of a file; else a name that the model knows."""
    if "{" in given or not _is_template(given):
        return checked(given, "--chat-template")
    return read_text(None, given, "chat template")


def _json_object(given: str) -> dict[str, Any]:
    try:
        found = json.loads(given)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"--template-args: expected a JSON object, found {given!r}")
    return found


def _is_template(given: str) -> bool:
    return "{" in given or Path(given).exists()


def context_of(llm: LLM, args: argparse.Namespace) -> int:
    """The context length of --ctx-size; 0 is the model's own.

    The default is the command's, or the model's if it is shorter: a cache for a very long context exceeds the memory.
    """
    limit = llm.config.max_position_embeddings
    context = min(limit, args.usual_context) if args.context is None else args.context or limit
    if context > limit:
        raise ValueError(f"--context (-c): expected at most {limit} tokens, the model's own, found {context}")
    return int(context)


def _cache(llm: LLM, args: argparse.Namespace) -> KVCache:
    """A KV cache of --ctx-size tokens."""
    return llm.new_cache(context_of(llm, args), args.kv)


def _show_answer(stream: Stream, cache: KVCache | None, args: argparse.Namespace) -> None:
    """Stream an answer to stdout; to stderr its reasoning, and at the end its times."""
    thinking = False
    for text, reasoning in stream.parts():
        if not reasoning:
            if thinking and not args.quiet:
                _note("\n")
            print(text, end="", flush=True)
        elif not args.quiet:
            _note(text, end="")
        thinking = reasoning
    print(flush=True)
    if not args.quiet:
        _note(_summary(stream.result, cache is not None and len(cache) >= cache.max_tokens))


def _summary(result: Generation, full: bool) -> str:
    """One line: the time to the first token, the speed after it, and why the answer ended."""
    times = result.timings
    reused = f" ({times.reused_tokens} of them from before)" if times.reused_tokens else ""
    limit = "the context is full: --context (-c) sets more" if full else "stopped at the token limit"
    ended = limit if result.finish_reason == "length" else "reached its end"
    made = f"{times.tokens} tokens, {times.tokens_per_second:.1f} tokens/s" if times.tokens > 1 else "1 token"
    made += f", {times.accepted} of {times.drafted} guesses right" if times.drafted else ""
    prompt = f"{times.prompt_tokens} prompt tokens{reused}, first token after {times.prompt_seconds:.2f} s"
    return f"[{prompt}; {made}; {ended}]"


def _note(text: str, end: str = "\n") -> None:
    """Print a remark to stderr, so that stdout holds only the model's answer."""
    show(text, stderr=True, style="dim", markup=False, emoji=False, soft_wrap=True, end=end)


def _next_line(interactive: bool, prompted: bool) -> str | None:
    """The next line typed or piped; None at the end."""
    if not interactive:
        if prompted:
            _note("> ", end="")
        line = read_line()
        if prompted and not line:
            print(file=sys.stderr)
        return line or None
    while True:
        try:
            return checked(input("> "), "the message")
        except EOFError:
            print(file=sys.stderr)
            return None
        except ValueError as error:
            _note(str(error))
        except KeyboardInterrupt:
            print(file=sys.stderr)
            _note("Ctrl-D or /exit leaves")


def _enable_line_editing() -> None:
    """Arrow keys and history at the prompt, where the platform has readline."""
    try:
        import readline
    except ImportError:
        return
    readline.set_auto_history(True)
