"""How a second tracker becomes one of a fleet: it is given the authority of the first, for a one-time token."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import grpc

from kedge.protos.v1 import enrolment_pb2 as pb
from kedge.protos.v1 import enrolment_pb2_grpc
from kedge.rpc.errors import UsageError
from kedge.rpc.security.files import SecretFileError, make_private_folder, read_private, write_private
from kedge.rpc.security.join import TRACKER, Join
from kedge.rpc.status import from_rpc_error
from kedge.rpc.tracker.security.ca import adopt
from kedge.rpc.tracker.security.folder import ADMIN_FILE
from kedge.rpc.transport import Tls, open_channel

_CALL_S = 20.0


def join_fleet(data_dir: Path, join: Join) -> None:
    """Fetch the fleet's CA into the data folder, where that was not done before.

    Raises:
        UsageError: the join string is not for a tracker.
        SecretFileError: the folder is that of another fleet's tracker.
        AuthenticationError: the token is spent, expired or revoked.
        ConnectError: the tracker does not answer, or is not the one that made the join string.
    """
    if join.kind != TRACKER:
        raise UsageError(
            f"this join string is for a {join.kind}: no tracker joins with it",
            hint="make one with 'kedge tracker token create --role tracker'",
        )
    make_private_folder(data_dir)
    folder = data_dir / "security"
    make_private_folder(folder)
    if (folder / "ca.pem").exists():
        if read_private(folder / "ca.pem") == join.ca:
            return
        raise SecretFileError(
            f"{data_dir} belongs to a tracker of another fleet", hint="name an empty folder with --data-dir"
        )
    with open_channel(join.address, Tls(join.ca, token=join.token)) as channel:
        stub: Any = cast(Any, enrolment_pb2_grpc.EnrolmentStub)(channel)
        try:
            given = stub.JoinTracker(pb.JoinTrackerRequest(), timeout=_CALL_S)
        except grpc.RpcError as error:
            raise from_rpc_error(error, join.address) from error
    write_private(folder / ADMIN_FILE, f"{given.admin_token}\n".encode())
    adopt(folder, given.ca_pem, given.ca_private_key_pem)
