"""The number of processors that this process may use, and thus of workers that it starts."""

from __future__ import annotations

import os
from pathlib import Path

MOST_WORKERS = 16  # more do not help a single GPU


def usable_processors(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """Number of processors that this process may use: those of its affinity, or fewer if its control group limits it.

    A container that may use two of 64 processors is such a group. Both versions of Linux's control groups are handled.

    Args:
        proc, root: where Linux describes the groups.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        groups = [line.split(":", 2) for line in proc.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return allowed
    for _, controllers, path in groups:
        if not controllers or "cpu" in controllers.split(","):
            # the limits of parent groups apply too; in a container only these may be visible
            names = Path(path.lstrip("/")).parts
            for count in range(len(names) + 1):
                for hierarchy in ("", controllers, "cpu"):  # `cpu` may be a link, or the only name
                    allowed = min(allowed, _quota(root.joinpath(hierarchy, *names[:count])) or allowed)
    return allowed


def _quota(group: Path) -> int | None:
    """Whole processors within a control group's quota, at least one; None if it has no quota."""
    try:
        if (group / "cpu.max").is_file():
            quota, period = (group / "cpu.max").read_text(encoding="utf-8").split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text(encoding="utf-8") for name in ("quota", "period"))
        return max(1, int(quota) // int(period)) if int(quota) > 0 else None
    except (OSError, ValueError):  # no such file; "max"
        return None


def default_workers() -> int:
    """Default number of workers: the usable processors, divided among the processes that torchrun started here."""
    return max(1, min(MOST_WORKERS, usable_processors() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
