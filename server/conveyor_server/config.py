"""Every setting: where it comes from, its unit in its name, its default and its meaning.

Sources, the strongest first: flags, environment variables (`CONVEYOR_LIMITS__SESSIONS_MAX=500`),
a TOML file. An unknown key in any of them is an error.
"""

import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from conveyor.os_errors import os_error_text
from conveyor_server.environment import (
    DELIMITER,
    PREFIX,
    TOKENS,
    TOKENS_FORM,
    environment_problems,
    other_case,
)

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

PORT_MAX = 65_535
_NUMBERS: dict[object, str] = {int: "a whole number", float: "a number"}
_DEVICE = r"^(auto|cpu|cuda(:\d+)?)$"
_ENDPOINT = r"^(https?://[^/\s]+)?$"
_PATTERNS = {
    _DEVICE: "auto, cpu, cuda or cuda:N",
    _ENDPOINT: "http://HOST:PORT, https://HOST:PORT or nothing",
}


class ConfigError(Exception):
    """The configuration is not usable; the message names source, key and problem, a line each."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _flags_are_no_numbers(cls, value: object, info: ValidationInfo) -> object:
        # Python, and pydantic with it, takes true for 1.
        expected = _NUMBERS.get(cls.model_fields[info.field_name or ""].annotation)
        if isinstance(value, bool) and expected is not None:
            raise ValueError(f"found {str(value).lower()}; expected {expected}")
        return value


class ListenConfig(_Section):
    """Where the server answers."""

    address: str = "127.0.0.1:50051"
    """host:port of the gRPC services; port 0 takes a free one."""
    metrics_address: str = "127.0.0.1:9464"
    """host:port of the Prometheus endpoint; port 0 takes a free one; empty turns it off."""
    ready_file: Path | None = None
    """Written once the server serves: a JSON object with the two bound addresses. For scripts."""
    reflection: bool = False
    """Whether clients may discover the services by gRPC reflection."""
    tls_certificate_file: Path | None = None
    """PEM chain; with the key below the gRPC port speaks TLS only."""
    tls_key_file: Path | None = None
    """PEM private key."""
    tls_client_ca_file: Path | None = None
    """PEM of authorities: with it a client has to show a certificate that one of them signed."""

    @field_validator("address", "metrics_address")
    @classmethod
    def _is_an_address(cls, address: str, info: ValidationInfo) -> str:
        # grpc takes a port it cannot use for some other one, without a word.
        host, _, port = address.rpartition(":")
        usable = bool(host) and port.isascii() and port.isdecimal() and int(port) <= PORT_MAX
        if not usable and not (info.field_name == "metrics_address" and not address):
            raise ValueError(f"found {address!r}; expected host:port, the port 0 to {PORT_MAX}")
        return address


class ModelsConfig(_Section):
    """What is served."""

    folder: Path = Path("models/zoo")
    """The model repository: NAME/ or NAME/VERSION/ bundles."""
    reload_seconds: float = Field(default=0.0, ge=0)
    """How often the repository is looked through for changes; 0: only on SIGHUP."""


class EngineConfig(_Section):
    """How the arithmetic runs."""

    device: str = Field(default="auto", pattern=_DEVICE)
    """auto takes the first CUDA device that can be used, else the CPU; cuda and cuda:N insist."""
    cpu_threads: int = Field(default=1, ge=1, le=256)
    """Threads of one engine call on a CPU.

    Outputs are bit-identical for one setting of this, not across settings.
    """
    slots: int = Field(default=1024, ge=1, le=1_000_000)
    """Sessions of one model version with their carry on the device at once.

    The others are paged out.
    """
    batch_sessions_max: int = Field(default=256, ge=1, le=65_536)
    """Sessions in one tick."""
    quantum_steps: int = Field(default=16, ge=1, le=65_536)
    """Steps of one session in one tick."""
    inline_multiply_adds_max: int = Field(default=200_000_000, ge=0)
    """A tick of no more work runs on the event loop itself, a heavier one on a thread of its own.

    That leaves the loop free to go on reading and writing. Crossing threads costs about 0.1 ms,
    which a small tick would feel.
    """
    verify_same_bits: bool = True
    """Check at load, on this machine, that a row's result does not depend on its batch.

    Where the fast kernels fail the check, slower ones that pass it are used.
    """


class LimitsConfig(_Section):
    """Bounds of every queue, count, size and time."""

    message_bytes_max: int = Field(default=4 * 2**20, ge=1024, le=2**30)
    """Bytes in one message from a client."""
    metadata_bytes_max: int = Field(default=16 * 2**10, ge=1024, le=2**20)
    """Bytes of request metadata."""
    chunk_steps_max: int = Field(default=16_384, ge=1)
    """Steps in one chunk; a bundle may set a lower one for itself."""
    predict_steps_max: int = Field(default=65_536, ge=1)
    """Steps in one Predict call."""
    generate_steps_max: int = Field(default=65_536, ge=1)
    """Steps in one Generate call, prompt and outputs together."""
    sessions_max: int = Field(default=100_000, ge=1)
    """Sessions on this server."""
    principal_sessions_max: int = Field(default=10_000, ge=1)
    """Sessions of one principal; below `sessions_max`, so that no one takes them all."""
    stream_sessions_max: int = Field(default=4_096, ge=1)
    """Sessions open on one stream."""
    streams_max: int = Field(default=4_096, ge=1)
    """StreamSteps and ModelStreamInfer calls at once."""
    concurrent_calls_max: int = Field(default=16_384, ge=1)
    """Calls at once, health aside, that were let in."""
    connections_max: int = Field(default=8_192, ge=1, le=2**31 - 1)
    """Connections at once; beyond it new ones are closed unanswered.

    Where the process may open fewer files, fewer connections are taken.
    """
    connection_calls_max: int = Field(default=1_024, ge=1, le=2**28 - 1)
    """Calls at once on one connection, health aside, that were let in.

    The transport is told to take eight times as many, which is what a burst of short calls needs.
    """
    connection_idle_seconds_max: float = Field(default=120.0, gt=0, le=2**31 / 1000 - 1)
    """Time without a call after which a connection is closed; clients connect again by themselves.
    """
    connection_handshake_seconds_max: float = Field(default=10.0, gt=0, le=2**31 / 1000 - 1)
    """Time for a new connection to end its TLS handshake and to begin to speak HTTP/2."""
    request_bytes_max: int = Field(default=256 * 2**20, ge=1024)
    """Bytes of unary requests that are handled at once.

    One that takes its time to arrive counts as the largest there may be. A single one always fits.
    """
    message_seconds_max: float = Field(default=5.0, gt=0)
    """Time for the message of a unary request to arrive."""
    health_calls_max: int = Field(default=1_024, ge=1)
    """Calls of Health.Watch at once, and calls of Health.Check that wait for their message.

    Health asks for no token. Of such Checks the one that has waited longest is given up.
    """
    connection_watches_max: int = Field(default=16, ge=1)
    """Calls of Health.Watch at once on one connection."""
    memory_rows_max: int = Field(default=4_096, ge=1)
    """Rows in what one session attends over; a bundle may set a lower one for itself.

    Neither is reached where so many rows would not fit into a message together with the carry.
    """
    memories_bytes_max: int = Field(default=2 * 2**30, ge=1)
    """Bytes of what all sessions attend over; what forks share counts once."""
    predictions_max: int = Field(default=64, ge=1)
    """Predict calls at once on models with layers that run from the end."""
    running_predictions_max: int = Field(default=4, ge=1)
    """Those of them that are begun; the others wait for their turn.

    One that is begun holds what a layer puts out at every step.
    """
    steps_in_flight_max: int = Field(default=32_768, ge=1)
    """Steps of one session accepted and not yet answered; `chunk_steps_max` or more."""
    frame_entries_max: int = Field(default=16_384, ge=1)
    """Entries in one steps frame."""
    inbox_chunks_max: int = Field(default=65_536, ge=1)
    """Chunks accepted and not yet finished, on this server."""
    inbox_bytes_max: int = Field(default=256 * 2**20, ge=1024)
    """Bytes of those chunks' rows."""
    outbox_bytes_max: int = Field(default=8 * 2**20, ge=1024)
    """Bytes of results for one stream's client, wanted of what was taken or waiting to be read.

    Beyond it nothing more is taken from that stream; a single chunk may want more by itself.
    """
    result_bytes_max: int = Field(default=64 * 2**20, ge=1024)
    """Bytes of results that one chunk or one Predict call may ask for."""
    results_total_bytes_max: int = Field(default=512 * 2**20, ge=1024)
    """Bytes of results for all clients, wanted of what was taken or waiting to be read.

    Beyond it nothing more is taken from streams until some are read, and unary calls that want
    more than 4 KiB are refused. A stream's first 64 KiB do not count. It is
    `principal_results_bytes_max` or more.
    """
    principal_results_bytes_max: int = Field(default=128 * 2**20, ge=1024)
    """The same for the clients of one principal; `result_bytes_max` or more."""
    slow_reader_seconds_max: float = Field(default=30.0, gt=0)
    """How long a stream may stay blocked on a client that reads nothing."""
    idle_seconds_default: float = Field(default=600.0, gt=0)
    """Idle time after which a session ends, if it asks for none; `idle_seconds_max` or less."""
    idle_seconds_max: float = Field(default=86_400.0, gt=0)
    """The longest idle time a session may ask for."""
    lifetime_seconds_max: float = Field(default=30 * 86_400.0, gt=0)
    """Time after which a session ends however busy it is."""
    held_results_steps_max: int = Field(default=256, ge=0)
    """Steps of one session whose inputs and results are held for retries."""
    held_results_bytes_max: int = Field(default=128 * 2**10, ge=0)
    """Bytes of one session's held inputs and results."""
    held_results_total_bytes_max: int = Field(default=512 * 2**20, ge=0)
    """Bytes of all sessions' held inputs and results.

    At the bound the least recently stepped session's are dropped.
    """
    replay_steps_max: int = Field(default=16_384, ge=1)
    """Steps a client may have sent and not seen answered or made durable."""
    replay_bytes_max: int = Field(default=4 * 2**20, ge=1024)
    """Bytes of those steps' rows."""
    host_state_bytes_max: int = Field(default=8 * 2**30, ge=1024)
    """Bytes of paged-out carries in host memory.

    Beyond it the longest idle sessions are evicted.
    """
    ended_sessions_max: int = Field(default=65_536, ge=0)
    """Ended sessions remembered: why they ended, for their owners, and how often they were claimed.

    So what was still on its way to one of them cannot run on a later session of the same id.
    """
    ended_seconds_max: float = Field(default=3_600.0, ge=0)
    """How long it is remembered."""
    fork_sessions_max: int = Field(default=64, ge=1)
    """Copies in one ForkSession call."""
    labels_max: int = Field(default=16, ge=0)
    """Labels on a session."""


