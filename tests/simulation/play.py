"""A run of the simulation that one number decides."""

import random

from conveyor_server.core import OpenMode, OutputMode, SessionKey, TraceMode
from tests.simulation.simulation import Simulation
from tests.simulation.streams import Stream
from tests.simulation.world import Setup
from tests.support.models import ATTENTIVE, FEATURES, TOKENS

SESSION_IDS = ("a", "b", "c", "d")


def setup_of(rng: random.Random) -> Setup:
    """Mostly tight bounds; sometimes loose ones, so that runs get further."""
    return Setup(
        slots=rng.choice((1, 2, 3, 8)),
        batch_sessions_max=rng.choice((1, 2, 4, 8)),
        quantum_steps=rng.choice((1, 2, 3, 16)),
        sessions_max=rng.choice((3, 6, 20)),
        principal_sessions_max=rng.choice((2, 4, 20)),
        steps_in_flight_max=rng.choice((6, 24, 100)),
        inbox_chunks_max=rng.choice((3, 12, 100)),
        held_results_steps_max=rng.choice((0, 4, 64)),
        held_results_total_bytes_max=rng.choice((0, 1_500, 100_000)),
        host_state_bytes_max=rng.choice((1024, 1 << 30)),
        memories_bytes_max=rng.choice((60, 130, 1 << 30)),
        predictions_max=rng.choice((2, 5)),
        running_predictions_max=rng.choice((1, 3)),
        idle_seconds_default=rng.choice((10.0, 30.0)),
        lifetime_seconds_max=rng.choice((60.0, 10_000.0)),
        ended_sessions_max=rng.choice((16, 100)),
    )


class Player:
    """Chooses what happens next."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.simulation = Simulation(setup_of(self.rng))
        self.callers = self.simulation.callers
        self._moves = {
            self.step: 30,
            self.tick: 22,
            self.open: 14,
            self.half_a_tick: 12,
            self.advance: 6,
            self.close: 3,
            self.reset: 2,
            self.fork: 4,
            self.export_or_import: 3,
            self.detach: 2,
            self.keep_alive: 2,
            self.predict: 2,
            self.predict_whole: 2,
            self.give_up: 1,
            self.fail: 2,
            self.jump_wall: 1,
        }

    def play(self, events: int) -> None:
        """So many things happen; then all that is under way comes to its end."""
        moves, weights = list(self._moves), list(self._moves.values())
        for move in self.rng.choices(moves, weights, k=events):
            move()
        self.simulation.drain()

    def step(self) -> None:
        rng, (key, stream) = self.rng, self._target()
        kinds = ("next", "again", "conflict", "gap", "poison")
        kind = rng.choices(kinds, (70, 18, 6, 4, 2))[0]
        length = rng.choice((1, 1, 1, 2, 3, 5, 17))
        first_step, rows = self.callers.rows(key, kind, length, rng.randrange(4))
        output = rng.choice((OutputMode.ALL, OutputMode.ALL, OutputMode.LAST, OutputMode.NONE))
        epoch = 0
        if stream is None and rng.random() < 0.3 and key in self.simulation.world.live:
            epoch = max(1, self.simulation.world.live[key].epoch - rng.randrange(2))
        seconds = rng.choice((None, None, 0.5))
        trace = rng.choice((TraceMode.NONE,) * 4 + (TraceMode.SUMMARY, TraceMode.FULL))
        self.callers.send(
            key, stream, first_step, rows, output, epoch=epoch, seconds=seconds, trace=trace
        )

    def tick(self) -> None:
        self.simulation.tick()

    def half_a_tick(self) -> None:
        if self.simulation.world.batch is None:
            self.simulation.begin()
        else:
            self.simulation.finish()

    def open(self) -> None:
        rng, stream = self.rng, self._stream()
        key = (stream.principal, rng.choice(SESSION_IDS))
        self.callers.open(
            rng.choice((stream, stream, stream, None)),
            key,
            mode=rng.choice((OpenMode.EITHER,) * 4 + (OpenMode.CREATE, OpenMode.RESUME)),
            model={"b": ATTENTIVE, "c": ATTENTIVE, "d": TOKENS}.get(key[1], FEATURES)
            if rng.random() < 0.9
            else rng.choice((FEATURES, TOKENS, ATTENTIVE)),
            memory=rng.choice((0, 0, 0, 1, 4)),
            idle_seconds=rng.choice((None, None, 3.0, 60.0)),
        )

    def close(self) -> None:
        key, stream = self._target()
        self.callers.close(stream, key)

    def reset(self) -> None:
        self.callers.reset(self._target()[0])

    def fork(self) -> None:
        rng, (key, _) = self.rng, self._target()
        new_ids = rng.sample((*SESSION_IDS, "e", "f", ""), rng.choice((1, 1, 2)))
        self.callers.fork(key, new_ids, rng.choice((0, 0, 3)))

    def export_or_import(self) -> None:
        rng, (key, _) = self.rng, self._target()
        if rng.random() < 0.5:
            self.callers.export(key)
        else:
            self.callers.import_(rng.randrange(100), key, rng.choice((3.0, 60.0)))

    def detach(self) -> None:
        key, stream = self._target()
        if stream is not None:
            self.callers.detach(stream, key[1])

    def keep_alive(self) -> None:
        self.callers.keep_alive(self._stream())

    def predict(self) -> None:
        self.callers.predict(self._stream().principal, self.rng.choice((1, 4, 40)))

    def predict_whole(self) -> None:
        length, seconds = self.rng.choice((1, 4, 9)), self.rng.choice((None, None, 0.5))
        output = self.rng.choice((OutputMode.ALL, OutputMode.LAST, OutputMode.NONE))
        self.callers.predict_whole(length, output, seconds)

    def give_up(self) -> None:
        self.callers.give_up(self.rng.randrange(100))

    def fail(self) -> None:
        if self.rng.random() < 0.3:
            self.simulation.fail_next_memory()
            return
        self.simulation.fail_next(memory=self.rng.random() < 0.5)

    def advance(self) -> None:
        self.simulation.world.rig.clock.advance(self.rng.choice((0.1, 0.5, 1.0, 2.0, 25.0)))

    def jump_wall(self) -> None:
        self.simulation.world.rig.clock.jump_wall(self.rng.choice((-3600.0, 3600.0)))

    def _stream(self) -> Stream:
        return self.rng.choice(self.simulation.streams)

    def _target(self) -> tuple[SessionKey, Stream | None]:
        """A session, and the stream or the call that reaches for it; mostly ones that can."""
        rng, stream = self.rng, self._stream()
        if stream.claims and rng.random() < 0.8:
            return (stream.principal, rng.choice(list(stream.claims))), stream
        mine = [key for key in self.simulation.world.live if key[0] == stream.principal]
        if mine and rng.random() < 0.8:
            return rng.choice(mine), None
        return (stream.principal, rng.choice(SESSION_IDS)), None
