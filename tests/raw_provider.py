"""A provider that sends the bytes that a test says, and the certificate it may have."""

import asyncio
import datetime as dt
import gc
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from harperpy.plugins.openai_connection import Connection

from harperpy.testing import whole

Send = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

OK = b"HTTP/1.1 200 OK\r\n"
# What streams begin and end with.
HEAD = OK + b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
DONE = b"data: [DONE]\n\n"


def said(text: str) -> bytes:
    """The body of an answer."""
    return msgspec.json.encode(whole(text))


def sized(body: bytes, *lines: bytes, status: bytes = OK) -> bytes:
    """An answer with its length."""
    head = b"".join([status, *(line + b"\r\n" for line in lines)])
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def event(told: Any) -> bytes:
    """One event."""
    return b"data: %b\n\n" % msgspec.json.encode(told)


def piece(data: bytes, extension: bytes = b"") -> bytes:
    """One chunk."""
    return b"%x%b\r\n%b\r\n" % (len(data), extension, data)


def connections() -> list[Connection]:
    """Ours to a provider."""
    gc.collect()
    return [one for one in gc.get_objects() if type(one) is Connection]


async def read_request(reader: asyncio.StreamReader) -> None:
    """Read one request to its end."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
    await reader.readexactly(length)


class Provider:
    """Answers what a test says, on as many connections as come; `asked` counts by connection.

    `open` is how many of them there are.
    """

    def __init__(self) -> None:
        self.url = ""
        self.open = 0
        self.asked: list[int] = []
        self.answers: list[bytes | Send] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection; an answer of no length ends it."""
        number = len(self.asked)
        self.asked.append(0)
        self.open += 1
        try:
            while True:
                await read_request(reader)
                self.asked[number] += 1
                answer = self.answers.pop(0) if self.answers else sized(said("again"))
                if not isinstance(answer, bytes):
                    await answer(reader, writer)
                    return
                writer.write(answer)
                if b"again" not in answer:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open -= 1
            writer.close()


def certificate(folder: Path) -> Path:
    """A certificate of "localhost" that signs itself, with its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = folder / "localhost.pem"
    form = (Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(key.private_bytes(*form) + made.public_bytes(Encoding.PEM))
    return path
