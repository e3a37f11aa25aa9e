"""The models' way into service and out of it: what is in the repository is what is served."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from conveyor_models import BundleError
from conveyor_server.config import Config
from conveyor_server.core import ModelInfo, ModelKey
from conveyor_server.engine.engine import TorchEngine
from conveyor_server.engine.loader import (
    Fingerprint,
    Known,
    Loaded,
    Repository,
    load_repository,
)
from conveyor_server.scheduler.driver import Driver
from conveyor_server.scheduler.models import ModelTable

_log = logging.getLogger(__name__)

SetServing = Callable[[ModelInfo, bool], Awaitable[None]]
"""Tells the health service whether a version is served."""


class Reloader:
    """Looks through the repository at the start, on request and, if so configured, regularly."""

    def __init__(
        self,
        config: Config,
        engine: TorchEngine,
        models: ModelTable,
        driver: Driver,
        set_serving: SetServing,
    ) -> None:
        """Looks at nothing yet."""
        self._folder = config.models.folder
        self._limits = config.limits
        self._every_seconds = config.models.reload_seconds
        self._engine = engine
        self._models = models
        self._driver = driver
        self._set_serving = set_serving
        self._fingerprints: dict[ModelKey, Fingerprint] = {}
        self._looking = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = False

    def start(self) -> None:
        """Looks again as often as configured, on the running loop."""
        if self._every_seconds:
            self._spawn(self._look_regularly)

    def request(self) -> None:
        """Looks again soon, on the running loop."""
        self._spawn(self._look_and_survive)

    def stop(self) -> None:
        """Looks no more, whatever is requested."""
        self._stopped = True
        for task in self._tasks:
            task.cancel()

    async def look(self) -> None:
        """Looks through the repository once.

        New versions go into service; missing ones go out of it and are dropped as their last
        session ends.
        """
        async with self._looking:
            while await self._look_once():
                pass  # at most once for each version that was retired

    async def _look_once(self) -> bool:
        """Returns whether a version that is there was dropped meanwhile, and has to be loaded."""
        known = {
            info.key: Known(info.digest, self._fingerprints.get(info.key))
            for info in self._models.all_loaded()
        }
        try:
            found = await asyncio.to_thread(
                load_repository, self._folder, self._engine, known, self._limits
            )
        except BundleError as error:
            _log.error("the model repository cannot be read", extra={"problem": str(error)})
            return False
        for problem in found.problems:
            _log.error("a model cannot be served", extra={"problem": problem})
        self._fingerprints = found.fingerprints
        entered, left = await self._driver.call(lambda _: self._take_over(found))
        for info in entered:
            await self._set_serving(info, True)
        for info in left:
            await self._set_serving(info, False)
        return any(self._models.loaded(key) is None for key in found.present)

    def _spawn(self, look: Callable[[], Coroutine[Any, Any, None]]) -> None:
        if self._stopped:
            return
        # The loop itself keeps only a weak reference to a task.
        task = asyncio.ensure_future(look())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _look_regularly(self) -> None:
        while True:
            await asyncio.sleep(self._every_seconds)
            await self._look_and_survive()

    async def _look_and_survive(self) -> None:
        try:
            await self.look()
        except Exception:  # noqa: BLE001  what is in service stays there, and the next look comes
            _log.exception("a look through the model repository failed")

    def _take_over(self, found: Repository) -> tuple[list[ModelInfo], list[ModelInfo]]:
        """Puts what was found into service; runs between two ticks.

        Returns what went into service and what went out of it.
        """
        for loaded in found.loaded:
            self._add(loaded)
        entered = [loaded.info for loaded in found.loaded]
        entered += self._models.restore(found.present)
        # A folder with a problem may be half copied; nothing is taken out of service on the word of
        # such a look.
        missing = [info for info in self._models if info.key not in found.present]
        left = [] if found.problems else missing
        for info in left:
            _log.info("model retired", extra={"model": info.key.name, "version": info.key.version})
            self._models.retire(info.key)
        return entered, left

    def _add(self, loaded: Loaded) -> None:
        info = loaded.info
        self._engine.add(info.key, loaded.runner)
        self._models.add(info)
        _log.info(
            "model loaded",
            extra={
                "model": info.key.name,
                "version": info.key.version,
                "digest": info.digest,
                "kernels": loaded.runner.family.name,
                "device": str(self._engine.device),
            },
        )
