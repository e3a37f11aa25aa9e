"""Closed loops on the real scheduler and the fake engine."""

from collections.abc import Sequence

import pytest

from conveyor_server.core import Chunk, InputKind, ModelInfo, OutputMode
from conveyor_server.errors import (
    ConveyorError,
    EngineFailed,
    InboxFull,
    SessionClosed,
    StepConflict,
)
from conveyor_server.scheduler.generation import UNREAD_MAX, Generation, GenerationEnd, Made, Plan
from conveyor_server.scheduler.sampling import Sampling
from tests.support.engine import straight_through
from tests.support.models import LOOPED, TOKENS
from tests.support.rig import PRINCIPAL, Rig, rows_of


class Loop:
    """One generation on one session."""

    def __init__(self, rig: Rig, plan: Plan, session_id: str = "s") -> None:
        self.rig, self.session_id = rig, session_id
        self.changes = 0
        self.generation = Generation(plan, self._submit_step, self._changed)

    def prompt(self, first_step: int, values: Sequence[int]) -> None:
        rows = rows_of(self.rig.model, *values)
        self._submit(first_step, len(values), rows, self.generation)

    def run(self) -> list[Made]:
        """Reads until the generation ends."""
        made: list[Made] = []
        for _ in range(1_000):
            self.rig.run()
            made += self.generation.take()
            if self.generation.end is not None or self.generation.error is not None:
                return made
        raise AssertionError("the generation does not end")

    def _submit_step(self, step: int, row: bytes, generation: Generation) -> None:
        self._submit(step, 1, row, generation)

    def _submit(self, first_step: int, length: int, rows: bytes, generation: Generation) -> None:
        self.rig.scheduler.inbox.put(
            Chunk(
                session_id=self.session_id,
                principal=PRINCIPAL,
                model=self.rig.model,
                epoch=0,
                first_step=first_step,
                length=length,
                rows=rows,
                output=OutputMode.LAST,
                reply=generation,
                arrived_seconds=0.0,
            )
        )

    def _changed(self) -> None:
        self.changes += 1


def make_plan(
    model: ModelInfo = TOKENS,
    steps_max: int = 10,
    sampling: Sampling | None = None,
    stop_tokens: Sequence[int] = (),
) -> Plan:
    sampling = sampling or Sampling(1.0, 0, 11)
    if model.input_kind is InputKind.FEATURES:
        sampling = Sampling()
    return Plan(model, steps_max, sampling, frozenset(stop_tokens))


def make_loop(plan: Plan, **more: int) -> Loop:
    rig = Rig((plan.model,), **more)
    rig.open()
    return Loop(rig, plan)


def expected_tokens(prompt: Sequence[int], count: int, sampling: Sampling) -> list[int]:
    """The loop written out: every output drawn and fed back."""
    tokens = list(prompt)
    for _ in range(count):
        outputs, _ = straight_through(TOKENS, rows_of(TOKENS, *tokens))
        tokens.append(sampling.draw(outputs[-1], TOKENS.activation, len(tokens)))
    return tokens[len(prompt) :]


def test_every_output_becomes_the_next_input() -> None:
    loop = make_loop(make_plan(steps_max=20))
    loop.prompt(1, [3, 1, 4])
    made = loop.run()
    assert [each.token for each in made] == expected_tokens([3, 1, 4], 20, Sampling(1.0, 0, 11))
    assert [each.step for each in made] == list(range(3, 23))
    assert loop.generation.end is GenerationEnd.STEPS_MAX
    assert loop.generation.applied_step == 23  # the last output is fed back too
    assert loop.rig.view().applied_step == 23


def test_features_are_fed_back_as_they_are() -> None:
    loop = make_loop(make_plan(LOOPED, steps_max=5))
    loop.prompt(1, [1, 2])
    rows = [each.row for each in loop.run()]
    fed = rows_of(LOOPED, 1, 2)
    for row in rows:
        outputs, _ = straight_through(LOOPED, fed)
        assert outputs[-1] == row
        fed += row
    assert len(rows) == 5


def test_a_run_can_be_taken_up_at_any_step() -> None:
    whole = make_loop(make_plan(steps_max=12))
    whole.prompt(1, [5])
    tokens = [each.token for each in whole.run()]

    loop = make_loop(make_plan(steps_max=7))
    loop.prompt(1, [5])
    first = [each.token for each in loop.run()]
    _, _, applied, output = loop.rig.operations.position(PRINCIPAL, "s")
    assert output is not None
    again = Loop(loop.rig, make_plan(steps_max=5))
    again.generation.begin(applied, output)
    assert first + [each.token for each in again.run()] == tokens


