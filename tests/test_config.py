"""config.yaml: what is read, what is refused and how that is worded, what is hidden when shown."""

from pathlib import Path
from time import perf_counter
from typing import Any

import msgspec
import pytest

from harperpy.config import load_config, parse_config, redacted
from harperpy.errors import ConfigError, HarperError
from harperpy.secret import Secret, decode_hook, encode_hook, mask
from harperpy.sections import Config, ModelConfig
from harperpy.spelling import closest

DEFAULT_MODELS = {"default": ModelConfig(backend="local"), "echo": ModelConfig(backend="echo")}


def parse(text: str, **environ: str) -> Config:
    """The configuration that a text says."""
    return parse_config(text, source="config.yaml", environ=environ)


def refusals(text: str, **environ: str) -> list[str]:
    """What is said about a text that is refused, without the file's name before each line."""
    with pytest.raises(ConfigError) as caught:
        parse(text, **environ)
    lines = str(caught.value).split("\n")
    assert all(line.startswith("config.yaml: ") for line in lines)
    return [line.removeprefix("config.yaml: ") for line in lines]


def at(config: object, path: str) -> object:
    """The attribute, or entry of a map, that a dotted path names."""
    for step in path.split("."):
        config = config[step] if isinstance(config, dict) else getattr(config, step)
    return config


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("root_path", None),
        ("http.port", 9926),
        ("http.host", None),
        ("http.workers", 1),
        ("http.pin_workers", True),
        ("http.max_body_size", 10_000_000),
        ("http.cors", None),
        ("http.cors_access_list", ("*",)),
        ("http.timeout", 120_000),
        ("http.timeout_seconds", 120.0),
        ("http.max_concurrent_requests", None),
        ("http.request_queue_limit", 20_000),
        ("operations_api.network.port", 9925),
        ("operations_api.network.host", "localhost"),
        ("operations_api.network.cors", None),
        ("operations_api.network.cors_access_list", ("*",)),
        ("authentication.authorize_local", False),
        ("authentication.cache_ttl", 30_000),
        ("authentication.cache_seconds", 30.0),
        ("authentication.operation_token_seconds", 86_400.0),
        ("authentication.refresh_token_seconds", 30 * 86_400.0),
        ("authentication.hash_function", "argon2id"),
        ("authentication.slow_guesses", True),
        ("logging.level", None),
        ("logging.std_streams", True),
        ("logging.audit_log", True),
        ("logging.audit_auth_events.log_failed", True),
        ("logging.audit_auth_events.log_successful", False),
        ("logging.audit_retention", 3 * 86_400_000),
        ("accounting.durability", "process"),
        ("accounting.retention_seconds", 90 * 86_400.0),
        ("analytics.aggregate_period", 60.0),
        ("analytics.retention", 365 * 86_400_000),
        ("database.url", None),
        ("database.busy_timeout", 5_000),
        ("database.transaction_timeout", 30_000),
        ("models.generative", DEFAULT_MODELS),
        ("models.embedding", DEFAULT_MODELS),
        ("prices", ()),
        ("limits.store", None),
        ("limits.rules", ()),
        ("plugins", {}),
    ],
)
def test_defaults(path: str, expected: object) -> None:
    """An empty file gives every key its documented default."""
    assert expected == at(parse(""), path)


