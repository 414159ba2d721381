"""Names of headers, in the form by which they are found, kept and told in the fewest steps."""

from __future__ import annotations

from multidict import istr

# Of requests, as they are written where a plain mapping holds them.
ACCEPT = istr("accept")
AUTHORIZATION = istr("authorization")
ORIGIN = istr("origin")
REQUEST_ID = istr("x-request-id")
# Of answers, as they are told.
CACHE_CONTROL = istr("Cache-Control")
CONNECTION = istr("Connection")
CONTENT_LENGTH = istr("Content-Length")
CONTENT_TYPE = istr("Content-Type")
DATE = istr("Date")
SERVER = istr("Server")
TRANSFER_ENCODING = istr("Transfer-Encoding")
VARY = istr("Vary")
