"""config.yaml, decoded once into frozen structs; every refusal names file, key and expectation."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from msgspec import (
    UNSET,
    Meta,
    Struct,
    UnsetType,
    ValidationError,
    convert,
    field,
    structs,
    to_builtins,
)

from .document import Document, KeyPath, Report, Tree
from .errors import ConfigError
from .leaves import (
    ApiKey,
    Count,
    Durability,
    Duration,
    DurationOrOff,
    Flag,
    HashFunction,
    HttpUrl,
    Kind,
    Level,
    Patience,
    PluginBlock,
    Port,
    Positive,
    Size,
    SizeOrOff,
    SqliteUrl,
    Text,
    as_it_is,
)
from .secret import Plain, decode_hook, encode_hook, mask, masked, names_secret
from .spelling import nearest

_LONGEST_SHOWN = 60


class _Section(Struct, frozen=True, rename="camel"):
    """A block of config.yaml; its repr shows no secret, not even one in a plugin's options."""

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        plain: dict[str, Plain] = to_builtins(self, enc_hook=encode_hook)
        return [(key, masked(value, key)) for key, value in plain.items()]

    def __repr__(self) -> str:
        shown = ", ".join(f"{key}={value!r}" for key, value in self.__rich_repr__())
        return f"{type(self).__name__}({shown})"


class HttpConfig(_Section, frozen=True, kw_only=True):
    """The REST port; 0 takes a free one. Times in milliseconds.

    By default `dev` serves this machine with `cors`, `run` all interfaces without. `timeout` is how
    long a body may take to arrive, and a verb to return. Beyond `maxConcurrentRequests` (GET, HEAD,
    OPTIONS and streams do not count) requests wait for `requestQueueLimit`, and are then 503; each
    of the `workers` (processes) counts by itself. `maxHeaderSize` bounds each line of a head,
    `headersTimeout` how long it takes. A whole answer of more than `compressionThreshold` bytes is
    gzip to who takes it; 0 is never.
    """

    port: Port = 9926
    host: Text | None = None
    workers: Positive = 1
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


class NetworkConfig(_Section, frozen=True, kw_only=True):
    """The operations port, on loopback unless it says otherwise. `cors` of None: by mode."""

    port: Port = 9925
    host: Text = "localhost"
    cors: Flag | None = None
    cors_access_list: tuple[Text, ...] = ("*",)


class OperationsApiConfig(_Section, frozen=True, kw_only=True):
    """The port that takes operations on users, keys and rows; `cors` as for the REST port."""

    network: NetworkConfig = NetworkConfig()


class AuthenticationConfig(_Section, frozen=True, kw_only=True):
    """Who is trusted, and for how long (in milliseconds).

    `authorizeLocal` makes a super user of who calls from this machine without a credential;
    `cacheTTL` is how long a verified one is remembered.
    """

    authorize_local: Flag = False
    cache_ttl: DurationOrOff = field(default=30_000, name="cacheTTL")
    operation_token_timeout: Duration = 86_400_000
    refresh_token_timeout: Duration = 30 * 86_400_000
    hash_function: HashFunction = "argon2id"

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


class LoggingConfig(_Section, frozen=True, kw_only=True):
    """What is logged (by default `dev` from info on, `run` from warn), and which writes audited."""

    level: Level | None = None
    std_streams: Flag = True
    audit_log: Flag = True
    audit_retention: Duration = 3 * 86_400_000


class AccountingConfig(_Section, frozen=True, kw_only=True):
    """How safely model calls are written down (`fsync`: a power cut takes none), for how long."""

    durability: Durability = "process"
    retention: Duration = 90 * 86_400_000

    @property
    def retention_seconds(self) -> float:
        """How long a row of the ledger is kept, in seconds."""
        return self.retention / 1000


