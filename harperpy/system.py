"""The tables of the `system` schema."""

from __future__ import annotations

import hashlib
import hmac
import time
from typing import Any

import sqlalchemy as sa

CREATED, UPDATED = "__createdtime__", "__updatedtime__"

metadata = sa.MetaData()


# What the calls of a day are told apart by, and what is counted of them.
DIMENSIONS = (
    *("tenant", "user", "api_key", "app"),
    *("model", "backend", "backend_name", "provider_model", "method"),
)
TOKENS = (
    *("prompt_tokens", "completion_tokens", "embedding_tokens"),
    *("cached_tokens", "reasoning_tokens", "reserved_tokens"),
)
COUNTS = ("calls", "failures", "unpriced", *TOKENS)
COSTS = ("cost", "reserved_cost")


def _times() -> list[sa.Column[Any]]:
    """When a row was made and last changed, in ms since 1970."""
    return [sa.Column(CREATED, sa.Float), sa.Column(UPDATED, sa.Float)]


hdb_role = sa.Table(
    "hdb_role",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("role", sa.String, nullable=False, unique=True),
    sa.Column("permission", sa.JSON, nullable=False),
    *_times(),
)

hdb_user = sa.Table(
    "hdb_user",
    metadata,
    sa.Column("username", sa.String, primary_key=True),
    sa.Column("password", sa.String, nullable=False),
    sa.Column("role", sa.String, sa.ForeignKey("hdb_role.id"), nullable=False),
    sa.Column("active", sa.Boolean, nullable=False, default=True),
    sa.Column("tenant", sa.String, nullable=False, default="default"),
    *_times(),
)

hdb_token = sa.Table(
    "hdb_token",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("user", sa.String, sa.ForeignKey("hdb_user.username"), nullable=False, index=True),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("name", sa.String),
    sa.Column("prefix", sa.String),
    sa.Column("hash", sa.String, nullable=False, unique=True),
    sa.Column("expires", sa.Float),
    sa.Column("last_used", sa.Float),
    sa.Column("tenant", sa.String),
    sa.Column("grants", sa.JSON(none_as_null=True)),
    sa.Column("family", sa.String, index=True),
    sa.Column("spent", sa.Float),
    # The API key that a family of tokens was made with.
    sa.Column("key_id", sa.String),
    *_times(),
)

hdb_model_calls = sa.Table(
    "hdb_model_calls",
    metadata,
    sa.Column("id", sa.BigInteger, primary_key=True),
    sa.Column(CREATED, sa.Float, nullable=False),
    sa.Column("tenant", sa.String),
    sa.Column("user", sa.String),
    sa.Column("app", sa.String),
    sa.Column("request_id", sa.String),
    sa.Column("model", sa.String),
    sa.Column("backend", sa.String, nullable=False),
    sa.Column("backend_name", sa.String),
    sa.Column("provider_model", sa.String),
    sa.Column("method", sa.String, nullable=False),
    sa.Column("adapter", sa.String),
    sa.Column("conversation_id", sa.String),
    sa.Column("prompt_tokens", sa.Integer),
    sa.Column("completion_tokens", sa.Integer),
    sa.Column("embedding_tokens", sa.Integer),
    sa.Column("cached_tokens", sa.Integer),
    sa.Column("reasoning_tokens", sa.Integer),
    sa.Column("usage_estimated", sa.Boolean, nullable=False),
    sa.Column("gpu_ms", sa.Float),
    sa.Column("latency_ms", sa.Float, nullable=False),
    sa.Column("ttft_ms", sa.Float),
    sa.Column("success", sa.Boolean, nullable=False),
    sa.Column("error_code", sa.String),
    sa.Column("finish_reason", sa.String),
    sa.Column("upstream_status", sa.Integer),
    sa.Column("api_key", sa.String),
    sa.Column("cost", sa.Float),
    sa.Column("price_version", sa.String),
    sa.Column("reserved_tokens", sa.Integer),
    sa.Column("reserved_cost", sa.Float),
    sa.Index("hdb_model_calls_created", CREATED),
    sa.Index("hdb_model_calls_backend", "backend", CREATED),
    sa.Index("hdb_model_calls_tenant", "tenant", CREATED),
)

