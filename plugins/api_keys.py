"""The operations on API keys and tokens."""

from __future__ import annotations

import asyncio
import datetime as dt
import re
import time
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from harperpy import (
    AccessViolation,
    ClientError,
    Context,
    Grants,
    HarperError,
    InvalidBody,
    InvalidCredentials,
    NoParameters,
    NotFound,
    Permission,
    Scope,
    User,
    caller_address,
)

Text = Annotated[str, Meta(min_length=1)]
# A user's or a tenant's stands in each row of the ledger.
Name = Annotated[str, Meta(min_length=1, max_length=256)]
Seconds = Annotated[float, Meta(gt=0)]

_CLEANING_SECONDS = 3600.0
# What is later has no name in ISO 8601, and no reader.
_LAST_MS = dt.datetime(9999, 1, 1, tzinfo=dt.UTC).timestamp() * 1000
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class AddApiKey(msgspec.Struct, forbid_unknown_fields=True):
    """A key for the caller; for another `username`, or another tenant, where a super user asks.

    It ends at `expires` (ISO 8601) or after `expires_in` (seconds, or a text such as `30d`).
    """

    name: Name
    username: Text | None = None
    tenant: Name | None = None
    grants: Grants | None = None
    expires: dt.datetime | None = None
    expires_in: Seconds | str | None = None


class DropApiKey(msgspec.Struct, forbid_unknown_fields=True):
    """The key to end, by its id."""

    id: Text


class CreateTokens(msgspec.Struct, forbid_unknown_fields=True):
    """Username and password; neither for the caller's own tokens.

    The operation token lives for `expires_in`: seconds, or a text such as `12h`.
    """

    username: Text | None = None
    password: Text | None = None
    expires_in: Seconds | str | None = None


class RefreshToken(msgspec.Struct, forbid_unknown_fields=True):
    """The refresh token, unless it comes as the request's Bearer."""

    refresh_token: Text | None = None


def add_key_operations(scope: Scope) -> None:
    """Register them; once an hour what has expired is removed."""
    keys, add = KeyOperations(scope), scope.operations.add
    add("add_api_key", keys.add_api_key, AddApiKey, open_to="user")
    add("list_api_keys", keys.list_api_keys, NoParameters, open_to="user", reads=True)
    add("drop_api_key", keys.drop_api_key, DropApiKey, open_to="user")
    add("create_authentication_tokens", keys.create_tokens, CreateTokens, open_to="anyone")
    add("refresh_operation_token", keys.refresh_token, RefreshToken, open_to="anyone")
    scope.on_close(scope.keys.flush)
    scope.create_task(_clean(scope), name="expired tokens")