class AuthConfig(_Section):
    """Who may call."""

    tokens: dict[str, str] = Field(default_factory=dict)
    """Bearer token -> principal. Empty: everybody is the one principal `anonymous`."""

    @field_validator("tokens")
    @classmethod
    def _tokens_usable(cls, tokens: dict[str, str]) -> dict[str, str]:
        for token, principal in tokens.items():
            if len(token) < 16:
                raise ValueError("a token has fewer than 16 characters; make it longer")
            if not principal or not principal.isprintable():
                raise ValueError("a principal is empty or has characters that cannot be printed")
        return tokens


class ShutdownConfig(_Section):
    """How the server stops on SIGTERM."""

    grace_seconds: float = Field(default=10.0, ge=0)
    """Time for streams to take their last results; then they are cut."""
    reconnect_after_seconds: float = Field(default=1.0, ge=0)
    """What drain frames tell clients to wait."""


class LogConfig(_Section):
    """The log: JSON lines on standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Lines below it are not written."""


class TracingConfig(_Section):
    """OpenTelemetry spans; they need the extra `otel`."""

    endpoint: str = Field(default="", pattern=_ENDPOINT)
    """Where spans are sent: an OTLP collector that speaks gRPC, as in http://127.0.0.1:4317.

    https speaks TLS. Empty: nothing is traced.
    """
    sample_ratio: float = Field(default=1.0, ge=0, le=1)
    """The share of calls that is traced of those whose caller has not decided."""
    service_name: str = Field(default="conveyor", min_length=1, max_length=255)
    """What the server is called in traces."""
    events_max: int = Field(default=128, ge=1, le=65_536)
    """Waits and ticks kept of one call; of a longer one the last."""
    spans_queued_max: int = Field(default=2_048, ge=1, le=1_000_000)
    """Spans that wait to be sent; beyond it the oldest are dropped."""
    export_seconds_max: float = Field(default=5.0, gt=0)
    """How long sending some spans may take, and at the stop all that are left."""