class DatabaseConfig(_Section, frozen=True, kw_only=True):
    """Where the `system` schema lives: by default `system.db` in the data folder.

    `busyTimeout` is how long a transaction waits to write, `transactionTimeout` how long it may
    keep others waiting once it has written (milliseconds).
    """

    url: SqliteUrl | None = None
    busy_timeout: Duration = 5_000
    transaction_timeout: Duration = 30_000


class ModelConfig(_Section, frozen=True, kw_only=True):
    """One logical model; KIND is `generative` or `embedding`, NAME what callers ask for.

    `default` is for who names none, `gpt-*` for any name that begins so. `model` is the provider's
    name for it (NAME if not given), `fallback` what to try after it. By default the `openai` one
    has 10 s to connect, 60 s to begin a stream, 120 s of silence in it, 10 minutes, and 2 retries.
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
    model_file: Text | None = None


class ModelsConfig(_Section, frozen=True, kw_only=True):
    """The logical models of each kind, by name, in the file's order."""

    generative: Mapping[str, ModelConfig] = {}
    embedding: Mapping[str, ModelConfig] = {}


def _default_models() -> ModelsConfig:
    both = {"default": ModelConfig(backend="local"), "echo": ModelConfig(backend="echo")}
    return ModelsConfig(generative=both, embedding=both)


class Config(_Section, frozen=True, kw_only=True):
    """All of config.yaml; `plugins` maps name to true, false or options, in the file's order."""

    root_path: Text | None = None
    http: HttpConfig = HttpConfig()
    operations_api: OperationsApiConfig = OperationsApiConfig()
    authentication: AuthenticationConfig = AuthenticationConfig()
    logging: LoggingConfig = LoggingConfig()
    accounting: AccountingConfig = AccountingConfig()
    database: DatabaseConfig = DatabaseConfig()
    models: ModelsConfig = field(default_factory=_default_models)
    plugins: Mapping[str, PluginBlock] = {}


