"""One value of a YAML text, changed where it stands: comments and the order of keys stay."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import yaml

from harperpy import ClientError


def edited(text: str, path: Sequence[str], value: Any) -> str:
    """The text with this value at a path of keys.

    Raises `ClientError` 409 for a text in which that cannot be done and be certain.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        changed = (
            _appended(text, path, value) if root is None else _changed(text, root, path, value)
        )
        certain = yaml.safe_load(changed) == _with(yaml.safe_load(text), path, value)
    except yaml.YAMLError:
        certain, changed = False, ""
    if not certain:
        message = f"{'.'.join(path)}: config.yaml is written in a way that only you can change"
        raise ClientError(message, status=409)
    return changed


def _changed(text: str, node: yaml.Node, path: Sequence[str], value: Any) -> str:
    for at, step in enumerate(path):
        if not isinstance(node, yaml.MappingNode):
            break
        found = next(((key, one) for key, one in node.value if key.value == step), None)
        if found is None:
            return _inserted(text, node, path[at:], value)
        key, node = found
        if at == len(path) - 1 or node.tag == "tag:yaml.org,2002:null":
            return _replaced(text, key, node, _nested(path[at + 1 :], value))
    raise yaml.YAMLError


def _replaced(text: str, key: yaml.Node, node: yaml.Node, value: Any) -> str:
    """The value after a key; a block ends with its last line."""
    end = node.end_mark.index
    tail = "\n" if text[:end].endswith("\n") and node.start_mark.index < end else ""
    return f"{text[: key.end_mark.index]}: {_shown(value)}{tail}{text[end:]}"


def _inserted(text: str, node: yaml.MappingNode, path: Sequence[str], value: Any) -> str:
    """A new key of a map, after the others; before them where the last one's end is not certain."""
    line = f"{_key(path[0])}: {_shown(_nested(path[1:], value))}"
    start = node.start_mark.index
    if node.flow_style:
        comma = ", " if node.value else ""
        return f"{text[: start + 1]}{line}{comma}{text[start + 1 :]}"
    indent = " " * node.start_mark.column
    last = node.value[-1][1]
    if getattr(last, "style", None) in ("|", ">") or getattr(last, "flow_style", None) is False:
        return f"{text[:start]}{line}\n{indent}{text[start:]}"
    end = text.find("\n", last.end_mark.index)
    end = len(text) if end < 0 else end
    return f"{text[:end]}\n{indent}{line}{text[end:]}"


def _appended(text: str, path: Sequence[str], value: Any) -> str:
    end = "" if not text or text.endswith("\n") else "\n"
    return f"{text}{end}{_key(path[0])}: {_shown(_nested(path[1:], value))}\n"


def _nested(path: Sequence[str], value: Any) -> Any:
    for step in reversed(path):
        value = {step: value}
    return value


def _with(tree: Any, path: Sequence[str], value: Any) -> Any:
    if not path:
        return value
    known: dict[str, Any] = tree or {}
    return {**known, path[0]: _with(known.get(path[0]), path[1:], value)}


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z][\w-]*", name) else json.dumps(name)


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
