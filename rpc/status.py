"""kedge's errors across gRPC: a status code, the class's name and the hint go over; the same class comes out.

The tracker calls `to_status`, clients and agents call `from_rpc_error`.
"""

from __future__ import annotations

from typing import Any, Dict, Mapping, Optional, Tuple, Type

import grpc

from kedge.protos.v1 import fleet_pb2
from kedge.rpc import blobs, errors
from kedge.rpc.protocol import ProtocolError
from kedge.rpc.selector import SelectorError
from kedge.rpc.transport import Address, HandshakeError, handshake_error, unreachable

_CLASS_KEY = "kedge-error"
#: Hints are text in any language: gRPC's metadata wants bytes for that.
_HINT_KEY = "kedge-hint-bin"


class UnknownJobError(errors.KedgeError):
    """The tracker knows no job with this id."""


class RemoteError(errors.KedgeError):
    """The tracker failed in a way that has no class of its own; the message carries the status."""


class NameTakenError(errors.KedgeError):
    """Another device is enrolled under this name."""


class UnknownTokenError(errors.KedgeError):
    """The tracker knows no token, or no enrolled device, of this name."""


class NotReadyError(errors.KedgeError):
    """A job names blobs that the tracker does not have."""


class QueueFullError(errors.KedgeError):
    """As many jobs of one user wait as may."""


class UnknownReservationError(errors.KedgeError):
    """The tracker knows no reservation with this id."""


class TrackerAwayError(errors.ConnectError):
    """The tracker cannot decide now, and will before long, or another one does: the same call may be made again."""


_CODES: Mapping[Type[errors.KedgeError], grpc.StatusCode] = {
    UnknownJobError: grpc.StatusCode.NOT_FOUND,
    TrackerAwayError: grpc.StatusCode.UNAVAILABLE,
    NotReadyError: grpc.StatusCode.FAILED_PRECONDITION,
    QueueFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UnknownReservationError: grpc.StatusCode.NOT_FOUND,
    errors.UsageError: grpc.StatusCode.INVALID_ARGUMENT,
    SelectorError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ArtifactError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.InputError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.IncompatibleTargetError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.NoDeviceError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.AuthenticationError: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDeniedError: grpc.StatusCode.PERMISSION_DENIED,
    errors.LimitError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.UsageError: grpc.StatusCode.INVALID_ARGUMENT,
    NameTakenError: grpc.StatusCode.ALREADY_EXISTS,
    UnknownTokenError: grpc.StatusCode.NOT_FOUND,
    ProtocolError: grpc.StatusCode.FAILED_PRECONDITION,
    blobs.BadDigestError: grpc.StatusCode.INVALID_ARGUMENT,
    blobs.MissingBlobError: grpc.StatusCode.NOT_FOUND,
    blobs.CorruptBlobError: grpc.StatusCode.DATA_LOSS,
    blobs.UploadOffsetError: grpc.StatusCode.ABORTED,
    blobs.BlobQuotaError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    blobs.DiskFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    blobs.BlobError: grpc.StatusCode.INTERNAL,
}
_BY_NAME: Mapping[str, Type[errors.KedgeError]] = {cls.__name__: cls for cls in _CODES}

#: gRPC's own key, which its retries heed: when to try again, in milliseconds.
_PUSHBACK_KEY = "grpc-retry-pushback-ms"
_PUSHBACK_MS = 500
#: Of a message or a hint: at most four bytes each, and gRPC takes 16 KiB together.
_MAX_CHARS = 1_500

#: The peer is away, or went away in mid-call; trying again can help.
_AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
#: gRPC's own words for a connection that broke under a call, where it has not made up its mind to say UNAVAILABLE.
_TORN = {grpc.StatusCode.UNKNOWN: "Stream removed", grpc.StatusCode.INTERNAL: "RST_STREAM"}

Metadata = Tuple[Tuple[str, Any], ...]


def to_status(error: errors.KedgeError) -> Tuple[grpc.StatusCode, str, Metadata]:
    """The code, details and trailing metadata that say `error` to the other end."""
    cls = TrackerAwayError if isinstance(error, TrackerAwayError) else type(error)
    code = _CODES.get(cls, grpc.StatusCode.FAILED_PRECONDITION)
    metadata: Metadata = ((_CLASS_KEY, cls.__name__),)
    if code is grpc.StatusCode.UNAVAILABLE:
        metadata += ((_PUSHBACK_KEY, str(_PUSHBACK_MS)),)
    if error.hint:
        metadata += ((_HINT_KEY, _cut(error.hint).encode()),)
    return code, _cut(error.message), metadata


def to_refusal(error: errors.KedgeError) -> fleet_pb2.Refusal:
    """The same where it is not the whole call that fails."""
    return fleet_pb2.Refusal(error=type(error).__name__, message=_cut(error.message), hint=_cut(error.hint or ""))


def from_refusal(refusal: fleet_pb2.Refusal) -> errors.KedgeError:
    """The kedge error that a refusal says."""
    return _BY_NAME.get(refusal.error, RemoteError)(refusal.message, hint=refusal.hint or None)


def _cut(text: str) -> str:
    """A message may quote what somebody sent; more than this no peer takes."""
    return text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]}…"


def from_rpc_error(error: grpc.RpcError, address: Optional[Address] = None) -> errors.KedgeError:
    """The kedge error behind a failed call; ConnectError when the tracker at `address` is away."""
    code, details = error.code(), error.details() or ""
    trailing: Any = error.trailing_metadata() or ()
    said: Dict[str, Any] = dict(trailing)
    if _CLASS_KEY in said:
        cls, hint = _BY_NAME.get(said[_CLASS_KEY], RemoteError), said.get(_HINT_KEY)
        return cls(details, hint=hint.decode() if hint else None)
    failed = handshake_error(address, details) if code is grpc.StatusCode.UNAVAILABLE else None
    if failed is not None:
        return failed
    if code in _AWAY or _is_torn(code, details):
        if address is None:
            return errors.ConnectError(f"the tracker went away ({details})", hint="see whether it still runs")
        return unreachable(address, _reason(details))
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return unanswered(address)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return ProtocolError(f"the peer is not a kedge tracker, or an older one ({details})")
    return RemoteError(f"the tracker answered {code.name}: {details}")


def unanswered(address: Optional[Address] = None) -> errors.ConnectError:
    """The error for a tracker that is there, and says nothing."""
    who = "the tracker" if address is None else f"the tracker at {address}"
    return errors.ConnectError(f"{who} did not answer in time", hint="its log, or that of what lies between, says why")


def was_said(metadata: Any) -> bool:
    """Whether trailing metadata come from a tracker's handler, and not from gRPC for want of a connection."""
    return any(key == _CLASS_KEY for key, _ in metadata or ())


def is_away(error: grpc.RpcError) -> bool:
    """True when the tracker could not be reached or went away, so that the same call may succeed later."""
    code, details = error.code(), error.details() or ""
    if _is_torn(code, details):
        return True
    return code in _AWAY and not isinstance(handshake_error(None, details), HandshakeError)


def _is_torn(code: grpc.StatusCode, details: str) -> bool:
    return code in _TORN and _TORN[code] in details


def _reason(details: str) -> str:
    """gRPC's words for a failed connection, without what only its authors understand."""
    line = details.strip().splitlines()[0] if details.strip() else ""
    if line.startswith("failed to connect to all addresses"):
        return line.rsplit(": ", 1)[-1].rstrip(")")
    return line[:200]
