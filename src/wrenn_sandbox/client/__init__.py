"""The Python client of the API, for threads (`Client`) and for asyncio (`AsyncClient`).

    with Client("http://127.0.0.1:8080", api_key="wrn_...") as client:
        with client.sandboxes.create() as sandbox:
            print(sandbox.exec("uname", "-a").check().stdout)

Both have the same methods: `_sync` is generated from `_async` by `tools/make_sync_client.py`.
"""

from wrenn_sandbox.client._async.client import AsyncClient
from wrenn_sandbox.client._async.files import AsyncDownload
from wrenn_sandbox.client._async.sandboxes import AsyncSandbox
from wrenn_sandbox.client._async.streams import AsyncStream, AsyncTerminal
from wrenn_sandbox.client._sync.client import Client
from wrenn_sandbox.client._sync.files import Download
from wrenn_sandbox.client._sync.sandboxes import Sandbox
from wrenn_sandbox.client._sync.streams import Stream, Terminal

from .errors import (
    AgentError,
    AlreadyExists,
    ApiError,
    ClientError,
    CommandFailed,
    Conflict,
    ConnectionFailed,
    ExecTimeout,
    Forbidden,
    Gone,
    InvalidRequest,
    InvalidState,
    NoCapacity,
    NoSpace,
    NotFound,
    QuotaExceeded,
    RateLimited,
    RequestTimeout,
    StreamFailed,
    TooLarge,
    Unauthorized,
    UnexpectedAnswer,
)
from .frames import Exit, Frame, Size, Stderr, Stdout
from .models import (
    ApiKey,
    Copied,
    Event,
    FileEntry,
    LeftOut,
    Limits,
    Metrics,
    NetworkPolicy,
    Ports,
    Process,
    Result,
    SandboxInfo,
    Session,
    TeamEvent,
    Template,
    Usage,
    Used,
    Webhook,
    WebhookDelivery,
)

__all__ = [
    "AgentError",
    "AlreadyExists",
    "ApiError",
    "ApiKey",
    "AsyncClient",
    "AsyncDownload",
    "AsyncSandbox",
    "AsyncStream",
    "AsyncTerminal",
    "Client",
    "ClientError",
    "CommandFailed",
    "Conflict",
    "ConnectionFailed",
    "Copied",
    "Download",
    "Event",
    "ExecTimeout",
    "Exit",
    "FileEntry",
    "Forbidden",
    "Frame",
    "Gone",
    "InvalidRequest",
    "InvalidState",
    "LeftOut",
    "Limits",
    "Metrics",
    "NetworkPolicy",
    "NoCapacity",
    "NoSpace",
    "NotFound",
    "Ports",
    "Process",
    "QuotaExceeded",
    "RateLimited",
    "RequestTimeout",
    "Result",
    "Sandbox",
    "SandboxInfo",
    "Session",
    "Size",
    "Stderr",
    "Stdout",
    "Stream",
    "StreamFailed",
    "TeamEvent",
    "Template",
    "Terminal",
    "TooLarge",
    "Unauthorized",
    "UnexpectedAnswer",
    "Usage",
    "Used",
    "Webhook",
    "WebhookDelivery",
]