def load_config(path: Path, environ: Mapping[str, str]) -> Config:
    """Decode the file at `path`; a file that is missing means the defaults.

    Raises ConfigError for a file that cannot be read, and as `parse_config` does.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Config()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        message = f"{path}: cannot be read: {reason}"
        raise ConfigError(message) from error
    return parse_config(text, source=str(path), environ=environ)


def parse_config(text: str, *, source: str, environ: Mapping[str, str]) -> Config:
    """Decode YAML text; `${VAR}` in a value is taken from `environ`, `$${` is a literal `${`.

    Raises ConfigError, with one line `source: key.path: sentence` for everything that is wrong.
    """
    report = Report(source)
    document = Document(report, environ)
    tree = document.read(text)
    config = _Decoder(report, document.variables).section(Config, {} if tree is None else tree, ())
    if report.lines or not isinstance(config, Config):
        raise ConfigError("\n".join(report.lines))
    return config


def redacted(config: Config) -> dict[str, Any]:
    """The configuration as plain camelCase values, fit to be shown: `masked` hides every secret.

    The names of models and plugins are no keys: a plugin called `api_keys` shows its options.
    """
    plain: dict[str, Any] = to_builtins(config, enc_hook=encode_hook)
    models, plugins = plain.pop("models"), plain.pop("plugins")
    shown = _masked_values(plain)
    shown["models"] = {kind: _masked_values(entries) for kind, entries in models.items()}
    shown["plugins"] = _masked_values(plugins)
    return shown


def _masked_values(blocks: Mapping[str, Plain]) -> dict[str, Any]:
    return {name: masked(block) for name, block in blocks.items()}


class _Decoder:
    """Plain values on their way to structs; what does not fit is reported and left UNSET."""

    def __init__(self, report: Report, variables: Mapping[KeyPath, str]) -> None:
        self._report = report
        self._variables = variables

    def section(self, kind: type[_Section], raw: Tree, path: KeyPath) -> Any:
        """A struct of this kind; a key without a value (null) is as good as absent."""
        if not isinstance(raw, dict):
            return self._refuse("a map of keys", raw, path)
        fields = {each.encode_name: each for each in structs.fields(kind)}
        values = {each.name: UNSET for each in fields.values() if each.required}
        for key, value in raw.items():
            if key not in fields:
                self._report.add((*path, key), f"unknown key; {nearest(key, fields, 'keys')}")
            elif value is not None:
                values[fields[key].name] = self._value(fields[key].type, value, (*path, key))
        for key, each in fields.items():
            if each.required and raw.get(key) is None:
                expected = _meta(each.type).description
                self._report.add((*path, key), f"missing; expected {expected}")
        return kind(**values)

    def _value(self, hint: Any, value: Tree, path: KeyPath) -> Any:
        if get_origin(hint) in {Union, UnionType}:
            hint = next(option for option in get_args(hint) if option is not NoneType)
        if get_origin(hint) is tuple:
            return self._items(get_args(hint)[0], value, path)
        if value is UNSET:
            return UNSET
        if isinstance(hint, type) and issubclass(hint, _Section):
            return self.section(hint, value, path)
        if get_origin(hint) is Mapping:
            return self._named(get_args(hint)[1], value, path)
        return self._leaf(hint, value, path)

    def _named(self, hint: Any, raw: Tree, path: KeyPath) -> Any:
        if not isinstance(raw, dict):
            return self._refuse("a map of names", raw, path)
        entries = {name: self._value(hint, value, (*path, name)) for name, value in raw.items()}
        for name, entry in entries.items():
            if isinstance(entry, ModelConfig):
                self._check_fallback(entry, [*entries], (*path, name))
        return entries

    def _check_fallback(self, entry: ModelConfig, known: list[str], path: KeyPath) -> None:
        others = [name for name in known if name != path[-1]]
        for name in entry.fallback:
            if name not in {*known, UNSET}:
                sentence = f"no {path[1]} model is called '{name}'"
                help_ = nearest(name, others, "other models")
                self._report.add((*path, "fallback"), f"{sentence}; {help_}")

    def _items(self, hint: Any, raw: Tree, path: KeyPath) -> tuple[Any, ...]:
        if isinstance(raw, list):
            return tuple(self._value(hint, each, (*path, at)) for at, each in enumerate(raw))
        if isinstance(raw, str):
            return (self._leaf(hint, raw, path),)
        if raw is not UNSET:
            self._refuse("a string or a list of strings", raw, path)
        return ()

    def _leaf(self, hint: Any, value: Tree, path: KeyPath) -> Any:
        meta = _meta(hint)
        parse: Callable[[Tree], Tree] = (meta.extra or {}).get("parse", as_it_is)
        # The environment knows only strings; what the file itself says has to have the right type.
        strict = not self._variables.get(path)
        try:
            return convert(parse(value), hint, strict=strict, dec_hook=decode_hook)
        except (ValidationError, ValueError):
            return self._refuse(meta.description or "", value, path)

    def _refuse(self, expected: str, value: Tree, path: KeyPath) -> UnsetType:
        variables = self._variables.get(path, "")
        key = next((step for step in reversed(path) if isinstance(step, str)), "")
        found = _found(value, hidden=names_secret(key) or names_secret(variables))
        origin = f" from {variables}" if variables else ""
        self._report.add(path, f"expected {expected}, got {found}{origin}")
        return UNSET


def _meta(hint: Any) -> Meta:
    """What a field's type says of itself: its wording, and how its text is read."""
    return next(each for each in hint.__metadata__ if isinstance(each, Meta))


def _found(value: Tree, *, hidden: bool) -> str:
    match value:
        case dict():
            return "a map"
        case list():
            return "a list"
        case None:
            return "nothing"
        case _ if hidden:
            return "a value that is not shown"
        case str():
            shown = mask(value)
            cut = shown if len(shown) <= _LONGEST_SHOWN else f"{shown[:_LONGEST_SHOWN]}..."
            return json.dumps(cut, ensure_ascii=False)
        case _:
            return json.dumps(value, default=str)
