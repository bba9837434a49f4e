"""Options that ruvllm lacks, llama.cpp's and mistyped ones, and what to use instead: none is mistaken for another."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_HOST = "ruvllm runs on the CPU only: leave it out"
_SAMPLING = "leave it out; `--help` lists what there is"
_FILE = "it is read from the model's file: leave it out"
_CHOSEN = "ruvllm chooses it: leave it out"
_DRAFT = "leave it out: how many tokens are guessed follows from what pays; --model-draft says by whom"
_HUB = "give OWNER/NAME, OWNER/NAME:TYPE or OWNER/NAME/file.gguf as the model: it is fetched"
_PICTURES = "only text models are supported"
_LOG = "use --debug for more output, --quiet for the answer alone"
_CHAT = "use `ruvllm chat` for a conversation, `ruvllm generate` for one answer, --raw for no chat at all"
_MAPPED = "weights are mapped from the file unless --no-mmap is given"

_USE: dict[str, str] = {
    name: hint
    for names, hint in (
        ("-ngl --gpu-layers --n-gpu-layers -sm --split-mode -ts --tensor-split -mg --main-gpu -dev --device", _HOST),
        ("--list-devices -ot --override-tensor -cmoe --cpu-moe -ncmoe --n-cpu-moe -kvo --kv-offload", _HOST),
        ("-nkvo --no-kv-offload --op-offload --no-op-offload --no-host -fit --fit -fitt --fit-target", _HOST),
        ("-fitc --fit-ctx --rpc", _HOST),
        ("-fa --flash-attn", "attention always works this way: leave it out"),
        ("-sys", "use --system"),
        ("-sysf --system-prompt-file", 'use --system "$(cat FILE)"'),
        ("-ctk --cache-type-k -ctv --cache-type-v", "use --kv f16 or --kv int8, for keys and values"),
        ("-b --batch-size -ub --ubatch-size -dt --defrag-thold --swa-full -ctxcp --ctx-checkpoints", _CHOSEN),
        ("--swa-checkpoints -cram --cache-ram --repack -nr --no-repack --numa --prio --poll --prio-batch", _CHOSEN),
        ("--poll-batch --warmup --no-warmup -bs --backend-sampling --check-tensors --perf --no-perf", _CHOSEN),
        ("-tb --threads-batch", "use --threads (-t), for prompt and answer"),
        ("-C --cpu-mask -Cr --cpu-range --cpu-strict -Cb --cpu-mask-batch -Crb --cpu-range-batch", "use taskset"),
        ("--cpu-strict-batch", "use taskset"),
        ("-np --parallel -cb --cont-batching", "use `ruvllm serve --sequences N`; other commands have one sequence"),
        ("--keep --context-shift --no-context-shift", "a full context ends the answer; set a larger one with -c"),
        ("--predict", "use --n-predict (-n)"),
        ("-bf --binary-file", "use --file (-f), which reads UTF-8"),
        ("-e --escape --no-escape", r"escapes are not processed: in a shell write $'one\ntwo'"),
        ("--rope-scaling --rope-scale --rope-freq-base --rope-freq-scale --yarn-orig-ctx --yarn-ext-factor", _FILE),
        ("--yarn-attn-factor --yarn-beta-slow --yarn-beta-fast --override-kv -gan --grp-attn-n", _FILE),
        ("--mlock --mmap -dio --direct-io -ndio --no-direct-io -lm --load-mode", _MAPPED),
        ("--lora-scaled --lora-base", "use --lora PATH=WEIGHT"),
        ("--control-vector --control-vector-scaled --control-vector-layer-range", "use an adapter: --lora PATH"),
        ("-hf -hfr --hf-repo -hff --hf-file", _HUB),
        ("-hft --hf-token", "set HF_TOKEN"),
        ("--offline", "set HF_HUB_OFFLINE=1"),
        ("-mu --model-url -dr --docker-repo", "fetch the file first, and give its path"),
        ("-cl --cache-list", "use `ruvllm pull` without a name"),
        ("--log-disable --log-file --log-colors -v --verbose --log-verbose -lv --verbosity --log-verbosity", _LOG),
        ("--log-prefix --no-log-prefix --log-timestamps --no-log-timestamps --verbose-prompt --simple-io", _LOG),
        ("--display-prompt --no-display-prompt --show-timings --no-show-timings -co --color -sp --special", _LOG),
        ("--samplers --sampler-seq --sampling-seq --top-nsigma --top-n-sigma --dry-penalty-last-n", _SAMPLING),
        ("--dry-sequence-breaker --adaptive-target --adaptive-decay --dynatemp-range --dynatemp-exp", _SAMPLING),
        ("--ignore-eos", "forbid the model's end tokens with --logit-bias ID-inf"),
        ("-jf", "use --json-schema FILE"),
        ("-r --reverse-prompt", "use --stop"),
        ("-cnv --conversation -no-cnv --no-conversation -st --single-turn -i --interactive -if", _CHAT),
        ("--interactive-first -mli --multiline-input", _CHAT),
        ("--jinja --no-jinja", "templates are always Jinja: leave it out"),
        ("-rea --reasoning --reasoning-budget", "use --think or --no-think"),
        ("--reasoning-effort", """use --template-args '{"reasoning_effort": "low"}'"""),
        ("--reasoning-format", "reasoning goes to stderr: leave it out"),
        ("-mm --mmproj -mmu --mmproj-url --no-mmproj --image --audio --video -mmdev", _PICTURES),
        ("-md", "use --model-draft"),
        ("-hfd -hfrd -td --threads-draft -tbd -Cd -Crd -Cbd -otd -cmoed -ncmoed -devd -ngld", _DRAFT),
        ("-ctkd -ctvd --draft --draft-n --draft-max --draft-min --draft-n-min --spec-type --spec-default", _DRAFT),
    )
    for name in names.split()
}
_CLOSE = 0.75  # share of characters that a mistyped option has in common with the one that was meant
_GLUED = re.compile(r"-[A-Za-z](=|[+-]?\.?\d)")  # -n5, -n=5: a short option and its number


def what_to_use(option: str) -> str | None:
    """What to use in place of an option of llama.cpp; None if llama.cpp has no such option."""
    return _USE.get(option.partition("=")[0])


def close_option(option: str, known: Iterable[str]) -> str | None:
    """The known long option whose name is nearly this; None if there is none."""
    typed = option.partition("=")[0].replace("_", "-")
    names = [name[2:] for name in known if name.startswith("--")]
    close = difflib.get_close_matches(typed[2:], names, n=1, cutoff=_CLOSE) if typed.startswith("--") else []
    return f"--{close[0]}" if close else None


def is_no_option(argument: str) -> bool:
    """Whether an argument begins like a short option but is none: argparse would read ``-ngl`` as ``-n gl``.

    A number may follow its option directly (``-n5``); all our options with one dash have one letter.
    """
    short = argument[:1] == "-" and argument[1:2].isalpha() and len(argument) > 2
    return short and _GLUED.match(argument) is None
