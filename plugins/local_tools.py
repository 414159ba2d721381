"""Tool calls for a model that knows none: a JSON schema makes it write them."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from harperpy import GenerateOpts, JSONSchemaFormat, Message, Prompt, ToolCallDelta, ToolDef

_REPLY = "reply"
_CUT_REPLY = re.compile(r'"reply"\s*:\s*"((?:[^"\\]|\\.)*)')


def needs_schema(prompt: Prompt, opts: GenerateOpts) -> bool:
    """Whether tools are in play: offered, not forbidden, and not just answered.

    A small model that has a tool's result and may choose calls the tool again, for ever.
    """
    answered = prompt.messages[-1].role == "tool" and opts.tool_choice in (None, "auto")
    return bool(prompt.tools) and opts.tool_choice != "none" and not answered


def with_schema(prompt: Prompt, opts: GenerateOpts) -> tuple[Prompt, GenerateOpts]:
    """The same question without tools: told in words, and demanded by a schema."""
    tools = prompt.tools
    if opts.tool_choice not in (None, "auto", "required"):
        tools = [tool for tool in tools if tool.name == opts.tool_choice]
    branches = [_branch(tool) for tool in tools]
    if opts.tool_choice in (None, "auto"):
        branches.append(_object({_REPLY: {"type": "string"}}))
    schema = branches[0] if len(branches) == 1 else {"anyOf": branches}
    told = Message(role="system", content=_words(tools, choice=len(branches) > len(tools)))
    replace = msgspec.structs.replace
    asked = replace(prompt, messages=[told, *prompt.messages], tools=[])
    return asked, replace(opts, response_format=JSONSchemaFormat(schema=schema), tool_choice=None)


def without_tool_turns(prompt: Prompt) -> Prompt:
    """Calls and their results as plain turns: the model's template has no place for them."""
    messages: list[Message] = []
    results: list[str] = []
    for message in prompt.messages:
        if message.role == "tool":
            results.append(message.text)
        elif message.text or not message.tool_calls:
            messages.append(message)
        if message.role == "user":
            results.clear()
    if results:
        _ask_again(messages, "\n".join(results))
    return Prompt(messages=messages)


def _ask_again(messages: list[Message], results: str) -> None:
    """Put the results into the question: the one form in which a small model uses them."""
    last = max((at for at, one in enumerate(messages) if one.role == "user"), default=None)
    asked = messages.pop(last).text if last is not None else "What is the result?"
    text = (
        f"Information: {results}\n\n"
        f"Using only this information, answer in one short sentence: {asked}"
    )
    messages.append(Message(role="user", content=text))


def read_call(text: str, tools: list[ToolDef]) -> ToolCallDelta | str:
    """The call that the model wrote, or its reply; of JSON that was cut off what can be read."""
    try:
        written = msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError:
        cut = _CUT_REPLY.search(text)
        return cut[1].replace('\\"', '"').replace("\\n", "\n") if cut else ""
    name = written.get("name")
    if name not in {tool.name for tool in tools}:
        return str(written.get(_REPLY, ""))
    arguments = msgspec.json.encode(written.get("arguments") or {}).decode()
    return ToolCallDelta(index=0, name=str(name), arguments=arguments)


def _branch(tool: ToolDef) -> dict[str, Any]:
    parameters = tool.parameters or {"type": "object", "properties": {}}
    return _object({"name": {"const": tool.name}, "arguments": parameters})


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _words(tools: list[ToolDef], *, choice: bool) -> str:
    lines = ["You can call these functions:"]
    for tool in tools:
        parameters = msgspec.json.encode(tool.parameters.get("properties", {})).decode()
        lines.append(f"- {tool.name}: {tool.description} Arguments: {parameters}")
    lines.append('To call one, answer {"name": its name, "arguments": {its arguments}}.')
    if choice:
        lines.append('Otherwise answer {"reply": your answer}.')
    return "\n".join(lines)
