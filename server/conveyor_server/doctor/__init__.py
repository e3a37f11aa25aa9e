"""`conveyor-server doctor`: would a server start here and do well, and if not, what to do.

Nothing is changed and nothing stays: files are read, ports bound and let go, models loaded and
dropped.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from conveyor_server.doctor.finding import Finding, Status, fail, ok, warn, worst
from conveyor_server.doctor.machine import check_clock, check_files, check_versions

__all__ = ["Finding", "Status", "examine", "worst"]


def examine(config_file: Path | None, flags: Mapping[str, str]) -> Iterator[Finding]:
    """Makes every check that can be made, and tells what it found as it goes.

    Args:
        config_file: As `conveyor-server serve` is given it.
        flags: `section.key` -> value, as there.
    """
    versions = list(_guarded("versions", check_versions))
    yield from versions
    if worst(versions) is Status.FAIL:
        return  # what the other checks are made with is not there
    yield from _examine_service(config_file, flags)


def _examine_service(config_file: Path | None, flags: Mapping[str, str]) -> Iterator[Finding]:
    # They need the packages that were looked for just now.
    from conveyor_server.config import ConfigError, load_config  # noqa: PLC0415
    from conveyor_server.doctor import service, speed  # noqa: PLC0415

    try:
        config = load_config(config_file, flags)
    except ConfigError as error:
        for problem in str(error).splitlines():
            yield fail("configuration", problem, "correct it; every setting is in config.py")
        return
    yield ok("configuration", f"sound{f', from {config_file}' if config_file else ''}")
    yield from _guarded("configuration", lambda: service.check_exposure(config))
    yield from _guarded("files", lambda: check_files(config.limits.streams_max))
    yield from _guarded("clock", check_clock)
    yield from _guarded("store", lambda: service.check_store(config))
    yield from _guarded("ports", lambda: service.check_ports(config))
    yield from _guarded("device", lambda: service.check_device(config))
    models: list[service.Model] = []
    yield from _guarded("models", lambda: service.check_models(config, models))
    yield from _guarded("memory", lambda: service.check_memory(config, models))
    infos = [model.info for model in models]
    yield from _guarded("speed", lambda: speed.check_speed(config, infos))


def _guarded(check: str, findings: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """A check that breaks is a finding too, and the others go on."""
    try:
        yield from findings()
    except Exception as error:  # noqa: BLE001  whatever it is, it is told
        yield warn(
            check,
            f"could not be checked: {type(error).__name__}: {error}",
            "this is a mistake of the check: please report it",
        )
