from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from kedge.rpc.artifact import Artifact
from kedge.rpc.client import Fleet
from kedge.rpc.client.access import Access
from kedge.rpc.security import identity
from kedge.rpc.security.identity import Identity
from kedge.rpc.tracker.server import RunningTracker, start
from kedge.rpc.transport import Tls
from support.fake_agent import FakeAgent, echo
from support.postgres import postgres
from support.toys import QUICK, device_info, make_artifact

__all__ = ["postgres"]


@pytest.fixture(scope="session")
def artifact() -> Artifact:
    return make_artifact()


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningTracker]:
    """A tracker as users have it: TLS, tokens, certificates."""
    with start(port=0, data_dir=tmp_path_factory.mktemp("secure") / "tracker", settings=QUICK) as running:
        yield running


def admin_tls(tracker: RunningTracker) -> Tls:
    assert tracker.serving.security is not None
    return tracker.serving.security.admin_tls()


@pytest.fixture(scope="module")
def access(tracker: RunningTracker) -> Iterator[Access]:
    with Access(tracker.address, admin_tls(tracker)) as access:
        yield access


@pytest.fixture
def fleet_of(tracker: RunningTracker, access: Access) -> Iterator[Callable[..., Fleet]]:
    """`fleet_of("ann")`: a client with a token of its own."""
    made: list[Fleet] = []

    def make(user: str, role: str = "submit") -> Fleet:
        _, join = access.create_token(role, user)
        made.append(Fleet(tracker.address, Tls(join.ca, token=join.token)))
        return made[-1]

    yield make
    for fleet in made:
        fleet.close()


@pytest.fixture
def enrolled(access: Access) -> Callable[[str], Identity]:
    """`enrolled("bench-1")`: the identity of a device."""
    return lambda name: identity.enrol(access.enrol_token(name)[0], name)


@pytest.fixture
def agent(enrolled: Callable[[str], Identity]) -> Iterator[FakeAgent]:
    """An agent that echoes what jobs send it."""
    known = enrolled("bench-1")
    with FakeAgent(known.address, device_info(), work=echo, tls=known.tls) as agent:
        yield agent
