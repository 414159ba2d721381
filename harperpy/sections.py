"""The sections of config.yaml: frozen structs, their keys, defaults and units."""

from collections.abc import Mapping
from typing import Any

from msgspec import Struct, field, to_builtins

from .leaves import (
    ApiKey,
    Count,
    Day,
    Dimension,
    Durability,
    Duration,
    DurationOrOff,
    FilePath,
    Flag,
    HashFunction,
    Host,
    HttpUrl,
    Kind,
    Level,
    Limit,
    LimitOrZero,
    LockTimeout,
    MeterStore,
    Money,
    Patience,
    Period,
    PluginBlock,
    Port,
    Positive,
    SecondsOrOff,
    Size,
    SizeOrOff,
    SqliteUrl,
    Text,
    TransportName,
    Unpriced,
    WorkerCount,
)
from .secret import Plain, encode_hook, masked


class Section(Struct, frozen=True, rename="camel"):
    """A block of config.yaml; its repr shows no secret, not even one in a plugin's options."""

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        plain: dict[str, Plain] = to_builtins(self, enc_hook=encode_hook)
        return [(key, masked(value, key)) for key, value in plain.items()]

    def __repr__(self) -> str:
        shown = ", ".join(f"{key}={value!r}" for key, value in self.__rich_repr__())
        return f"{type(self).__name__}({shown})"


class HttpConfig(Section, frozen=True, kw_only=True):
    """The REST port; 0 takes a free one. Times in milliseconds.

    By default `dev` serves this machine with `cors`, `run` all interfaces without. `workers` is how
    many processes `run` has serve it; `auto` is one for each processor that it may use. With
    `pinWorkers` each keeps to one of them, where there are enough (on Linux). One whose loop does
    not turn for `workerTimeout` is killed and started again; 0 is never. `timeout` is how long a
    body may take to arrive, and a verb to return. Beyond `maxConcurrentRequests` (GET, HEAD,
    OPTIONS and streams do not count) requests wait for `requestQueueLimit`, and are then 503; each
    worker counts by itself. `maxHeaderSize` bounds each line of a head, `headersTimeout` how long
    it takes. A whole answer of more than `compressionThreshold` bytes is gzip to who takes it; 0 is
    never. `front` serves requests of the common form without aiohttp.
    """

    port: Port = 9926
    host: Host | None = None
    workers: WorkerCount = 1
    pin_workers: Flag = True
    worker_timeout: DurationOrOff = 60_000
    max_body_size: Size = 10_000_000
    cors: Flag | None = None
    cors_access_list: tuple[Text, ...] = ("*",)
    timeout: DurationOrOff = 120_000
    headers_timeout: DurationOrOff = 60_000
    keep_alive_timeout: Duration = 30_000
    max_header_size: Size = 16_384
    max_concurrent_requests: Positive | None = None
    request_queue_limit: Patience = 20_000
    compression_threshold: SizeOrOff = 0
    front: Flag = True

    @property
    def worker_timeout_seconds(self) -> float:
        """How long a worker's loop may not turn, in seconds; 0 is no limit."""
        return self.worker_timeout / 1000

    @property
    def timeout_seconds(self) -> float:
        """How long a body may take to arrive, and a verb to return, in seconds; 0 is no limit."""
        return self.timeout / 1000

    @property
    def headers_timeout_seconds(self) -> float:
        """How long a head may take from its first byte to its last, in seconds; 0 is no limit."""
        return self.headers_timeout / 1000

    @property
    def keep_alive_timeout_seconds(self) -> float:
        """How long a connection may be without a request, in seconds."""
        return self.keep_alive_timeout / 1000


class NetworkConfig(Section, frozen=True, kw_only=True):
    """The operations port, on loopback unless it says otherwise. `cors` of None: by mode."""

    port: Port = 9925
    host: Host = "localhost"
    cors: Flag | None = None
    cors_access_list: tuple[Text, ...] = ("*",)


class OperationsApiConfig(Section, frozen=True, kw_only=True):
    """The port that takes operations on users, keys and rows; `cors` as for the REST port."""

    network: NetworkConfig = NetworkConfig()


class AuthenticationConfig(Section, frozen=True, kw_only=True):
    """Who is trusted, and for how long (in milliseconds).

    `authorizeLocal` makes a super user of who calls from this machine without a credential;
    `cacheTTL` is how long a verified one is remembered. `slowGuesses` makes who sends wrong
    passwords wait; without it, something before the server has to.
    """

    authorize_local: Flag = False
    cache_ttl: DurationOrOff = field(default=30_000, name="cacheTTL")
    operation_token_timeout: Duration = 86_400_000
    refresh_token_timeout: Duration = 30 * 86_400_000
    hash_function: HashFunction = "argon2id"
    slow_guesses: Flag = True

    @property
    def cache_seconds(self) -> float:
        """How long a verified credential is remembered, in seconds; 0 is not at all."""
        return self.cache_ttl / 1000

    @property
    def operation_token_seconds(self) -> float:
        """How long an operation token lives, in seconds."""
        return self.operation_token_timeout / 1000

    @property
    def refresh_token_seconds(self) -> float:
        """How long a refresh token lives, in seconds."""
        return self.refresh_token_timeout / 1000


class AuthEventsConfig(Section, frozen=True, kw_only=True):
    """Which logins leave a line in the log: who, from where, at what; never the secret."""

    log_failed: Flag = True
    log_successful: Flag = False


class LoggingConfig(Section, frozen=True, kw_only=True):
    """What is logged (by default `dev` from info on, `run` from warn), and which writes audited."""

    level: Level | None = None
    std_streams: Flag = True
    audit_auth_events: AuthEventsConfig = AuthEventsConfig()
    audit_log: Flag = True
    audit_retention: Duration = 3 * 86_400_000


