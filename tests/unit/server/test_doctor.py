"""The doctor: each of its checks on machines and configurations that are well and that are not."""

import json
import re
import resource
import socket
import time
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch

from conveyor.install import install_command
from conveyor_server.config import Config, load_config
from conveyor_server.core import ModelInfo
from conveyor_server.doctor import Finding, Status, examine, machine, service, speed, worst
from conveyor_server.doctor.finding import fail, ok, warn
from conveyor_server.doctor.report import show
from conveyor_server.engine.devices import Choice
from tests.integration.bundles import TINY, add_model
from tests.support.models import ATTENTIVE, BOTHWAYS, FEATURES

CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBbTCCAROgAwIBAgIUYyWLooK2xOI1hVLFKtvzhqNjN4AwCgYIKoZIzj0EAwIw
DDEKMAgGA1UEAwwBeDAeFw0yNjExMjQyMDI3NTJaFw0yNjExMjcyMDI3NTJaMAwx
CjAIBgNVBAMMAXgwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAASu+uC18EnK9w0i
gdyRXc3bfRvHDVUYpQIwpTXW0tQjt+6IxBy/DDaWjbJj7AWHir4KaHhlaR+x8MDo
uhHB2T53o1MwUTAdBgNVHQ4EFgQUXM0zFM5YsUsRNoIlf8dO/QcuI58wHwYDVR0j
BBgwFoAUXM0zFM5YsUsRNoIlf8dO/QcuI58wDwYDVR0TAQH/BAUwAwEB/zAKBggq
hkjOPQQDAgNIADBFAiEA2Yot8guMPSqmpwuZrdySEFPZI6uhxtpvyr1+m4ZU2ssC
IAcJxVX+X7dT+w1s1PwnWpOcyDhoU/5ssOioe1rt+CC2
-----END CERTIFICATE-----
"""
ENCRYPTED_KEY = """\
-----BEGIN ENCRYPTED PRIVATE KEY-----
MIHjME4GCSqGSIb3DQEFDTBBMCkGCSqGSIb3DQEFDDAcBAjYwATPuWYSRQICCAAw
DAYIKoZIhvcNAgkFADAUBggqhkiG9w0DBwQIe77lCYaKvoMEgZD+jQo7IPrMvu2Q
qV5SYvJJjMHjn/hVJKDImYbWN5Bb62SNMnYTdSDGbMeZilQjTqCBEXjS+Uu8ZFrx
Fc79F1rS1cL7cxWPZApcwksl/2v4eanB2T5MBjgfJLuj9lj7P4U70X2bMx0zBF6v
kIMJJSwbkBn34K1XBhZOfuHPqy1h1X7XCgOCEDWGWsgHLTPLIC0=
-----END ENCRYPTED PRIVATE KEY-----
"""
"""Of nothing but this test."""
FREE = {"listen.address": "127.0.0.1:0", "listen.metrics_address": "127.0.0.1:0"}


def config(**settings: object) -> Config:
    """`listen__address` is written for `listen.address`."""
    flags = {name.replace("__", "."): str(value) for name, value in settings.items()}
    return load_config(flags={"engine.device": "cpu", **FREE, **flags})


def only(findings: Iterable[Finding]) -> Finding:
    (finding,) = findings
    return finding


@pytest.fixture
def taken() -> Iterator[str]:
    """An address that somebody listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    add_model(tmp_path, "tiny", TINY)
    return tmp_path


def findings(repository: Path, **settings: object) -> list[Finding]:
    flags = {name.replace("__", "."): str(value) for name, value in settings.items()}
    fixed = {"engine.device": "cpu", "models.folder": str(repository), **FREE}
    return list(examine(None, fixed | flags))


# --- as a whole ----------------------------------------------------------------------------------


