"""``make demo``: a real server, real models, real input, the real client.

Every number and every letter printed comes out of the server that is started here. It checks what
it says: a mistake ends it with a message and exit status 1.
"""

import asyncio
import importlib.util
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench import spelling
from bench.link import Link
from bench.processes import ServerProcess, conveyor_server, total
from conveyor_client import aio

ZOO: Final = Path(__file__).parent.parent / "models" / "zoo"
SESSIONS: Final = 200
HOURS: Final = 96
HOURS_FIRST: Final = 24
"""Not scored: the carry of a new session has not seen a whole day yet."""
ROWS_SHOWN: Final = 6
PROMPT: Final = "The function returns "
CUT_AFTER_HOURS: Final = 100
IN_FLIGHT: Final = 24
FORK_PROMPT: Final = "If the file does not exist, "
BRANCHES: Final = ("a new ", "an exception ")
WARMER_F: Final = 10.0
STATIONS_SHORT: Final = {"seattle": "Seattle", "san_francisco": "S. Fran."}
"""So that a line of forecasts fits 80 columns."""
COLUMNS: Final = 80
"""Of a line where the output is no terminal."""

Floats = npt.NDArray[np.float32]


class Demo:
    """The parts, in order; all on one server."""

    def __init__(self, console: Console, server: ServerProcess, client: aio.Client) -> None:
        """The server serves the zoo."""
        self._console = console
        self._server = server
        self._client = client
        self._data: Any = _load(ZOO / "temperature" / "data.py")
        self._summary = Table("what the metrics endpoint says", "", box=None, pad_edge=False)

    async def run(self) -> None:
        """All of it."""
        await self._forecast()
        await self._spell()
        await self._write_text()
        await self._cut_connection()
        await self._fork()
        self._say_metrics()

    # -- many sessions -----------------------------------------------------------------------------

    async def _forecast(self) -> None:
        self._title(f"{SESSIONS} sessions of `temperature`, each reads {HOURS} held-out hours")
        windows = self._data.windows(SESSIONS, HOURS)
        sessions = [self._client.session("temperature") for _ in windows]
        await asyncio.gather(*(session.open() for session in sessions))
        before = self._server.metrics()
        began = time.perf_counter()
        outputs = await asyncio.gather(
            *(_read_hours(s, w.features) for s, w in zip(sessions, windows, strict=True))
        )
        seconds = time.perf_counter() - began
        after = self._server.metrics()
        self._show_forecasts(windows, outputs)
        self._show_errors(windows, outputs)
        steps = _grown(before, after, "conveyor_steps_total")
        batches = _grown(before, after, "conveyor_tick_sessions_sum")
        mean = batches / _grown(before, after, "conveyor_tick_sessions_count")
        _check(steps == SESSIONS * HOURS, f"{steps} steps were applied, not {SESSIONS * HOURS}")
        self._summary.add_row("steps a second, forecasts above", f"{steps / seconds:,.0f}")
        self._summary.add_row("sessions in a tick, on average", f"{mean:.1f}")
        state = after['conveyor_state_bytes{tier="device"}']
        self._summary.add_row(
            "state kept for the open sessions", f"{state:,.0f} bytes ({state / SESSIONS:.0f} each)"
        )
        await asyncio.gather(*(session.close() for session in sessions))

    def _show_forecasts(self, windows: list[Any], outputs: list[Floats]) -> None:
        table = Table(box=None, pad_edge=False, collapse_padding=True)
        table.add_column("station", no_wrap=True)
        table.add_column("at", no_wrap=True)
        table.add_column("°F now", justify="right")
        for hours in self._data.HORIZONS_HOURS:
            table.add_column(f"+{hours} h", justify="right", style="bold")
            table.add_column("truth", justify="right")
            table.add_column("naive", justify="right", style="dim")
        for index in np.linspace(0, len(windows) - 1, ROWS_SHOWN).round().astype(int):
            window, row = windows[index], HOURS - 1 - 5 * int(index) % 24
            naive = self._data.same_hour_yesterday(window.features)
            cells = [STATIONS_SHORT[window.station], _hour(window.timestamps[row])]
            cells.append(f"{window.features[row, 0]:.1f}")
            for column in range(len(self._data.HORIZONS_HOURS)):
                figures = (outputs[index], window.targets, naive)
                cells += [f"{each[row, column]:.1f}" for each in figures]
            table.add_row(*cells)
        self._console.print(table)
        self._console.print(
            "+6 h: the forecast for 6 hours on; naive: as warm as that hour the day before",
            style="dim",
            highlight=False,
        )

    def _show_errors(self, windows: list[Any], outputs: list[Floats]) -> None:
        scored = slice(HOURS_FIRST, None)
        truth = np.stack([window.targets[scored] for window in windows])
        table = Table(box=None, pad_edge=False)
        table.add_column(f"mean absolute error of {truth[..., 0].size:,} forecasts, °F")
        for hours in self._data.HORIZONS_HOURS:
            table.add_column(f"+{hours} h", justify="right")
        naive = [self._data.same_hour_yesterday(window.features) for window in windows]
        still = [self._data.persistence(window.features) for window in windows]
        forecasts = (
            ("temperature", outputs),
            ("naive: same hour yesterday", naive),
            ("naive: stays as it is", still),
        )
        for name, rows in forecasts:
            made = np.stack([each[scored] for each in rows])
            errors = np.abs(made - truth).mean(axis=(0, 1))
            table.add_row(name, *(f"{error:.3f}" for error in errors))
        self._console.print()
        self._console.print(table)
        self._console.print(
            "at +24 h the two naive ones are the same: that hour yesterday is the hour now",
            style="dim",
            highlight=False,
        )

    # -- images ------------------------------------------------------------------------------------

    async def _spell(self) -> None:
        self._title("`spell` looks at a scanned digit and writes its name, letter by letter")
        data: Any = _load(ZOO / "spell" / "data.py")
        images, shown = data.digits(data.HELD_OUT)
        self._say("the image, then its 16 patches at each step: the darker, the closer it looked")
        for digit in spelling.SHOWN:
            image = images[list(shown).index(digit)]
            looked = await spelling.look(self._client, data, image)
            self._say(spelling.drawing(data, image, looked) + "\n")
        found, seconds = await spelling.words(self._client, data, images)
        names = spelling.right(data, shown, found)
        self._say(
            f"{names} of {len(shown)} held-out digits got their right name"
            f" ({names / len(shown):.1%}) in {seconds:.1f} s"
        )
        _check(names > 0.9 * len(shown), "the model spells worse than its card says")

    # -- text --------------------------------------------------------------------------------------

    async def _write_text(self) -> None:
        self._title("`letters` goes on by itself, a character a step")
        async with self._client.session("letters") as session:
            prompt = session.model.input.encode(PROMPT)
            self._console.print(PROMPT, end="", style="dim")
            drawn = session.generate(prompt, steps_max=240, temperature=0.5, seed=7)
            async with drawn:
                async for token in drawn:
                    letter = session.model.input.labels[int(token)]
                    self._console.print(letter, end="", markup=False, highlight=False)
        self._console.print()

    # -- a break -----------------------------------------------------------------------------------

    async def _cut_connection(self) -> None:
        self._title("A connection is cut in the middle, with steps on their way")
        features, _, timestamps = self._data.held_out()
        rows = features[: 2 * CUT_AFTER_HOURS]
        async with self._client.session("temperature") as session:
            whole = await _read_hours(session, rows)
        before = self._server.metrics()
        async with Link(self._server.address) as link, aio.Client(link.address) as client:
            session = client.session("temperature")
            await session.open()
            epoch = session.epoch
            outputs: list[Floats] = []
            async for output in session.stream(rows, in_flight=IN_FLIGHT):
                outputs.append(output)
                if len(outputs) == CUT_AFTER_HOURS:
                    link.cut()
                    self._say(f"{CUT_AFTER_HOURS} of {len(rows)} hours answered: connection cut")
            self._say(
                f"the client came back by itself ({link.connections} connections, epoch {epoch}"
                f" -> {session.epoch}) and finished step {session.applied_step}"
            )
            session_id = session.session_id  # and here the client is gone, without a goodbye
        after = self._server.metrics()
        again = _grown(before, after, "conveyor_duplicate_steps_total")
        refused = _grown(before, after, "conveyor_rejected_total")
        self._say(
            f"{again:.0f} steps came a second time and were answered from memory, not run again;"
            f" {refused:.0f} of the broken stream came too late and were refused"
            " (both counts differ from run to run)"
        )
        same = np.stack(outputs).tobytes() == whole.tobytes()
        _check(link.connections > 1, "the connection was not cut")
        _check(same, "the outputs differ from those of an uninterrupted session")
        self._say(f"all {len(rows)} outputs equal those of an uninterrupted session, bit for bit")
        await self._what_if(session_id, features, len(rows), _hour(timestamps[len(rows)]))

    async def _what_if(self, session_id: str, rows: Floats, hour: int, at: str) -> None:
        """Another client takes the session over, and asks what an hour would have changed."""
        warmer = rows[hour].copy()
        warmer[0] += WARMER_F
        async with (
            aio.Client(self._server.address) as client,
            client.resume(session_id) as session,
        ):
            (fork,) = await session.fork()
            async with fork:
                real, supposed = await asyncio.gather(session.step(rows[hour]), fork.step(warmer))
        self._say(
            f"another client resumed it at step {hour} and forked it: were it {WARMER_F:.0f} °F"
            f" warmer at {at}, an hour later it would be"
            f" {supposed[0]:.1f} and not {real[0]:.1f} °F"
        )

    # -- two branches ------------------------------------------------------------------------------

    async def _fork(self) -> None:
        self._title("A session of `letters` reads a beginning, is forked, and goes on twice")
        async with self._client.session("letters") as session:
            await session.step(session.model.input.encode(FORK_PROMPT), output="none")
            forks = await session.fork(len(BRANCHES))
            written = await asyncio.gather(
                *(_go_on(fork, words) for fork, words in zip(forks, BRANCHES, strict=True))
            )
            for words, text in zip(BRANCHES, written, strict=True):
                line = Text(FORK_PROMPT, style="dim")
                line.append(words, style="bold").append(" ".join(text.split()), style="none")
                self._console.print(line)
            applied = (await session.info()).applied_step
            _check(applied == len(FORK_PROMPT), "the forked session moved")

    # -- the rest ----------------------------------------------------------------------------------

    def _say_metrics(self) -> None:
        metrics = self._server.metrics()
        for name, text in (
            ("conveyor_steps_total", "steps applied in all"),
            ("conveyor_resumes_total", "sessions taken up again"),
        ):
            self._summary.add_row(text, f"{total(metrics, name):,.0f}")
        self._console.print()
        self._console.print(self._summary)

    def _title(self, text: str) -> None:
        self._console.print()
        self._console.rule(Text(text, style="bold"), align="left")

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)


