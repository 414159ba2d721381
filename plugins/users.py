"""People: the authenticators, and the operations on users, roles, keys and tokens."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from harperpy import (
    AccessViolation,
    ClientError,
    Context,
    InvalidCredentials,
    NoParameters,
    NotFound,
    Role,
    Scope,
    User,
    document_of,
    read_permission,
)

Text = Annotated[str, Meta(min_length=1)]


class AddUser(msgspec.Struct, forbid_unknown_fields=True):
    """A new user; `role` is a role's name."""

    username: Text
    password: Text
    role: Text
    active: bool = True
    tenant: Text = "default"


class AlterUser(msgspec.Struct, forbid_unknown_fields=True):
    """What to change about a user."""

    username: Text
    password: Text | UnsetType = UNSET
    role: Text | UnsetType = UNSET
    active: bool | UnsetType = UNSET
    tenant: Text | UnsetType = UNSET


class DropUser(msgspec.Struct, forbid_unknown_fields=True):
    """The user to remove."""

    username: Text


class AddRole(msgspec.Struct, forbid_unknown_fields=True):
    """A new role; its id is its name unless given."""

    role: Text
    permission: dict[str, Any]
    id: Text | None = None


class AddApiKey(msgspec.Struct, forbid_unknown_fields=True):
    """A key for the caller, or for `username` where a super user asks."""

    name: Text
    username: Text | None = None


class DropApiKey(msgspec.Struct, forbid_unknown_fields=True):
    """The key to end, by its id."""

    id: Text


class CreateTokens(msgspec.Struct, forbid_unknown_fields=True):
    """Username and password; neither for the caller's own tokens."""

    username: Text | None = None
    password: Text | None = None


class RefreshToken(msgspec.Struct, forbid_unknown_fields=True):
    """The refresh token, unless it comes as the request's Bearer."""

    refresh_token: Text | None = None


def handle_application(scope: Scope) -> None:
    """Register the authenticators and the operations."""
    for authenticator in (
        scope.tokens.authenticate_key,
        scope.tokens.authenticate_token,
        scope.tokens.authenticate_password,
    ):
        scope.authenticators.append(authenticator)
    people, keys = PeopleOperations(scope), KeyOperations(scope)
    add = scope.operations.add
    add("user_info", people.user_info, NoParameters, open_to="user", reads=True)
    add("add_user", people.add_user, AddUser)
    add("alter_user", people.alter_user, AlterUser)
    add("drop_user", people.drop_user, DropUser)
    add("list_users", people.list_users, NoParameters)
    add("add_role", people.add_role, AddRole)
    add("list_roles", people.list_roles, NoParameters)
    add("add_api_key", keys.add_api_key, AddApiKey, open_to="user")
    add("list_api_keys", keys.list_api_keys, NoParameters, open_to="user", reads=True)
    add("drop_api_key", keys.drop_api_key, DropApiKey, open_to="user")
    add("create_authentication_tokens", keys.create_tokens, CreateTokens, open_to="anyone")
    add("refresh_operation_token", keys.refresh_token, RefreshToken, open_to="anyone")


class PeopleOperations:
    """Operations on users and roles."""

    def __init__(self, scope: Scope) -> None:
        self._people = scope.people

    async def user_info(self, _: NoParameters, context: Context) -> dict[str, Any]:
        """The calling user."""
        return _shown(_caller(context))

    async def add_user(self, request: AddUser) -> str:
        """Add a user."""
        await self._people.add_user(
            request.username,
            request.password,
            request.role,
            active=request.active,
            tenant=request.tenant,
        )
        return f"{request.username} successfully added"

    async def alter_user(self, request: AlterUser) -> dict[str, Any]:
        """Change a user's password, role, active or tenant."""
        changes = {
            field: value
            for field in ("password", "role", "active", "tenant")
            if (value := getattr(request, field)) is not UNSET
        }
        if not changes:
            message = "nothing to update: give one of password, role, active, tenant"
            raise ClientError(message)
        await self._people.alter_user(request.username, changes)
        return {"message": "updated 1 of 1 records", "update_hashes": [request.username]}

    async def drop_user(self, request: DropUser) -> str:
        """Remove a user with its keys and tokens."""
        await self._people.drop_user(request.username)
        return f"{request.username} successfully deleted"

    async def list_users(self) -> list[dict[str, Any]]:
        """All users."""
        return [_shown(user) for user in await self._people.list_users()]

    async def add_role(self, request: AddRole) -> dict[str, Any]:
        """Add a role."""
        permission = read_permission(request.permission)
        role = Role(request.id or request.role, request.role, permission)
        await self._people.add_role(role)
        return _role(role)

    async def list_roles(self) -> list[dict[str, Any]]:
        """All roles."""
        return [_role(role) for role in await self._people.list_roles()]


class KeyOperations:
    """Operations on API keys and tokens."""

    def __init__(self, scope: Scope) -> None:
        self._people = scope.people
        self._tokens = scope.tokens

    async def add_api_key(self, request: AddApiKey, context: Context) -> dict[str, Any]:
        """Make an API key; it is shown this once."""
        caller = _caller(context)
        username = request.username or caller.username
        if username != caller.username and not caller.is_super_user:
            message = "username: only super users make keys for others"
            raise AccessViolation(caller, message)
        if await self._people.user(username) is None:
            message = f"User {username} does not exist"
            raise NotFound(message, param="username")
        key_id, key = await self._tokens.add_key(username, request.name)
        return {"id": key_id, "name": request.name, "api_key": key}

    async def list_api_keys(self, _: NoParameters, context: Context) -> list[Any]:
        """API keys by their first letters: all for super users, else the caller's own."""
        return [*await self._tokens.list_keys(_own(context))]

    async def drop_api_key(self, request: DropApiKey, context: Context) -> str:
        """End an API key at once."""
        await self._tokens.drop_key(request.id, _own(context))
        return f"API key {request.id} successfully deleted"

    async def create_tokens(self, request: CreateTokens, context: Context) -> dict[str, Any]:
        """An operation token and a refresh token, for username and password or the caller."""
        user = context.user
        if request.username is not None or request.password is not None:
            user = await self._people.verify_password(
                request.username or "", request.password or ""
            )
            if user is None or not user.active:
                message = "Login failed"
                raise InvalidCredentials(message)
        elif user is None:
            raise context.rejection or AccessViolation(None)
        operation, refresh = await self._tokens.create_tokens(user)
        return {"operation_token": operation, "refresh_token": refresh}

    async def refresh_token(self, request: RefreshToken, context: Context) -> dict[str, Any]:
        """A new operation token for a refresh token."""
        bearer = context.headers.get("authorization", "").partition(" ")[2].strip()
        if not (token := request.refresh_token or bearer):
            message = "refresh_token: expected in the body or as the request's Bearer"
            raise ClientError(message, param="refresh_token")
        return {"operation_token": await self._tokens.refresh(token)}


def _caller(context: Context) -> User:
    if context.user is None:
        raise AccessViolation(None)
    return context.user


def _own(context: Context) -> str | None:
    """Whose keys a caller may see and end: its own; everyone's for super users."""
    caller = _caller(context)
    return None if caller.is_super_user else caller.username


def _shown(user: User) -> dict[str, Any]:
    return {
        "username": user.username,
        "active": user.active,
        "tenant": user.tenant,
        "role": _role(user.role),
    }


def _role(role: Role) -> dict[str, Any]:
    return {"id": role.id, "role": role.role, "permission": document_of(role.permission)}