def test_every_check_is_made(repository: Path) -> None:
    found = findings(repository)
    assert worst(found) is not Status.FAIL, found
    assert {finding.check for finding in found} == {
        "versions", "configuration", "files", "clock", "store", "ports", "device", "models",
        "memory", "speed",
    }  # fmt: skip
    for finding in found:
        assert bool(finding.advice) == (finding.status is not Status.OK), finding


def test_a_configuration_that_cannot_be_read_ends_it_with_every_problem() -> None:
    found = list(examine(None, {"engine.slots": "0", "limits.sesions_max": "3"}))
    problems = [finding for finding in found if finding.check == "configuration"]
    assert [finding.status for finding in problems] == [Status.FAIL] * 2
    assert found[-2:] == problems
    assert any("engine.slots" in finding.found for finding in problems)
    assert any("sessions_max" in finding.found for finding in problems)  # the guess


def test_a_check_that_breaks_is_told_and_the_others_are_made(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Config) -> Iterator[Finding]:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(service, "check_ports", broken)
    found = findings(repository)
    (ports,) = [finding for finding in found if finding.check == "ports"]
    assert ports.status is Status.WARN
    assert "ZeroDivisionError: by zero" in ports.found
    assert found[-1].check == "speed"


# --- the machine ---------------------------------------------------------------------------------


def test_the_requirements_are_those_of_the_server_and_no_other_extra() -> None:
    needed = dict(machine.requirements())
    assert {"grpcio", "protobuf", "torch", "pydantic-settings"} <= set(needed)
    assert not {"pytest", "onnx", "opentelemetry-sdk", "mkdocs"} & set(needed)
    assert all(needed.values())


def test_what_is_installed_is_new_enough() -> None:
    finding = only(machine.check_versions())
    assert finding.status is Status.OK
    assert f"torch {metadata.version('torch')}" in finding.found


@pytest.mark.parametrize("version", ["1.84.9", "1.9", "0.99.0+cpu"])
def test_an_older_package_fails(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "requirements", lambda: [("thing", "1.85.1")])
    installed = metadata.version("conveyor")
    versions = {"thing": version, "conveyor": installed}
    monkeypatch.setattr(metadata, "version", versions.__getitem__)
    finding = only(machine.check_versions())
    assert finding.status is Status.FAIL
    assert f"thing {version} is older than 1.85.1" in finding.found
    assert finding.advice == install_command("server")


@pytest.mark.parametrize("version", ["1.85.1", "1.85.1+cpu", "1.100", "2.0rc1"])
def test_a_newer_package_does_not(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "requirements", lambda: [("thing", "1.85.1")])
    versions = {"thing": version, "conveyor": "1"}
    monkeypatch.setattr(metadata, "version", versions.__getitem__)
    assert only(machine.check_versions()).status is Status.OK


def test_a_missing_package_fails_and_nothing_else_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "requirements", lambda: [("absent-thing", "1")])
    found = list(examine(None, {"engine.slots": "wrong"}))
    assert [finding.found for finding in found] == ["absent-thing is not installed"]


@pytest.mark.parametrize(
    ("soft", "status"),
    [(999 + 256, Status.WARN), (1000 + 256, Status.OK), (resource.RLIM_INFINITY, Status.OK)],
)
def test_file_descriptors(soft: int, status: Status, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, soft))
    finding = only(machine.check_files(streams_max=1000))
    assert finding.status is status
    assert ("ulimit -n 1256" in finding.advice) == (status is Status.WARN)


