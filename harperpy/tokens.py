"""Tokens: operation tokens, and the refresh tokens that follow each other in a family."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import msgspec
import sqlalchemy as sa

from .audit import Deed
from .auth import Basic, Bearer, Credential, User, Verified
from .database import Database
from .errors import InvalidBody, InvalidCredentials
from .people import People, end_tokens
from .system import CREATED, hdb_token, now_ms, purpose_key

Subject: TypeAlias = Literal["operation", "refresh"]

_REFRESH = hdb_token.c.kind == "refresh"
# Whoever asks why a key works no more finds it in the list for so long.
_KEYS_SHOWN_MS = 30 * 86_400_000.0


class Tokens:
    """Makes, checks and ends tokens; only keyed hashes of refresh tokens are stored.

    All that came from one login are a family: an operation token is good while the family is there.
    What an API key made is that key's, and ends with it. A refresh token is good once; the second
    time it is shown, someone has a copy, and the family ends. `changed` is called when one does.
    """

    def __init__(
        self,
        database: Database,
        people: People,
        secret: bytes,
        changed: Callable[[object], None],
        *,
        operation_seconds: float,
        refresh_seconds: float,
    ) -> None:
        self._database = database
        self._people = people
        self._changed = changed
        self._hash_key = purpose_key(secret, "token hashes")
        self._sign_key = purpose_key(secret, "token signatures")
        self._operation_seconds = operation_seconds
        self._refresh_seconds = refresh_seconds

    async def create(
        self, user: User, seconds: float | None = None, *, since: float | None = None
    ) -> tuple[str, str]:
        """An operation token and a refresh token for a user; the first lives so many seconds.

        `since` is when they began to say who they are, in ms since 1970: what a new password, or
        whatever else has changed since, would have ended is not made. Raises `InvalidCredentials`
        then, or where the user's API key has been dropped, `InvalidBody` where `seconds` is longer
        than a refresh token lives, and `NotFound` where the user has been dropped.
        """
        if seconds is not None and seconds > self._refresh_seconds:
            message = f"expires_in: expected at most {self._refresh_seconds:g} seconds"
            raise InvalidBody(message, param="expires_in")
        family = secrets.token_hex(8)
        refresh, row = self._refresh_token(user, family)
        deed = Deed(hdb_token, subject=user.username)

        def work(connection: sa.Connection) -> None:
            self._people.expect(connection, user.username, since)
            _expect_key(connection, user.key_id)
            connection.execute(sa.insert(hdb_token).values(row))
            told = {name: row[name] for name in ("user", "kind", "expires")}
            deed.note(connection, "insert", row["id"], after=told)

        await self._database.run(work)
        lives = self._operation_seconds if seconds is None else seconds
        return self._sign(user, "operation", family, lives), refresh

    async def refresh(self, refresh_token: str) -> tuple[str, str]:
        """A new operation token and a new refresh token; the old one is good no more.

        Raises `InvalidCredentials` for a token that is not current.
        """
        claims = self._read(refresh_token, "refresh")
        family = claims["sid"]
        user = await self._people.active_user(claims["username"])
        following, row = self._refresh_token(user, family)
        shown = hdb_token.c.hash == self._hash(refresh_token)
        deed = Deed(hdb_token, subject=user.username)

        def work(connection: sa.Connection) -> Literal["unknown", "spent", "good"]:
            select = sa.select(hdb_token.c.id, hdb_token.c.spent, hdb_token.c.key_id).where(
                shown, _REFRESH, hdb_token.c.user == user.username
            )
            if (known := connection.execute(select).first()) is None:
                return "unknown"
            if known.spent is not None:
                of_family = hdb_token.c.family == family
                end_tokens(connection, deed, user.username, _REFRESH, of_family)
                return "spent"
            now = now_ms()
            spend = sa.update(hdb_token).where(shown).values(spent=now, last_used=now)
            connection.execute(spend)
            connection.execute(sa.insert(hdb_token).values({**row, "key_id": known.key_id}))
            told = {"user": user.username, "kind": "refresh"}
            deed.note(connection, "refresh", known.id, row["id"], after=told)
            return "good"

        def ended(found: str) -> None:
            if found == "spent":
                self._changed(found)

        if await self._database.run(work, ended) != "good":
            message = "invalid token"
            raise InvalidCredentials(message)
        return self._sign(user, "operation", family, self._operation_seconds), following

    async def forget_expired(self) -> None:
        """Remove the refresh tokens whose time is over, and keys that ended a month ago."""
        now, deed = now_ms(), Deed(hdb_token)
        ends = {"refresh": now, "api_key": now - _KEYS_SHOWN_MS}

        def work(connection: sa.Connection) -> None:
            for kind, end in ends.items():
                old = (hdb_token.c.kind == kind) & (hdb_token.c.expires <= end)
                gone = sa.delete(hdb_token).where(old).returning(hdb_token.c.id)
                if ids := list(connection.scalars(gone)):
                    deed.note(connection, "delete", *ids, before={"kind": kind})

        await self._database.run(work)

    async def authenticate(self, credential: Credential) -> Verified | None:
        """Vouches for `Bearer` operation tokens."""
        if not isinstance(credential, Bearer):
            return None
        claims = self._read(credential.token, "operation")
        user = await self._people.active_user(claims["username"])
        key_id = await self._key_of(claims["sid"], user)
        return Verified(msgspec.structs.replace(user, key_id=key_id), claims["exp"])

    async def authenticate_password(self, credential: Credential) -> Verified | None:
        """Vouches for `Basic` usernames and passwords."""
        if not isinstance(credential, Basic):
            return None
        user = await self._people.verify_password(
            credential.username, credential.password, credential.address
        )
        if user is None:
            message = "Login failed"
            raise InvalidCredentials(message)
        return Verified(user)

    async def _key_of(self, family: str, user: User) -> str | None:
        """The API key that made a family. Raises `InvalidCredentials` where that has ended."""
        of_user = (hdb_token.c.family == family) & (hdb_token.c.user == user.username)
        select = sa.select(hdb_token.c.key_id).where(of_user, _REFRESH).limit(1)
        row = await self._database.read(lambda connection: connection.execute(select).first())
        if row is None:
            message = "token revoked"
            raise InvalidCredentials(message)
        key_id: str | None = row.key_id
        return key_id

    def _refresh_token(self, user: User, family: str) -> tuple[str, dict[str, Any]]:
        """A refresh token of a family, and the row that stands for it."""
        token = self._sign(user, "refresh", family, self._refresh_seconds)
        now = now_ms()
        return token, {
            "id": secrets.token_hex(8),
            "user": user.username,
            "kind": "refresh",
            "hash": self._hash(token),
            "family": family,
            "key_id": user.key_id,
            "expires": now + self._refresh_seconds * 1000,
            CREATED: now,
        }

    def _hash(self, token: str) -> str:
        return hmac.new(self._hash_key, token.encode(), hashlib.sha256).hexdigest()

    def _sign(self, user: User, subject: Subject, family: str, seconds: float) -> str:
        import jwt  # noqa: PLC0415  # it brings cryptography; most callers have API keys

        now = time.time()
        claims = {
            "sub": subject,
            "username": user.username,
            "super_user": user.is_super_user,
            "sid": family,
            "jti": secrets.token_hex(8),
            "iat": int(now),
            "exp": now + seconds,
        }
        return jwt.encode(  # pyright: ignore[reportUnknownMemberType]  # names cryptography's keys
            claims, self._sign_key, algorithm="HS256"
        )

    def _read(self, token: str, subject: Subject) -> dict[str, Any]:
        import jwt  # noqa: PLC0415  # as in _sign

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
        # A role is the user's: a token that names another is none of ours.
        if "role" in claims or not all(isinstance(claims[it], str) for it in ("username", "sid")):
            message = "invalid token"
            raise InvalidCredentials(message)
        return claims


def _expect_key(connection: sa.Connection, key_id: str | None) -> None:
    """Raises `InvalidCredentials` in the caller's transaction where the key has been dropped."""
    there = sa.select(1).where(hdb_token.c.id == key_id)
    if key_id is not None and connection.scalar(there) is None:
        message = "Incorrect API key provided."
        raise InvalidCredentials(message)
