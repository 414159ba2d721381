"""Who is asking: Role, Permission, User, and the authenticators that vouch for them."""

from __future__ import annotations

import base64
import binascii
import copy
import hashlib
import os
import time
from collections.abc import Awaitable, Callable
from typing import TypeAlias, cast

import msgspec

from .epoch import Epoch
from .errors import InvalidCredentials, RegistrationError
from .permission import Permission
from .request import Shown

_CACHED_CREDENTIALS = 4096


class Role(msgspec.Struct, frozen=True):
    """A named permission."""

    id: str
    role: str
    permission: Permission = Permission()


class User(msgspec.Struct, frozen=True):
    """A person or program that was recognised.

    `key_id` is the id of the API key that vouched for them, None if it was no key. Such a user has
    the key's tenant, and of the role's permission what the key's grants leave.
    """

    username: str
    role: Role
    active: bool = True
    tenant: str = "default"
    key_id: str | None = None

    @property
    def is_super_user(self) -> bool:
        """Whether nothing is refused to this user."""
        return self.role.permission.super_user


def extract_tenant_id(user: User | None) -> str | None:
    """The tenant a user's calls are billed to; None for anonymous callers."""
    return None if user is None else user.tenant or "default"


class Bearer(msgspec.Struct, frozen=True):
    """`Authorization: Bearer TOKEN`."""

    token: str


class Basic(msgspec.Struct, frozen=True):
    """`Authorization: Basic base64(username:password)`, and where it came from.

    No address is the server's own local socket.
    """

    username: str
    password: str
    address: str = ""


Credential: TypeAlias = Bearer | Basic
"""What a request's `Authorization` header holds."""


class Verified(msgspec.Struct, frozen=True):
    """A user an authenticator vouches for, until `expires` (seconds since 1970) if it is given."""

    user: User
    expires: float | None = None


Authenticator: TypeAlias = Callable[[Credential], Awaitable[Verified | None]]
"""Returns who it vouches for, None if the credential is not of its kind; raises
`InvalidCredentials` if it is of its kind and wrong: what is said if no other vouches."""


def read_credential(header: str, address: str = "") -> Credential:
    """Parse an `Authorization` header. Raises `InvalidCredentials` for what is not one."""
    scheme, _, value = header.strip().partition(" ")
    value = value.strip()
    if scheme.lower() == "bearer" and value and value.isascii():
        return Bearer(value)
    if scheme.lower() == "basic" and value.isascii():
        return _read_basic(value, address)
    message = "Authorization: expected 'Bearer TOKEN' or 'Basic CREDENTIALS'."
    raise InvalidCredentials(message)


def _read_basic(value: str, address: str) -> Basic:
    try:
        username, colon, password = base64.b64decode(value, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError) as error:
        message = "Authorization: the Basic credential is not base64 of username:password."
        raise InvalidCredentials(message) from error
    if not colon or not username:
        message = "Authorization: the Basic credential has no username or no colon."
        raise InvalidCredentials(message)
    return Basic(username, password, address)


class Authenticators:
    """The authenticators in order; the first that vouches wins.

    What was verified is remembered for `ttl` seconds under a keyed hash of the whole header.
    `revoke()` forgets all at once, in each process that shares the `epoch`: call it after any
    change of users, roles, keys or tokens. Failures are never remembered.
    """

    def __init__(self, ttl: float = 30.0, epoch: Epoch | None = None) -> None:
        self._ttl = ttl
        self._list: list[tuple[str, Authenticator]] = []
        self.owner = ""
        """The plugin whose own is what is appended here."""
        self._epoch = epoch or Epoch()
        self._secret = os.urandom(32)
        self._cache: dict[bytes, tuple[bytes, float, User, str | None]] = {}

    def append(self, authenticator: Authenticator) -> None:
        """Ask this one too, after those that are there.

        Raises `RegistrationError` for what cannot be asked.
        """
        if not callable(cast("object", authenticator)):
            message = f"authenticators.append: expected an async function, got {authenticator!r}"
            raise RegistrationError(message)
        self._list.append((self.owner, authenticator))

    def of(self, owner: str) -> Authenticators:
        """The same, for a plugin: what it appends is its own."""
        same = copy.copy(self)
        same.owner = owner
        return same

    def fail(self, owner: str) -> None:
        """Let a plugin that did not start vouch for nobody."""
        self._list[:] = [one for one in self._list if one[0] != owner]
        self.revoke()

    def revoke(self) -> None:
        """Let no cached verification count any more, those still under way included."""
        self._epoch.move()
        self._cache.clear()

    def forget(self, username: str) -> None:
        """Let no password of this user count that was verified before."""
        for key in [key for key, one in self._cache.items() if one[2].username == username]:
            if self._cache[key][3] is not None:
                del self._cache[key]

    async def identify(self, header: str, address: str = "", shown: Shown | None = None) -> User:
        """The user behind an `Authorization` header. Raises `InvalidCredentials`.

        A password counts as verified only for the address that it came from.
        """
        shown = shown or Shown()
        if shown.header != header:
            sent = header.encode(errors="surrogateescape")
            shown.key = hashlib.blake2b(sent, key=self._secret, digest_size=32).digest()
            shown.header, shown.course = header, None
        if (known := self.recall(shown, address)) is not None:
            return known
        key, epoch = shown.key, self._epoch.now()
        credential = read_credential(header, address)
        verified = await self._ask(credential)
        expires = time.time() + self._ttl
        if verified.expires is not None:
            expires = min(expires, verified.expires)
        if len(self._cache) >= _CACHED_CREDENTIALS:
            self._cache.pop(next(iter(self._cache)))
        bound = address if isinstance(credential, Basic) else None
        self._cache[key] = (epoch, expires, verified.user, bound)
        return verified.user

    def recall(self, shown: Shown, address: str) -> User | None:
        """The user behind what was shown and verified before; None where it has to be verified."""
        known = self._cache.get(shown.key)
        if known is None:
            return None
        epoch, expires, user, bound = known
        if epoch != self._epoch.now() or expires <= time.time():
            return None
        return user if bound is None or bound == address else None

    async def _ask(self, credential: Credential) -> Verified:
        refusal: InvalidCredentials | None = None
        for _, authenticator in self._list:
            try:
                verified = await authenticator(credential)
            except InvalidCredentials as error:
                # It may be another's: a plugin's bearer token is no token of ours.
                refusal = refusal or error
                continue
            if verified is not None:
                if not verified.user.active:
                    message = "This user is inactive."
                    raise InvalidCredentials(message)
                return verified
        raise refusal or InvalidCredentials