@pytest.mark.parametrize(
    ("text", "path", "expected"),
    [
        ("rootPath: /srv/data", "root_path", "/srv/data"),
        ("http: {port: 0}", "http.port", 0),
        ("http: {port: 65535}", "http.port", 65535),
        ("http: {host: 192.0.2.1}", "http.host", "192.0.2.1"),
        ("http: {host: '::1'}", "http.host", "::1"),
        ("http: {workers: 4}", "http.workers", 4),
        ("http: {workers: auto}", "http.workers", "auto"),
        ("http: {cors: true}", "http.cors", True),
        (
            "http: {corsAccessList: [https://a.example]}",
            "http.cors_access_list",
            ("https://a.example",),
        ),
        (
            "http: {corsAccessList: https://a.example}",
            "http.cors_access_list",
            ("https://a.example",),
        ),
        ("http: {corsAccessList: []}", "http.cors_access_list", ()),
        ("http: {maxBodySize: 2000}", "http.max_body_size", 2000),
        ("http: {maxBodySize: 2000B}", "http.max_body_size", 2000),
        ("http: {maxBodySize: 25MB}", "http.max_body_size", 25_000_000),
        ("http: {maxBodySize: 1 gb}", "http.max_body_size", 1_000_000_000),
        ("http: {maxBodySize: 1MiB}", "http.max_body_size", 1_048_576),
        ("http: {timeout: 0}", "http.timeout", 0),
        ("http: {timeout: 1500ms}", "http.timeout_seconds", 1.5),
        ("operationsApi: {network: {port: 1, host: '::1'}}", "operations_api.network.host", "::1"),
        ("authentication: {authorizeLocal: yes}", "authentication.authorize_local", True),
        ("authentication: {cacheTTL: 0}", "authentication.cache_seconds", 0.0),
        ("authentication: {cacheTTL: 45s}", "authentication.cache_ttl", 45_000),
        (
            "authentication: {operationTokenTimeout: 30m}",
            "authentication.operation_token_seconds",
            1800.0,
        ),
        (
            "authentication: {refreshTokenTimeout: 12h}",
            "authentication.refresh_token_timeout",
            43_200_000,
        ),
        ("logging: {level: debug, stdStreams: false}", "logging.level", "debug"),
        ("logging: {level: debug, stdStreams: false}", "logging.std_streams", False),
        ("logging: {auditLog: false}", "logging.audit_log", False),
        ("logging: {auditRetention: 30d}", "logging.audit_retention", 2_592_000_000),
        ("database: {busyTimeout: 250ms}", "database.busy_timeout", 250),
        ("database: {transactionTimeout: 1m}", "database.transaction_timeout", 60_000),
        ("accounting: {durability: fsync}", "accounting.durability", "fsync"),
        ("accounting: {retention: 7d}", "accounting.retention", 604_800_000),
        ("analytics: {aggregatePeriod: 0.5}", "analytics.aggregate_period", 0.5),
        ("analytics: {aggregatePeriod: false}", "analytics.aggregate_period", 0),
        ("analytics: {aggregatePeriod: -1}", "analytics.aggregate_period", -1),
        ("analytics: {retention: 30d}", "analytics.retention", 2_592_000_000),
        ("database: {url: 'sqlite:///a/b.db'}", "database.url", "sqlite:///a/b.db"),
    ],
)
def test_values(text: str, path: str, expected: object) -> None:
    """A value that the file gives takes the default's place, in each way of writing it."""
    assert expected == at(parse(text), path)


def test_a_model() -> None:
    """Every key of a model reaches its field, and names keep the file's order."""
    config = parse(
        """
models:
  generative:
    zeta: {backend: echo}
    default:
      backend: openai
      model: gpt-4.1
      apiKey: sk-made-up
      baseUrl: https://api.example/v1
      organization: org
      fallback: [zeta, '4']
      requestTimeoutMs: 1
      connectTimeoutMs: 2
      firstByteTimeoutMs: 3
      idleTimeoutMs: 4
      maxRetries: 0
      transport: aiohttp
      modelFile: a.gguf
    4: {backend: local, fallback: zeta}
"""
    )

    assert ["zeta", "default", "4"] == list(config.models.generative)
    assert {} == config.models.embedding
    assert ("zeta",) == config.models.generative["4"].fallback
    assert config.models.generative["default"] == ModelConfig(
        backend="openai",
        model="gpt-4.1",
        api_key=Secret("sk-made-up"),
        base_url="https://api.example/v1",
        organization="org",
        fallback=("zeta", "4"),
        request_timeout_ms=1,
        connect_timeout_ms=2,
        first_byte_timeout_ms=3,
        idle_timeout_ms=4,
        max_retries=0,
        transport="aiohttp",
        model_file="a.gguf",
    )


def test_plugins() -> None:
    """Plugins keep their order and their free options; a name without a value is on."""
    config = parse("plugins: {z: true, a: false, m: {path: x.py, deep: [{any: 1.5}, null]}, n: }")

    assert [
        ("z", True),
        ("a", False),
        ("m", {"path": "x.py", "deep": [{"any": 1.5}, None]}),
        ("n", True),
    ] == list(config.plugins.items())


@pytest.mark.parametrize(
    "text",
    ["", "# nothing\n", "http:\nmodels:\nplugins:\n", "http: {port: , host: null}", "{}", "---\n"],
)
def test_a_key_without_a_value_is_absent(text: str) -> None:
    """A block whose lines are all commented out leaves the defaults."""
    assert Config() == parse(text)