class Config(BaseSettings):
    """All settings of one server process."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter=DELIMITER,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
    )

    listen: ListenConfig = ListenConfig()
    models: ModelsConfig = ModelsConfig()
    engine: EngineConfig = EngineConfig()
    limits: LimitsConfig = LimitsConfig()
    auth: AuthConfig = AuthConfig()
    shutdown: ShutdownConfig = ShutdownConfig()
    log: LogConfig = LogConfig()
    tracing: TracingConfig = TracingConfig()

    @model_validator(mode="after")
    def _no_contradictions(self) -> Self:
        """Refuses a setting that another one makes impossible to reach."""
        limits = self.limits
        if limits.chunk_steps_max > limits.steps_in_flight_max:
            raise ValueError(
                f"limits.chunk_steps_max is {limits.chunk_steps_max}; expected at most"
                f" limits.steps_in_flight_max, which is {limits.steps_in_flight_max}"
            )
        if limits.idle_seconds_default > limits.idle_seconds_max:
            raise ValueError(
                f"limits.idle_seconds_default is {limits.idle_seconds_default:g}; expected at most"
                f" limits.idle_seconds_max, which is {limits.idle_seconds_max:g}"
            )
        for smaller, larger in (
            ("result_bytes_max", "principal_results_bytes_max"),
            ("principal_results_bytes_max", "results_total_bytes_max"),
        ):
            if getattr(limits, smaller) > getattr(limits, larger):
                raise ValueError(
                    f"limits.{smaller} is {getattr(limits, smaller)}, more than"
                    f" limits.{larger} with {getattr(limits, larger)}"
                )
        if (self.listen.tls_certificate_file is None) != (self.listen.tls_key_file is None):
            here, missing = ("tls_certificate_file", "tls_key_file")
            if self.listen.tls_certificate_file is None:
                here, missing = missing, here
            raise ValueError(f"listen.{here} is set, but listen.{missing} is not; set both or none")
        if self.listen.tls_client_ca_file and self.listen.tls_certificate_file is None:
            raise ValueError(
                "listen.tls_client_ca_file is set, but listen.tls_certificate_file is not;"
                " set them together"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags over environment over file; see `load_config`."""
        assert isinstance(init_settings, InitSettingsSource)
        # pydantic-settings declares a bare dict.
        kwargs = init_settings.init_kwargs  # pyright: ignore[reportUnknownMemberType]
        given = cast(dict[str, dict[str, Any]], kwargs)
        flags, file = given.get("flags", {}), given.get("file", {})
        return (
            InitSettingsSource(settings_cls, init_kwargs=flags),
            env_settings,
            InitSettingsSource(settings_cls, init_kwargs=file),
        )


