"""The public surface is what `__init__` names, and every error is in it."""

import inspect
import pkgutil
from collections.abc import Callable

import conveyor_client
from conveyor_client import _blocking, _client, _errors, _session, aio


def parameters(function: Callable[..., object]) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_all_names_exist_and_are_sorted() -> None:
    assert conveyor_client.__all__ == sorted(conveyor_client.__all__)
    for name in conveyor_client.__all__:
        assert hasattr(conveyor_client, name), name


def test_nothing_public_is_left_out() -> None:
    public = {name for name in vars(conveyor_client) if not name.startswith("_")}
    submodules = {module.name for module in pkgutil.iter_modules(conveyor_client.__path__)}
    assert public - submodules <= set(conveyor_client.__all__)
    assert {name for name in submodules if not name.startswith("_")} == {"aio", "cli"}


def test_every_error_is_exported() -> None:
    errors = {
        name
        for name, value in vars(_errors).items()
        if isinstance(value, type) and issubclass(value, _errors.ConveyorError)
    }
    assert errors <= set(conveyor_client.__all__)


def test_the_twins_have_the_same_methods() -> None:
    pairs = [(aio.Client, conveyor_client.Client), (aio.Session, conveyor_client.Session)]
    inside = {"calls", "home", "cached_model", "lane_for", "check", "items"}
    internal = inside | {"options", "aclose"}
    for there, here in pairs:
        names = {name for name in dir(there) if not name.startswith("_")} - internal
        assert names <= {name for name in dir(here) if not name.startswith("_")}


def test_wrapped_methods_keep_signature_and_documentation() -> None:
    for here, there in [
        (_blocking.Session.step, _session.Session.step),
        (_blocking.Client.predict, _client.Client.predict),
        (_blocking.Client.session, _client.Client.session),
        (_blocking.Client.sessions, _client.Client.sessions),
    ]:
        assert (
            inspect.signature(here).parameters.keys() == inspect.signature(there).parameters.keys()
        )
        assert inspect.getdoc(here) == inspect.getdoc(there)
    by_hand = [
        (_blocking.Session.stream, _session.Session.stream),
        (_blocking.Session.stream_with_trace, _session.Session.stream_with_trace),
        (_blocking.Session.generate, _session.Session.generate),
        (_blocking.Session.fork, _session.Session.fork),
        (_blocking.Client.generate, _client.Client.generate),
        (_blocking.Client.import_session, _client.Client.import_session),
    ]
    for here, there in by_hand:
        assert (
            inspect.signature(here).parameters.keys() == inspect.signature(there).parameters.keys()
        )
        assert inspect.getdoc(here)
