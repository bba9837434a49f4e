"""The CPUs and memory that a container grants this process, by Linux's control groups (v1 and v2).

Python, numba and psutil report the host. A container with two of its sixty-four cores, or a tenth of its memory, is
throttled or killed when it takes what they report. The limits of all parent groups apply too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

ROOT = "RUVLLM_CGROUP_ROOT"  # environment variable for tests: the directory that holds /proc and /sys
_NONE = 1 << 62  # v1 writes no limit as the largest multiple of a page
_RECLAIMED = ("inactive_file", "active_file", "slab_reclaimable")  # part of the memory in use; v1 prefixes "total_"

Group = tuple[str, int]  # its directory, and its version of control groups


def cpus() -> int | None:
    """CPUs that this process may use, at least 1; None where no container limits them.

    A fraction of a CPU is dropped: a throttled thread makes all others wait.
    """
    found = [*_quotas(), *_sets()]
    return max(1, int(min(found))) if found else None


def memory() -> tuple[int, int] | None:
    """The memory limit of this process's control group and what is free of it, in bytes; None without a limit."""
    found = []
    for group, version in _groups("memory"):
        limit = _number(group, "memory.max" if version == 2 else "memory.limit_in_bytes")
        used = _number(group, "memory.current" if version == 2 else "memory.usage_in_bytes")
        if limit is not None and used is not None and limit < _NONE:
            found.append((limit, max(0, limit - used + _reclaimable(group, version))))
    return min(found, key=lambda pair: pair[1], default=None)


def limit_pool() -> None:
    """Limit numba, before it is imported, to the container's CPUs, unless the user has set its threads."""
    allowed = cpus()
    if allowed is not None and allowed < affinity():
        os.environ.setdefault("NUMBA_NUM_THREADS", str(allowed))


def affinity() -> int:
    """Logical CPUs that the scheduler may run this process on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quotas() -> Iterator[float]:
    for group, version in _groups("cpu"):
        if version == 2:
            quota, _, period = _read(group, "cpu.max").partition(" ")
        else:
            quota, period = _read(group, "cpu.cfs_quota_us"), _read(group, "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(period):  # "max" and "-1" are none
            yield int(quota) / int(period)


def _sets() -> Iterator[int]:
    for group, version in _groups("cpuset"):
        names = ("cpuset.cpus.effective",) if version == 2 else ("cpuset.effective_cpus", "cpuset.cpus")
        counts = [count for name in names if (count := _count(_read(group, name)))]
        yield from counts[:1]


def _count(listed: str) -> int:
    """CPUs in a list such as 0-3,8; 0 if it is empty or no such list."""
    total = 0
    for part in listed.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            return 0
        total += int(last) - int(first) + 1 if dash else 1
    return total


def _reclaimable(group: str, version: int) -> int:
    """Bytes of file pages that the kernel reclaims when memory is needed, such as those of a mapped model."""
    wanted = _RECLAIMED if version == 2 else tuple(f"total_{name}" for name in _RECLAIMED)
    lines = (line.split() for line in _read(group, "memory.stat").splitlines())
    return sum(int(line[1]) for line in lines if len(line) == 2 and line[0] in wanted and line[1].isdecimal())


def _groups(controller: str) -> Iterator[Group]:
    """The group of this process and its parents, as far as they are visible."""
    own = dict(_memberships())
    for mounted, place, version, controllers in _mounts():
        if version == 1 and controller not in controllers:
            continue
        path = own.get(controller if version == 1 else "")
        if path is None:
            continue
        # Without a cgroup namespace a container sees the host's path, but mounts only what is below it.
        inside = path == mounted or path.startswith(mounted.rstrip("/") + "/")
        names = [name for name in path[len(mounted) :].split("/") if name] if inside and ".." not in path else []
        for depth in range(len(names), -1, -1):
            yield os.path.join(place, *names[:depth]), version


def _memberships() -> Iterator[tuple[str, str]]:
    """Controller -> path of the group of this process; "" is that of version 2."""
    for line in _read(_root(), "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for controller in controllers.split(","):
            yield controller, path


def _mounts() -> Iterator[tuple[str, str, int, list[str]]]:
    """Where control groups are mounted: root within them, directory, version, and the controllers of version 1."""
    for line in _read(_root(), "proc/self/mountinfo").splitlines():
        fields, _, kind = line.partition(" - ")
        before, after = fields.split(), kind.split()
        if len(before) > 4 and len(after) > 2 and after[0] in ("cgroup", "cgroup2"):
            place = os.path.join(_root(), before[4].lstrip("/"))
            yield before[3], place, 2 if after[0] == "cgroup2" else 1, after[2].split(",")


def _number(group: str, name: str) -> int | None:
    text = _read(group, name)
    return int(text) if text.isdecimal() else None


def _read(directory: str, name: str) -> str:
    try:
        with open(os.path.join(directory, name), encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:  # no such limit, or not visible
        return ""


def _root() -> str:
    return os.environ.get(ROOT, "/")
