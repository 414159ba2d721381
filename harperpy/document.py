"""Document: YAML text as plain values, no key given twice and every `${VAR}` filled in."""

import datetime as dt
import json
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

import yaml
from msgspec import UNSET, UnsetType

from .errors import ConfigError

KeyPath: TypeAlias = tuple[str | int, ...]
Tree: TypeAlias = "dict[str, Tree] | list[Tree] | str | float | bytes | dt.date | UnsetType | None"

_LOADER = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
_MERGE = "tag:yaml.org,2002:merge"


class Report:
    """Everything that is wrong with one source, a line each: `source: key.path: sentence`."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.lines: list[str] = []

    def add(self, path: KeyPath, sentence: str) -> None:
        """One more thing that is wrong, at a path of keys and list positions."""
        where = [shown_path(path)] if path else []
        self.lines.append(": ".join([self.source, *where, sentence]))


def shown_path(path: KeyPath) -> str:
    """A path as an operator would write it: `models.generative."gpt-4.1".fallback[0]`."""
    shown = ""
    for step in path:
        if isinstance(step, int):
            shown += f"[{step}]"
        else:
            shown += "." if shown else ""
            shown += step if re.fullmatch(r"[\w-]+", step) else json.dumps(step)
    return shown


class Document:
    """YAML text on its way to plain values.

    `variables` remembers, by path, each `${VAR}` that was filled into the string there. A value
    that could not be filled in or read is UNSET, and the report says why.
    """

    def __init__(self, report: Report, environ: Mapping[str, str]) -> None:
        self.variables: dict[KeyPath, str] = {}
        self._report = report
        self._environ = environ

    def read(self, text: str) -> Tree:
        """The values of the text; raises ConfigError where it is not YAML."""
        source = self._report.source
        try:
            self._loader: Any = _LOADER(text)
            root: yaml.Node | None = self._loader.get_single_node()
            return None if root is None else self._value(root, ())
        except yaml.YAMLError as error:
            message = f"{source}: {_yaml_sentence(error, text)}"
            raise ConfigError(message) from error
        except RecursionError:
            message = f"{source}: it is nested too deeply, or an alias holds itself"
            raise ConfigError(message) from None

    def _value(self, node: yaml.Node, path: KeyPath) -> Tree:
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(child, (*path, at)) for at, child in enumerate(node.value)]
        try:
            value: Tree = self._loader.construct_object(node)
        except (yaml.YAMLError, ValueError, LookupError, AttributeError):
            # What is no value of a tag that is written out ends in any of them.
            tag = node.tag.rpartition(":")[2]
            self._report.add(path, f"the value on {_line(node)} cannot be read as {tag}")
            return UNSET
        return self._filled(value, path) if isinstance(value, str) else value

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Tree]:
        inherited: dict[str, Tree] = {}
        own: dict[str, Tree] = {}
        first: dict[str, yaml.Node] = {}
        # Merged maps come first: `variables` must end up with what the map's own keys say.
        for key_node, child in sorted(node.value, key=lambda pair: pair[0].tag != _MERGE):
            if key_node.tag == _MERGE:
                inherited |= self._merged(child, path)
            elif not isinstance(key_node, yaml.ScalarNode):
                self._report.add(path, f"the key on {_line(key_node)} is not a plain name")
            # A key is its text: models may be called `4`, `4.1` or `no`.
            elif (key := str(key_node.value)) in own:
                lines = f"on {_line(first[key])} and again on {_line(key_node)}"
                self._report.add((*path, key), f"duplicate key, given {lines}")
            else:
                first[key] = key_node
                own[key] = self._value(child, (*path, key))
        return inherited | own

    def _merged(self, node: yaml.Node, path: KeyPath) -> dict[str, Tree]:
        bases = node.value if isinstance(node, yaml.SequenceNode) else [node]
        inherited: dict[str, Tree] = {}
        for base in reversed(bases):
            if isinstance(base, yaml.MappingNode):
                inherited |= self._mapping(base, path)
            else:
                self._report.add(path, f"'<<' on {_line(base)} takes a map or a list of maps")
        return inherited

    def _filled(self, text: str, path: KeyPath) -> Tree:
        self.variables.pop(path, None)
        if "${" not in text:
            return text
        self.variables[path] = " ".join(re.findall(r"(?<!\$)\$\{\w+\}", text))
        before = len(self._report.lines)
        # An unclosed brace is matched too, to be refused: it would travel as a wrong key.
        pattern = r"\$?\$\{(\w*)([^}]*\}?)"
        filled = re.sub(pattern, lambda match: self._variable(match, path), text)
        return filled if len(self._report.lines) == before else UNSET

    def _variable(self, match: re.Match[str], path: KeyPath) -> str:
        name, rest = match.groups()
        if match[0].startswith("$$"):
            return match[0][1:]
        value = self._environ.get(name, "")
        if rest != "}" or not name.isidentifier():
            # What follows the name is not quoted: in `${KEY:-default}` it may be a secret.
            self._report.add(path, f"expected a variable as ${{NAME}}, got '${{{name}...'")
        elif not value:
            state = "empty" if name in self._environ else "not set"
            self._report.add(path, f"the environment variable {name} is {state}")
        return value


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


def _yaml_sentence(error: yaml.YAMLError, text: str) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        # libyaml counts bytes; where only the slower reader is, the column may be off by a little.
        at = len(text.encode()[: getattr(error, "position", 0)].decode(errors="ignore"))
        line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
        return f"line {line}, column {column}: a character that YAML does not allow"
    mark = error.problem_mark
    problem = " ".join(part for part in (error.context, error.problem) if part)
    hint = "; inside braces, quote ${NAME}" if "${" in _text_of(text, mark.line) else ""
    return f"line {mark.line + 1}, column {mark.column + 1}: not valid YAML: {problem}{hint}"


def _text_of(text: str, line: int) -> str:
    lines = text.split("\n")
    return lines[line] if line < len(lines) else ""
