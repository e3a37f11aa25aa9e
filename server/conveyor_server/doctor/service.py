"""Checks of the server as it is configured."""

import errno
import importlib.util
import ipaddress
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from conveyor.install import install_command
from conveyor.os_errors import os_error_text
from conveyor_models import BundleError
from conveyor_server.config import Config
from conveyor_server.core import ModelInfo
from conveyor_server.doctor.finding import Finding, fail, ok, warn
from conveyor_server.doctor.machine import cores, memory_bytes
from conveyor_server.engine.about import about_device
from conveyor_server.engine.devices import DeviceError, find_device
from conveyor_server.engine.engine import TorchEngine
from conveyor_server.engine.loader import load_repository
from conveyor_server.rpc.tls import TlsFilesError, read_authorities, read_pair

NVIDIA_DEVICE: Final = Path("/dev/nvidiactl")
GIB: Final = 2**30


@dataclass(frozen=True, slots=True)
class Model:
    """A model that would be served."""

    info: ModelInfo
    kernels: str


def check_exposure(config: Config) -> Iterator[Finding]:
    """Who reaches the server, and what its files let it do."""
    listen = config.listen
    if not _on_loopback(listen.address):
        if not config.auth.tokens:
            yield warn(
                "configuration",
                f"{listen.address} is open to anyone who can reach it: auth.tokens is empty",
                "give every caller a token, unless a proxy in front checks who calls",
            )
        if listen.tls_certificate_file is None:
            yield warn(
                "configuration",
                f"{listen.address} does not use TLS: tokens and inputs travel in clear text",
                "set listen.tls_certificate_file and listen.tls_key_file, unless a proxy ends TLS",
            )
    if listen.tls_certificate_file is not None and listen.tls_key_file is not None:
        yield _check_tls(listen.tls_certificate_file, listen.tls_key_file)
    if listen.tls_client_ca_file is not None:
        yield _check_client_ca(listen.tls_client_ca_file)
    if not config.engine.verify_same_bits:
        yield warn(
            "configuration",
            "engine.verify_same_bits is off: outputs may depend on what else is in a batch",
            "turn it on; it costs a moment for each model at the start",
        )
    if config.tracing.endpoint and importlib.util.find_spec("opentelemetry") is None:
        yield fail(
            "configuration",
            "tracing.endpoint is set and OpenTelemetry is not installed",
            f"{install_command('otel')}; or leave tracing.endpoint empty",
        )


def _on_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_tls(certificate: Path, key: Path) -> Finding:
    try:
        read_pair(certificate, key)
    except TlsFilesError as error:
        advice = "give a PEM chain and the private key that belongs to its first certificate"
        return fail("tls", str(error), advice)
    return ok("tls", f"{certificate} and its key belong together")


def _check_client_ca(ca: Path) -> Finding:
    try:
        read_authorities(ca)
    except TlsFilesError as error:
        return fail("tls", str(error), "give certificates in PEM")
    return ok("tls", f"clients need a certificate of an authority in {ca}")


def check_store(config: Config) -> Iterator[Finding]:
    """Where sessions are kept, and whether the files of a start can be written."""
    yield ok(
        "store",
        "sessions are kept in memory: a stop ends them, and paged-out carries may take"
        f" {_size(config.limits.host_state_bytes_max)}",
    )
    ready = config.listen.ready_file
    if ready is not None and not ready.parent.is_dir():
        yield fail(
            "store", f"listen.ready_file: there is no folder {ready.parent}", "make the folder"
        )


def check_ports(config: Config) -> Iterator[Finding]:
    """Whether the addresses can be listened on."""
    addresses = {
        "listen.address": config.listen.address,
        "listen.metrics_address": config.listen.metrics_address,
    }
    for setting, address in addresses.items():
        if not address:
            yield ok("ports", f"{setting} is empty: there are no metrics")
            continue
        if setting != "listen.address" and _same_port(address, config.listen.address):
            yield fail(
                "ports",
                f"{setting} {address} is the same as listen.address",
                f"set {setting} to another port",
            )
            continue
        problem = bind_problem(address)
        if problem is None:
            yield ok("ports", f"{setting} {address} is free")
        elif problem.errno == errno.EADDRINUSE:
            yield warn(
                "ports",
                f"{setting} {address} is in use",
                "fine if that is this server, running; else stop what listens there (`ss -ltnp`),"
                f" or set {setting} to another port",
            )
        else:
            yield fail(
                "ports",
                f"{setting} {address}: {os_error_text(problem)}",
                f"set {setting} to an address of this machine and a port that this user may bind",
            )


def _same_port(one: str, other: str) -> bool:
    """Whether two addresses are one; port 0 is a free port each time."""
    return one == other and one.rpartition(":")[2] != "0"


def bind_problem(address: str) -> OSError | None:
    """Why an address cannot be bound; None if it can."""
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        for family, kind, protocol, _, bound in found:
            with socket.socket(family, kind, protocol) as probe:
                # As a server does: a port that it left a moment ago is free.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(bound)
    except OSError as error:
        return error
    return None