def load_config(file: Path | None = None, flags: Mapping[str, str] | None = None) -> Config:
    """Reads the configuration.

    Args:
        file: A TOML file with one table for each section.
        flags: `section.key` -> value as text, for instance `{"engine.device": "cpu"}`.

    Raises:
        ConfigError: A file that cannot be read, an unknown key or a value out of its range; every
            problem is named.
    """
    # pydantic-settings reads the variables it knows, in any case, and passes over the others.
    if problems := list(environment_problems(os.environ, _keys())):
        raise ConfigError("\n".join(problems))
    in_file, in_flags = _read_toml(file) if file else {}, _nest(flags or {})
    if wrong := other_case((*in_file, *in_flags), Config.model_fields):
        raise ConfigError(
            "\n".join(f"{name}: unknown section; did you mean {name.lower()}?" for name in wrong)
        )
    try:
        # Not fields, but what `settings_customise_sources` reads.
        return Config(
            file=in_file,  # pyright: ignore[reportCallIssue]
            flags=in_flags,  # pyright: ignore[reportCallIssue]
        )
    except ValidationError as error:
        problems = [
            ": ".join(filter(None, (_setting(item), _problem(item))))
            for item in error.errors(include_url=False)
        ]
        raise ConfigError("\n".join(problems)) from error
    except SettingsError as error:
        raise ConfigError(f"environment: {error}") from error