def test_a_stop_token_is_the_last_one() -> None:
    tokens = expected_tokens([1], 30, Sampling(1.0, 0, 11))
    stop = tokens[9]
    loop = make_loop(make_plan(steps_max=30, stop_tokens=[stop]))
    loop.prompt(1, [1])
    made = [each.token for each in loop.run()]
    assert made == tokens[: tokens.index(stop) + 1]
    assert loop.generation.end is GenerationEnd.STOP_TOKEN
    assert loop.rig.view().applied_step == 1 + len(made)


def test_it_pauses_when_nobody_reads_and_goes_on_when_somebody_does() -> None:
    loop = make_loop(make_plan(steps_max=UNREAD_MAX + 10))
    loop.prompt(1, [2])
    loop.rig.run()
    assert loop.generation.end is None
    assert loop.rig.view().applied_step == UNREAD_MAX  # prompt and all outputs but the last
    assert loop.rig.scheduler.inbox.chunks == 0
    first = loop.generation.take()
    assert len(first) == UNREAD_MAX
    rest = loop.run()
    assert [each.token for each in first + rest] == expected_tokens(
        [2], UNREAD_MAX + 10, Sampling(1.0, 0, 11)
    )


def test_it_pauses_at_its_very_end_too() -> None:
    loop = make_loop(make_plan(steps_max=UNREAD_MAX))
    loop.prompt(1, [2])
    loop.rig.run()
    assert loop.generation.end is None
    assert len(loop.run()) == UNREAD_MAX
    assert loop.generation.end is GenerationEnd.STEPS_MAX
    assert loop.rig.view().applied_step == UNREAD_MAX + 1


def test_a_prompt_in_several_quanta_makes_one_output() -> None:
    loop = make_loop(make_plan(steps_max=1), quantum_steps=2)
    loop.prompt(1, [1, 2, 3, 4, 5])
    made = loop.run()
    assert [each.step for each in made] == [5]


def test_nothing_more_is_begun_once_the_reader_is_gone() -> None:
    loop = make_loop(make_plan(steps_max=50))
    loop.prompt(1, [1])
    for _ in range(5):
        loop.rig.scheduler.tick()
    loop.generation.stop()
    loop.rig.run()
    assert loop.rig.view().applied_step <= 7
    assert loop.rig.scheduler.inbox.chunks == 0


def test_generations_are_batched_with_one_another() -> None:
    rig = Rig((TOKENS,))
    loops: list[Loop] = []
    for name in "abc":
        rig.open(name)
        loops.append(Loop(rig, make_plan(steps_max=5), name))
        loops[-1].prompt(1, [1])
    rig.run()
    assert {len(works) for _, works in rig.engine.runs} == {3}
    assert len({tuple(loop.generation.take()) for loop in loops}) == 1


@pytest.mark.parametrize("failing", [1, 4])
def test_an_error_ends_it(failing: int) -> None:
    loop = make_loop(make_plan())
    loop.prompt(1, [1])
    for _ in range(failing - 1):
        loop.rig.scheduler.tick()
    loop.rig.engine.fail_next.append(EngineFailed("broken"))
    made = loop.run()
    assert isinstance(loop.generation.error, EngineFailed)
    assert loop.generation.end is None
    assert len(made) == failing - 1
    assert loop.changes == failing


def test_a_step_that_somebody_else_took_ends_it() -> None:
    loop = make_loop(make_plan(steps_max=1_000))
    loop.prompt(1, [1])
    loop.rig.run()
    applied = loop.rig.view().applied_step
    loop.rig.step("s", applied + 1, [7])
    loop.generation.take()
    loop.run()
    # The stranger's token is only by chance the one that would have been fed back.
    assert isinstance(loop.generation.error, StepConflict)


def test_a_full_inbox_ends_it() -> None:
    loop = make_loop(make_plan())

    def refuse(step: int, row: bytes, generation: Generation) -> None:
        raise InboxFull("full", limit="limits.inbox_chunks_max", maximum=1)

    loop.generation._submit = refuse
    loop.prompt(1, [1])
    loop.run()
    assert isinstance(loop.generation.error, InboxFull)


def test_a_closed_session_ends_it() -> None:
    loop = make_loop(make_plan(steps_max=1_000))
    loop.prompt(1, [1])
    loop.rig.run()
    loop.rig.close()
    loop.run()
    error: ConveyorError | None = loop.generation.error
    assert isinstance(error, SessionClosed)