def check_device(config: Config) -> Iterator[Finding]:
    """Whether the arithmetic has what it is to run on."""
    engine = config.engine
    try:
        report = about_device(engine.device)
    except DeviceError as error:
        yield fail(
            "device",
            str(error),
            "set engine.device to auto or cpu, or install the driver (see `nvidia-smi`) and the"
            " CUDA build of torch",
        )
        return
    build = f"CUDA {report.cuda_version}" if report.cuda_version else "CPU only"
    yield ok("device", f"{report.device} ({report.name}), torch {report.torch_version} ({build})")
    if report.passed_over:
        yield warn(
            "device",
            f"there is a CUDA device that cannot be used: {report.passed_over}",
            "install a build of torch that has kernels for it, or free its memory; until then"
            " engine.device = auto takes the CPU",
        )
    if report.kind == "cuda":
        return
    if engine.device == "auto" and not report.passed_over and NVIDIA_DEVICE.exists():
        advice = (
            "the driver is too old for it, see `nvidia-smi`"
            if report.cuda_version
            else "install a CUDA build of torch"
        )
        yield warn("device", "torch does not use the NVIDIA device of this machine", advice)
    available = cores()
    if engine.cpu_threads > available:
        yield warn(
            "device",
            f"engine.cpu_threads is {engine.cpu_threads}, but this machine has {available:g} cores",
            "lower it; outputs are bit-identical only for the same value, so do not change it"
            " later",
        )


def check_models(config: Config, models: list[Model]) -> Iterator[Finding]:
    """Loads every bundle and probes it for same bits, on this machine, as a server would.

    Those that pass are added to `models`.
    """
    try:
        device = find_device(config.engine.device).device
    except DeviceError:
        return  # the check of the device says so
    # As many slots as the probe of same bits runs at once; a whole pool is not needed for it.
    slots = min(config.engine.slots, config.engine.batch_sessions_max)
    engine = TorchEngine(device, cpu_threads=config.engine.cpu_threads, slots=slots)
    folder = config.models.folder
    try:
        found = load_repository(folder, engine, {}, config.limits)
    except BundleError as error:
        yield fail("models", str(error), "set models.folder to the repository of models")
        return
    for problem in found.problems:
        yield fail("models", problem, "correct the bundle or remove it; the others are served")
    if not found.loaded:
        yield fail("models", f"{folder} has no model that can be served", "put a bundle there")
    fastest = engine.fastest_kernels
    for loaded in found.loaded:
        key, kernels = loaded.info.key, loaded.runner.family.name
        models.append(Model(loaded.info, kernels))
        said = f"{key.name} {key.version}: same bits in any batch with {kernels}"
        if kernels != fastest:
            yield warn(
                "models",
                f"{said}; the faster ones ({fastest}) do not give the same bits here",
                "fine if it is fast enough; else try another processor or build of torch",
            )
        else:
            yield ok("models", said)


def check_memory(config: Config, models: list[Model]) -> Iterator[Finding]:
    """Whether what the limits allow fits in the machine."""
    limits, slots = config.limits, config.engine.slots
    pools = sum(model.info.carry_bytes * slots for model in models if model.info.streamable)
    parts = {
        "limits.host_state_bytes_max": limits.host_state_bytes_max,
        "limits.held_results_total_bytes_max": limits.held_results_total_bytes_max,
        "limits.inbox_bytes_max": limits.inbox_bytes_max,
    }
    memories = {}
    if any(model.info.memory_row_size for model in models):
        memories = {"limits.memories_bytes_max": limits.memories_bytes_max}
        parts |= memories
    try:
        report = about_device(config.engine.device)
    except DeviceError:
        return  # the check of the device says so
    if report.kind == "cuda":
        yield _fits("the device", {"engine.slots": pools} | memories, report.free_bytes)
    else:
        parts["engine.slots"] = pools
    available = memory_bytes()
    if available is None:
        yield ok("memory", f"the limits allow {_size(sum(parts.values()))} beside the models")
    else:
        yield _fits("the machine", parts, available)


def _fits(where: str, parts: dict[str, int], available: int) -> Finding:
    total = sum(parts.values())
    said = f"the limits allow {_size(total)}, {where} has {_size(max(available, 0))} of memory left"
    if total <= available:
        return ok("memory", said)
    shares = ", ".join(f"{name} {_size(size)}" for name, size in parts.items() if size)
    largest = max(parts, key=lambda name: parts[name])
    return warn(
        "memory",
        f"{said} ({shares})",
        f"lower {largest} first: at its limits the server would be killed, or refuse sessions",
    )


def _size(size_bytes: int) -> str:
    if size_bytes >= GIB:
        return f"{size_bytes / GIB:.1f} GiB"
    return f"{size_bytes / 2**20:.1f} MiB"
