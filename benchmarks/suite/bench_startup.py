"""The time before the first token: importing, compiling, starting."""

import os
import subprocess
import sys
import tempfile
import time


class Startup:
    """Each runs in a new process; the compile benchmark gets an empty cache."""

    version = "1"
    timeout = 300

    def timeraw_import_ruvllm(self) -> str:
        return "import ruvllm"

    def timeraw_import_kernels(self) -> str:
        return "import ruvllm.kernels"

    def timeraw_import_numba(self) -> str:
        """The least that importing the kernels can cost."""
        return "import numba"


class Compile:
    """Seconds until the first token of a model with random weights, in a process of its own."""

    version = "1"
    timeout = 600
    params = ([True, False],)
    param_names = ("cold",)
    unit = "s"
    _PROGRAM = (
        "from ruvllm.model import Llama\n"
        "from ruvllm.model.config import ModelConfig\n"
        "config = ModelConfig(vocab_size=512, hidden_size=512, intermediate_size=512, num_hidden_layers=1,\n"
        "                     num_attention_heads=8, num_key_value_heads=4, head_dim=64)\n"
        "model = Llama(config, layout='int4')\n"
        "cache = model.new_cache(80)\n"
        "model.forward(list(range(64)), cache)\n"
        "model.forward([1], cache)\n"
    )

    def track_first_token(self, cold: bool) -> float:
        with tempfile.TemporaryDirectory() as directory:
            environment = {**os.environ, "RUVLLM_CACHE": directory}
            for _ in range(1 if cold else 2):
                start = time.perf_counter()
                subprocess.run([sys.executable, "-c", self._PROGRAM], check=True, env=environment)
            return time.perf_counter() - start
