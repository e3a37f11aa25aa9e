"""The client: one channel, its streams, and a method for every call of the contract."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from types import TracebackType
from typing import Self
from uuid import uuid4

import numpy.typing as npt

from conveyor.v1 import model_pb2, session_pb2
from conveyor_client._by_id import ById
from conveyor_client._calls import Calls, Metadata, Tls
from conveyor_client._errors import ConveyorError, LimitExceeded, NotOpen, Unavailable
from conveyor_client._generation import Generation
from conveyor_client._home import Home
from conveyor_client._lane import Lane
from conveyor_client._nouns import (
    DURABILITIES,
    OPEN_MODES,
    OUTPUT_MODES,
    Durability,
    FloatArray,
    ModelInfo,
    OpenMode,
    Output,
    Rows,
    model_from_proto,
)
from conveyor_client._policy import Options
from conveyor_client._requests import duration, make_open_request
from conveyor_client._rows import RowCodec, pack_memory
from conveyor_client._session import Session

_HEALTH_POLL_SECONDS = 0.05


class Client(ById):
    """A connection to a Conveyor server, or to a proxy before several.

    Open it with ``async with`` or close it with `aclose`. It connects at its first call and belongs
    to the event loop that runs then, so it may be made before any does. Whoever forks closes it
    before: neither it nor another client can be used in the child of a process with an open one.

    Args:
        target: Where the server is, as gRPC names it: "host:port", "unix:path", "dns:///name:port".
        token: Sent as "authorization: Bearer ..." with every call.
        tls: How to speak TLS; None speaks plain HTTP/2.
        metadata: Sent with every call.
        options: Times and bounds.

    Raises:
        InvalidField: The target has a port above 65535.
        NotOpen: This process was forked while a client was open.
    """

    def __init__(
        self,
        target: str,
        *,
        token: str | None = None,
        tls: Tls | None = None,
        metadata: Metadata = (),
        options: Options | None = None,
    ) -> None:
        self.options = options or Options()
        home = Home(self)
        super().__init__(Calls(target, self.options, home, token=token, tls=tls, metadata=metadata))
        self._key = uuid4().hex
        self._lanes: list[Lane] = []
        self._lanes_made = 0
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes every stream and the channel; sessions still open live on within their lease.

        In a forked child nothing happens: the connection is the parent's.

        Raises:
            NotOpen: It belongs to another event loop, which is not closed.
        """
        if not self.home.forked and not self.home.lost:
            self.home.enter()
            lanes, self._lanes = self._lanes, []
            await asyncio.gather(*(lane.aclose() for lane in lanes))
        self._closed = True
        await self.calls.aclose()

    # --- sessions on a stream --------------------------------------------------------------------

    def session(
        self,
        model: str,
        *,
        version: int = 0,
        session_id: str | None = None,
        mode: OpenMode = "either",
        idle_seconds: float | None = None,
        durability: Durability = "default",
        memory: npt.ArrayLike | None = None,
        labels: Mapping[str, str] | None = None,
        output: Output = "all",
        own_stream: bool = False,
    ) -> Session:
        """Describes a session; ``async with`` opens it.

        Args:
            model: The model's name.
            version: Its version; 0 means the newest.
            session_id: Its id; made up if None.
            mode: What to do if there is a session of that id: "either" resumes it, "create"
                refuses, "resume" refuses if there is none.
            idle_seconds: After so long without a step or heartbeat the session ends.
            durability: How the server keeps the state through its own death.
            memory: What the model attends over, (M, memory row elements).
            labels: The caller's own notes.
            output: Which rows of a chunk come back, if a step does not say otherwise.
            own_stream: Share the stream with no other session; a proxy then routes by the session
                id.

        Returns:
            The session, not opened yet.
        """
        request = make_open_request(
            model=model,
            version=version,
            session_id=session_id or uuid4().hex,  # ours, so that opening twice opens one
            mode=OPEN_MODES[mode],
            durability=DURABILITIES[durability],
            idle_seconds=idle_seconds,
            memory=None if memory is None else pack_memory(memory),
            labels=labels,
        )
        return Session(self, request, output=output, own_stream=own_stream)

    def resume(
        self,
        session_id: str,
        *,
        token: str = "",
        output: Output = "all",
        own_stream: bool = False,
    ) -> Session:
        """Describes a session that exists; ``async with`` takes it over from whoever holds it.

        Args:
            session_id: The session.
            token: The `Session.token` of the claim before, if at hand.
            output: Which rows of a chunk come back, if a step does not say otherwise.
            own_stream: Share the stream with no other session.

        Returns:
            The session, not opened yet.
        """
        request = make_open_request(
            session_id=session_id, token=token, mode=session_pb2.OPEN_MODE_RESUME
        )
        return Session(self, request, output=output, own_stream=own_stream)

    async def import_session(
        self,
        snapshot: bytes,
        *,
        session_id: str = "",
        idle_seconds: float | None = None,
        output: Output = "all",
        timeout_seconds: float | None = None,
    ) -> Session:
        """Makes a session from a snapshot.

        Args:
            snapshot: From `Session.export`.
            session_id: Its id; empty means the id in the snapshot.
            idle_seconds: After so long without a step or heartbeat the session ends.
            output: Which rows of a chunk come back, if a step does not say otherwise.
            timeout_seconds: Overrides the client's.

        Returns:
            The session, not opened yet.

        Raises:
            SnapshotCorrupt: The snapshot is damaged.
            SnapshotIncompatible: It is of another model or format.
            ConveyorError: Anything else, by class.
        """
        request = session_pb2.ImportSessionRequest(snapshot=snapshot, session_id=session_id)
        if idle_seconds is not None:
            request.idle_ttl.CopyFrom(duration(idle_seconds))
        response = await self.calls.unary(
            self.calls.sessions.ImportSession, request, timeout_seconds=timeout_seconds
        )
        return self.resume(response.session.session_id, output=output)

    # --- without a session -----------------------------------------------------------------------

    async def generate(
        self,
        model: str,
        prompt: Rows,
        *,
        steps_max: int,
        version: int = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        stop_tokens: Sequence[int] = (),
        seed: int = 0,
        memory: npt.ArrayLike | None = None,
        timeout_seconds: float | None = None,
    ) -> Generation:
        """Lets a model go on from a prompt; the session made for it ends with the call.

        Args:
            model: The model's name.
            prompt: A chunk to run first.
            steps_max: At most so many outputs are made.
            version: The model's version; 0 means the newest.
            temperature: 0 takes the most probable token; 1 samples from the model's own
                distribution.
            top_k: Sample among so many most probable tokens; 0 means all.
            stop_tokens: Generation ends after any of these.
            seed: The same seed gives the same tokens.
            memory: What the model attends over, (M, memory row elements).
            timeout_seconds: For the whole of it; overrides the client's.

        Returns:
            An asynchronous iterator of tokens, or of output rows (O,) for other models.

        Raises:
            ModelNotFound: There is none.
            ConveyorError: Anything else, by class, here or from the iterator.
        """
        codec = RowCodec(await self.cached_model(model, version))
        rows, length, _ = codec.encode(prompt)
        request = session_pb2.GenerateRequest(
            model=model,
            version=version,
            prompt=rows,
            prompt_length=length,
            steps_max=steps_max,
            temperature=temperature,
            top_k=top_k,
            stop_tokens=stop_tokens,
            seed=seed,
            memory=None if memory is None else pack_memory(memory),
        )
        responses = self.calls.stream(
            self.calls.sessions.Generate, request, timeout_seconds=timeout_seconds
        )
        return Generation(responses, codec)

    async def predict(
        self,
        model: str,
        inputs: Rows,
        *,
        version: int = 0,
        output: Output = "all",
        memory: npt.ArrayLike | None = None,
        timeout_seconds: float | None = None,
    ) -> FloatArray:
        """Runs one whole sequence; no session is kept.

        Args:
            model: The model's name.
            inputs: The sequence: (K, D) features or (K,) tokens.
            version: The model's version; 0 means the newest.
            output: Which rows come back.
            memory: What the model attends over, (M, memory row elements).
            timeout_seconds: Overrides the client's.

        Returns:
            (K, O); with output "last" (O,); with "none" (0, O).

        Raises:
            ModelNotFound: There is none.
            InvalidInput: The rows are not what the model takes.
            ConveyorError: Anything else, by class.
        """
        codec = RowCodec(await self.cached_model(model, version))
        rows, length, single = codec.encode(inputs)
        request = session_pb2.PredictRequest(
            model=model,
            version=version,
            length=length,
            rows=rows,
            output=OUTPUT_MODES[output],
            memory=None if memory is None else pack_memory(memory),
        )
        response = await self.calls.unary(
            self.calls.sessions.Predict, request, timeout_seconds=timeout_seconds, repeatable=True
        )
        return codec.decode(response.rows, single or output == "last")

    # --- models and health -----------------------------------------------------------------------

    async def models(
        self, *, page_size: int = 0, timeout_seconds: float | None = None
    ) -> AsyncGenerator[ModelInfo, None]:
        """Lists the models in order of name and version, fetching page after page.

        Args:
            page_size: Models in a page; 0 means the server's choice.
            timeout_seconds: For each page; overrides the client's.

        Yields:
            The models.

        Raises:
            ConveyorError: What went wrong, by class.
        """
        request = model_pb2.ListModelsRequest(page_size=page_size)
        while True:
            response = await self.calls.unary(
                self.calls.models.ListModels,
                request,
                timeout_seconds=timeout_seconds,
                repeatable=True,
            )
            for model in response.models:
                yield model_from_proto(model)
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    async def healthy(self, service: str = "", *, timeout_seconds: float | None = None) -> bool:
        """Asks grpc.health.v1 whether something serves.

        Args:
            service: Empty for the whole server, else the name of a service or of a model as the
                server registers it.
            timeout_seconds: Overrides the client's.

        Returns:
            Whether it serves; False also for a name the server does not know.

        Raises:
            ConveyorError: The server could not be asked.
        """
        return await self.calls.health(service, timeout_seconds)

    async def wait_healthy(self, service: str = "", *, timeout_seconds: float = 30.0) -> bool:
        """Asks again and again until it serves.

        Args:
            service: As for `healthy`.
            timeout_seconds: When to give up.

        Returns:
            Whether it serves now.
        """
        give_up_at = asyncio.get_running_loop().time() + timeout_seconds
        while asyncio.get_running_loop().time() < give_up_at:
            if await self._healthy_now(service):
                return True
            await asyncio.sleep(_HEALTH_POLL_SECONDS)
        return False

    async def _healthy_now(self, service: str) -> bool:
        try:
            return await self.healthy(service, timeout_seconds=1.0)
        except Unavailable:
            return False
        except ConveyorError as error:
            if not error.retryable:
                raise
            return False

    # --- for sessions ----------------------------------------------------------------------------

    @property
    def home(self) -> Home:
        """Where the client may be used."""
        return self.calls.home

    def lane_for(self, model: ModelInfo | None, *, own_key: str = "") -> Lane:
        """Finds a stream with room for one session more, or makes one."""
        if self._closed:
            raise NotOpen("the client is closed")
        self._lanes = [lane for lane in self._lanes if not lane.closed]
        if not own_key:
            for lane in self._lanes:
                if lane.has_room:
                    return lane
        if len(self._lanes) >= self.options.streams_max:
            raise LimitExceeded(
                f"no room for one more session: each of the client's {len(self._lanes)} streams is"
                f" full (Options.streams_max is {self.options.streams_max})"
            )
        sessions_max = self.options.stream_sessions_max
        if model is not None and model.limits.stream_sessions_max > 0:
            sessions_max = min(sessions_max, model.limits.stream_sessions_max)
        self._lanes_made += 1
        key = own_key or f"{self._key}-{self._lanes_made}"
        sessions_max = 1 if own_key else sessions_max
        lane = Lane(self.calls.steps, key, self.options, sessions_max, self.calls.target)
        self._lanes.append(lane)
        return lane
