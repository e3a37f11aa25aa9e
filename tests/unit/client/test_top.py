"""Reading an exposition and summing it up."""

import http.server
import json
import math
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trustme
from typer.testing import CliRunner

from conveyor_client import TransportError
from conveyor_client.cli._app import app
from conveyor_client.cli._exposition import by_label, fetch, parse, quantile, total
from conveyor_client.cli._top import summarise


def exposition(scale: int) -> str:
    return f"""# HELP conveyor_steps_total Steps applied.
# TYPE conveyor_steps_total counter
conveyor_steps_total{{model="letters"}} {100.0 * scale}
conveyor_steps_total{{model="odd \\"name\\", {{so}}"}} 1.0
conveyor_tick_sessions_count{{model="letters"}} {10 * scale}
conveyor_tick_sessions_sum{{model="letters"}} {40 * scale}
conveyor_step_seconds_bucket{{le="0.001",model="letters"}} {50 * scale}
conveyor_step_seconds_bucket{{le="0.002",model="letters"}} {90 * scale}
conveyor_step_seconds_bucket{{le="+Inf",model="letters"}} {100 * scale}
conveyor_sessions{{state="idle"}} 3.0
conveyor_sessions{{state="active"}} 1.0
conveyor_slots{{model="letters",version="1",state="used"}} 4.0
conveyor_slots{{model="letters",version="1",state="free"}} 60.0
conveyor_slots{{model="letters",version="2",state="free"}} 64.0
conveyor_state_bytes{{tier="device"}} 4096.0
process_cpu_seconds_total 1.5e-1
not a sample at all
"""


def test_samples_are_parsed() -> None:
    samples = parse(exposition(1))
    assert total(samples, "process_cpu_seconds_total") == 0.15
    assert total(samples, "conveyor_steps_total") == 101
    assert total(samples, "conveyor_steps_total", model="letters") == 100
    assert total(samples, "absent") == 0
    assert by_label(samples, "conveyor_sessions", "state") == {"idle": 3, "active": 1}
    assert len(by_label(samples, "conveyor_steps_total", "model")) == 2


def test_quantiles_are_those_of_the_interval() -> None:
    before, after = parse(exposition(1)), parse(exposition(3))
    median = quantile(before, after, "conveyor_step_seconds", 0.5, model="letters")
    assert median == pytest.approx(0.001)
    assert quantile(before, after, "conveyor_step_seconds", 0.7) == pytest.approx(0.0015)
    assert quantile(before, after, "conveyor_step_seconds", 0.99) == pytest.approx(0.002)
    assert math.isnan(quantile(after, after, "conveyor_step_seconds", 0.5))
    assert math.isnan(quantile(before, after, "absent", 0.5))


def test_an_interval_is_summed_up() -> None:
    overview = summarise(parse(exposition(1)), parse(exposition(3)), seconds=2.0)
    assert overview.sessions == {"idle": 3, "active": 1}
    assert overview.state_bytes == {"device": 4096}
    letters = overview.models[0]
    assert letters.model == "letters"
    assert letters.steps_per_second == 100
    assert letters.ticks_per_second == 10
    assert letters.tick_sessions_mean == 4
    assert letters.step_ms_p50 == pytest.approx(1.0)
    assert letters.slots == {"used": 4, "free": 124}
    assert overview.models[1].tick_sessions_mean is None


@contextmanager
def metrics_of_a_server(context: ssl.SSLContext | None = None) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        scrapes = 0

        def do_GET(self) -> None:
            if self.path != "/metrics":
                self.send_error(404)
                return
            Handler.scrapes += 1
            self.send_response(200)
            self.end_headers()
            self.wfile.write(exposition(Handler.scrapes).encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture
def endpoint() -> Iterator[str]:
    with metrics_of_a_server() as address:
        yield address


def test_top_reads_an_endpoint(endpoint: str) -> None:
    arguments = ["top", "--once", "--interval", "0.05", "--metrics", endpoint]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "letters" in shown.stdout
    assert "sessions: idle 3  active 1" in shown.stdout
    told = CliRunner().invoke(app, [*arguments, "--json"])
    assert json.loads(told.stdout)["models"][0]["steps_per_second"] > 0


def test_an_endpoint_that_does_not_answer_is_told(endpoint: str) -> None:
    with pytest.raises(TransportError, match="404"):
        fetch(f"http://{endpoint}/elsewhere", 1.0)
    result = CliRunner().invoke(app, ["top", "--once", "--metrics", "127.0.0.1:1"])
    assert result.exit_code == 1
    assert "cannot reach 127.0.0.1:1: connection refused" in result.output


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:none", "127.0.0.1:99999", f"http://{'a' * 70}:9464", "http://"]
)
def test_what_is_no_address_of_metrics_is_told(url: str) -> None:
    result = CliRunner().invoke(app, ["top", "--once", "--metrics", url])
    assert result.exit_code == 1
    assert f"{url} is not an address of metrics; expected http://HOST:PORT" in result.output


def test_top_trusts_the_ca_of_an_endpoint_behind_tls(tmp_path: Path) -> None:
    authority, ca = trustme.CA(), tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(ca)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with metrics_of_a_server(context) as address:
        arguments = ["top", "--once", "--interval", "0.05", "--metrics", f"https://{address}"]
        shown = CliRunner().invoke(app, [*arguments, "--ca", str(ca)])
        assert shown.exit_code == 0, shown.output
        assert "letters" in shown.stdout
        refused = CliRunner().invoke(app, arguments)
        assert refused.exit_code == 1
        assert "certificate verify failed" in refused.output
