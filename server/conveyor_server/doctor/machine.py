"""Checks of the machine and of what is installed on it. Only the standard library is needed."""

import ctypes
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Final

from conveyor.install import install_command
from conveyor_server.clock import SystemClock
from conveyor_server.doctor.finding import Finding, fail, ok, warn

PYTHON_MIN: Final = (3, 11)
NEEDED_EXTRA: Final = "server"
SPARE_FILES: Final = 256
"""Descriptors for everything but streams: models, logs, the metrics' readers."""
TICK_SECONDS_MAX: Final = 0.001
"""A coarser clock would blur what the metrics measure."""
UNSYNCHRONISED: Final = 5
"""What adjtimex returns for a clock that nobody keeps right."""
_REQUIREMENT: Final = re.compile(r"^([\w.-]+)(?:\[[^\]]*\])?[^>=]*(?:[>=]=\s*([\d.]+))?")


def check_versions() -> Iterator[Finding]:
    """Whether what the server needs is installed, and new enough."""
    python = platform.python_version()
    if sys.version_info < PYTHON_MIN:
        needed = ".".join(map(str, PYTHON_MIN))
        yield fail("versions", f"Python {python}", f"install Python {needed} or newer")
    found = [f"conveyor {metadata.version('conveyor')}", f"Python {python}"]
    problems: list[str] = []
    for name, minimum in requirements():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            problems.append(f"{name} is not installed")
            continue
        found.append(f"{name} {version}")
        if _numbers(version) < _numbers(minimum):
            problems.append(f"{name} {version} is older than {minimum}")
    for problem in problems:
        yield fail("versions", problem, install_command(NEEDED_EXTRA))
    if not problems:
        yield ok("versions", ", ".join(found))


def requirements() -> list[tuple[str, str]]:
    """The packages that a server needs, with their least versions; "" where any will do."""
    needed: list[tuple[str, str]] = []
    for line in metadata.requires("conveyor") or ():
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", marker)
        parsed = _REQUIREMENT.match(requirement.strip())
        if parsed is not None and (extra is None or extra[1] == NEEDED_EXTRA):
            needed.append((parsed[1], parsed[2] or ""))
    return needed


def _numbers(version: str) -> tuple[int, ...]:
    """Of a release: 2.13.0+cpu -> (2, 13, 0)."""
    release = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in release[0].split(".")) if release else ()


def check_files(streams_max: int) -> Iterator[Finding]:
    """Whether as many connections can be open as streams are allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = streams_max + SPARE_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        yield ok("files", f"{soft} descriptors, {needed} are enough for every stream allowed")
        return
    how = f"`ulimit -n {needed}`, LimitNOFILE= of systemd or `ulimits` of compose"
    yield warn(
        "files",
        f"{soft} descriptors at once (at most {hard}), and limits.streams_max allows"
        f" {streams_max} streams, each of which may have a connection of its own",
        f"raise the limit with {how}, or lower limits.streams_max",
    )


def check_clock() -> Iterator[Finding]:
    """Whether the clocks are usable: one counts leases, the other is shown to people."""
    resolution = time.get_clock_info("monotonic").resolution
    if resolution > TICK_SECONDS_MAX:
        yield warn(
            "clock",
            f"the monotonic clock moves in steps of {resolution} s",
            "times in metrics are no finer; use another clock source of the kernel",
        )
    installed = Path(__file__).stat().st_mtime
    wall = SystemClock().wall()
    if wall < installed:
        yield fail(
            "clock",
            f"the wall clock is {installed - wall:.0f} s before this software was installed",
            "set it, and let NTP keep it",
        )
    elif clock_state() == UNSYNCHRONISED:
        yield warn(
            "clock",
            "the kernel does not know of anything that keeps the wall clock right",
            "run chrony, systemd-timesyncd or ntpd; leases do not depend on it, but the times in"
            " logs, traces and answers do",
        )
    else:
        yield ok("clock", "monotonic and wall clock are usable")


def clock_state() -> int:
    """What the kernel says of the wall clock; 0 where it cannot be asked."""
    try:
        adjtimex = ctypes.CDLL(None, use_errno=True).adjtimex
    except (AttributeError, OSError):  # not Linux
        return 0
    # A struct timex with no mode set changes nothing; it takes 208 bytes on 64 bits.
    return int(adjtimex(ctypes.create_string_buffer(512)))


def cores() -> float:
    """Processors that this process may use, by affinity and by its control group."""
    available = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    quota = _read(Path("/sys/fs/cgroup/cpu.max")).split()
    if len(quota) == 2 and quota[0].isdecimal():
        available = min(available, int(quota[0]) / int(quota[1]))
    return available


def memory_bytes() -> int | None:
    """Bytes that this process may still take, or None where that cannot be told."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _read(Path("/proc/meminfo")), re.MULTILINE)
    if found is None:
        return None
    available = int(found[1]) * 1024
    limit = _read(Path("/sys/fs/cgroup/memory.max")).strip()
    used = _read(Path("/sys/fs/cgroup/memory.current")).strip()
    if limit.isdecimal() and used.isdecimal():
        available = min(available, int(limit) - int(used))
    return available


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""
