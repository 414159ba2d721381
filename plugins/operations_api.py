"""The operations port: `POST /` with `{"operation": name, …}`; and the operations on the server."""

from __future__ import annotations

import asyncio
from typing import Any, Literal, cast

import msgspec

from harperpy import (
    AccessViolation,
    Body,
    ClientError,
    Context,
    Deed,
    HarperError,
    InvalidBody,
    NoParameters,
    Operations,
    RequestTarget,
    Resource,
    Response,
    Scope,
    json_response,
    redacted,
)

from . import (
    describing,
    logs,
    machine,
    modelling,
    recording,
    searching,
    settings,
    sql,
    status,
    usage,
)
from .trial import trouble

# Who they are takes less; what is read of a longer body would be all the server's time.
_MOST_OF_STRANGERS = 64 * 1024
_MORE = (sql, searching, recording, describing, usage, modelling, status, settings, machine, logs)


class RestartService(msgspec.Struct, forbid_unknown_fields=True):
    """Which part; all of them are one process's."""

    service: Literal["http", "http_workers", "harperdb", "harperpy"]


def handle_application(scope: Scope) -> None:
    """Mount the operations on their port, and add those on the server itself."""
    endpoint = type("OperationsEndpoint", (OperationsResource,), {"operations": scope.operations})
    scope.operations_resources.set("", endpoint)
    own = ServerOperations(scope)
    scope.operations.add("get_configuration", own.get_configuration, NoParameters, reads=True)
    scope.operations.add("list_commands", own.list_commands, NoParameters, reads=True)
    scope.operations.add("get_components", own.get_components, NoParameters, reads=True)
    scope.operations.add("restart", own.restart, NoParameters)
    scope.operations.add("restart_service", own.restart_service, RestartService)
    for operations in _MORE:
        operations.add_operations(scope)


class OperationsResource(Resource):
    """Runs operations. Whoever is not known may run those open to anyone."""

    operations: Operations
    public = {"create"}  # noqa: RUF012  # as plugin authors write it; nobody changes it
    settles_credentials = True

    @classmethod
    async def post(cls, target: RequestTarget, data: Body, context: Context) -> Any:
        """The operation's result; text becomes a message."""
        body = await _read(data, context)
        result = await cls.operations.call(body, context)
        return {"message": result} if isinstance(result, str) else result

    @staticmethod
    def present_error(error: HarperError, context: Context) -> Response:
        """`{"error": message}`, with the paths of what did not fit."""
        body: dict[str, Any] = {"error": error.public_message}
        if error.errors:
            body["errors"] = error.errors
        body.update(error.report or {})
        return json_response(error.status, body, error.headers)


class ServerOperations:
    """Operations on the server itself."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope

    async def get_configuration(self) -> dict[str, Any]:
        """The configuration, its secrets redacted."""
        return redacted(self._scope.config)

    async def get_components(self) -> list[dict[str, Any]]:
        """The plugins, how each is, and its options, secrets redacted."""
        options = redacted(self._scope.config)["plugins"]
        known = self._scope.status()["plugins"]
        return [{"name": name, **one, "options": options.get(name)} for name, one in known.items()]

    async def restart(self, _: NoParameters, context: Context) -> str:
        """Start the server anew, if it could start with the config.yaml that is there."""
        return await self.restart_service(RestartService("harperpy"), context)

    async def restart_service(self, request: RestartService, context: Context) -> str:
        """Start a part of the server anew, which is all of it."""
        scope = self._scope
        path, running = scope.config_file_path, scope.config
        if told := await asyncio.to_thread(trouble, path, scope.directory, running):
            message = f"the server stays as it is: {told}"
            raise ClientError(message, status=409)
        deed = Deed("server")
        await self._scope.database.run(lambda made: deed.note(made, "restart", request.service))
        context.response_headers["Connection"] = "close"
        if self._scope.request_restart("an operation asks for it", ordered=True):
            return "Restarting harperpy."
        return "A restart is noted in get_status: who runs this server has to make it."

    async def list_commands(self) -> list[dict[str, str]]:
        """What plugins add to the command line: each command, its line of help, its parameters."""
        return [
            {"command": one.name, "help": one.help, "parameters": _shown(one.request_type)}
            for one in self._scope.operations
            if one.help is not None
        ]


async def _read(data: Body, context: Context) -> dict[str, Any]:
    """The object that names an operation. Who is not known is told of that first."""
    stranger = (context.rejection or AccessViolation(None)) if context.user is None else None
    if stranger is not None:
        await _take(data, stranger)
    try:
        body = await data
    except InvalidBody as error:
        raise stranger or error from None
    if not isinstance(body, dict):
        message = "Invalid JSON."
        raise stranger or ClientError(message)
    return cast("dict[str, Any]", body)


async def _take(data: Body, stranger: HarperError) -> None:
    """Have a short body here. Raises what is said to strangers for a longer one, undecoded."""
    taken = bytearray()
    async for chunk in data.stream():
        taken += chunk
        if len(taken) > _MOST_OF_STRANGERS:
            raise stranger
    data.whole = bytes(taken)


def _shown(request_type: type[Any]) -> str:
    """The parameters of a Struct; those that may be left out are in brackets."""
    fields = msgspec.structs.fields(request_type)
    shown = ((one.encode_name, one.required) for one in fields)
    return " ".join(f"{name}=…" if needed else f"[{name}=…]" for name, needed in shown)
