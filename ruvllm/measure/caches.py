"""The caches of this processor: how large each level is."""

import subprocess
import sys
from pathlib import Path

_USUAL = {"L1": 32 << 10, "L2": 1 << 20, "L3": 16 << 20}  # if the system does not report them
_SYSFS = Path("/sys/devices/system/cpu/cpu0/cache")
_MACOS = {"L1": "hw.perflevel0.l1dcachesize", "L2": "hw.perflevel0.l2cachesize"}


def cache_sizes() -> dict[str, int]:
    """Bytes of each data cache level of the first core, smallest first; typical sizes if unknown."""
    sizes = _from_sysfs() if _SYSFS.is_dir() else _from_sysctl() if sys.platform == "darwin" else {}
    return dict(sorted(sizes.items())) or dict(_USUAL)


def _from_sysfs() -> dict[str, int]:
    sizes = {}
    try:
        for entry in _SYSFS.glob("index*"):
            kind, level, size = ((entry / name).read_text().strip() for name in ("type", "level", "size"))
            if kind in ("Data", "Unified"):
                sizes[f"L{level}"] = int(size[:-1]) << {"K": 10, "M": 20}[size[-1]]
    except (OSError, ValueError, KeyError):
        return {}
    return sizes


def _from_sysctl() -> dict[str, int]:
    sizes = {}
    for level, name in _MACOS.items():
        told = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False)
        if told.stdout.strip().isdigit():
            sizes[level] = int(told.stdout)
    return sizes