def test_models_that_are_given_replace_the_default() -> None:
    """Only a file without `models` gets models: no embeddings come in by the back door."""
    assert {} == parse("models: {generative: {a: {backend: echo}}}").models.embedding
    assert {} == parse("models: {}").models.generative


def test_yaml_merges_and_aliases() -> None:
    """`<<` gives what the map itself does not say; of several bases the first wins."""
    config = parse("""
models:
  generative:
    a: &a {backend: echo, model: a, maxRetries: 1}
    b: {model: b, <<: *a}
    c: {<<: [{model: c}, *a]}
    d: *a
""")

    models = config.models.generative
    assert [("a", 1), ("b", 1), ("c", 1), ("a", 1)] == [
        (models[name].model, models[name].max_retries) for name in "abcd"
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http: {prot: 1}", "http.prot: unknown key; did you mean 'port'?"),
        (
            "http: {max_body_size: 1}",
            "http.max_body_size: unknown key; did you mean 'maxBodySize'?",
        ),
        ("HTTP: {port: 1}", "HTTP: unknown key; did you mean 'http'?"),
        (
            "http: {quux: 1}",
            (
                "http.quux: unknown key; the known keys are "
                "compressionThreshold, cors, corsAccessList, front, headersTimeout, host, "
                "keepAliveTimeout, maxBodySize, maxConcurrentRequests, maxHeaderSize, pinWorkers, "
                "port, requestQueueLimit, timeout, workerTimeout, workers"
            ),
        ),
        (
            "models: {generative: {a: {backend: echo, apikey: sk-made-up}}}",
            "models.generative.a.apikey: unknown key; did you mean 'apiKey'?",
        ),
        (
            "database: {x y: 1}",
            'database."x y": unknown key; the known keys are busyTimeout, transactionTimeout, url',
        ),
    ],
)
def test_unknown_keys(text: str, expected: str) -> None:
    """A key nobody knows is named with the nearest that is known, or with all of them."""
    assert [expected] == refusals(text)


