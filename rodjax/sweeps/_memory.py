"""The memory that a container, a batch system or the machine leaves this process."""

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

GROUP, ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
#: The files that hold a limit: version 1 of cgroups has a tree for each controller.
V1, V2 = ("memory", "memory.limit_in_bytes"), ("", "memory.max")


def available(group: Path = GROUP, root: Path = ROOT) -> float:
    """Bytes: those of the machine, or the least limit of the process's cgroups.

    `group` is the file that names the process's cgroups, `root` where they are mounted.
    """
    return min([_machine(), *_limits(group, root)])


def _limits(group: Path, root: Path) -> Iterator[float]:
    """Those of the process's own cgroup and of all above it."""
    for tree, file, path in _memberships(group):
        parts = PurePosixPath(path).parts[1:]
        # A path out of the mounted tree leads nowhere; what is mounted is the limit.
        parts = () if ".." in parts else parts
        for depth in range(len(parts) + 1):
            found = root.joinpath(tree, *parts[:depth], file)
            try:
                yield float(found.read_text())
            except (OSError, ValueError):
                # No such file, as where the container's own is the root; or "max".
                continue


def _memberships(group: Path) -> Iterator[tuple[str, str, str]]:
    """Tree, file and path of the cgroups that may limit memory."""
    try:
        lines = group.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield *V2, path
        elif "memory" in controllers.split(","):
            yield *V1, path


def _machine() -> float:
    """The machine's own, infinite where it does not tell."""
    if not hasattr(os, "sysconf"):
        return math.inf
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
