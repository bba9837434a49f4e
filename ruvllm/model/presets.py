"""Configurations of well-known models by name, for benchmarks and for models with random weights."""

from ruvllm.model.config import ModelConfig, RopeConfig

PRESETS: dict[str, ModelConfig] = {
    "llama2-7b": ModelConfig(
        name="LLaMA2-7B", vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, head_dim=128, max_position_embeddings=4096,
        rms_norm_eps=1e-5, rope=RopeConfig(theta=10000.0), bos_token_id=1, eos_token_ids=(2,),
    ),
    "llama2-13b": ModelConfig(
        name="LLaMA2-13B", vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
        num_attention_heads=40, num_key_value_heads=40, head_dim=128, max_position_embeddings=4096,
        rms_norm_eps=1e-5, rope=RopeConfig(theta=10000.0), bos_token_id=1, eos_token_ids=(2,),
    ),
    "llama3-8b": ModelConfig(
        name="LLaMA3-8B", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=8192,
        rms_norm_eps=1e-5, rope=RopeConfig(theta=500000.0), bos_token_id=128000, eos_token_ids=(128001,),
    ),
    "llama3-70b": ModelConfig(
        name="LLaMA3-70B", vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, head_dim=128, max_position_embeddings=8192,
        rms_norm_eps=1e-5, rope=RopeConfig(theta=500000.0), bos_token_id=128000, eos_token_ids=(128001,),
    ),
    "llama3-405b": ModelConfig(
        name="LLaMA3.1-405B", vocab_size=128256, hidden_size=16384, intermediate_size=53248, num_hidden_layers=126,
        num_attention_heads=128, num_key_value_heads=8, head_dim=128, max_position_embeddings=8192,
        rms_norm_eps=1e-5, rope=RopeConfig(theta=500000.0), bos_token_id=128000,
        eos_token_ids=(128001,),
    ),
    "mistral-7b": ModelConfig(
        name="Mistral-7B", vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=32768,
        rms_norm_eps=1e-5, rope=RopeConfig(theta=10000.0), sliding_window=4096, bos_token_id=1, eos_token_ids=(2,),
    ),
    "smollm2-135m": ModelConfig(
        name="SmolLM2-135M-Instruct", vocab_size=49152, hidden_size=576, intermediate_size=1536,
        num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
        max_position_embeddings=8192, rms_norm_eps=1e-5, rope=RopeConfig(theta=100000.0),
        tie_word_embeddings=True, bos_token_id=1, eos_token_ids=(2,),
    ),
}  # fmt: skip
