"""People: the authenticators, and the operations on users and roles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from harperpy import (
    AccessViolation,
    ClientError,
    Context,
    InvalidBody,
    NoParameters,
    Permission,
    PermissionErrors,
    Role,
    Scope,
    User,
    document_of,
    read_permission,
)

from .api_keys import Name, add_key_operations, calling

Text = Annotated[str, Meta(min_length=1)]


class AddUser(msgspec.Struct, forbid_unknown_fields=True):
    """A new user; `role` is a role's name."""

    username: Name
    password: Text
    role: Text
    active: bool = True
    tenant: Name | None = None


class AlterUser(msgspec.Struct, forbid_unknown_fields=True):
    """What to change about a user."""

    username: Text
    password: Text | UnsetType = UNSET
    role: str | UnsetType = UNSET
    active: bool | UnsetType = UNSET
    tenant: Name | UnsetType = UNSET


class DropUser(msgspec.Struct, forbid_unknown_fields=True):
    """The user to remove."""

    username: Text


class AddRole(msgspec.Struct, forbid_unknown_fields=True):
    """A new role; its id is its name unless given."""

    role: Text
    permission: dict[str, Any]
    id: Text | None = None


class AlterRole(msgspec.Struct, forbid_unknown_fields=True):
    """The role to change, by its id; `role` is a new name."""

    id: Text
    permission: dict[str, Any]
    role: Text | None = None


class DropRole(msgspec.Struct, forbid_unknown_fields=True):
    """The role to remove, by its id."""

    id: Text


def handle_application(scope: Scope) -> None:
    """Register the authenticators and the operations."""
    for authenticator in (
        scope.keys.authenticate,
        scope.tokens.authenticate,
        scope.tokens.authenticate_password,
    ):
        scope.authenticators.append(authenticator)
    people, add = PeopleOperations(scope), scope.operations.add
    add("user_info", people.user_info, NoParameters, open_to="user", reads=True)
    add("add_user", people.add_user, AddUser)
    add("alter_user", people.alter_user, AlterUser)
    add("drop_user", people.drop_user, DropUser)
    add("list_users", people.list_users, NoParameters, reads=True)
    add("add_role", people.add_role, AddRole)
    add("alter_role", people.alter_role, AlterRole)
    add("drop_role", people.drop_role, DropRole)
    add("list_roles", people.list_roles, NoParameters, reads=True)
    add_key_operations(scope)


class PeopleOperations:
    """Operations on users and roles.

    A role may lend them to others than super users, who then give and change no more than they have
    themselves, and see and change nobody of another tenant.
    """

    def __init__(self, scope: Scope) -> None:
        self._people = scope.people
        self._operations = scope.operations

    async def user_info(self, _: NoParameters, context: Context) -> dict[str, Any]:
        """The calling user."""
        return _shown(calling(context))

    async def add_user(self, request: AddUser, context: Context) -> str:
        """Add a user."""
        caller = calling(context)
        tenant = request.tenant or ("default" if caller.is_super_user else caller.tenant)
        self._check_tenant(tenant, caller)
        await self._people.add_user(
            request.username,
            request.password,
            request.role,
            active=request.active,
            tenant=tenant,
            may=self._may(caller),
        )
        return f"{request.username} successfully added"

    async def alter_user(self, request: AlterUser, context: Context) -> dict[str, Any]:
        """Change a user's password, role, active or tenant."""
        changes = {
            field: value
            for field in ("password", "role", "active", "tenant")
            if (value := getattr(request, field)) is not UNSET
        }
        if not changes:
            message = "nothing to update: give one of password, role, active, tenant"
            raise ClientError(message)
        if request.role == "":
            message = "If role is specified, it cannot be empty."
            raise InvalidBody(message, param="role", errors=[{"path": "/role", "message": message}])
        caller = calling(context)
        self._check_tenant(changes.get("tenant", caller.tenant), caller)
        await self._people.alter_user(request.username, changes, self._may(caller))
        return {"message": "updated 1 of 1 records", "update_hashes": [request.username]}

    async def drop_user(self, request: DropUser, context: Context) -> str:
        """Remove a user with its keys and tokens."""
        await self._people.drop_user(request.username, self._may(calling(context)))
        return f"{request.username} successfully deleted"

    async def list_users(self, _: NoParameters, context: Context) -> list[dict[str, Any]]:
        """All users; those of the caller's tenant, unless a super user asks."""
        caller, users = calling(context), await self._people.list_users()
        everyone = caller.is_super_user
        return [_shown(user) for user in users if everyone or user.tenant == caller.tenant]

    async def add_role(self, request: AddRole, context: Context) -> dict[str, Any]:
        """Add a role."""
        permission = self._read(request.permission)
        role = Role(request.id or request.role, request.role, permission)
        self._check_role(role, calling(context))
        await self._people.add_role(role)
        return _role(role)

    async def alter_role(self, request: AlterRole, context: Context) -> dict[str, Any]:
        """Change a role's permission, or its name too; it counts at once."""
        caller, permission = calling(context), self._read(request.permission)
        self._check_role(Role(request.id, request.id, permission), caller)
        may = self._may(caller)
        return _role(await self._people.alter_role(request.id, permission, request.role, may))

    async def drop_role(self, request: DropRole, context: Context) -> str:
        """Remove a role that nobody has."""
        role = await self._people.drop_role(request.id, self._may(calling(context)))
        return f"{role.role} successfully deleted"

    async def list_roles(self) -> list[dict[str, Any]]:
        """All roles."""
        return [_role(role) for role in await self._people.list_roles()]

    def _read(self, document: dict[str, Any]) -> Permission:
        permission = read_permission(document)
        if wrong := self._operations.check_names(permission.operations or ()):
            raise PermissionErrors(wrong, {})
        return permission

    def _may(self, caller: User) -> Callable[[User | Role], None] | None:
        """Refuses what has more than the caller or is of another tenant; None: nothing."""
        if caller.is_super_user:
            return None

        def may(one: User | Role) -> None:
            if isinstance(one, User):
                self._check_tenant(one.tenant, caller)
                one = one.role
            self._check_role(one, caller)

        return may

    def _check_role(self, role: Role, caller: User) -> None:
        """Raises `AccessViolation` for a role that has more than the caller."""
        own = caller.role.permission
        if role.permission.exceeds(own) or self._operations.exceeds(role.permission, own):
            message = "role: it has more than the role or the key of whoever asks"
            raise AccessViolation(caller, message)

    def _check_tenant(self, tenant: str, caller: User) -> None:
        if tenant != caller.tenant and not caller.is_super_user:
            message = "tenant: only super users have to do with another tenant"
            raise AccessViolation(caller, message)


def _shown(user: User) -> dict[str, Any]:
    return {
        "username": user.username,
        "active": user.active,
        "tenant": user.tenant,
        "role": _role(user.role),
    }


def _role(role: Role) -> dict[str, Any]:
    return {"id": role.id, "role": role.role, "permission": document_of(role.permission)}