PORT = "expected an integer between 0 and 65535"
PERIOD = "expected a number of seconds from 0.1 to 86400 (0, less or false is off)"
WORKERS = "expected an integer between 1 and 1024, or auto"
DURATION = "expected a duration such as '30m', '12h' or '1d', or a number of milliseconds"
SIZE = "expected a size such as '10MB', or a number of bytes above 0"
HOST = "expected the name of a host or its address"
SQLITE = "expected an SQLite URL such as sqlite:///data/system.db (no other database works yet)"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- http", "expected a map of keys, got a list"),
        ("http", 'expected a map of keys, got "http"'),
        ("http: 9926", "http: expected a map of keys, got 9926"),
        ("http: {port: abc}", f'http.port: {PORT}, got "abc"'),
        ("http: {port: '80'}", f'http.port: {PORT}, got "80"'),
        ("http: {port: 65536}", f"http.port: {PORT}, got 65536"),
        ("http: {port: -1}", f"http.port: {PORT}, got -1"),
        ("http: {port: true}", f"http.port: {PORT}, got true"),
        ("http: {port: 80.5}", f"http.port: {PORT}, got 80.5"),
        ("http: {port: [1]}", f"http.port: {PORT}, got a list"),
        ("http: {port: {a: 1}}", f"http.port: {PORT}, got a map"),
        ("http: {port: 2024-01-31}", f'http.port: {PORT}, got "2024-01-31"'),
        ("http: {host: ''}", f'http.host: {HOST}, got ""'),
        ("http: {host: .local}", f'http.host: {HOST}, got ".local"'),
        ("http: {host: 'a b'}", f'http.host: {HOST}, got "a b"'),
        ("http: {host: 'localhost:80'}", f'http.host: {HOST}, got "localhost:80"'),
        (
            "operationsApi: {network: {host: a..b}}",
            f'operationsApi.network.host: {HOST}, got "a..b"',
        ),
        ("http: {workers: 0}", f"http.workers: {WORKERS}, got 0"),
        ("http: {workers: 1025}", f"http.workers: {WORKERS}, got 1025"),
        ("http: {workers: many}", f'http.workers: {WORKERS}, got "many"'),
        (
            'rootPath: "a\\0"',
            'rootPath: expected the path of a folder or a file, got "a\\u0000"',
        ),
        (
            "database: {busyTimeout: 30d}",
            f'database.busyTimeout: {DURATION}, up to 24 days, got "30d"',
        ),
        (
            f"limits: {{rules: [{{per: user, concurrent: {2**53 + 1}}}]}}",
            f"limits.rules[0].concurrent: expected an integer between 1 and 2^53, got {2**53 + 1}",
        ),
        ("http: {cors: 'yes'}", 'http.cors: expected true or false, got "yes"'),
        (
            "http: {corsAccessList: [a, 5]}",
            "http.corsAccessList[1]: expected a string that is not empty, got 5",
        ),
        (
            "http: {corsAccessList: [null]}",
            "http.corsAccessList[0]: expected a string that is not empty, got nothing",
        ),
        (
            "http: {corsAccessList: 5}",
            "http.corsAccessList: expected a string or a list of strings, got 5",
        ),
        (
            "http: {port: 9925}",
            "operationsApi.network.port: expected another port than http.port's, got 9925 for both",
        ),
        ("http: {maxBodySize: 0}", f"http.maxBodySize: {SIZE}, got 0"),
        (
            "http: {maxConcurrentRequests: 0}",
            "http.maxConcurrentRequests: expected an integer above 0, got 0",
        ),
        (
            "http: {requestQueueLimit: -1}",
            f"http.requestQueueLimit: {DURATION} (0 is not at all), got -1",
        ),
        ("http: {maxBodySize: 10 apples}", f'http.maxBodySize: {SIZE}, got "10 apples"'),
        ("http: {timeout: soon}", f'http.timeout: {DURATION} (0 is off), got "soon"'),
        ("accounting: {retention: 0}", f"accounting.retention: {DURATION}, got 0"),
        ("analytics: {aggregatePeriod: true}", f"analytics.aggregatePeriod: {PERIOD}, got true"),
        ("analytics: {aggregatePeriod: 0.01}", f"analytics.aggregatePeriod: {PERIOD}, got 0.01"),
        ("analytics: {aggregatePeriod: 1d}", f'analytics.aggregatePeriod: {PERIOD}, got "1d"'),
        ("analytics: {aggregatePeriod: 86401}", f"analytics.aggregatePeriod: {PERIOD}, got 86401"),
        (
            "authentication: {operationTokenTimeout: 1y}",
            f'authentication.operationTokenTimeout: {DURATION}, got "1y"',
        ),
        (
            "authentication: {hashFunction: sha256}",
            'authentication.hashFunction: expected argon2id, got "sha256"',
        ),
        (
            "logging: {level: loud}",
            'logging.level: expected debug, info, warn or error, got "loud"',
        ),
        (
            "accounting: {durability: maybe}",
            'accounting.durability: expected process or fsync, got "maybe"',
        ),
        (
            "database: {url: 'postgresql://me:hunter2@db/x'}",
            f'database.url: {SQLITE}, got "postgresql://me:[redacted]@db/x"',
        ),
        ("database: {url: 'sqlite://'}", f'database.url: {SQLITE}, got "sqlite://"'),
        (
            "database: {url: 'sqlite:///:memory:'}",
            f'database.url: {SQLITE}, got "sqlite:///:memory:"',
        ),
        ("models: {generative: [a]}", "models.generative: expected a map of names, got a list"),
        (
            "models: {generative: {a: }}",
            "models.generative.a: expected a map of keys, got nothing",
        ),
        (
            "models: {generative: {'gpt-*': {model: x}}}",
            (
                'models.generative."gpt-*".backend: '
                "missing; expected a kind of backend, such as echo or openai"
            ),
        ),
        (
            "models: {embedding: {a: {backend: echo, baseUrl: localhost}}}",
            'models.embedding.a.baseUrl: expected an http:// or https:// URL, got "localhost"',
        ),
        (
            "models: {embedding: {a: {backend: echo, idleTimeoutMs: 0}}}",
            "models.embedding.a.idleTimeoutMs: expected an integer above 0, got 0",
        ),
        (
            "models: {embedding: {a: {backend: echo, transport: curl}}}",
            'models.embedding.a.transport: expected own or aiohttp, got "curl"',
        ),
        (
            "models: {embedding: {a: {backend: echo, maxRetries: -1}}}",
            "models.embedding.a.maxRetries: expected an integer of 0 or more, got -1",
        ),
        ("plugins: [users]", "plugins: expected a map of names, got a list"),
        ("plugins: {users: 1}", "plugins.users: expected true, false or a map of options, got 1"),
        (
            f"http: {{port: {'x' * 99}}}",
            f'http.port: {PORT}, got "{"x" * 60}..."',
        ),
    ],
)
def test_wrong_values(text: str, expected: str) -> None:
    """A wrong value is named by file, key path, what was expected and what was found."""
    assert [expected] == refusals(text)


