"""People: users and roles in the database, and their passwords."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import argon2
import sqlalchemy as sa

from .attempts import Attempts
from .audit import Deed
from .auth import Role, User
from .database import Database
from .errors import ClientError, Conflict, InvalidCredentials, NotFound
from .permission import Permission, document_of, stored_permission
from .system import CREATED, UPDATED, hdb_role, hdb_token, hdb_user, now_ms

SUPER_USER = Role("super_user", "super_user", Permission(super_user=True))
MODEL_USER = Role("model_user", "model_user", Permission(resources={"v1/*": ["read", "create"]}))

# OWASP Password Storage Cheat Sheet: argon2id with 19 MiB and two passes.
_HASHER = argon2.PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1)
_AT_ONCE = 2

May: TypeAlias = Callable[[User | Role], None]
"""Raises what refuses someone to change this user, or to give or change this role."""


class People:
    """Users and roles. `changed` is called with what each change that may take a right away gives.

    Where a change takes `may`, it is asked in the same transaction about each user and role that it
    touches, as they are then.
    """

    def __init__(
        self, database: Database, changed: Callable[[object], None], attempts: Attempts
    ) -> None:
        self._database = database
        self._changed = changed
        self._attempts = attempts
        self._hashing = asyncio.Semaphore(_AT_ONCE)
        # Verified in place of an unknown user's, so that both take the same time.
        self._nobody: str | None = None

    async def open(self) -> None:
        """Make the roles that ship, where they are missing."""
        deed = Deed(hdb_role)

        def work(connection: sa.Connection) -> None:
            known = set(connection.scalars(sa.select(hdb_role.c.id)))
            for role in (SUPER_USER, MODEL_USER):
                if role.id not in known:
                    row = _role_row(role)
                    connection.execute(sa.insert(hdb_role).values(row))
                    deed.note(connection, "insert", role.id, after=_told(row))

        await self._database.run(work)

    async def first_super_user(self) -> User | None:
        """The longest-standing active super user."""
        users = await self._users(sa.select(*_JOINED).order_by(hdb_user.c[CREATED]))
        return next((user for user in users if user.is_super_user and user.active), None)

    async def user(self, username: str) -> User | None:
        """The user of that name."""
        found = await self._users(sa.select(*_JOINED).where(hdb_user.c.username == username))
        return found[0] if found else None

    async def list_users(self) -> list[User]:
        """All users, by name."""
        return await self._users(sa.select(*_JOINED).order_by(hdb_user.c.username))

    async def add_user(
        self,
        username: str,
        password: str,
        role: str,
        *,
        active: bool = True,
        tenant: str = "default",
        may: May | None = None,
    ) -> None:
        """Add a user.

        Raises `ClientError` for a name nobody can log in by, `Conflict` for a taken one, `NotFound`
        for an unknown role.
        """
        # By another one nobody can log in (RFC 7617), or read who did.
        if ":" in username or not username.isprintable():
            message = "username: expected printable characters, and no colon"
            raise ClientError(message, param="username")
        hashed = await self._hash(password)
        deed = Deed(hdb_user)

        def work(connection: sa.Connection) -> None:
            if connection.scalar(sa.select(1).where(hdb_user.c.username == username)):
                message = f"User {username} already exists"
                raise Conflict(message)
            now = now_ms()
            row = {
                "username": username,
                "password": hashed,
                "role": _role_id(connection, role, may),
            }
            times = {CREATED: now, UPDATED: now}
            values = {**row, "active": active, "tenant": tenant, **times}
            connection.execute(sa.insert(hdb_user).values(values))
            deed.note(connection, "insert", username, after=_told(values))

        await self._database.run(work, self._changed)

    async def alter_user(
        self, username: str, changes: Mapping[str, Any], may: May | None = None
    ) -> None:
        """Change `password`, `role` (a name), `active` or `tenant`.

        A new password or an inactive user ends the user's tokens. Raises `NotFound`, and
        `Conflict` where it would leave no active super user.
        """
        values = dict(changes)
        if password := values.get("password"):
            values["password"] = await self._hash(password)
        deed, of_tokens = Deed(hdb_user), Deed(hdb_token)

        def work(connection: sa.Connection) -> None:
            before = _super_users(connection)
            known = _known(connection, username)
            _ask(connection, may, hdb_user.c.username == username)
            if "role" in values:
                values["role"] = _role_id(connection, values["role"], may)
            connection.execute(
                sa.update(hdb_user)
                .where(hdb_user.c.username == username)
                .values({**values, UPDATED: now_ms()})
            )
            changed = {column: known[column] for column in values if column in known}
            deed.note(connection, "update", username, after=_told(values), before=changed)
            if "password" in values or values.get("active") is False:
                refresh = hdb_token.c.kind == "refresh"
                end_tokens(connection, of_tokens, username, refresh)
            _keep_a_super_user(connection, before)

        await self._database.run(work, self._changed)

    async def drop_user(self, username: str, may: May | None = None) -> None:
        """Remove a user with its keys and tokens. Raises as `alter_user`."""
        deed, of_tokens = Deed(hdb_user), Deed(hdb_token)

        def work(connection: sa.Connection) -> None:
            before = _super_users(connection)
            known = _known(connection, username)
            _ask(connection, may, hdb_user.c.username == username)
            end_tokens(connection, of_tokens, username)
            connection.execute(sa.delete(hdb_user).where(hdb_user.c.username == username))
            deed.note(connection, "delete", username, before=known)
            _keep_a_super_user(connection, before)

        await self._database.run(work, self._changed)

    async def list_roles(self) -> list[Role]:
        """All roles, by name."""

        def work(connection: sa.Connection) -> list[Role]:
            rows = connection.execute(sa.select(hdb_role).order_by(hdb_role.c.role))
            return [Role(row.id, row.role, stored_permission(row.permission)) for row in rows]

        return await self._database.read(work)

    async def add_role(self, role: Role) -> None:
        """Add a role. Raises `Conflict` for a taken name."""
        deed = Deed(hdb_role)

        def work(connection: sa.Connection) -> None:
            _check_free(connection, hdb_role.c.role, role.role)
            _check_free(connection, hdb_role.c.id, role.id)
            row = _role_row(role)
            connection.execute(sa.insert(hdb_role).values(row))
            deed.note(connection, "insert", role.id, after=_told(row))

        await self._database.run(work)

    async def alter_role(
        self, role_id: str, permission: Permission, name: str | None = None, may: May | None = None
    ) -> Role:
        """Change a role's permission, and its name if one is given.

        Raises `ClientError` for an unknown id, and `Conflict` for a taken name or where it would
        leave no active super user.
        """
        deed = Deed(hdb_role)

        def work(connection: sa.Connection) -> Role:
            before = _super_users(connection)
            if (known := _role(connection, role_id)) is None:
                message = "Invalid role id"
                raise ClientError(message, param="id")
            _ask(connection, may, hdb_user.c.role == role_id, known)
            role = Role(role_id, name or known.role, permission)
            _check_free(connection, hdb_role.c.role, role.role, but=role_id)
            changed = {"role": role.role, "permission": document_of(permission), UPDATED: now_ms()}
            connection.execute(sa.update(hdb_role).where(hdb_role.c.id == role_id).values(changed))
            old = {"role": known.role, "permission": document_of(known.permission)}
            deed.note(connection, "update", role_id, after=_told(changed), before=old)
            _keep_a_super_user(connection, before)
            return role

        return await self._database.run(work, self._changed)

    async def drop_role(self, role_id: str, may: May | None = None) -> Role:
        """Remove a role that nobody has. Raises `NotFound`, or `Conflict` where someone has it."""
        deed = Deed(hdb_role)

        def work(connection: sa.Connection) -> Role:
            if (known := _role(connection, role_id)) is None:
                message = "Role not found"
                raise NotFound(message, param="id")
            _ask(connection, may, hdb_user.c.role == role_id, known)
            held = sa.select(hdb_user.c.active).where(hdb_user.c.role == role_id)
            if holders := set(connection.scalars(held)):
                state = "active" if True in holders else "inactive"
                message = (
                    f"Cannot drop role {known.role} as it has {state} user(s) tied to this role"
                )
                raise Conflict(message)
            connection.execute(sa.delete(hdb_role).where(hdb_role.c.id == role_id))
            old = {"id": role_id, "role": known.role, "permission": document_of(known.permission)}
            deed.note(connection, "delete", role_id, before=old)
            return known

        return await self._database.run(work, self._changed)

    async def active_user(self, username: str) -> User:
        """The user of that name. Raises `InvalidCredentials` if there is none, or not any more."""
        user = await self.user(username)
        if user is None or not user.active:
            message = "This user does not exist any more or is inactive."
            raise InvalidCredentials(message)
        return user

    def expect(self, connection: sa.Connection, username: str, since: float | None = None) -> None:
        """Raises `NotFound` in the caller's transaction if there is no user of that name.

        With `since`, in ms since 1970, `InvalidCredentials` if they have been changed after it.
        """
        _known(connection, username)
        updated = sa.select(hdb_user.c[UPDATED]).where(hdb_user.c.username == username)
        if since is not None and (connection.scalar(updated) or 0.0) > since:
            message = "Login failed"
            raise InvalidCredentials(message)

    async def verify_password(self, username: str, password: str, address: str = "") -> User | None:
        """The user, if they are active and this is their password.

        Whoever is unknown or inactive takes as long as a wrong password. `address` is where it came
        from, empty for the local socket. Raises `TooManyAttempts` after too many wrong ones.
        """
        columns = (*_JOINED, hdb_user.c.password)
        joined = sa.select(*columns).join_from(hdb_user, hdb_role)
        asked = joined.where(hdb_user.c.username == username)
        if self._nobody is None:
            self._nobody = await self._hash(secrets.token_urlsafe(15))
        async with self._hashing:
            # Asked when its turn has come: whoever sends many at once gains nothing.
            self._attempts.check(username, address)
            row = await self._database.read(lambda connection: connection.execute(asked).first())
            hashed = self._nobody if row is None else row.password
            right = await asyncio.to_thread(_matches, hashed, password)
            if right and row is not None and row.active:
                self._attempts.succeeded(username, address)
                return _user(row)
            self._attempts.failed(username, address)
            return None

    async def _hash(self, password: str) -> str:
        async with self._hashing:
            return await asyncio.to_thread(_HASHER.hash, password)

    async def _users(self, select: sa.Select[*tuple[Any, ...]]) -> list[User]:
        return await self._database.read(lambda connection: _read(connection, select))


_JOINED = (
    hdb_user.c.username,
    hdb_user.c.active,
    hdb_user.c.tenant,
    hdb_role.c.id,
    hdb_role.c.role.label("role_name"),
    hdb_role.c.permission,
)


def _read(connection: sa.Connection, select: sa.Select[*tuple[Any, ...]]) -> list[User]:
    joined = select.join_from(hdb_user, hdb_role)
    return [_user(row) for row in connection.execute(joined)]


def _ask(
    connection: sa.Connection, may: May | None, where: sa.ColumnElement[bool], *roles: Role
) -> None:
    """Ask about these roles, and about the users of whom this is true."""
    if may is not None:
        touched: list[User | Role] = [*roles, *_read(connection, sa.select(*_JOINED).where(where))]
        for one in touched:
            may(one)


def _user(row: sa.Row[*tuple[Any, ...]]) -> User:
    role = Role(row.id, row.role_name, stored_permission(row.permission))
    return User(row.username, role, active=row.active, tenant=row.tenant)


def _role_row(role: Role) -> dict[str, Any]:
    permission = document_of(role.permission)
    now = now_ms()
    row = {"id": role.id, "role": role.role, "permission": permission}
    return {**row, CREATED: now, UPDATED: now}


def _role(connection: sa.Connection, role_id: str | None, name: str | None = None) -> Role | None:
    of_it = hdb_role.c.role == name if role_id is None else hdb_role.c.id == role_id
    row = connection.execute(sa.select(hdb_role).where(of_it)).first()
    return None if row is None else Role(row.id, row.role, stored_permission(row.permission))


def _check_free(
    connection: sa.Connection, column: sa.Column[Any], value: str, but: str | None = None
) -> None:
    """Raises `Conflict` where another role has this name or id."""
    if connection.scalar(sa.select(1).where(column == value, hdb_role.c.id != (but or ""))):
        what = "name" if column.name == "role" else "id"
        message = f"A role with {what} '{value}' already exists"
        raise Conflict(message)


def _role_id(connection: sa.Connection, name: str, may: May | None) -> str:
    if (role := _role(connection, None, name)) is None:
        message = f"{name} role not found"
        raise NotFound(message, param="role")
    if may is not None:
        may(role)
    return role.id


def _super_users(connection: sa.Connection) -> int:
    """How many are active."""
    joined = sa.select(hdb_role.c.permission).join_from(hdb_user, hdb_role)
    permissions = connection.scalars(joined.where(hdb_user.c.active.is_(True)))
    return sum(bool(permission.get("super_user")) for permission in permissions)


def _keep_a_super_user(connection: sa.Connection, before: int) -> None:
    if before and not _super_users(connection):
        message = "Cannot drop, demote or deactivate the last active super user"
        raise Conflict(message)


_PLAIN = (hdb_user.c.username, hdb_user.c.role, hdb_user.c.active, hdb_user.c.tenant)


def _known(connection: sa.Connection, username: str) -> dict[str, Any]:
    """The user as the audit may show it. Raises `NotFound`."""
    select = sa.select(*_PLAIN).where(hdb_user.c.username == username)
    if (row := connection.execute(select).mappings().first()) is None:
        raise _no_user(username)
    return dict(row)


def _told(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the audit may show of a row: of a password that there is a new one."""
    told = {name: value for name, value in values.items() if name not in (CREATED, UPDATED)}
    return {**told, "password": "changed"} if "password" in told else told


def end_tokens(
    connection: sa.Connection, deed: Deed, username: str, *which: sa.ColumnElement[bool]
) -> None:
    """End a user's keys and tokens, those of which all this is true, and note it."""
    ended = sa.delete(hdb_token).where(hdb_token.c.user == username, *which)
    ids = list(connection.scalars(ended.returning(hdb_token.c.id)))
    if ids:
        deed.note(connection, "delete", *ids, before={"user": username})


def _no_user(username: str) -> ClientError:
    message = f"User {username} does not exist"
    return NotFound(message)


def _matches(hashed: str, password: str) -> bool:
    try:
        return _HASHER.verify(hashed, password)
    except argon2.exceptions.VerificationError:
        return False
