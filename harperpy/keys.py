"""Keys: API keys, what they leave of their owner's rights, and when they were used."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import msgspec
import sqlalchemy as sa

from .audit import Deed
from .auth import Bearer, Credential, Role, User, Verified
from .database import Database
from .errors import HarperError, InvalidCredentials, NotFound
from .people import People, end_tokens
from .permission import Grants
from .system import CREATED, hdb_token, iso, now_ms, purpose_key

logger = logging.getLogger("harperpy.keys")

KEY_PREFIX = "hk_"
_NOTED_SECONDS = 60.0
_IS_KEY = hdb_token.c.kind == "api_key"


class APIKey(msgspec.Struct, frozen=True):
    """An API key as it may be shown: its first letters. Times are ISO 8601 in UTC.

    Without a `tenant` or `grants` of its own it has its owner's; `last_used` is right to a minute.
    """

    id: str
    name: str | None
    user: str
    prefix: str
    created: str
    last_used: str | None
    tenant: str | None = None
    grants: Grants | None = None
    expires: str | None = None


class Keys:
    """Makes, checks and ends API keys; only keyed hashes of them are stored.

    `changed` is called when one ends.
    """

    def __init__(
        self, database: Database, people: People, secret: bytes, changed: Callable[[object], None]
    ) -> None:
        self._database = database
        self._people = people
        self._changed = changed
        self._hash_key = purpose_key(secret, "token hashes")
        self._used: dict[str, float] = {}
        self._noted: dict[str, float] = {}

    async def add(
        self,
        username: str,
        name: str,
        *,
        tenant: str | None = None,
        grants: Grants | None = None,
        expires: float | None = None,
    ) -> tuple[str, str]:
        """A new API key: its id and the key itself, which nobody can read again.

        `expires` is in ms since 1970. Raises `NotFound` for an unknown user.
        """
        key = KEY_PREFIX + secrets.token_urlsafe(32)
        key_id = secrets.token_hex(8)
        told = {"user": username, "kind": "api_key", "name": name}
        limits = {"tenant": tenant, "grants": msgspec.to_builtins(grants), "expires": expires}
        told |= {what: value for what, value in limits.items() if value is not None}
        row = {**told, "id": key_id, "prefix": key[:8], "hash": self._hash(key), CREATED: now_ms()}
        deed = Deed(hdb_token, subject=username)

        def work(connection: sa.Connection) -> None:
            self._people.expect(connection, username)
            connection.execute(sa.insert(hdb_token).values(row))
            deed.note(connection, "insert", key_id, after=told)

        await self._database.run(work)
        return key_id, key

    async def list(self, username: str | None = None) -> list[APIKey]:
        """The API keys, of one user or of all."""
        select = sa.select(hdb_token).where(_IS_KEY).order_by(hdb_token.c[CREATED])
        if username is not None:
            select = select.where(hdb_token.c.user == username)

        def work(connection: sa.Connection) -> list[APIKey]:
            return [_shown(row) for row in connection.execute(select)]

        await self.flush()
        return await self._database.read(work)

    async def expiry(self, key_id: str) -> float | None:
        """When a key ends, in ms since 1970; None if it does not."""
        select = sa.select(hdb_token.c.expires).where(hdb_token.c.id == key_id)
        return await self._database.read(lambda connection: connection.scalar(select))

    async def is_whole(self, key_id: str) -> bool:
        """Whether a key is all that its owner is: for ever, with all grants and the same tenant."""
        limits = (hdb_token.c.expires, hdb_token.c.grants, hdb_token.c.tenant)
        whole = sa.and_(*(limit.is_(None) for limit in limits))
        select = sa.select(1).where(hdb_token.c.id == key_id, whole)
        return bool(await self._database.read(lambda connection: connection.scalar(select)))

    async def drop(self, key_id: str, username: str | None = None) -> None:
        """End a key and its tokens at once; of one user only if named. Raises `NotFound`."""
        delete = sa.delete(hdb_token).where(hdb_token.c.id == key_id, _IS_KEY)
        if username is not None:
            delete = delete.where(hdb_token.c.user == username)
        deed = Deed(hdb_token)

        def work(connection: sa.Connection) -> None:
            told = delete.returning(hdb_token.c.user, hdb_token.c.kind, hdb_token.c.name)
            if (row := connection.execute(told).first()) is None:
                message = f"API key {key_id} does not exist"
                raise NotFound(message)
            before = {"user": row.user, "kind": row.kind, "name": row.name}
            deed.note(connection, "delete", key_id, before=before)
            end_tokens(connection, deed, row.user, hdb_token.c.key_id == key_id)

        await self._database.run(work, self._changed)

    async def authenticate(self, credential: Credential) -> Verified | None:
        """Vouches for `Bearer hk_…`, for a minute at most, so that its last use is known."""
        if not isinstance(credential, Bearer) or not credential.token.startswith(KEY_PREFIX):
            return None
        stored = hdb_token.c.hash == self._hash(credential.token)
        select = sa.select(hdb_token).where(stored, _IS_KEY)
        row = await self._database.read(lambda connection: connection.execute(select).first())
        now = time.time()
        if row is None or (row.expires is not None and row.expires / 1000 <= now):
            message = "Incorrect API key provided." if row is None else "This API key has expired."
            raise InvalidCredentials(message)
        user = _with_key(await self._people.active_user(row.user), row)
        self._note(row.id, now)
        ends = now + _NOTED_SECONDS
        return Verified(user, ends if row.expires is None else min(ends, row.expires / 1000))

    async def flush(self) -> None:
        """Return when the last uses of all keys are written, or cannot be."""
        try:
            await asyncio.wrap_future(self._write())
        except HarperError as error:
            logger.warning("when keys were used last is not written: %s", error)

    def _note(self, key_id: str, now: float) -> None:
        self._used[key_id] = now
        if now - self._noted.get(key_id, 0.0) >= _NOTED_SECONDS:
            self._noted[key_id] = now
            self._write()

    def _write(self) -> Future[None]:
        """Note the uses when a writer's turn comes; another process may have seen later ones."""
        used, self._used = self._used, {}

        def work(connection: sa.Connection) -> None:
            for key_id, seconds in used.items():
                at = seconds * 1000
                earlier = hdb_token.c.last_used.is_(None) | (hdb_token.c.last_used < at)
                of_key = sa.update(hdb_token).where(hdb_token.c.id == key_id, earlier)
                connection.execute(of_key.values(last_used=at))

        return self._database.submit(work)

    def _hash(self, key: str) -> str:
        return hmac.new(self._hash_key, key.encode(), hashlib.sha256).hexdigest()


def _with_key(user: User, key: sa.Row[*tuple[Any, ...]]) -> User:
    """The owner of a key as whoever holds the key: with its tenant, and what its grants leave."""
    role, grants = user.role, _grants(key)
    if grants is not None:
        role = Role(role.id, role.role, role.permission.narrowed(grants))
    tenant = key.tenant or user.tenant
    return msgspec.structs.replace(user, role=role, tenant=tenant, key_id=key.id)


def _grants(row: sa.Row[*tuple[Any, ...]]) -> Grants | None:
    return None if row.grants is None else msgspec.convert(row.grants, Grants)


def _shown(row: sa.Row[*tuple[Any, ...]]) -> APIKey:
    return APIKey(
        id=row.id,
        name=row.name,
        user=row.user,
        prefix=row.prefix,
        created=iso(getattr(row, CREATED)) or "",
        last_used=iso(row.last_used),
        tenant=row.tenant,
        grants=_grants(row),
        expires=iso(row.expires),
    )