@pytest.mark.parametrize(
    "value",
    [
        "12345678",
        "''",
        "[hunter2]",
        "{a: hunter2}",
        "3.5",
        "$MY_KEY",
        "os.environ/MY_KEY",
        '"k\\n"',
    ],
)
def test_a_wrong_secret_is_not_quoted(value: str) -> None:
    """The refusal of a wrong API key says what was expected, and nothing of the key."""
    (line,) = refusals(f"models: {{generative: {{a: {{backend: echo, apiKey: {value}}}}}}}")

    expected = (
        "models.generative.a.apiKey: expected a key of one line that is not empty, "
        'or "${NAME}" for that of the environment, got a '
    )
    assert line.removeprefix(expected) in {"value that is not shown", "list", "map"}


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        (
            "{default: {backend: echo, fallback: bakcup}, backup: {backend: echo}}",
            (
                "models.generative.default.fallback: "
                "no generative model is called 'bakcup'; did you mean 'backup'?"
            ),
        ),
        (
            "{default: {backend: echo, fallback: [b, zzz]}, b: {backend: echo}}",
            (
                "models.generative.default.fallback: "
                "no generative model is called 'zzz'; the known other models are b"
            ),
        ),
        (
            "{default: {backend: echo, fallback: [only-embeds]}}",
            (
                "models.generative.default.fallback: "
                "no generative model is called 'only-embeds'; there are no other models"
            ),
        ),
    ],
)
def test_a_fallback_has_to_exist(models: str, expected: str) -> None:
    """A fallback names a model of the same kind; the nearest is offered, never the model itself."""
    text = f"models: {{embedding: {{only-embeds: {{backend: echo}}}}, generative: {models}}}"

    assert [expected] == refusals(text)


def test_all_that_is_wrong_is_said_at_once() -> None:
    """One run tells the operator everything: a line for each thing that is wrong."""
    text = """
http: {port: abc, prot: 1, host: '${NO}'}
models: {generative: {a: {fallback: [5, nobody]}, b: {backend: echo, fallback: '${NO}'}}}
"""

    assert [
        "http.host: the environment variable NO is not set",
        "models.generative.b.fallback: the environment variable NO is not set",
        f'http.port: {PORT}, got "abc"',
        "http.prot: unknown key; did you mean 'port'?",
        "models.generative.a.fallback[0]: expected a string that is not empty, got 5",
        "models.generative.a.backend: missing; expected a kind of backend, such as echo or openai",
        (
            "models.generative.a.fallback: "
            "no generative model is called 'nobody'; the known other models are b"
        ),
    ] == refusals(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "http:\n  port: 1\n  host: a\n  port: 2",
            "http.port: duplicate key, given on line 2 and again on line 4",
        ),
        ("http: {}\nhttp: {}", "http: duplicate key, given on line 1 and again on line 2"),
        (
            "plugins: {a: {b: [{c: 1, c: 1}]}}",
            "plugins.a.b[0].c: duplicate key, given on line 1 and again on line 1",
        ),
        ("? [a]\n: 1", "the key on line 1 is not a plain name"),
        ("http: {<<: 5}", "http: '<<' on line 1 takes a map or a list of maps"),
        ("http: !env HOST", "http: the value on line 1 cannot be read as !env"),
        ("http: !!bool maybe", "http: the value on line 1 cannot be read as bool"),
        ("http: !!int ''", "http: the value on line 1 cannot be read as int"),
        ("http: !!timestamp x", "http: the value on line 1 cannot be read as timestamp"),
        ("plugins: {a: 2024-13-45}", "plugins.a: the value on line 1 cannot be read as timestamp"),
        ("plugins: &a [*a]", "it is nested too deeply, or an alias holds itself"),
        ("\n# é\nhttp: \x01", "line 3, column 7: a character that YAML does not allow"),
    ],
)
def test_yaml_that_says_nothing_useful(text: str, expected: str) -> None:
    """Valid YAML that cannot be a configuration is refused with its key or its line."""
    assert [expected] == refusals(text)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("http: ]", "line 1, column 7: not valid YAML: "),
        ("http: 1\n  port: 2", "line 2, column 7: not valid YAML: "),
        ("\thttp: 1", "line 1, column 1: not valid YAML: "),
        ("http: *nobody", "line 1, column 7: not valid YAML: "),
        ("http: {}\n---\nhttp: {}", "line 2, column 1: not valid YAML: "),
    ],
)
def test_text_that_is_not_yaml(text: str, place: str) -> None:
    """A syntax error is one sentence with file, line and column."""
    (line,) = refusals(text)

    assert line.startswith(place)


