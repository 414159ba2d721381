"""harperpy: a programmable AI server. This is its face: all that a plugin author uses."""

from .accounting import Admission, Attempt, CallRow, Ledger, ModelCall, row_of
from .analytics import Analytics
from .audit import Deed
from .auth import Authenticator, Basic, Bearer, Credential, Role, User, Verified, extract_tenant_id
from .backend import ModelBackend, define_backend
from .batches import Batched, Texts
from .billing import Billing
from .booking import Booking
from .config import load_config, redacted
from .content import Blob, Body, EventStream, Response, ResponseError, decode_json, json_response
from .context import Context, get_context
from .contracts import Contract, FieldError, Problem
from .daily import recount_days
from .database import Database
from .deadlines import Deadlines, Waits
from .doors import caller_address
from .entries import FileEntry
from .errors import (
    Aborted,
    AccessViolation,
    BackendError,
    BackendTimeout,
    CapabilityError,
    ClientError,
    ConfigError,
    Conflict,
    HarperError,
    InvalidBody,
    InvalidCredentials,
    LimitReached,
    ModelNotFound,
    ModelUnavailable,
    NotAuthorised,
    NotFound,
    NotImplementedYet,
    PreconditionFailed,
    PriceUnknown,
    RegistrationError,
    ResourceConflict,
    ServerError,
    ServiceUnavailable,
    SetupError,
    TransactionError,
    UpstreamAuthError,
    UpstreamRejected,
)
from .forms import Part, Parts
from .hookspecs import BackendFactory, ModelEntry, hookimpl
from .journal import Journal, Waiting
from .journal_reader import JournalReader, JournalStep
from .messages import (
    Capability,
    Choice,
    EmbedInput,
    EmbedOpts,
    EmbedResult,
    GenerateChunk,
    GenerateOpts,
    GenerateResult,
    JSONSchemaFormat,
    Message,
    Prompt,
    TokenLogprob,
    TokenUsage,
    ToolCall,
    ToolCallDelta,
    ToolDef,
    ToolType,
    TopLogprob,
    estimate_tokens,
)
from .middleware import Middleware, Next
from .models import Models
from .negotiation import ContentType, ContentTypes
from .operations import NoParameters, Operations
from .options import Options
from .outbox import Outbox
from .parts import (
    AudioPart,
    ContentPart,
    FilePart,
    ImagePart,
    ImageURL,
    InputAudio,
    InputFile,
    RefusalPart,
    TextPart,
)
from .permission import (
    Grants,
    Permission,
    PermissionErrors,
    TableRights,
    document_of,
    read_permission,
)
from .prompts import paired
from .queries import bounded, has_part
from .reconciling import Difference, Served, Unequal, difference
from .registry import Entry, Resources
from .rendering import Reply
from .replay import ReplayBuffer
from .request import Request, RequestTarget
from .resource import METHOD_VERBS, Resource
from .routing import ModelInfo
from .scope import Scope
from .secret import Secret, mask
from .sections import BudgetConfig, Config, LimitConfig, ModelConfig
from .server import Server
from .signal import AbortController, AbortSignal
from .spelling import closest, nearest
from .sse import SSE, SSEDecoder, encode_sse
from .streaming import (
    completion_id,
    openai_error,
    openai_finish_reason,
    openai_logprobs,
    openai_stream,
    openai_tool_call,
    openai_usage,
)
from .table_resource import TableResource
from .tables import Table, Tables
from .transactions import Transaction
from .vectors import Vector, base64_of

__all__ = [
    "AbortController",
    "AbortSignal",
    "Aborted",
    "AccessViolation",
    "Admission",
    "Analytics",
    "Attempt",
    "AudioPart",
    "Authenticator",
    "BackendError",
    "BackendFactory",
    "BackendTimeout",
    "Basic",
    "Batched",
    "Bearer",
    "Billing",
    "Blob",
    "Body",
    "Booking",
    "BudgetConfig",
    "CallRow",
    "Capability",
    "CapabilityError",
    "Choice",
    "ClientError",
    "Config",
    "ConfigError",
    "Conflict",
    "ContentPart",
    "ContentType",
    "ContentTypes",
    "Context",
    "Contract",
    "Credential",
    "Database",
    "Deadlines",
    "Deed",
    "Difference",
    "EmbedInput",
    "EmbedOpts",
    "EmbedResult",
    "Entry",
    "EventStream",
    "FieldError",
    "FileEntry",
    "FilePart",
    "GenerateChunk",
    "GenerateOpts",
    "GenerateResult",
    "Grants",
    "HarperError",
    "ImagePart",
    "ImageURL",
    "InputAudio",
    "InputFile",
    "InvalidBody",
    "InvalidCredentials",
    "JSONSchemaFormat",
    "Journal",
    "JournalReader",
    "JournalStep",
    "Ledger",
    "LimitConfig",
    "LimitReached",
    "METHOD_VERBS",
    "Message",
    "Middleware",
    "ModelBackend",
    "ModelCall",
    "ModelConfig",
    "ModelEntry",
    "ModelInfo",
    "ModelNotFound",
    "ModelUnavailable",
    "Models",
    "Next",
    "NoParameters",
    "NotAuthorised",
    "NotFound",
    "NotImplementedYet",
    "Operations",
    "Options",
    "Outbox",
    "Part",
    "Parts",
    "Permission",
    "PermissionErrors",
    "PreconditionFailed",
    "PriceUnknown",
    "Problem",
    "Prompt",
    "RefusalPart",
    "RegistrationError",
    "ReplayBuffer",
    "Reply",
    "Request",
    "RequestTarget",
    "Resource",
    "ResourceConflict",
    "Resources",
    "Response",
    "ResponseError",
    "Role",
    "SSE",
    "SSEDecoder",
    "Scope",
    "Secret",
    "Served",
    "Server",
    "ServerError",
    "ServiceUnavailable",
    "SetupError",
    "Table",
    "TableResource",
    "TableRights",
    "Tables",
    "TextPart",
    "Texts",
    "TokenLogprob",
    "TokenUsage",
    "ToolCall",
    "ToolCallDelta",
    "ToolDef",
    "ToolType",
    "TopLogprob",
    "Transaction",
    "TransactionError",
    "Unequal",
    "UpstreamAuthError",
    "UpstreamRejected",
    "User",
    "Vector",
    "Verified",
    "Waiting",
    "Waits",
    "base64_of",
    "bounded",
    "caller_address",
    "closest",
    "completion_id",
    "decode_json",
    "define_backend",
    "difference",
    "document_of",
    "encode_sse",
    "estimate_tokens",
    "extract_tenant_id",
    "get_context",
    "has_part",
    "hookimpl",
    "json_response",
    "load_config",
    "mask",
    "nearest",
    "openai_error",
    "openai_finish_reason",
    "openai_logprobs",
    "openai_stream",
    "openai_tool_call",
    "openai_usage",
    "paired",
    "read_permission",
    "recount_days",
    "redacted",
    "row_of",
]
