"""Tokens: API keys, operation tokens and refresh tokens, and the authenticators for them."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from typing import Any, Literal, TypeAlias

import jwt
import msgspec
import sqlalchemy as sa

from .audit import Deed
from .auth import Basic, Bearer, Credential, Role, User, Verified
from .database import Database
from .errors import InvalidCredentials, NotFound
from .people import People
from .permission import Grants
from .system import CREATED, hdb_token, now_ms

KEY_PREFIX = "hk_"
# What the audit may show of a new one.
_TOLD = ("user", "kind", "name", "expires")
Subject: TypeAlias = Literal["operation", "refresh"]


class APIKey(msgspec.Struct, frozen=True):
    """An API key as it may be shown: its first letters. Times are ISO 8601 in UTC."""

    id: str
    name: str | None
    user: str
    prefix: str
    created: str
    last_used: str | None


class Tokens:
    """Makes, checks and ends credentials; only keyed hashes of them are stored."""

    def __init__(
        self,
        database: Database,
        people: People,
        secret: bytes,
        changed: Any,
        *,
        operation_seconds: float,
        refresh_seconds: float,
    ) -> None:
        self._database = database
        self._people = people
        self._changed = changed
        self._hash_key = purpose_key(secret, "token hashes")
        self._sign_key = purpose_key(secret, "token signatures")
        self._seconds: dict[Subject, float] = {
            "operation": operation_seconds,
            "refresh": refresh_seconds,
        }

    async def add_key(self, username: str, name: str) -> tuple[str, str]:
        """A new API key: its id and the key itself, which nobody can read again."""
        key = KEY_PREFIX + secrets.token_urlsafe(32)
        key_id = secrets.token_hex(8)
        await self._store(key_id, username, "api_key", key, name=name, prefix=key[:8])
        return key_id, key

    async def list_keys(self, username: str | None = None) -> list[APIKey]:
        """The API keys, of one user or of all."""
        select = sa.select(hdb_token).where(hdb_token.c.kind == "api_key")
        if username is not None:
            select = select.where(hdb_token.c.user == username)

        def work(connection: sa.Connection) -> list[APIKey]:
            rows = connection.execute(select.order_by(hdb_token.c[CREATED])).mappings()
            return [_shown(row) for row in rows]

        return await self._database.run(work)

    async def drop_key(self, key_id: str, username: str | None = None) -> None:
        """End a key at once; of one user only if named. Raises `NotFound`."""
        delete = sa.delete(hdb_token).where(hdb_token.c.id == key_id, hdb_token.c.kind == "api_key")
        if username is not None:
            delete = delete.where(hdb_token.c.user == username)
        deed = Deed(hdb_token)

        def work(connection: sa.Connection) -> None:
            told = delete.returning(hdb_token.c.user, hdb_token.c.kind, hdb_token.c.name)
            if (row := connection.execute(told).mappings().first()) is None:
                message = f"API key {key_id} does not exist"
                raise NotFound(message)
            deed.note(connection, "delete", key_id, before=_of_text(row))

        await self._database.run(work)
        self._changed()

    async def create_tokens(self, user: User) -> tuple[str, str]:
        """An operation token and a refresh token for a user."""
        refresh_id = secrets.token_hex(8)
        refresh = self._sign(user, "refresh", refresh_id)
        expires = now_ms() + self._seconds["refresh"] * 1000
        await self._store(refresh_id, user.username, "refresh", refresh, expires=expires)
        return self._sign(user, "operation", refresh_id), refresh

    async def refresh(self, refresh_token: str) -> str:
        """A new operation token. Raises `InvalidCredentials` for a token that is not current."""
        claims = self._read(refresh_token, "refresh")
        deed = Deed(hdb_token, subject=claims["username"])
        if not await self._touch(refresh_token, deed):
            message = "invalid token"
            raise InvalidCredentials(message)
        user = await self._active_user(claims["username"])
        return self._sign(user, "operation", claims["sid"])

    async def authenticate_key(self, credential: Credential) -> Verified | None:
        """Vouches for `Bearer hk_…`."""
        if not isinstance(credential, Bearer) or not credential.token.startswith(KEY_PREFIX):
            return None
        key = await self._key(credential.token)
        if key is None or (key.expires is not None and key.expires <= now_ms()):
            message = "Incorrect API key provided."
            raise InvalidCredentials(message)
        user = _with_key(await self._active_user(key.user), key)
        return Verified(user, None if key.expires is None else key.expires / 1000)

    async def authenticate_token(self, credential: Credential) -> Verified | None:
        """Vouches for `Bearer` operation tokens."""
        if not isinstance(credential, Bearer):
            return None
        claims = self._read(credential.token, "operation")
        user = await self._active_user(claims["username"])
        await self._check_session(claims["sid"], user)
        return Verified(user, claims["exp"])

    async def authenticate_password(self, credential: Credential) -> Verified | None:
        """Vouches for `Basic` usernames and passwords."""
        if not isinstance(credential, Basic):
            return None
        user = await self._people.verify_password(credential.username, credential.password)
        if user is None:
            message = "Login failed"
            raise InvalidCredentials(message)
        return Verified(user)

    async def _active_user(self, username: str) -> User:
        user = await self._people.user(username)
        if user is None or not user.active:
            message = "This user does not exist any more or is inactive."
            raise InvalidCredentials(message)
        return user

    async def _check_session(self, session: str, user: User) -> None:
        """An operation token ends with the refresh token that it came with."""
        of_user = (hdb_token.c.id == session) & (hdb_token.c.user == user.username)
        select = sa.select(1).where(of_user, hdb_token.c.kind == "refresh")
        if not await self._database.read(lambda connection: connection.scalar(select)):
            message = "token revoked"
            raise InvalidCredentials(message)

    async def _store(self, key_id: str, user: str, kind: str, token: str, **more: Any) -> None:
        row = {"id": key_id, "user": user, "kind": kind, "hash": self._hash(token), **more}
        row[CREATED] = now_ms()
        told = {name: value for name, value in row.items() if name in _TOLD}
        deed = Deed(hdb_token, subject=user)

        def work(connection: sa.Connection) -> None:
            connection.execute(sa.insert(hdb_token).values(row))
            deed.note(connection, "insert", key_id, after=told)

        await self._database.run(work)

    async def _key(self, key: str) -> sa.Row[*tuple[Any, ...]] | None:
        """A stored key; its use is noted when a writer's turn comes."""
        stored = hdb_token.c.hash == self._hash(key)
        select = sa.select(hdb_token).where(stored, hdb_token.c.kind == "api_key")
        row = await self._database.read(lambda connection: connection.execute(select).first())
        if row is not None:
            used = sa.update(hdb_token).where(stored).values(last_used=now_ms())
            self._database.submit(lambda connection: connection.execute(used))
        return row

    async def _touch(self, token: str, deed: Deed) -> str | None:
        """The id of a stored, current token, noting its use."""
        now = now_ms()
        current = (hdb_token.c.expires.is_(None)) | (hdb_token.c.expires > now)
        update = (
            sa.update(hdb_token)
            .where(hdb_token.c.hash == self._hash(token), current)
            .values(last_used=now)
            .returning(hdb_token.c.id, hdb_token.c.user)
        )

        def work(connection: sa.Connection) -> str | None:
            if (row := connection.execute(update).first()) is None:
                return None
            found: str = row.id
            deed.note(connection, "refresh", found, after={"user": row.user, "kind": "refresh"})
            return found

        return await self._database.run(work)

    def _hash(self, token: str) -> str:
        return hmac.new(self._hash_key, token.encode(), hashlib.sha256).hexdigest()

    def _sign(self, user: User, subject: Subject, session: str) -> str:
        now = time.time()
        claims = {
            "sub": subject,
            "username": user.username,
            "super_user": user.is_super_user,
            "sid": session,
            "jti": secrets.token_hex(8),
            "iat": int(now),
            "exp": now + self._seconds[subject],
        }
        return jwt.encode(  # pyright: ignore[reportUnknownMemberType]  # names cryptography's keys
            claims, self._sign_key, algorithm="HS256"
        )

    def _read(self, token: str, subject: Subject) -> dict[str, Any]:
        try:
            claims = jwt.decode(  # pyright: ignore[reportUnknownMemberType]  # as encode
                token,
                self._sign_key,
                algorithms=["HS256"],
                subject=subject,
                options={"require": ["exp", "sub", "username", "sid"]},
            )
        except jwt.ExpiredSignatureError as error:
            message = "token expired"
            raise InvalidCredentials(message) from error
        except jwt.InvalidTokenError as error:
            message = "invalid token"
            raise InvalidCredentials(message) from error
        return claims


def purpose_key(secret: bytes, purpose: str) -> bytes:
    """A key for one purpose alone (HKDF-Expand of RFC 5869 for one block)."""
    return hmac.new(secret, purpose.encode() + b"\x01", hashlib.sha256).digest()


def _with_key(user: User, key: sa.Row[*tuple[Any, ...]]) -> User:
    """The owner of a key as whoever holds the key: with its tenant, and what its grants leave."""
    role, grants = user.role, key.grants
    if grants is not None:
        permission = role.permission.narrowed(msgspec.convert(grants, Grants))
        role = Role(role.id, role.role, permission)
    tenant = key.tenant or user.tenant
    return msgspec.structs.replace(user, role=role, tenant=tenant, key_id=key.id)


def _of_text(row: sa.RowMapping) -> dict[str, Any]:
    return {str(name): value for name, value in row.items()}


def _shown(row: sa.RowMapping) -> APIKey:
    return APIKey(
        id=row["id"],
        name=row["name"],
        user=row["user"],
        prefix=row["prefix"],
        created=_iso(row[CREATED]) or "",
        last_used=_iso(row["last_used"]),
    )


def _iso(ms: float | None) -> str | None:
    if ms is None:
        return None
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(ms / 1000))