def test_an_unquoted_variable_in_braces() -> None:
    """The one mistake that `${VAR}` invites in YAML is explained."""
    (line,) = refusals("http: {host: ${HOST}}", HOST="a")

    assert line.startswith("line 1, column ")
    assert line.endswith("; inside braces, quote ${NAME}")


@pytest.mark.parametrize(
    ("text", "path", "expected"),
    [
        ("http: {host: '${V}'}", "http.host", "80"),
        ("http:\n  port: ${V}", "http.port", 80),
        ("http: {maxBodySize: '${V}MB'}", "http.max_body_size", 80_000_000),
        ("http: {timeout: '${V}'}", "http.timeout", 80),
        ("http: {cors: '${YES}'}", "http.cors", True),
        ("http: {corsAccessList: '${V}'}", "http.cors_access_list", ("80",)),
        ("http: {corsAccessList: ['a${V}']}", "http.cors_access_list", ("a80",)),
        ("rootPath: /srv/${V}/${YES}", "root_path", "/srv/80/true"),
        ("rootPath: $V ${V} $${V}", "root_path", "$V 80 ${V}"),
        ("rootPath: '${NESTED}'", "root_path", "${V}"),
        ("plugins: {a: '${YES}'}", "plugins.a", True),
        ("plugins: {a: {b: ['${V}']}}", "plugins.a.b", ["80"]),
        (
            "models: {embedding: {a: {backend: echo, apiKey: '${V}'}}}",
            "models.embedding",
            {"a": ModelConfig(backend="echo", api_key=Secret("80"))},
        ),
    ],
)
def test_variables(text: str, path: str, expected: object) -> None:
    """`${VAR}` stands for the environment's value, once, and becomes the type that is expected."""
    config = parse(text, V="80", YES="true", NESTED="${V}")

    assert expected == at(config, path)


def test_only_what_comes_from_the_environment_is_lenient() -> None:
    """A quoted number in the file stays a mistake, also where a variable stood in a merged map."""
    text = """
models:
  embedding:
    a: &a {backend: echo, maxRetries: '${V}'}
    b: {<<: *a, maxRetries: '1'}
"""

    assert ['models.embedding.b.maxRetries: expected an integer of 0 or more, got "1"'] == refusals(
        text, V="1"
    )
    assert [f'http.port: {PORT}, got "${{V}}"'] == refusals("http: {port: '$${V}'}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http: {host: '${NO}'}", "http.host: the environment variable NO is not set"),
        ("http: {host: 'a${NO}'}", "http.host: the environment variable NO is not set"),
        ("http: {host: '${EMPTY}'}", "http.host: the environment variable EMPTY is empty"),
        (
            "plugins: {a: {b: [{c: '${NO}'}]}}",
            "plugins.a.b[0].c: the environment variable NO is not set",
        ),
        (
            "models: {generative: {a: {backend: '${NO}'}}}",
            "models.generative.a.backend: the environment variable NO is not set",
        ),
        ("http: {port: '${V}'}", f'http.port: {PORT}, got "8x" from ${{V}}'),
        (
            "http: {port: '${MY_SECRET}'}",
            f"http.port: {PORT}, got a value that is not shown from ${{MY_SECRET}}",
        ),
        (
            "http: {host: '${V:-hunter2}'}",
            "http.host: expected a variable as ${NAME}, got '${V...'",
        ),
        ("http: {host: '${V'}", "http.host: expected a variable as ${NAME}, got '${V...'"),
        ("http: {host: '${}'}", "http.host: expected a variable as ${NAME}, got '${...'"),
    ],
)
def test_variables_that_cannot_be_filled_in(text: str, expected: str) -> None:
    """A missing variable is an error that names it and its key, never an empty string."""
    assert [expected] == refusals(text, V="8x", EMPTY="", MY_SECRET="hunter2")


