"""What the terminal shows of known traces."""

import io
import re

import numpy as np
import pytest
from rich.console import Console

from conveyor.v1 import model_pb2
from conveyor_client.cli._gates_lines import line_of
from conveyor_client.cli._gates_view import GatesView
from conveyor_client.cli._recording import Recording, symbol
from conveyor_client.cli._scales import scale_of
from tests.unit.client.fake.models import attention_weights, gate_values
from tests.unit.client.recordings import COUNTER, LOOKER, SUMMARY, record, speller


def drawn(
    recording: Recording, width: int = 80, height: int = 24, colours: str | None = None
) -> list[str]:
    """The lines of the view, colours and all."""
    console = Console(
        file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=colours
    )  # type: ignore[arg-type]
    console.print(GatesView(recording, "a title"), end="")
    out = console.file
    assert isinstance(out, io.StringIO)
    return out.getvalue().split("\n")


def line_with(lines: list[str], start: str) -> str:
    (found,) = [line for line in lines if line.startswith(start)]
    return found


def shades(values: np.ndarray, scheme: str) -> str:
    return "".join(scheme[min(int(value * 5), 4)] for value in values)


def test_letters_stand_above_the_steps_they_belong_to() -> None:
    recording = record(speller(), 7)
    lines = drawn(recording, height=8)
    assert lines[0].rstrip() == "a title"
    assert line_with(lines, "in").rstrip() == "in" + " " * 52 + "b␣c⏎$ab".rjust(7)
    assert line_with(lines, "out").rstrip().endswith("␣c⏎$ab␣")
    assert lines[3].split() == ["␣", "90%", *lines[3].split()[2:]]
    forget = line_with(lines, "f forget")
    middle = gate_values(0, "f", 1, 7, 3)[:, 1]
    assert forget[12:61] == shades(middle, " ░▒▓█").rjust(49)
    now = gate_values(0, "f", 7, 1, 3)[0]
    assert forget[61:].split() == [
        f"{now.mean():.2f}", f"{(now < 0.1).mean():.0%}", f"{(now > 0.9).mean():.0%}"
    ]  # fmt: skip
    assert [line[0] for line in lines[5:11]] == list("ifgoch")


def test_what_goes_below_zero_has_a_sign() -> None:
    lines = drawn(record(speller(), 20), height=8)
    values = gate_values(0, "g", 1, 20, 3)[:, 1]
    assert line_with(lines, "g candidate")[12:61] == shades((values + 1) / 2, "=- +#").rjust(49)


def test_only_the_newest_steps_are_shown() -> None:
    lines = drawn(record(speller(), 200), height=8)
    values = gate_values(0, "f", 152, 49, 3)[:, 1]
    assert line_with(lines, "f forget")[12:61] == shades(values, " ░▒▓█")


def test_a_high_terminal_shows_more_units() -> None:
    low, high = (drawn(record(speller(), 5), height=h) for h in (8, 40))
    assert len(high) > len(low)
    start = high.index(line_with(high, "f forget"))
    units = gate_values(0, "f", 1, 5, 3)
    for row, unit in enumerate([0, 1, 1, 2]):
        assert high[start + row][12:61] == shades(units[:, unit], " ░▒▓█").rjust(49)


@pytest.mark.parametrize("width", [8, 20, 40, 59, 60, 79, 80, 200])
@pytest.mark.parametrize("model", [COUNTER, LOOKER, speller()], ids=lambda model: model.name)
def test_no_line_is_wider_than_the_terminal(model: model_pb2.Model, width: int) -> None:
    lines = drawn(record(model, 300), width=width)
    assert all(len(line) == width for line in lines[:-1])
    gates = {"counter": "h", "looker": "rznhifgoch", "speller": "ifgoch"}[model.name]
    rows = "\n".join(lines)
    for gate in gates:
        assert re.search(rf"^{gate} ", rows, re.MULTILINE), gate


