"""`kedge join`, `kedge signer`, `kedge tracker token`, `kedge tracker enrolled` and `kedge tracker revoke`."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Annotated, Any

import typer

from kedge.cli import output
from kedge.cli.arguments import parse_duration
from kedge.cli.place import require_tracker
from kedge.rpc.errors import UsageError


def join(
    string: Annotated[str, typer.Argument(metavar="STRING", help="What 'kedge tracker token create' printed.")],
    tracker: Annotated[
        str | None,
        typer.Option("--tracker", metavar="HOST:PORT", help="Where it is from here.", show_default="as in the string"),
    ] = None,
) -> None:
    """Join a tracker: from now on every command here reaches it as the user that the join string is for.

    The string carries the tracker's certificate and a token. They are kept in ~/.config/kedge, readable by you alone.

    Examples:

      kedge join 'kedge1.…'

      kedge join 'kedge1.…' --tracker 127.0.0.1:9190
    """
    from kedge.rpc.client.fleet import Fleet
    from kedge.rpc.security import credentials, signing
    from kedge.rpc.security.join import DEVICE, USER, parse_join
    from kedge.rpc.transport import Tls, parse_trackers

    found = parse_join(string)
    if found.kind != USER:
        use = "agent start" if found.kind == DEVICE else "tracker start --database URL"
        raise UsageError(f"this join string lets a {found.kind} in", hint=f"there: kedge {use} --join '…'")
    address = parse_trackers(tracker) if tracker else found.address
    tls = Tls(found.ca, token=found.token)
    with Fleet(address, tls) as fleet:
        fleet.hello()
    path = credentials.remember(credentials.Credentials(address.each, tls))
    signing.own_key(credentials.config_dir(), make=True)
    output.stdout().print(f"joined the tracker at {address}; its credentials are in {path}", soft_wrap=True)
    output.stderr().print(f"hint: export KEDGE_TRACKER={address}", soft_wrap=True)


def signer(as_json: output.JsonFlag = False) -> None:
    """Print the public key that your artifacts are signed with when they are sent; the first call makes the key.

    An agent that was started with --require-signer KEY runs nothing else.

    Examples:

      kedge signer
    """
    from kedge.rpc.security import credentials, signing

    key = signing.own_key(credentials.config_dir(), make=True)
    assert key is not None
    public = signing.public_key(key).hex()
    if as_json:
        output.emit_json({"public_key": public})
    else:
        output.stdout().print(public)


def token_create(
    role: Annotated[
        str,
        typer.Option(
            "--role", help="'submit', 'read', 'admin', 'enrol' for one device, 'tracker' for another tracker."
        ),
    ],
    user: Annotated[str, typer.Option("--user", help="Whose it is; not needed to enrol.")] = "",
    device: Annotated[
        str, typer.Option("--device", help="With enrol: the device's name, also where one has it already.")
    ] = "",
    expires: Annotated[
        str | None,
        typer.Option(
            "--expires", metavar="TIME", help="30d, 12h, 45min.", show_default="90d; admin 365d; enrol and tracker 1h"
        ),
    ] = None,
    tracker: output.TrackerOption = None,
    as_json: output.JsonFlag = False,
) -> None:
    """Make a token and print the command that joins with it. The token is told this once.

    Examples:

      kedge tracker token create --role submit --user ann --expires 30d

      kedge tracker token create --role enrol --device rpi4-1

      kedge tracker token create --role tracker
    """
    lifetime_s = 0 if expires is None else max(1, round(parse_duration(expires)))
    with _access(tracker) as access:
        token, found = access.create_token(role, user, device=device, lifetime_s=lifetime_s)
    if as_json:
        output.emit_json({**asdict(token), "join": str(found)})
        return
    command, whose = "kedge join", f"user {token.user}"
    if token.role == "enrol":
        command, whose = "kedge agent start --join", f"device {token.device or 'of any free name'}"
    elif token.role == "tracker":
        command, whose = "kedge tracker start --database URL --join", "one more tracker"
    output.stderr().print(f"token {token.id}: {token.role}, {whose}, until {_moment(token.expires_s)}", soft_wrap=True)
    output.stdout().print(f"{command} '{found}'", soft_wrap=True)


def token_list(tracker: output.TrackerOption = None, as_json: output.JsonFlag = False) -> None:
    """List tokens: whose, what for, until when. Those that are over go 30 days later.

    Examples:

      kedge tracker token list --tracker tracker:9190
    """
    with _access(tracker) as access:
        found = access.tokens()
    if as_json:
        output.emit_json([{**asdict(token), "state": token.state(time.time())} for token in found])
        return
    table = output.table("=token", "user", "role", "device", "created", "expires", "state")
    for token in found:
        times = (_moment(token.created_s), _moment(token.expires_s))
        table.add_row(token.id, token.user, token.role, token.device or "-", *times, token.state(time.time()))
    output.show(table)


def token_revoke(
    token: Annotated[str, typer.Argument(metavar="TOKEN", help="As 'list' names it.")],
    tracker: output.TrackerOption = None,
) -> None:
    """Refuse a token from now on, and end what it has under way. Jobs that it has submitted go on.

    Examples:

      kedge tracker token revoke 3fa9c2e1b0
    """
    with _access(tracker) as access:
        revoked = access.revoke_token(token)
    output.stdout().print(f"token {revoked.id} of {revoked.user} is revoked", soft_wrap=True)


def enrolled(tracker: output.TrackerOption = None, as_json: output.JsonFlag = False) -> None:
    """List the devices that were ever enrolled, with their certificates.

    Examples:

      kedge tracker enrolled --tracker tracker:9190
    """
    with _access(tracker) as access:
        found = access.enrolled()
    if as_json:
        output.emit_json([asdict(device) for device in found])
        return
    table = output.table("=device", "enrolled", "certificate until", "revoked")
    for device in found:
        revoked = _moment(device.revoked_s) if device.revoked_s else "-"
        table.add_row(device.device, _moment(device.enrolled_s), _moment(device.not_after_s), revoked)
    output.show(table)


def revoke(
    device: Annotated[str, typer.Argument(metavar="DEVICE", help="Its name.")],
    tracker: output.TrackerOption = None,
) -> None:
    """Refuse a device's certificate from now on; its agent is disconnected and ends, and the tracker forgets it.

    Examples:

      kedge tracker revoke rpi4-1
    """
    with _access(tracker) as access:
        access.revoke_device(device)
    output.stdout().print(f"device {device} is revoked; it comes back with a new join string only", soft_wrap=True)


def _access(tracker: str | None) -> Any:
    from kedge.rpc.client.access import Access
    from kedge.rpc.security import credentials
    from kedge.rpc.transport import parse_trackers

    address = parse_trackers(require_tracker(tracker))
    return Access(address, credentials.find(address).tls)


def _moment(unix_s: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix_s)) if unix_s else "for ever"