class KeyOperations:
    """Operations on API keys and tokens."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._people = scope.people
        self._keys = scope.keys
        self._tokens = scope.tokens

    async def add_api_key(self, request: AddApiKey, context: Context) -> dict[str, Any]:
        """Make an API key, with no more than its maker has; it is shown this once."""
        caller = calling(context)
        owner = await self._owner(request, caller)
        # What a key makes stays where the key is, and ends with it.
        own = caller.key_id if owner.username == caller.username else None
        tenant = request.tenant or (caller.tenant if own else None)
        self._check(request.grants, owner, caller)
        expires = await self._expiry(request, own)
        key_id, key = await self._keys.add(
            owner.username, request.name, tenant=tenant, grants=request.grants, expires=expires
        )
        return {"id": key_id, "name": request.name, "api_key": key}

    async def list_api_keys(self, _: NoParameters, context: Context) -> list[Any]:
        """API keys by their first letters: all for super users, else the caller's own."""
        return [*await self._keys.list(_own(context))]

    async def drop_api_key(self, request: DropApiKey, context: Context) -> str:
        """End an API key at once."""
        await self._keys.drop(request.id, _own(context))
        return f"API key {request.id} successfully deleted"

    async def create_tokens(self, request: CreateTokens, context: Context) -> dict[str, Any]:
        """An operation token and a refresh token, for username and password or the caller."""
        user = context.user
        if request.username is not None or request.password is not None:
            name, password = request.username or "", request.password or ""
            user = await self._people.verify_password(name, password, caller_address(context))
            if user is None:
                refusal = InvalidCredentials("Login failed")
                refusal.username = name
                raise refusal
        elif user is None:
            raise context.rejection or AccessViolation(None)
        elif user.key_id is not None and not await self._keys.is_whole(user.key_id):
            message = "A key with grants, an expiry or a tenant of its own makes no tokens."
            raise AccessViolation(user, message)
        seconds = _seconds(request.expires_in)
        began = (time.time() - (time.perf_counter() - context.started)) * 1000
        operation, refresh = await self._tokens.create(user, seconds, since=began)
        return {"operation_token": operation, "refresh_token": refresh}

    async def refresh_token(self, request: RefreshToken, context: Context) -> dict[str, Any]:
        """A new operation token and a new refresh token; the old one is good no more."""
        bearer = context.headers.get("authorization", "").partition(" ")[2].strip()
        if not (token := request.refresh_token or bearer):
            message = "refresh_token: expected in the body or as the request's Bearer"
            raise ClientError(message, param="refresh_token")
        operation, refresh = await self._tokens.refresh(token)
        return {"operation_token": operation, "refresh_token": refresh}

    async def _owner(self, request: AddApiKey, caller: User) -> User:
        username = request.username or caller.username
        if not caller.is_super_user:
            if username != caller.username:
                message = "username: only super users make keys for others"
                raise AccessViolation(caller, message)
            if request.tenant not in (None, caller.tenant):
                message = "tenant: only super users make keys for another tenant"
                raise AccessViolation(caller, message)
        if (owner := await self._people.user(username)) is None:
            message = f"User {username} does not exist"
            if request.username is None:
                # The local socket before there is a super user, or a plugin.
                message = "username: expected whose key it is, as who asks is no user"
            raise NotFound(message, param="username")
        return owner

    def _check(self, grants: Grants | None, owner: User, caller: User) -> None:
        """Raises `InvalidBody` for more than the owner has, or than the caller's own key has."""
        if grants is not None:
            wrong = grants.errors()
            wrong += self._scope.operations.check_names(grants.operations)
            if wrong:
                message = f"grants.{wrong[0]}"
                raise InvalidBody(message, param="grants")
        whole = owner.role.permission
        asked = whole if grants is None else whole.asked(grants)
        holders = [whole, *([caller.role.permission] if caller.username == owner.username else [])]
        for holder in holders:
            if (what := self._excess(asked, holder)) is not None:
                message = (
                    f"grants.{what}: a key has no more than its owner, or the key that made it"
                )
                raise InvalidBody(message, param=f"grants.{what}")

    def _excess(self, asked: Permission, holder: Permission) -> str | None:
        if (what := asked.exceeds(holder)) is not None:
            return what
        return "operations" if self._scope.operations.exceeds(asked, holder) else None

    async def _expiry(self, request: AddApiKey, own: str | None) -> float | None:
        """When the key ends, in ms since 1970: not after the key that makes it."""
        if request.expires is not None and request.expires_in is not None:
            message = "expires: give either expires or expires_in"
            raise InvalidBody(message, param="expires")
        asked: float | None = None
        if request.expires is not None:
            aware = request.expires.tzinfo is not None
            moment = request.expires if aware else request.expires.replace(tzinfo=dt.UTC)
            asked = moment.timestamp() * 1000
        elif (seconds := _seconds(request.expires_in)) is not None:
            asked = (time.time() + seconds) * 1000
        if asked is not None and not time.time() * 1000 < asked < _LAST_MS:
            message = "expires: expected a time that is to come, before the year 9999"
            raise InvalidBody(message, param="expires")
        makers = await self._keys.expiry(own) if own else None
        return min((at for at in (asked, makers) if at is not None), default=None)


def calling(context: Context) -> User:
    """Who calls. Raises `AccessViolation` where nobody is logged in."""
    if context.user is None:
        raise AccessViolation(None)
    return context.user


def _own(context: Context) -> str | None:
    """Whose keys a caller may see and end: its own; everyone's for super users."""
    caller = calling(context)
    return None if caller.is_super_user else caller.username


def _seconds(given: float | str | None) -> float | None:
    """A duration in seconds. Raises `InvalidBody`."""
    if not isinstance(given, str):
        return given
    match = re.fullmatch(r"([1-9]\d{0,8})([smhd])", given)
    if match is None:
        message = (
            "expires_in: expected a number of seconds, or a text such as '90s', '12h' or '30d'"
        )
        raise InvalidBody(message, param="expires_in")
    return float(int(match[1]) * _UNITS[match[2]])


async def _clean(scope: Scope) -> None:
    """Once an hour, remove the refresh tokens that have expired; a busy database is left be."""
    while True:
        try:
            await scope.tokens.forget_expired()
        except HarperError as error:
            scope.logger.warning("expired tokens stay for another hour: %s", error)
        await asyncio.sleep(_CLEANING_SECONDS)