@pytest.mark.parametrize(
    ("state", "offset_seconds", "status"),
    [(0, 0, Status.OK), (machine.UNSYNCHRONISED, 0, Status.WARN), (0, -1e9, Status.FAIL)],
)
def test_the_clock(
    state: int, offset_seconds: float, status: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    monkeypatch.setattr(machine, "clock_state", lambda: state)
    monkeypatch.setattr(machine.SystemClock, "wall", lambda self: now + offset_seconds)
    assert only(machine.check_clock()).status is status


def test_a_coarse_clock_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    class Coarse:
        resolution = 0.016

    monkeypatch.setattr(time, "get_clock_info", lambda _: Coarse)
    monkeypatch.setattr(machine, "clock_state", lambda: 0)
    first, _ = machine.check_clock()
    assert first.status is Status.WARN
    assert "0.016" in first.found


def test_asking_the_kernel_for_the_state_of_its_clock_changes_nothing() -> None:
    assert 0 <= machine.clock_state() <= machine.UNSYNCHRONISED


def test_there_are_cores_and_memory() -> None:
    assert machine.cores() > 0
    available = machine.memory_bytes()
    assert available is None or available > 0


# --- the configuration ---------------------------------------------------------------------------


def test_a_server_on_loopback_need_not_know_its_callers() -> None:
    for address in ("127.0.0.1:1", "localhost:1", "[::1]:1", "127.8.8.8:1"):
        assert not list(service.check_exposure(config(listen__address=address)))


def test_a_server_that_is_open_to_everybody_is_warned_of() -> None:
    found = list(service.check_exposure(config(listen__address="0.0.0.0:1")))
    assert [finding.status for finding in found] == [Status.WARN] * 2
    assert "auth.tokens" in found[0].found
    assert "tls" in found[1].advice


def test_tls_files_have_to_be_there_and_to_belong_together(tmp_path: Path) -> None:
    files = {"tls_certificate_file": tmp_path / "chain.pem", "tls_key_file": tmp_path / "key.pem"}
    settings = {f"listen__{name}": file for name, file in files.items()}
    assert "chain.pem: no such file" in only(service.check_exposure(config(**settings))).found
    for file in files.values():
        file.write_text("not a certificate")
    finding = only(service.check_exposure(config(**settings)))
    assert finding.status is Status.FAIL
    assert "holds no certificate in PEM" in finding.found
    assert "PEM" in finding.advice


def test_a_key_with_a_passphrase_is_refused_and_nobody_is_asked_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    certificate.write_text(CERTIFICATE)
    key.write_text(ENCRYPTED_KEY)
    settings = {"listen__tls_certificate_file": certificate, "listen__tls_key_file": key}
    finding = only(service.check_exposure(config(**settings)))
    assert finding.status is Status.FAIL
    assert "key.pem is encrypted" in finding.found


def test_a_promise_that_is_not_verified_is_warned_of() -> None:
    finding = only(service.check_exposure(config(engine__verify_same_bits=False)))
    assert finding.status is Status.WARN


def test_tracing_without_its_extra_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = config(tracing__endpoint="http://127.0.0.1:4317")
    assert not list(service.check_exposure(traced))
    monkeypatch.setattr(service.importlib.util, "find_spec", lambda _: None)
    finding = only(service.check_exposure(traced))
    assert finding.status is Status.FAIL
    assert install_command("otel") in finding.advice


# --- ports, store, device ------------------------------------------------------------------------


def test_a_free_port_is_well_and_stays_free(taken: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    for _ in range(2):
        found = list(service.check_ports(config(listen__address=address)))
        assert [finding.status for finding in found] == [Status.OK] * 2


def test_a_port_in_use_may_be_the_servers_own(taken: str) -> None:
    found = list(service.check_ports(config(listen__metrics_address=taken)))
    assert [finding.status for finding in found] == [Status.OK, Status.WARN]
    assert taken in found[1].found


def test_one_port_is_not_enough_for_calls_and_metrics() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    settings = config(listen__address=address, listen__metrics_address=address)
    calls, metrics = service.check_ports(settings)
    assert (calls.status, metrics.status) == (Status.OK, Status.FAIL)
    assert worst(service.check_ports(config())) is Status.OK  # each a free port of its own


def test_an_address_of_another_machine_fails() -> None:
    # Kept for documentation, so no machine's own.
    found = list(service.check_ports(config(listen__address="192.0.2.1:50051")))
    assert [finding.status for finding in found] == [Status.FAIL, Status.OK]


def test_metrics_may_be_off() -> None:
    found = list(service.check_ports(config(listen__metrics_address="")))
    assert [finding.status for finding in found] == [Status.OK] * 2


def test_the_ready_file_needs_its_folder(tmp_path: Path) -> None:
    assert only(service.check_store(config(listen__ready_file=tmp_path / "r"))).status is Status.OK
    _, finding = service.check_store(config(listen__ready_file=tmp_path / "absent" / "r"))
    assert finding.status is Status.FAIL


def test_a_device_that_is_not_there_fails_once() -> None:
    absent = config(engine__device="cuda:63")
    assert only(service.check_device(absent)).status is Status.FAIL
    assert not list(service.check_models(absent, []))
    assert not list(service.check_memory(absent, []))
    assert not list(speed.check_speed(absent, [FEATURES]))


def test_more_threads_than_cores_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "cores", lambda: 1.5)
    assert only(service.check_device(config(engine__cpu_threads=1))).status is Status.OK
    _, finding = service.check_device(config(engine__cpu_threads=2))
    assert finding.status is Status.WARN
    assert "1.5 cores" in finding.found


def test_a_device_that_torch_does_not_use_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(service, "NVIDIA_DEVICE", tmp_path)
    _, finding = service.check_device(config(engine__device="auto"))
    assert finding.status is Status.WARN
    assert only(service.check_device(config(engine__device="cpu"))).status is Status.OK


def test_a_cuda_device_that_cannot_be_used_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = Choice(torch.device("cpu"), "its compute capability is 6.1")
    monkeypatch.setattr("conveyor_server.engine.about.find_device", lambda _: cpu)
    monkeypatch.setattr(service, "NVIDIA_DEVICE", Path("/"))
    _, finding = service.check_device(config(engine__device="auto"))
    assert finding.status is Status.WARN
    assert "capability is 6.1" in finding.found


# --- speed ---------------------------------------------------------------------------------------


def test_the_speed_of_one_session_and_of_many_is_measured(repository: Path) -> None:
    add_model(repository, "larger", TINY | {"layers": [{"cell": "lstm", "size": 50}]})
    models: list[service.Model] = []
    assert all(service.check_models(config(models__folder=repository), models))
    infos = [model.info for model in models]
    finding = only(speed.check_speed(config(models__folder=repository), infos))
    assert finding.status is Status.OK
    assert re.fullmatch(
        r"larger 1, steps a second: cpu [\d,]+ with one session, [\d,]+ with 64",
        finding.found,
    )


def test_without_a_model_that_can_be_stepped_nothing_is_measured() -> None:
    assert not list(speed.check_speed(config(), [BOTHWAYS]))


@pytest.mark.parametrize(
    ("cuda", "status", "said"),
    [
        ((100.0, 100.0), Status.WARN, "set engine.device = cpu: it is faster with both"),
        ((100.0, 9_000.0), Status.OK, "where one session is stepped at once, engine.device = cpu"),
        ((900.0, 100.0), Status.OK, "where 64 sessions are stepped at once, engine.device = cpu"),
        ((900.0, 9_000.0), Status.OK, "cuda:0 900 with one session, 9,000 with 64; cpu 800 with"),
    ],
)
def test_the_faster_device_is_advised(cuda: tuple[float, float], status: Status, said: str) -> None:
    measured = {"cuda:0": dict(zip((1, 64), cuda, strict=True)), "cpu": {1: 800.0, 64: 5_000.0}}
    finding = speed.judge("tiny 1", measured)
    assert finding.status is status
    assert said in f"{finding.found} {finding.advice}"


# --- models and memory ---------------------------------------------------------------------------


def test_a_sound_model_passes_the_probe(repository: Path) -> None:
    models: list[service.Model] = []
    finding = only(service.check_models(config(models__folder=repository), models))
    assert finding.status is Status.OK
    assert finding.found.startswith("tiny 1: same bits")
    assert [model.info.key.name for model in models] == ["tiny"]


def test_a_damaged_model_fails_and_the_others_are_looked_at(repository: Path) -> None:
    add_model(repository, "damaged", TINY)
    (weights,) = (repository / "damaged").rglob("weights.safetensors")
    weights.write_bytes(b"nothing")
    found = list(service.check_models(config(models__folder=repository), []))
    assert [finding.status for finding in found] == [Status.FAIL, Status.OK]
    assert "damaged" in found[0].found


def test_a_model_that_keeps_no_promise_here_fails(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conveyor_server.engine.engine.same_bits", lambda *_: False)
    unverified = config(models__folder=repository, engine__verify_same_bits=False)
    found = list(service.check_models(unverified, []))
    assert {finding.status for finding in found} == {Status.FAIL}
    assert any("rows depend on the batch" in finding.found for finding in found)


def test_slower_kernels_are_warned_of(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.TorchEngine, "fastest_kernels", "faster-ones")
    finding = only(service.check_models(config(models__folder=repository), []))
    assert finding.status is Status.WARN
    assert "the faster ones (faster-ones) do not give the same bits" in finding.found


@pytest.mark.parametrize("folder", ["absent", "empty"])
def test_without_a_model_it_fails(folder: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    found = list(service.check_models(config(models__folder=tmp_path / folder), []))
    assert worst(found) is Status.FAIL


def test_what_the_limits_allow_has_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    info: ModelInfo = FEATURES
    pools = 10 * info.carry_bytes
    settings = {
        "engine__slots": 10,
        "limits__host_state_bytes_max": 5000,
        "limits__held_results_total_bytes_max": 2000,
        "limits__inbox_bytes_max": 1024,
    }
    models = [service.Model(info, "kernels")]
    exactly = 5000 + 2000 + 1024 + pools
    monkeypatch.setattr(service, "memory_bytes", lambda: exactly)
    assert only(service.check_memory(config(**settings), models)).status is Status.OK
    monkeypatch.setattr(service, "memory_bytes", lambda: exactly - 1)
    finding = only(service.check_memory(config(**settings), models))
    assert finding.status is Status.WARN
    assert "limits.host_state_bytes_max" in finding.advice
    monkeypatch.setattr(service, "memory_bytes", lambda: None)
    assert only(service.check_memory(config(**settings), models)).status is Status.OK


def test_what_may_be_attended_over_counts_where_a_model_attends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = config(limits__memories_bytes_max=2**60)
    monkeypatch.setattr(service, "memory_bytes", lambda: 2**59)
    without = service.check_memory(settings, [service.Model(FEATURES, "kernels")])
    assert only(without).status is Status.OK
    finding = only(service.check_memory(settings, [service.Model(ATTENTIVE, "kernels")]))
    assert finding.status is Status.WARN
    assert "limits.memories_bytes_max" in finding.advice


# --- the report ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "status", "well"),
    [
        ([ok("a", "b")], "ok", True),
        ([ok("a", "b"), warn("c", "d", "e")], "warn", True),
        ([fail("f", "g", "h"), warn("c", "d", "e")], "fail", False),
    ],
)
def test_the_report_says_all_of_it_in_both_forms(
    found: list[Finding], status: str, well: bool
) -> None:
    said: list[str] = []
    assert show(found, as_json=True, say=said.append) is well
    (text,) = said
    report = json.loads(text)
    assert report["status"] == status
    assert [check["check"] for check in report["checks"]] == [finding.check for finding in found]
    said.clear()
    assert show(found, as_json=False, say=said.append) is well
    page = "\n".join(said)
    for finding in found:
        assert finding.found in page
        assert finding.advice in page
    failed = sum(finding.status is Status.FAIL for finding in found)
    assert said[-1].startswith(f"{failed} failed, ")
