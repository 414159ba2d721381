"""config.yaml, decoded once into frozen structs; every refusal names file, key and expectation."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from msgspec import (
    UNSET,
    Meta,
    UnsetType,
    ValidationError,
    convert,
    structs,
    to_builtins,
)

from .document import Document, KeyPath, Report, Tree
from .errors import ConfigError
from .leaves import as_it_is
from .secret import Plain, decode_hook, encode_hook, mask, masked, names_secret
from .sections import Config, ModelConfig, Section
from .spelling import nearest

_LONGEST_SHOWN = 60


def load_config(path: Path, environ: Mapping[str, str]) -> Config:
    """Decode the file at `path`; a file that is missing means the defaults.

    Raises ConfigError for a file that cannot be read, and as `parse_config` does.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        if (other := path.with_suffix(".yml")).exists():
            message = f"{other}: it would not be read: its name has to be {path.name}"
            raise ConfigError(message) from error
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
    if not report.lines:
        _check_ports(config, report)
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


def _check_ports(config: Config, report: Report) -> None:
    http, network = config.http, config.operations_api.network
    if http.port == network.port != 0 and http.host in (None, network.host):
        sentence = f"expected another port than http.port's, got {network.port} for both"
        report.add(("operationsApi", "network", "port"), sentence)


class _Decoder:
    """Plain values on their way to structs; what does not fit is reported and left UNSET."""

    def __init__(self, report: Report, variables: Mapping[KeyPath, str]) -> None:
        self._report = report
        self._variables = variables

    def section(self, kind: type[Section], raw: Tree, path: KeyPath) -> Any:
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
        if isinstance(hint, type) and issubclass(hint, Section):
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
        maps = isinstance(hint, type) and issubclass(hint, Section)
        if isinstance(raw, str) and not maps:
            return (self._leaf(hint, raw, path),)
        if raw is not UNSET:
            expected = "a list of maps" if maps else "a string or a list of strings"
            self._refuse(expected, raw, path)
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
