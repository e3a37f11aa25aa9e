"""The models in service."""

from dataclasses import replace

import pytest

from conveyor_server.core import ModelInfo, ModelKey
from conveyor_server.errors import ModelNotFound, ModelNotStreamable
from conveyor_server.scheduler.models import ModelTable
from tests.support.models import BOTHWAYS, FEATURES
from tests.support.rig import Rig


def version(number: int) -> ModelInfo:
    return replace(FEATURES, key=ModelKey("weather", number), digest=f"sha256:{number:064}")


def table_of(*numbers: int) -> ModelTable:
    table = ModelTable()
    for number in numbers:
        table.add(version(number))
    return table


def test_no_version_means_the_newest() -> None:
    table = table_of(2, 10, 9)
    assert table.resolve("weather").key.version == 10
    assert table.resolve("weather", 9).key.version == 9
    assert [info.key.version for info in table] == [2, 9, 10]
    assert [table.newest(info) for info in table] == [False, False, True]


@pytest.mark.parametrize(
    ("name", "number"), [("other", 0), ("weather", 3), ("", 0), ("Weather", 0)]
)
def test_what_is_not_there_is_not_found(name: str, number: int) -> None:
    with pytest.raises(ModelNotFound):
        table_of(1, 2).resolve(name, number)


def test_a_retired_version_stays_until_its_last_session_ends() -> None:
    rig = Rig((version(1), version(2)))
    rig.open("old", version=1)
    rig.models.retire(version(1).key)
    assert [info.key.version for info in rig.models] == [2]
    with pytest.raises(ModelNotFound):
        rig.open("new", version=1)
    assert rig.step("old", 1, [1])
    assert rig.models.all_loaded() == [version(1), version(2)]
    assert rig.dropped == []
    rig.close("old")
    assert rig.dropped == [version(1).key]
    assert rig.models.all_loaded() == [version(2)]
    assert rig.models.loaded(version(1).key) is None
    assert rig.engine.slots_used(version(1).key) == 0


def test_a_version_that_comes_back_is_in_service_again() -> None:
    table = table_of(1)
    table.session_began(version(1).key)
    table.retire(version(1).key)
    assert table.restore([version(2).key]) == []
    assert table.restore([version(1).key]) == [version(1)]
    assert table.restore([version(1).key]) == []
    assert table.resolve("weather").key.version == 1
    table.session_ended(version(1).key)
    assert table.loaded(version(1).key) is not None


def test_a_version_that_nobody_uses_is_dropped_at_once() -> None:
    dropped: list[ModelKey] = []
    table = ModelTable(dropped=dropped.append)
    table.add(version(1))
    table.add(version(2))
    table.retire(version(1).key)
    assert dropped == [version(1).key]
    assert table.all_loaded() == [version(2)]


def test_a_model_that_cannot_be_stepped_opens_no_session() -> None:
    rig = Rig((BOTHWAYS,))
    for ephemeral in (False, True):
        with pytest.raises(ModelNotStreamable) as caught:
            rig.open("", ephemeral=ephemeral)
        assert caught.value.metadata["layers"] == "1 (bidirectional), 2 (reverse)"
    assert len(rig.scheduler.sessions) == 0


def test_sessions_are_counted_by_version() -> None:
    rig = Rig((version(1), version(2)))
    rig.open("a", version=1)
    rig.open("b")
    rig.open("c")
    rig.close("b")
    described = rig.operations.describe_models()
    assert [(info.key.version, count, newest) for info, count, newest in described] == [
        (1, 1, False),
        (2, 1, True),
    ]


@pytest.mark.parametrize(
    ("name", "number", "message"),
    [
        ("wether", 0, "there is no model 'wether'; did you mean 'weather'?"),
        ("xyz", 0, "there is no model 'xyz'; this server has tagger, weather"),
        ("weather", 3, "model 'weather' has no version 3; it has 10, 2, 1"),
    ],
)
def test_a_wrong_name_or_version_is_answered_with_what_there_is(
    name: str, number: int, message: str
) -> None:
    table = table_of(1, 2, 10)
    table.add(BOTHWAYS)
    with pytest.raises(ModelNotFound) as caught:
        table.resolve(name, number)
    assert caught.value.message == message
    assert caught.value.metadata == {"model": name}


def test_what_is_listed_is_bounded_and_without_what_is_retired() -> None:
    table = ModelTable()
    for number in range(30):
        table.add(replace(FEATURES, key=ModelKey(f"m{number:02}", 1)))
    table.retire(ModelKey("m00", 1))
    with pytest.raises(ModelNotFound, match=r"this server has m01, .*, m10 and 19 more$"):
        table.resolve("elsewhere")
    with pytest.raises(ModelNotFound, match="this server has none"):
        ModelTable().resolve("elsewhere")
