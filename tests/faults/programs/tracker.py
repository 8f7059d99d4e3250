"""A tracker whose leases and silences are short: FOLDER PORT AGENTS_PORT (0: any) secure|plain [PEERS].

Says both ports. PEERS is JSON with what makes it one of several: database, peers_port, join.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path

from kedge.rpc import logs
from kedge.rpc.security.join import parse_join
from kedge.rpc.tracker.retention import Retention
from kedge.rpc.tracker.server import serve, stop
from kedge.rpc.tracker.settings import Settings

#: An agent that lost the tracker tries again within 5 s: its lease outlives that.
SETTINGS = Settings(
    heartbeat_interval_ms=250,
    silence_ms=4_000,
    lease_ms=8_000,
    cancel_grace_ms=3_000,
    deadline_slack_ms=3_000,
    quarantine_ms=500,
    longest_quarantine_ms=1_000,
)


async def main(folder: str, port: str, agents_port: str, how: str, peers: str = "{}") -> None:
    plain = how == "plain"
    several = json.loads(peers)
    if several.get("join"):
        several["join"] = parse_join(several["join"])
    serving_on = None if plain else int(agents_port)
    async with serve(
        "127.0.0.1",
        int(port),
        Path(folder),
        SETTINGS,
        agents_port=serving_on,
        insecure_loopback=plain,
        keep=Retention(every_s=0.5),
        **several,
    ) as serving:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, stop, serving.stopped, "SIGTERM")
        sys.stdout.write(f"{serving.address.port} {serving.agents_address.port}\n")
        sys.stdout.flush()
        await serving.stopped


logs.configure("json", "")
asyncio.run(main(*sys.argv[1:]))
