"""The models that sessions can be opened on."""

import difflib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Final

from conveyor_server.core import ModelInfo, ModelKey
from conveyor_server.errors import ModelNotFound

NAMES_SHOWN_MAX: Final = 10


class ModelTable:
    """Loaded versions by name.

    A retired version takes no new session and is dropped when its last one ends.
    """

    def __init__(self, dropped: Callable[[ModelKey], None] = lambda key: None) -> None:
        """Empty.

        Args:
            dropped: Called with each version that is forgotten; no session uses it any more.
        """
        self._dropped = dropped
        self._infos: dict[ModelKey, ModelInfo] = {}
        self._retired: set[ModelKey] = set()
        self.sessions: Counter[ModelKey] = Counter()
        """Open sessions on each version."""

    def __iter__(self) -> Iterator[ModelInfo]:
        """Versions in service, by name and version."""
        infos = dict(self._infos)  # metrics are read on another thread
        keys = sorted(key for key in infos if key not in self._retired)
        return (infos[key] for key in keys)

    def all_loaded(self) -> list[ModelInfo]:
        """Versions in service and retired ones, by name and version."""
        infos = dict(self._infos)  # as above
        return [infos[key] for key in sorted(infos)]

    def resolve(self, name: str, version: int = 0) -> ModelInfo:
        """The version asked for; 0 means the newest.

        Raises:
            ModelNotFound: There is none in service.
        """
        versions = [
            key.version for key in self._infos if key.name == name and key not in self._retired
        ]
        if not versions:
            served = {key.name for key in self._infos if key not in self._retired}
            raise ModelNotFound(f"there is no model {name!r}", hint=_hint(name, served), model=name)
        wanted = version or max(versions)
        if wanted not in versions:
            raise ModelNotFound(
                f"model {name!r} has no version {version}",
                hint=f"it has {_listed(map(str, sorted(versions, reverse=True)))}",
                model=name,
            )
        return self._infos[ModelKey(name, wanted)]

    def newest(self, info: ModelInfo) -> bool:
        """Whether a request without a version gets this one."""
        return self.resolve(info.key.name).key == info.key

    def loaded(self, key: ModelKey) -> ModelInfo | None:
        """The version if it is loaded, retired or not."""
        return self._infos.get(key)

    def add(self, info: ModelInfo) -> None:
        """Takes a version into service that is not loaded."""
        assert info.key not in self._infos, info.key
        self._infos[info.key] = info

    def retire(self, key: ModelKey) -> None:
        """Takes a version out of service."""
        self._retired.add(key)
        self._drop_unused(key)

    def restore(self, keys: Collection[ModelKey]) -> list[ModelInfo]:
        """Takes those of some versions back into service that were retired; returns them."""
        restored = sorted(self._retired.intersection(keys))
        self._retired.difference_update(restored)
        return [self._infos[key] for key in restored]

    def session_began(self, key: ModelKey) -> None:
        """A session uses a version."""
        self.sessions[key] += 1

    def session_ended(self, key: ModelKey) -> None:
        """A session uses a version no more; the last one takes a retired version with it."""
        self.sessions[key] -= 1
        self._drop_unused(key)

    def _drop_unused(self, key: ModelKey) -> None:
        if key in self._retired and not self.sessions[key]:
            self._retired.remove(key)
            del self._infos[key]
            del self.sessions[key]
            self._dropped(key)


def _hint(name: str, served: Collection[str]) -> str:
    """What a caller who asked for a model that is not there may have meant."""
    close = difflib.get_close_matches(name, served, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"this server has {_listed(sorted(served)) or 'none'}"


def _listed(names: Iterable[str]) -> str:
    """The first few, and how many more."""
    known = list(names)
    shown = ", ".join(known[:NAMES_SHOWN_MAX])
    more = len(known) - NAMES_SHOWN_MAX
    return f"{shown} and {more:,} more" if more > 0 else shown