async def _read_hours(session: aio.Session, rows: Floats) -> Floats:
    """One row a step, each sent once the one before is answered."""
    return np.stack([await session.step(row) for row in rows])


async def _go_on(fork: aio.Session, words: str) -> str:
    async with fork:
        labels = fork.model.input.labels
        prompt = fork.model.input.encode(words)
        drawn = fork.generate(prompt, steps_max=90, temperature=0.5, seed=3)
        async with drawn:
            return "".join([labels[int(token)] async for token in drawn])


def _hour(timestamp: np.datetime64) -> str:
    """As in "11-23 07 h"."""
    return str(timestamp)[5:13].replace("T", " ") + " h"


def _load(path: Path) -> ModuleType:
    """A module of the zoo; it is no package."""
    spec = importlib.util.spec_from_file_location(f"zoo_{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _grown(before: dict[str, float], after: dict[str, float], name: str) -> float:
    return total(after, name) - total(before, name)


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise SystemExit(f"demo: {otherwise}")


async def _run(console: Console, server: ServerProcess) -> None:
    async with aio.Client(server.address) as client:
        await Demo(console, server, client).run()


def main() -> None:
    """Starts the server, runs the parts, stops the server."""
    console = Console(width=None if sys.stdout.isatty() else COLUMNS)
    began = time.perf_counter()
    with (
        tempfile.TemporaryDirectory(prefix="conveyor-demo-") as folder,
        conveyor_server(Path(folder), ZOO, {"log.level": "warning"}) as server,
    ):
        console.print(
            f"conveyor-server serves {ZOO.name} on {server.address},"
            f" ready after {time.perf_counter() - began:.1f} s"
        )
        asyncio.run(_run(console, server))
        status = server.stop()
    _check(status == 0, f"the server ended with status {status}")
    console.print(f"\nThe server stopped cleanly. {time.perf_counter() - began:.1f} s in all.")


if __name__ == "__main__":
    main()
