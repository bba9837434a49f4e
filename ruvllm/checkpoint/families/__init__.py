"""The families of models whose files are read. To add one, write a file here and list it in ``FAMILIES``."""

from ruvllm.checkpoint.families import gemma, gpt_oss, granite, llama, olmo, phi, qwen, smollm
from ruvllm.checkpoint.family import Family

FAMILIES: tuple[Family, ...] = (
    llama.LLAMA, llama.MISTRAL, llama.MINISTRAL, llama.MIXTRAL, qwen.QWEN2, qwen.QWEN3, qwen.QWEN2_MOE,
    qwen.QWEN3_MOE, gemma.GEMMA, gemma.GEMMA2, gemma.GEMMA3, smollm.SMOLLM3, olmo.OLMO2, olmo.OLMO3, olmo.OLMOE,
    granite.GRANITE, phi.PHI3, gpt_oss.GPT_OSS,
)  # fmt: skip
BY_TYPE: dict[str, Family] = {family.model_type: family for family in FAMILIES}
BY_CLASS: dict[str, Family] = {name: family for family in FAMILIES for name in family.classes}
# The first family of an architecture reads its GGUF files: "llama" stands for LLaMA and the three Mistrals.
BY_ARCHITECTURE: dict[str, Family] = {family.architecture: family for family in reversed(FAMILIES)}
