"""Names of headers, in the form by which they are found, kept and told in the fewest steps."""

from __future__ import annotations

from multidict import istr

ACCEPT = istr("Accept")
AUTHORIZATION = istr("Authorization")
CACHE_CONTROL = istr("Cache-Control")
CONNECTION = istr("Connection")
CONTENT_LENGTH = istr("Content-Length")
CONTENT_TYPE = istr("Content-Type")
DATE = istr("Date")
ORIGIN = istr("Origin")
REQUEST_ID = istr("x-request-id")
SERVER = istr("Server")
VARY = istr("Vary")