def _setting(item: "ErrorDetails") -> str:
    """Which setting is wrong, without what may be a token."""
    # Section and key only: what lies below is the caller's.
    where = item["loc"][:2]
    if item["type"] == "extra_forbidden" and where[0] == "auth":
        where = where[:1]
    return ".".join(map(str, where))


def _problem(item: "ErrorDetails") -> str:
    """What is wrong with one setting, in this file's words."""
    where = item["loc"]
    if item["type"] == "extra_forbidden":
        if len(where) == 1:
            return "unknown section" + _guess(str(where[0]), Config.model_fields)
        if where[0] == "auth":
            return (
                "unknown key, not shown as it may be a token; tokens are given in [auth.tokens], or"
                f" as {TOKENS}='{TOKENS_FORM}'"
            )
        return "unknown key" + _guess(str(where[-1]), _keys().get(str(where[0]), ()))
    if item["type"] == "model_type" and len(where) == 1:
        return "is a section, which has keys and no value of its own"
    if item["type"] == "value_error":
        return item["msg"].removeprefix("Value error, ")
    # Only here, where it is needed: torch comes along.
    from conveyor_models.problems import expected, found_instead  # noqa: PLC0415

    kind, context = item["type"], item.get("ctx", {})
    if where[:1] == ("auth",):  # what is found may be a token
        return f"expected {expected(kind, context, _PATTERNS)}"
    return found_instead(item["input"], kind, context, _PATTERNS)


def _keys() -> dict[str, list[str]]:
    """The keys of each section."""
    # Every field is a section, which the type of an annotation does not tell.
    return {
        name: list(cast(type[_Section], field.annotation).model_fields)
        for name, field in Config.model_fields.items()
    }


def _guess(name: str, known: Iterable[str]) -> str:
    """The closest of the known names, or else the setting of that name in any section."""
    close = difflib.get_close_matches(name, list(known), n=1)
    if not close:
        close = [f"{section}.{name}" for section, keys in _keys().items() if name in keys]
    return f"; did you mean {close[0]}?" if close else ""


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(os_error_text(error, file)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not text in UTF-8") from error
    except ValueError as error:
        raise ConfigError(f"{file}: not valid TOML: {error}") from error


def _nest(flags: Mapping[str, str]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, value in flags.items():
        section, _, key = path.partition(".")
        if not key:
            raise ConfigError(f"{path}: expected SECTION.KEY, as in limits.sessions_max")
        nested.setdefault(section, {})[key] = value
    return nested