def test_load_config(tmp_path: Path) -> None:
    """A file is read as UTF-8, with or without a byte order mark; a missing one is the defaults."""
    path = tmp_path / "config.yaml"
    missing = load_config(path, {})
    path.write_bytes(b"\xef\xbb\xbfrootPath: gr\xc3\xbcn-${V}")

    assert Config() == missing
    assert load_config(path, {"V": "1"}).root_path == "grün-1"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """What is no file, or no text, is refused in a sentence that names it."""
    path = tmp_path / "config.yaml"
    path.write_bytes(b"rootPath: \xff")

    with pytest.raises(ConfigError) as not_text:
        load_config(path, {})
    with pytest.raises(ConfigError) as no_file:
        load_config(tmp_path, {})

    assert f"{path}: cannot be read: it is not UTF-8 text" == str(not_text.value)
    assert f"{tmp_path}: cannot be read: Is a directory" == str(no_file.value)


def test_a_refusal_names_the_file_it_was_given(tmp_path: Path) -> None:
    """The path stands before the sentence, so that a terminal can open it."""
    path = tmp_path / "config.yaml"
    path.write_text("http: {prot: 1}")

    with pytest.raises(HarperError) as caught:
        load_config(path, {})

    assert f"{path}: http.prot: unknown key; did you mean 'port'?" == str(caught.value)


REDACTED = "[redacted]"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"apiKey": "hunter2"}, {"apiKey": REDACTED}),
        ({"APIKEY": "hunter2"}, {"APIKEY": REDACTED}),
        ({"x-access-token": "hunter2"}, {"x-access-token": REDACTED}),
        ({"clientSecret": "hunter2"}, {"clientSecret": REDACTED}),
        ({"password": 1234}, {"password": REDACTED}),
        ({"headers": {"Authorization": "hunter2"}}, {"headers": {"Authorization": REDACTED}}),
        ({"proxyAuth": "hunter2"}, {"proxyAuth": REDACTED}),
        ({"apiKeys": ["hunter2", ["hunter3"]]}, {"apiKeys": [REDACTED, [REDACTED]]}),
        ({"list": [{"token": "hunter2"}]}, {"list": [{"token": REDACTED}]}),
        (
            {"credentials": {"user": "hunter2", "ids": ["hunter3"], "timeout": "5s", "port": 1}},
            {"credentials": {"user": REDACTED, "ids": [REDACTED], "timeout": "5s", "port": 1}},
        ),
        ({"maxTokens": 512, "tokenTimeout": "1h"}, {"maxTokens": 512, "tokenTimeout": "1h"}),
        ({"tokenizer": "cl100k", "keyword": "a"}, {"tokenizer": "cl100k", "keyword": "a"}),
        ({"useToken": True, "key": None, "f": 0.5}, {"useToken": True, "key": None, "f": 0.5}),
        ({"headers": ["X-Api-Key: hunter2"]}, {"headers": [f"X-Api-Key: {REDACTED}"]}),
    ],
)
def test_redacted_options(options: dict[str, Any], expected: dict[str, Any]) -> None:
    """In a plugin's options the key decides, at any depth and in lists; a limit is no secret."""
    shown = redacted(Config(plugins={"api_keys": {**options, "path": "x.py"}, "b": True}))

    assert {"api_keys": {**expected, "path": "x.py"}, "b": True} == shown["plugins"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:hunter2@host/v1", f"https://me:{REDACTED}@host/v1"),
        ("https://me:hun/te@r2@host", f"https://me:{REDACTED}@host"),
        ("redis://:hunter2@host:6379/0", f"redis://:{REDACTED}@host:6379/0"),
        ("https://hunter2@github.com", f"https://{REDACTED}@github.com"),
        ("https://h/v1?api_key=hunter2&a=b#c", f"https://h/v1?api_key={REDACTED}&a=b#c"),
        ("https://h/v1?a=b&access_token=hunter2", f"https://h/v1?a=b&access_token={REDACTED}"),
        ("Bearer hunter2.a-b_c", f"Bearer {REDACTED}"),
        ("Incorrect key sk-hunter2hunter2.", f"Incorrect key {REDACTED}."),
        ('{"api_key": "hunter2"}', f'{{"api_key": "{REDACTED}"}}'),
        ("https://localhost:8080/@scope/a", "https://localhost:8080/@scope/a"),
        ("http://keycloak:8080/v1", "http://keycloak:8080/v1"),
        ("https://host/v1?email=a@b.c", "https://host/v1?email=a@b.c"),
        ("sqlite:///keys.db", "sqlite:///keys.db"),
        ("h://a:b@c,h://d:e@f h://g@i j@k", f"h://a:{REDACTED}@f h://{REDACTED}@i j@k"),
        ("https://localhost:8080", "https://localhost:8080"),
        ("a sentence about nothing", "a sentence about nothing"),
    ],
)
def test_mask(text: str, expected: str) -> None:
    """Secrets inside a text are hidden, its harmless parts are not, and twice is as once."""
    assert expected == mask(text)
    assert expected == mask(expected)


