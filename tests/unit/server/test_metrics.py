"""The metrics page."""

import re

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from conveyor_server.app import App
from conveyor_server.config import load_config
from conveyor_server.metrics import Counter, Histogram, Metrics
from tests.support.models import FEATURES
from tests.support.replies import Recorder
from tests.support.rig import Rig

# Section 10 of the design, less what needs a store or a device.
NAMES = re.findall(r"\w+", """
grpc_server_started_total grpc_server_handled_total grpc_server_msg_received_total
grpc_server_msg_sent_total grpc_server_handling_seconds
conveyor_steps_total conveyor_step_seconds conveyor_queue_seconds conveyor_tick_seconds
conveyor_tick_sessions conveyor_tick_steps conveyor_sessions conveyor_sessions_ended_total
conveyor_slots conveyor_state_bytes conveyor_page_ins_total conveyor_page_outs_total
conveyor_resumes_total conveyor_duplicate_steps_total conveyor_rejected_total
""")  # fmt: skip
LABELS = {"model", "version", "state", "tier", "reason", "outcome", "le", "generation"} | {
    "grpc_type", "grpc_service", "grpc_method", "grpc_code",
}  # fmt: skip
SECRET = "session-that-must-not-be-shown"


def page(metrics: Metrics) -> str:
    return generate_latest(metrics.registry).decode()


def samples(metrics: Metrics) -> dict[str, float]:
    """The samples without the buckets, name and labels -> value."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(page(metrics)):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_every_metric_of_the_design_is_on_the_page() -> None:
    text = page(App(load_config(flags={"engine.device": "cpu"}))._metrics)
    declared = set(re.findall(r"^# TYPE (\w+) ", text, re.MULTILINE))
    assert set(NAMES) <= declared, sorted(set(NAMES) - declared)
    for name in declared:
        assert re.search(rf"^# HELP {name} \S.*\.$", text, re.MULTILINE) or name.startswith(
            ("process_", "python_")
        ), name


def test_no_label_could_hold_a_session_or_a_principal() -> None:
    rig = Rig(slots=1)
    principal = "principal-that-must-not-be-shown"
    for name in (SECRET, "other"):
        rig.open(name, principal=principal)
        rig.step(name, 1, [1, 2], principal=principal)
    rig.step("other", 1, [1, 2], principal=principal)
    rig.open("other", Recorder(), principal=principal)
    rig.close("other", principal=principal)
    text = page(rig.metrics)
    assert "must-not-be-shown" not in text
    for family in text_string_to_metric_families(text):
        if family.name.startswith("conveyor"):
            assert all(set(sample.labels) <= LABELS for sample in family.samples), family.name


def test_what_happened_is_counted() -> None:
    rig = Rig(slots=1, quantum_steps=2)
    for name in "ab":
        rig.open(name)
        rig.clock.advance(0.5)
        rig.step(name, 1, [1, 2, 3])
    rig.step("b", 2, [2, 3])
    rig.open("b")
    rig.close("b")
    found = samples(rig.metrics)
    model = rig.model.key.name
    assert found[f"conveyor_steps_total{{model={model}}}"] == 6
    assert found[f"conveyor_tick_steps_sum{{model={model}}}"] == 6
    assert found[f"conveyor_tick_sessions_count{{model={model}}}"] == 4
    assert found[f"conveyor_tick_seconds_count{{model={model}}}"] == 4
    assert found[f"conveyor_step_seconds_count{{model={model}}}"] == 3
    assert found[f"conveyor_queue_seconds_count{{model={model}}}"] == 2
    assert found[f"conveyor_duplicate_steps_total{{model={model}}}"] == 2
    assert found[f"conveyor_page_outs_total{{model={model}}}"] == 1
    assert found["conveyor_resumes_total{outcome=claimed}"] == 1
    assert found["conveyor_sessions_ended_total{reason=closed}"] == 1


def test_a_histogram_counts_up_to_and_including_each_bound() -> None:
    histogram = Histogram("h", "Help.", (1, 2), ("model",))
    for value in (0.5, 1, 1.5, 2, 3):
        histogram.observe(value, "m")
    values = {
        sample.labels.get("le", sample.name): sample.value for sample in histogram.collect().samples
    }
    assert values == {"1.0": 2, "2.0": 4, "+Inf": 5, "h_count": 5, "h_sum": 8}


def test_a_page_read_between_the_parts_of_an_observation_is_whole() -> None:
    histogram = Histogram("h", "Help.", (1, 2), ("model",))

    class Scraped(dict[tuple[str, ...], list[int]]):
        def __setitem__(self, labels: tuple[str, ...], counts: list[int]) -> None:
            super().__setitem__(labels, counts)
            histogram.collect()  # as another thread might, just now

    histogram._counts = Scraped()
    histogram.observe(1, "m")
    assert {sample.name for sample in histogram.collect().samples} >= {"h_count", "h_sum"}


def test_a_page_read_while_a_model_is_dropped_goes_without_it() -> None:
    app = App(load_config(flags={"engine.device": "cpu"}))
    app._models.add(FEATURES)  # and the engine has it no more
    assert "conveyor_slots{" not in page(app._metrics)


def test_a_counter_without_labels_is_there_from_the_beginning() -> None:
    counter = Counter("c", "Help.")
    assert [sample.value for sample in counter.collect().samples] == [0]
    counter.add(2)
    counter.add()
    assert counter.total() == 3


def test_a_gauge_is_read_when_the_page_is() -> None:
    metrics, values = Metrics(), {"a": 1.0}
    metrics.gauge(
        "conveyor_things", "Things.", ("state",), lambda: [((k,), v) for k, v in values.items()]
    )
    assert samples(metrics)["conveyor_things{state=a}"] == 1
    values["a"] = 5.0
    assert samples(metrics)["conveyor_things{state=a}"] == 5


def test_a_label_with_every_awkward_character_keeps_the_page_readable() -> None:
    metrics = Metrics()
    awkward = 'a"b\\c\nd'
    metrics.steps.add(3, awkward)
    family = next(
        each
        for each in text_string_to_metric_families(page(metrics))
        if each.name == "conveyor_steps"
    )
    assert [(sample.labels["model"], sample.value) for sample in family.samples] == [(awkward, 3)]


@pytest.mark.parametrize("name", NAMES)
def test_names_end_in_their_unit_or_in_what_they_count(name: str) -> None:
    endings = ("_total", "_seconds", "_bytes", "_sessions", "_steps", "_slots")
    assert name.endswith(endings)