def test_features_are_named_and_the_attention_is_told() -> None:
    lines = drawn(record(LOOKER, 10), width=100)
    assert "left 10   right -0.01" in line_with(lines, "in")
    assert "left -2.303   right -0.1054" in line_with(lines, "out")
    assert "attention over 6 rows" in "".join(lines)
    row = int(np.argmax(attention_weights(10, 1, 6)))
    assert f"row {row}: 0.75" in line_with(lines, "looks at")


def test_colours_put_two_units_into_a_character() -> None:
    lines = drawn(record(speller(), 3), height=8, colours="truecolor")
    (forget,) = [line for line in lines if "f forget" in line]
    assert forget.count("▀") == 3
    assert forget.count("\x1b[38;2;") == 3  # the unit above
    assert forget.count(";48;2;") == 3  # and the one below
    first = gate_values(0, "f", 1, 1, 3)[0]
    assert first[0] != first[2]
    assert re.search(r"38;2;(\d+;\d+;\d+);48;2;(?!\1)", forget)


def test_a_summary_shows_the_mean() -> None:
    lines = drawn(record(speller(), 9, mode=SUMMARY), height=40)
    means = gate_values(0, "o", 1, 9, 3).mean(axis=1)
    assert line_with(lines, "o output")[12:61] == shades(means, " ░▒▓█").rjust(49)


@pytest.mark.parametrize("colours", [None, "truecolor"])
def test_steps_without_a_trace_are_points(colours: str | None) -> None:
    lines = drawn(record(LOOKER, 9, gaps=(3, 4)), height=8, colours=colours)
    assert sum(line.count("·") for line in lines) == 2 * 11  # ten gates and the attention
    all_gaps = drawn(record(LOOKER, 2, gaps=(1, 2)), colours=colours)
    assert "forget" not in "".join(all_gaps)


def test_before_the_first_step_it_says_so() -> None:
    assert "waiting for the first step" in "\n".join(drawn(record(COUNTER, 0)))


def test_a_line_says_it_all() -> None:
    line = line_of(record(speller(), 4))
    assert line.startswith("step 4  in ⏎  out $ 90%  layer 0 lstm: i 0.")
    forget = gate_values(0, "f", 4, 1, 3)
    figures = f"{(forget < 0.1).mean():.0%}/{(forget > 0.9).mean():.0%}"
    assert f"f {forget.mean():.2f} ({figures})" in line
    line = line_of(record(LOOKER, 2))
    assert line.startswith("step 2  in left 2, right -0.002  out left -2.303, right -0.1054  ")
    assert "looks at row 2 (0.75)" in line
    assert "layer 0 gru: r " in line
    assert "layer 1 lstm: i " in line
    assert "no trace" in line_of(record(LOOKER, 2, gaps=(2,)))


def test_a_recording_is_bounded_in_steps_and_in_bytes() -> None:
    recording = record(COUNTER, 50, steps_max=20)
    assert (len(recording), recording.seen) == (20, 50)
    span = recording.whole()
    assert (span.first_step, span.last_step) == (31, 50)
    assert span.inputs[:, 0].tolist() == list(range(31, 51))
    small = record(COUNTER, 50, bytes_max=10_000)
    assert 1 <= len(small) < 10
    assert len(record(COUNTER, 50, bytes_max=1)) == 1


def test_symbols_can_be_printed_anywhere() -> None:
    assert symbol(" ") == "␣"
    assert symbol("\n") == "⏎"
    assert symbol("\x1b[31m") == "·[31m"
    assert symbol("") == "·"
    assert symbol("é") == "é"


def test_scales() -> None:
    share = scale_of("f", np.float32([0.2]), np.float32([0.3]))
    assert share.place(np.float32([0, 0.5, 2])).tolist() == [0, 0.5, 1]
    small = scale_of("h", np.float32([-0.2]), np.float32([0.3]))
    assert (small.low, small.high, small.diverging) == (-1, 1, True)
    cell = scale_of("c", np.float32([-20, np.nan]), np.float32([3, np.nan]))
    assert (cell.low, cell.high) == (-20, 20)
    assert scale_of("c", np.float32([np.nan]), np.float32([np.nan])).high == 1
    assert scale_of("h", np.float32([0]), np.float32([4])).high == 4  # relu