hdb_model_calls_daily = sa.Table(
    "hdb_model_calls_daily",
    metadata,
    sa.Column("day", sa.String, primary_key=True),
    # What a call has none of is an empty text here: a key has no null.
    *(sa.Column(name, sa.String, primary_key=True) for name in DIMENSIONS),
    *(sa.Column(name, sa.BigInteger, nullable=False) for name in COUNTS),
    *(sa.Column(name, sa.Float, nullable=False) for name in COSTS),
    # A budget is one of them, on some days, however many others there are.
    *(
        sa.Index(f"hdb_model_calls_daily_{one}", one, "day")
        for one in ("tenant", "user", "api_key")
    ),
)

# Rules are keyed by what they are about, holds by the meter and the call.
hdb_limit = sa.Table(
    "hdb_limit",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("rule", sa.JSON, nullable=False),
    *_times(),
)

hdb_limit_rate = sa.Table(
    "hdb_limit_rate",
    metadata,
    sa.Column("meter", sa.String, primary_key=True),
    sa.Column("used", sa.Float, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
)

hdb_limit_hold = sa.Table(
    "hdb_limit_hold",
    metadata,
    sa.Column("meter", sa.String, primary_key=True),
    sa.Column("call", sa.BigInteger, primary_key=True),
    sa.Column("amount", sa.BigInteger, nullable=False),
    sa.Column("worker", sa.Integer, nullable=False),
    sa.Column("life", sa.String, nullable=False),
    sa.Index("hdb_limit_hold_call", "call"),
)

hdb_audit = sa.Table(
    "hdb_audit",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("timestamp", sa.Float, nullable=False, index=True),
    sa.Column("operation", sa.String, nullable=False),
    sa.Column("database", sa.String, nullable=False),
    sa.Column("table", sa.String, nullable=False),
    sa.Column("user_name", sa.String),
    sa.Column("key_id", sa.String),
    sa.Column("source", sa.String, nullable=False),
    sa.Column("request_id", sa.String),
    sa.Column("hash_values", sa.JSON(none_as_null=True)),
    sa.Column("records", sa.JSON(none_as_null=True)),
    sa.Column("original_records", sa.JSON(none_as_null=True)),
)

hdb_analytics = sa.Table(
    "hdb_analytics",
    metadata,
    sa.Column("id", sa.BigInteger, primary_key=True),
    sa.Column("metric", sa.String, nullable=False),
    sa.Column("path", sa.String),
    sa.Column("method", sa.String),
    sa.Column("type", sa.String),
    sa.Column("period", sa.Float, nullable=False),
    sa.Column("time", sa.Float, nullable=False),
    sa.Column("worker", sa.Integer, nullable=False),
    sa.Column("count", sa.Integer, nullable=False),
    sa.Column("total", sa.Float, nullable=False),
    sa.Column("mean", sa.Float),
    sa.Column("median", sa.Float),
    sa.Column("p1", sa.Float),
    sa.Column("p10", sa.Float),
    sa.Column("p25", sa.Float),
    sa.Column("p75", sa.Float),
    sa.Column("p90", sa.Float),
    sa.Column("p95", sa.Float),
    sa.Column("p99", sa.Float),
    sa.Column("p999", sa.Float),
    sa.Column("ratio", sa.Float),
    sa.Index("hdb_analytics_metric", "metric", "time"),
    sa.Index("hdb_analytics_time", "time"),
)

hdb_status = sa.Table(
    "hdb_status",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("status", sa.String, nullable=False),
    *_times(),
)


def purpose_key(secret: bytes, purpose: str) -> bytes:
    """A key for one purpose alone (HKDF-Expand of RFC 5869 for one block)."""
    return hmac.new(secret, purpose.encode() + b"\x01", hashlib.sha256).digest()


def iso(ms: float | None) -> str | None:
    """A time in ms since 1970 as it is shown: ISO 8601 in UTC, to the second."""
    return None if ms is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(ms / 1000))


def now_ms() -> float:
    """Milliseconds since 1970."""
    return time.time_ns() / 1e6
