"""Two network namespaces joined by a virtual cable, in which MPICH runs one rank each, over TCP. Linux, as root.

python -m tests.ranks.namespaces [--delay 0.5ms] -- python -m benchmarks.scale
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ADDRESSES = "10.93.27.1", "10.93.27.2"
# hydra calls this as it calls ssh: -x HOST COMMAND. Ranks of one machine would else find each other by shared memory.
_LAUNCHER = """#!/bin/sh
shift
namespace={0}-$(echo "$1" | cut -d. -f4)
shift
exec ip netns exec "$namespace" /bin/sh -c "$*"
"""
_OVER_TCP = {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "cable", "FI_PROVIDER": "tcp", "FI_TCP_IFACE": "cable"}


class Unavailable(Exception):
    """This system cannot do it; the text says what it refused."""


class Namespaces:
    """Names that begin with ``name``; see ``namespaces``."""

    def __init__(self, name: str, launcher: Path) -> None:
        self.name, self.launcher = name, launcher

    def command(self, mpiexec: str, *command: str) -> list[str]:
        """``command`` on two ranks, one in each namespace."""
        launch = ["-launcher", "ssh", "-launcher-exec", str(self.launcher), "-localhost", ADDRESSES[0]]
        variables = [f"{name}={value}" for name, value in _OVER_TCP.items()]
        ranks = ["-hosts", ",".join(ADDRESSES), "-n", "2", "env", *variables]
        return ["ip", "netns", "exec", f"{self.name}-1", mpiexec, *launch, *ranks, *command]

    def received(self) -> int:
        """Bytes that have come out of the cable on the first side."""
        return int(_cable(f"{self.name}-1", "statistics/rx_bytes"))


@contextmanager
def namespaces(delay: str = "") -> Iterator[Namespaces]:
    """Two namespaces, gone after the block.

    Args:
        delay: of each packet, each way, as netem takes it ("0.5ms"); "": none.

    Raises:
        Unavailable: without the rights, the commands, or a kernel that has them.
    """
    name, made = f"ruvllm{os.getpid()}", []
    try:
        for side in "12":
            _run("ip", "netns", "add", f"{name}-{side}")
            made.append(side)
        first, second = (f"{name}-{side}" for side in "12")
        _run("ip", "-n", first, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", second)
        for namespace, address in zip((first, second), ADDRESSES, strict=True):
            _run("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                _run("ip", "-n", namespace, "link", "set", device, "up")
            if delay:
                _run("tc", "-n", namespace, "qdisc", "add", "dev", "cable", "root", "netem", "delay", delay)
        while not all(_cable(namespace, "operstate") == "up" for namespace in (first, second)):
            time.sleep(0.05)  # the kernel notices the other end within a second
        with tempfile.TemporaryDirectory() as directory:
            launcher = Path(directory) / "launch"
            launcher.write_text(_LAUNCHER.format(name))
            launcher.chmod(0o700)
            yield Namespaces(name, launcher)
    finally:
        for side in made:
            with suppress(Unavailable):
                _run("ip", "netns", "del", f"{name}-{side}")


def _cable(namespace: str, attribute: str) -> str:
    return _run("ip", "netns", "exec", namespace, "cat", f"/sys/class/net/cable/{attribute}").strip()


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout
    except FileNotFoundError as error:
        raise Unavailable(f"no command {error.filename}") from None
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"{' '.join(command)}: {error.stderr.strip()}") from None


def main() -> None:
    """Run a command in two namespaces."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay", default="")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    command = args.command[args.command[:1] == ["--"] :]
    with namespaces(args.delay) as joined:
        mpiexec = str(Path(sys.executable).with_name("mpiexec"))
        sys.exit(subprocess.run(joined.command(mpiexec, *command), check=False).returncode)


if __name__ == "__main__":
    main()
