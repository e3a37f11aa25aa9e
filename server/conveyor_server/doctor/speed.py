"""How fast steps are on the devices there are, and which of them is the one to choose."""

from collections.abc import Iterator, Mapping
from typing import Final

from conveyor_models import load_bundle, scan
from conveyor_server.config import Config
from conveyor_server.core import ModelInfo
from conveyor_server.doctor.finding import Finding, ok, warn
from conveyor_server.engine.devices import DeviceError, find_device
from conveyor_server.engine.speed import steps_per_second

ALONE: Final = 1
TOGETHER: Final = 64
SECONDS: Final = 0.2
"""Measured of each device with each number of sessions."""

Rates = Mapping[int, float]
"""Steps a second by the number of sessions that are stepped at once."""


def check_speed(config: Config, infos: list[ModelInfo]) -> Iterator[Finding]:
    """Measures the model with the largest step, on the device that is set and on the other one."""
    streamable = [info for info in infos if info.streamable]
    if not streamable:
        return
    try:
        chosen = find_device(config.engine.device).device
        other = find_device("cpu" if chosen.type == "cuda" else "auto").device
    except DeviceError:
        return  # the check of the device says so
    key = max(streamable, key=lambda info: info.step_multiply_adds).key
    (found,) = (
        each
        for each in scan(config.models.folder).bundles
        if (each.spec.name, each.spec.version) == (key.name, key.version)
    )
    bundle = load_bundle(found.path)
    measured: dict[str, Rates] = {
        str(device): {
            sessions: steps_per_second(
                bundle,
                device,
                cpu_threads=config.engine.cpu_threads,
                sessions=sessions,
                seconds=SECONDS,
            )
            for sessions in (ALONE, TOGETHER)
        }
        for device in dict.fromkeys((chosen, other))
    }
    yield judge(f"{key.name} {key.version}", measured)


def judge(model: str, measured: Mapping[str, Rates]) -> Finding:
    """What was measured, and what to do about it.

    Args:
        model: Its name.
        measured: By device, the chosen one first; there may be one only.
    """
    chosen, *others = measured
    figures = "; ".join(
        f"{device} {rates[ALONE]:,.0f} with one session, {rates[TOGETHER]:,.0f} with {TOGETHER}"
        for device, rates in measured.items()
    )
    said = f"{model}, steps a second: {figures}"
    if not others:
        return ok("speed", said)
    (other,) = others
    faster = [n for n in (ALONE, TOGETHER) if measured[other][n] > measured[chosen][n]]
    if len(faster) == 2:
        return warn("speed", said, f"set engine.device = {other}: it is faster with both")
    if not faster:
        return ok("speed", said)
    few = "one session is" if faster == [ALONE] else f"{TOGETHER} sessions are"
    return ok("speed", f"{said}; where {few} stepped at once, engine.device = {other} is faster")