def test_no_name_is_near_to_a_very_long_one() -> None:
    """To find one takes a second where a client calls something by a name of megabytes."""
    assert "x" * 200 == closest("x" * 201, ["x" * 200])
    assert closest("x" * 1001, ["x" * 1000]) is None


QUICK = ["key" * 5000, "x" * 20_000, "a.key-" * 3000 + ":"]
QUICK += ["://" * 20_000, "@" + "://a:" * 12_000, "://a:1/" * 9000 + "@", "://a" * 15_000 + " @"]


@pytest.mark.parametrize("text", QUICK)
def test_mask_is_quick(text: str) -> None:
    """No text makes masking slow, though upstreams may write it."""
    begun = perf_counter()
    mask(text)

    assert perf_counter() - begun < 2


def test_redacted_is_the_whole_configuration() -> None:
    """The listing has the file's own keys, JSON can say it, and what is harmless is unchanged."""
    shown = redacted(parse("http: {cors: true}\nmodels: {generative: {key-1: {backend: echo}}}"))

    assert {"port": 9926, "cors": True}.items() <= shown["http"].items()
    assert shown["authentication"] == {
        "authorizeLocal": False,
        "cacheTTL": 30_000,
        "operationTokenTimeout": 86_400_000,
        "refreshTokenTimeout": 2_592_000_000,
        "hashFunction": "argon2id",
        "slowGuesses": True,
    }
    assert shown["models"]["generative"]["key-1"]["backend"] == "echo"
    assert shown["models"]["embedding"] == {}
    assert set(shown) == {field.encode_name for field in msgspec.structs.fields(Config)}
    assert msgspec.json.decode(msgspec.json.encode(shown)) == shown


def test_no_way_of_showing_a_configuration_gives_a_secret_away() -> None:
    """repr, str, rich and the listing hide API keys, URL passwords and plugins' secrets."""
    config = parse("""
models: {generative: {a: {backend: echo, apiKey: hunter2, baseUrl: 'https://me:hunter2@h'}}}
plugins: {p: {deep: [{password: hunter2}]}}
""")
    model = config.models.generative["a"]
    ways = [repr(config), f"{config}", repr(model), repr(config.models), repr(redacted(config))]

    assert model.api_key == Secret("hunter2")
    assert all(REDACTED in way for way in ways)
    assert not any("hunter2" in way for way in [*ways, repr(config.__rich_repr__())])


def test_a_secret() -> None:
    """A secret shows itself only when asked, and compares and hashes by what it hides."""
    secret = Secret("hunter2")

    assert secret.reveal() == "hunter2"
    assert [REDACTED] * 3 == [repr(secret), str(secret), f"{secret}"]
    assert len({secret, Secret("hunter2"), Secret("hunter3")}) == 2
    assert secret != "hunter2"


def test_a_secret_in_a_plugins_own_struct() -> None:
    """The hooks let any struct have secrets: decoded from strings, written as their mask."""

    class Options(msgspec.Struct):
        token: Secret

    options = msgspec.convert({"token": "hunter2"}, Options, dec_hook=decode_hook)

    assert options.token.reveal() == "hunter2"
    assert msgspec.to_builtins(options, enc_hook=encode_hook) == {"token": REDACTED}
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"token": ""}, Options, dec_hook=decode_hook)


def test_the_hooks_know_secrets_only() -> None:
    """Other types are left to msgspec's own refusal."""
    with pytest.raises(NotImplementedError):
        decode_hook(Path, "a")
    with pytest.raises(NotImplementedError):
        encode_hook(Path("a"))


def test_a_configuration_does_not_change() -> None:
    """What was decoded is what every part of the server sees."""
    with pytest.raises(AttributeError):
        parse("").http.port = 1  # type: ignore[misc]