class AccountingConfig(Section, frozen=True, kw_only=True):
    """How safely model calls are written down, and for how long.

    With `durability: process` what was noted outlives the process, however it ends; with `fsync` a
    power cut, too. `journalSize` is how many bytes of it may wait for the database, by process:
    beyond that, calls are refused until it takes them.
    """

    durability: Durability = "process"
    journal_size: Size = 64_000_000
    retention: Duration = 90 * 86_400_000

    @property
    def retention_seconds(self) -> float:
        """How long a row of the ledger is kept, in seconds."""
        return self.retention / 1000


class AnalyticsConfig(Section, frozen=True, kw_only=True):
    """How often what is measured becomes rows (seconds), and for how long those are kept."""

    aggregate_period: SecondsOrOff = 60.0
    retention: Duration = 365 * 86_400_000


class DatabaseConfig(Section, frozen=True, kw_only=True):
    """Where the `system` schema lives: by default `system.db` in the data folder.

    A path in `url`, as that of `rootPath`, is relative to the project's folder. `busyTimeout` is
    how long a transaction waits to write, `transactionTimeout` how long it may keep others waiting
    once it has written (milliseconds).
    """

    url: SqliteUrl | None = None
    busy_timeout: LockTimeout = 5_000
    transaction_timeout: Duration = 30_000


class ModelConfig(Section, frozen=True, kw_only=True):
    """One logical model; KIND is `generative` or `embedding`, NAME what callers ask for.

    `default` is for who names none, `gpt-*` for any name that begins so. `model` is the provider's
    name for it (NAME if not given), `fallback` what to try after it. By default the `openai` one
    has 10 s to connect, 60 s to begin a stream, 120 s of silence in it, 10 minutes, and 2 retries.
    Its requests go over connections of harperpy's `own`, or over `aiohttp`'s client, which heeds
    HTTP_PROXY, HTTPS_PROXY and NO_PROXY and reads compressed answers.
    """

    backend: Kind
    model: Text | None = None
    api_key: ApiKey | None = None
    base_url: HttpUrl | None = None
    organization: Text | None = None
    fallback: tuple[Text, ...] = ()
    request_timeout_ms: Positive | None = None
    connect_timeout_ms: Positive | None = None
    first_byte_timeout_ms: Positive | None = None
    idle_timeout_ms: Positive | None = None
    max_retries: Count | None = None
    transport: TransportName = "own"
    model_file: FilePath | None = None


class ModelsConfig(Section, frozen=True, kw_only=True):
    """The logical models of each kind, by name, in the file's order."""

    generative: Mapping[str, ModelConfig] = {}
    embedding: Mapping[str, ModelConfig] = {}


def _default_models() -> ModelsConfig:
    both = {"default": ModelConfig(backend="local"), "echo": ModelConfig(backend="echo")}
    return ModelsConfig(generative=both, embedding=both)


class PriceConfig(Section, frozen=True, kw_only=True):
    """What a provider's model costs per million tokens, `from` a day (UTC) on; in one currency.

    `model` is the provider's name for it or a pattern (`gpt-4o*`), `backend` a kind or a name of
    `models:` where it matters who serves it. `cachedInput` (`input` if not given) is for the cached
    part of a prompt; reasoning is output. Of what has no price here the price is unknown: what is
    free says 0. `version` (by default made of the rest) is what a row names it by. `maxOutput` is
    the most tokens that the model answers with, where budgets are to know it.
    """

    model: Text
    backend: Text | None = None
    input: Money | None = None
    cached_input: Money | None = None
    output: Money | None = None
    embedding: Money | None = None
    max_output: Positive | None = None
    since: Day | None = field(default=None, name="from")
    version: Text | None = None


class BudgetConfig(Section, frozen=True, kw_only=True):
    """How many `tokens`, or how much `cost`, a `period` has: a day or a month, in UTC.

    Where a model has no price, a budget of money says whether to `refuse` or to `allow` its calls,
    which then cost it nothing.
    """

    tokens: LimitOrZero | None = None
    cost: Money | None = None
    period: Period = "month"
    unknown_price: Unpriced = "refuse"


class LimitConfig(Section, frozen=True, kw_only=True):
    """What each `key` (by id), `user`, `tenant`, `model` or `backend` may take, of all calls.

    `match` is a name or a pattern of them, `model` one of the models that it is about. Each name
    has all of it for itself. `concurrent` counts calls that are being answered.
    """

    per: Dimension
    match: Text = "*"
    model: Text | None = None
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    concurrent: Limit | None = None
    budget: BudgetConfig | None = None


class LimitsConfig(Section, frozen=True, kw_only=True):
    """What callers may take of the models, and where it is counted.

    `store` is `memory` for one process, `database` for the workers of one machine (each the default
    there), or the URL of a Valkey server for several machines.
    """

    store: MeterStore | None = None
    rules: tuple[LimitConfig, ...] = ()


class Config(Section, frozen=True, kw_only=True):
    """All of config.yaml; `plugins` maps name to true, false or options, in the file's order."""

    root_path: FilePath | None = None
    http: HttpConfig = HttpConfig()
    operations_api: OperationsApiConfig = OperationsApiConfig()
    authentication: AuthenticationConfig = AuthenticationConfig()
    logging: LoggingConfig = LoggingConfig()
    accounting: AccountingConfig = AccountingConfig()
    analytics: AnalyticsConfig = AnalyticsConfig()
    database: DatabaseConfig = DatabaseConfig()
    models: ModelsConfig = field(default_factory=_default_models)
    prices: tuple[PriceConfig, ...] = ()
    limits: LimitsConfig = LimitsConfig()
    plugins: Mapping[str, PluginBlock] = {}
