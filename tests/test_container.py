"""Containers: CPU quotas, CPU sets and memory limits of control groups, from made-up /proc and /sys of all layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest

import ruvllm
from ruvllm import container
from ruvllm.errors import InsufficientMemoryError
from ruvllm.kernels.memory import free_memory, require_memory
from ruvllm.kernels.threads.pool import physical_cores
from ruvllm.machine import machine
from tests.model import tiny
from tests.processes import python

HOST = Path(__file__).parents[1]
GB = 10**9
V2 = "30 23 0:26 / /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw,nsdelegate\n"
OTHER = "22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n"


def v1(controllers: str, root: str = "/") -> str:
    """A mount of version 1, as mountinfo has it."""
    return f"31 23 0:27 {root} /sys/fs/cgroup/{controllers} rw,relatime - cgroup cgroup rw,{controllers}\n"


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """system(cgroup, mountinfo, {file below /sys/fs/cgroup: text}): what this process now sees."""

    def make(cgroup: str, mountinfo: str, files: dict[str, str]) -> Path:
        contents = {"proc/self/cgroup": cgroup, "proc/self/mountinfo": OTHER + mountinfo}
        contents |= {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
        for name, text in contents.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.setenv(container.ROOT, str(tmp_path))
        return tmp_path

    return make


STAT = "anon 5\ninactive_file 300000000\nactive_file 100000000\nslab_reclaimable 50000000\nfile 999\n"
V1_STAT = "cache 7\ninactive_file 1\ntotal_inactive_file 300000000\ntotal_active_file 100000000\n"
LAYOUTS: dict[str, tuple[str, str, dict[str, str], int | None, tuple[int, int] | None]] = {
    "version 2 in a namespace of its own": (
        "0::/\n", V2,
        {
            "cpu.max": "250000 100000\n", "cpuset.cpus.effective": "0-3,8\n", "memory.max": f"{2 * GB}\n",
            "memory.current": f"{GB}\n", "memory.stat": STAT,
        },
        2, (2 * GB, GB + 450_000_000),
    ),
    "version 2, the CPU set is less than the quota": (
        "0::/\n", V2, {"cpu.max": "800000 100000\n", "cpuset.cpus.effective": "1,4-5\n"}, 3, None,
    ),
    "version 2, limits of groups above": (
        "0::/user.slice/app.scope\n", V2,
        {
            "user.slice/app.scope/cpu.max": "max 100000\n", "user.slice/cpu.max": "300000 100000\n",
            "user.slice/app.scope/memory.max": f"{8 * GB}\n", "user.slice/app.scope/memory.current": f"{GB}\n",
            "user.slice/memory.max": f"{4 * GB}\n", "user.slice/memory.current": f"{3 * GB}\n",
        },
        3, (4 * GB, GB),
    ),
    "version 1 in a container that sees the host's paths": (
        "5:cpuset:/docker/abc\n4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n",
        v1("cpu,cpuacct", "/docker/abc") + v1("memory", "/docker/abc") + v1("cpuset", "/docker/abc"),
        {
            "cpu,cpuacct/cpu.cfs_quota_us": "400000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "cpuset/cpuset.cpus": "0-15\n", "cpuset/cpuset.effective_cpus": "0-9\n",
            "memory/memory.limit_in_bytes": f"{3 * GB}\n", "memory/memory.usage_in_bytes": f"{2 * GB}\n",
            "memory/memory.stat": V1_STAT,
        },
        4, (3 * GB, GB + 400_000_000),
    ),
    "version 1 on a host, in a group": (
        "4:memory:/a/b\n3:cpu:/a\n", v1("cpu") + v1("memory"),
        {
            "cpu/a/cpu.cfs_quota_us": "150000\n", "cpu/a/cpu.cfs_period_us": "50000\n", "cpu/cpu.cfs_quota_us": "-1\n",
            "cpu/cpu.cfs_period_us": "100000\n", "memory/a/b/memory.limit_in_bytes": "9223372036854771712\n",
            "memory/a/b/memory.usage_in_bytes": "5\n", "memory/a/memory.limit_in_bytes": f"{GB}\n",
            "memory/a/memory.usage_in_bytes": f"{GB + 5}\n",
        },
        3, (GB, 0),
    ),
    "both versions": (
        "3:memory:/\n2:cpu:/x\n0::/y\n",
        v1("cpu") + v1("memory") + V2.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified"),
        {
            "cpu/x/cpu.cfs_quota_us": "200000\n", "cpu/x/cpu.cfs_period_us": "100000\n",
            "unified/y/cpu.max": "100000 100000\n", "memory/memory.limit_in_bytes": "9223372036854771712\n",
            "memory/memory.usage_in_bytes": "5\n",
        },
        1, None,
    ),
    "part of a CPU is one": ("0::/\n", V2, {"cpu.max": "20000 100000\n"}, 1, None),
    "parts above one do not count": ("0::/\n", V2, {"cpu.max": "199000 100000\n"}, 1, None),
    "no limits": (
        "0::/\n", V2, {"cpu.max": "max 100000\n", "memory.max": "max\n", "memory.current": "5\n"}, None, None,
    ),
    "a group that cannot be seen from here": ("0::/../other\n", V2, {"cpu.max": "200000 100000\n"}, 2, None),
    "what is no number": (
        "0::/\nodd\n", V2 + "more - cgroup2\n",
        {"cpu.max": "many\n", "cpuset.cpus.effective": "all\n", "memory.max": "\n", "memory.stat": "x\n"}, None, None,
    ),
    "no control groups": ("", "", {}, None, None),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_limits(layout: str, system: Any) -> None:
    cgroup, mountinfo, files, cpus, memory = LAYOUTS[layout]
    system(cgroup, mountinfo, files)
    assert container.cpus() == cpus
    assert container.memory() == memory


def test_a_system_without_control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(container.ROOT, str(tmp_path / "nothing"))
    assert (container.cpus(), container.memory()) == (None, None)


def test_models_take_as_many_threads_as_the_container_has_cpus(system: Any, tmp_path: Path) -> None:
    path = tiny.write_gguf("llama2_mha", tmp_path / "tiny.gguf")
    system("0::/\n", V2, {"cpu.max": "100000 100000\n"})
    assert physical_cores() == 1
    assert ruvllm.load(path, progress=False).model.threads == 1


def test_memory_is_refused_by_the_limit_of_the_container(system: Any, tmp_path: Path) -> None:
    path = tiny.write_gguf("llama2_mha", tmp_path / "tiny.gguf")
    used = {"memory.current": "900000000\n", "memory.stat": STAT}
    system("0::/\n", V2, {"memory.max": f"{GB}\n", **used})
    assert free_memory() == 550_000_000
    require_memory(550_000_000, "a model")
    with pytest.raises(InsufficientMemoryError, match=r"a model: 0\.6 GB needed, 0\.6 GB free"):
        require_memory(550_000_001, "a model")
    system("0::/\n", V2, {"memory.max": "450000000\n", "memory.current": "450000000\n", "memory.stat": ""})
    with pytest.raises(InsufficientMemoryError, match=r"tiny\.gguf: weights='auto' .* needed, 0\.0 GB free"):
        ruvllm.load(path, progress=False)


def test_the_host_may_have_less_than_the_container_allows(system: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    system("0::/\n", V2, {"memory.max": f"{1000 * GB}\n", "memory.current": "5\n"})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 7}))
    assert free_memory() == 7


def test_it_is_shown(system: Any) -> None:
    system("0::/\n", V2, {"cpu.max": "100000 100000\n", "memory.max": f"{2 * GB}\n", "memory.current": f"{GB}\n"})
    facts = machine()
    assert facts["cores"].endswith(" logical, of which this container may use 1")
    assert facts["memory"].endswith("; this container may take 2.00 GB, 1.00 GB of it available")


POOL = """
import json, os, ruvllm
from ruvllm.spinning import environment_of_others
from ruvllm.kernels.threads.pool import most_threads, num_threads
print(json.dumps([most_threads(), num_threads(), environment_of_others().get("NUMBA_NUM_THREADS")]))
"""


@pytest.mark.parametrize(("of_user", "expected"), [({}, [1, 1, None]), ({"NUMBA_NUM_THREADS": "2"}, [2, 2, "2"])])
def test_kernels_take_as_many_threads_unless_the_user_says_how_many(
    of_user: dict[str, str], expected: list[Any], system: Any
) -> None:
    root = system("0::/\n", V2, {"cpu.max": "100000 100000\n"})
    variables = {"NUMBA_NUM_THREADS": None, **of_user, container.ROOT: str(root)}
    assert json.loads(python("-c", POOL, **variables)) == expected
