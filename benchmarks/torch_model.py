"""A transformers model on PyTorch's own operators and on ours: ``python -m benchmarks.torch_model``.

A LLaMA of SmolLM2-135M's shape with random float32 weights; ``ruvllm.torch.patch`` with weights in 32, 8 and 4 bits.
Rounds are interleaved; figures are medians. Needs PyTorch and transformers (``pip install 'ruvllm[torch]'``).
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

SHAPE: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip
TOKENS = 8  # decoded in one timing


def seconds(run: Callable[[], Any]) -> float:
    """Of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print a table."""
    import torch  # type: ignore[import-not-found]
    import transformers  # type: ignore[import-not-found]

    import ruvllm.torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = transformers.LlamaConfig(**{**SHAPE, "num_hidden_layers": arguments.layers})

    def fresh() -> Any:
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).eval()

    models = {"PyTorch": fresh()}
    models |= {f"ruvllm, {weights}": ruvllm.torch.patch(fresh(), weights) for weights in ("f32", "int8", "int4")}
    ids = torch.randint(0, config.vocab_size, (1, arguments.prompt))
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in models}
    worst: dict[str, float] = {}
    with torch.inference_mode():
        exact = models["PyTorch"](ids).logits
        for turn in range(arguments.rounds + 1):  # the first one warms up
            for name, model in models.items():
                worst[name] = float((model(ids).logits - exact).abs().max())
                prompt = seconds(partial(model, ids))
                cache = model(ids).past_key_values

                def decode(model: Any = model, cache: Any = cache) -> None:
                    for _ in range(TOKENS):
                        model(ids[:, :1], past_key_values=cache)

                token = seconds(decode) / TOKENS
                if turn:
                    times[name][0].append(prompt)
                    times[name][1].append(token)
    setting = f"{arguments.threads} threads, prompt of {arguments.prompt}, {arguments.layers} layers"
    print(f"{setting}, PyTorch {torch.__version__}")
    print(f"{'':16} {'prompt, tokens/s':>18} {'decoding, tokens/s':>20} {'largest difference of logits':>30}")
    for name, (prompts, tokens) in times.items():
        prompt, token = arguments.prompt / statistics.median(prompts), 1 / statistics.median(tokens)
        print(f"{name:16} {prompt:18.0f} {token:20.1f} {worst[name]:30.2g}")


if __name__ == "__main__":
    main()
