"""What is known of the noise of devices: which samples count, which are stale, which are forgotten."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kedge.rpc import convert
from kedge.rpc.client import Fleet
from kedge.rpc.errors import InputError, NoDeviceError
from kedge.rpc.messages import Heartbeat
from kedge.rpc.noise import MAX_AGE_MS, MOST_OF_A_DEVICE, MOST_OF_A_USER, Conditions, Noise, floor_for
from kedge.rpc.protocol import local_protocol
from kedge.rpc.tracker.server import RunningTracker
from kedge.rpc.types import Health, NoiseSample
from support.fake_agent import FakeAgent
from support.logged import wait_for
from support.toys import device_info

NOW = 100 * 86_400_000
THEN = Conditions("llvm -mcpu=cortex-a72", "kedge 0.1", "performance")
SAMPLE = NoiseSample("1", "pi", "ann", 0.02, 1, "cpu", *THEN, NOW)


def test_the_floor_is_the_median_over_users_of_each_users_median() -> None:
    """Whoever sends ten odd samples, of an artifact whose time is random, moves it no further than with one."""
    said = {"ann": [0.01, 0.03, 0.02], "bob": [0.04], "eve": [5.0] * MOST_OF_A_USER}
    numbers = itertools.count()
    noise = Noise(
        replace(SAMPLE, id=str(next(numbers)), user=user, relative=each, measured_unix_ms=NOW + next(numbers))
        for user, values in said.items()
        for each in values
    )
    (floor,) = noise.floors("pi", THEN, NOW)
    assert floor.relative == statistics.median([0.02, 0.04, 5.0])
    assert (floor.comparisons, floor.num_threads, floor.on, floor.stale) == (4 + MOST_OF_A_USER, 1, "cpu", "")
    assert noise.floors("other", THEN, NOW) == ()


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (THEN._replace(target="llvm -mcpu=cortex-a76"), "the target was llvm -mcpu=cortex-a72, and is llvm"),
        (THEN._replace(software="kedge 0.2"), "the software was kedge 0.1, and is kedge 0.2 now"),
        (THEN._replace(governor="ondemand"), "the governor was performance, and is ondemand now"),
    ],
)
def test_what_was_measured_under_other_conditions_is_stale_and_then_measured_again(now: Conditions, words: str) -> None:
    noise = Noise([SAMPLE, replace(SAMPLE, id="2", num_threads=4)])
    for floor in noise.floors("pi", now, NOW):
        assert words in floor.stale
    again = replace(SAMPLE, id="3", relative=0.07, **now._asdict())
    assert noise.keep(again) == ("1",), "only for as many threads is anything measured again"
    one, four = noise.floors("pi", now, NOW)
    assert (one.relative, one.stale, four.num_threads) == (0.07, "", 4) and words in four.stale
    assert floor_for((one, four), 1, "cpu") is one and floor_for((one, four), 1, "cuda:0") is None


def test_what_is_not_known_of_a_device_that_has_just_come_back_makes_nothing_stale() -> None:
    noise, unknown = Noise([SAMPLE]), THEN._replace(governor="")
    assert noise.floors("pi", unknown, NOW)[0].stale == ""
    assert noise.keep(replace(SAMPLE, id="2", governor="")) == ()


def test_old_samples_do_not_count_and_are_forgotten_when_there_is_a_new_one() -> None:
    late = NOW + MAX_AGE_MS + 1
    noise = Noise([SAMPLE, replace(SAMPLE, id="2", relative=0.5, measured_unix_ms=NOW + 2)])
    (floor,) = noise.floors("pi", THEN, late)
    assert (floor.relative, floor.comparisons, floor.stale) == (0.5, 1, "")
    (floor,) = noise.floors("pi", THEN, late + 9)
    assert "it was measured on 1970-04-11" in floor.stale
    assert noise.keep(replace(SAMPLE, id="3", measured_unix_ms=late + 9)) == ("1", "2")


@given(
    st.lists(
        st.tuples(st.sampled_from("abcdefghijklmnopqrst"), st.integers(1, 2), st.sampled_from(["", "x", "y"])),
        max_size=300,
    )
)
def test_whatever_is_kept_what_is_told_to_be_forgotten_is_all_that_is(said: list[tuple[str, int, str]]) -> None:
    """The database, which follows what `keep` says, has what a restarted tracker needs."""
    noise, stored = Noise(), {}
    for number, (user, threads, governor) in enumerate(said):
        sample = replace(SAMPLE, id=str(number), user=user, num_threads=threads, governor=governor)
        sample = replace(sample, measured_unix_ms=NOW + number)
        forgotten = noise.keep(sample)
        stored = {key: each for key, each in stored.items() if key not in forgotten} | {sample.id: sample}
    kept = noise.of("pi")
    assert set(kept) == set(stored.values()) and len(kept) <= MOST_OF_A_DEVICE
    assert all(sum(each.user == user for each in kept) <= MOST_OF_A_USER for user in {each.user for each in kept})
    assert not said or kept[-1].id == str(len(said) - 1), "the newest is always kept"
    assert Noise(stored.values()).floors("pi", THEN, NOW) == noise.floors("pi", THEN, NOW)


def test_a_tracker_keeps_the_noise_of_its_devices(tracker: RunningTracker, fleet: Fleet) -> None:
    with FakeAgent(tracker.address, device_info("pi")) as agent:
        agent.say(Heartbeat(Health(governor="performance"), ()))
        wait_for(lambda: fleet.devices("pi")[0].health == Health(governor="performance"), "the governor to be known")
        fleet.keep_noise("pi", 0.01, num_threads=2)
        status = fleet.keep_noise("pi", 0.03, num_threads=2)
        (floor,) = status.noise
        assert (floor.relative, floor.comparisons, floor.num_threads, floor.on) == (0.02, 2, 2, "cpu")
        assert (floor.governor, floor.software) == ("performance", local_protocol().software)
        assert (floor.target, floor.stale) == (device_info("pi").target, "")
        assert fleet.devices("pi")[0].noise == (floor,) and status.to_json()["noise"][0]["relative"] == 0.02
        assert convert.device_status_from_pb(convert.device_status_to_pb(status)) == status
        agent.say(Heartbeat(Health(governor="powersave"), ()))
        wait_for(lambda: fleet.devices("pi")[0].noise[0].stale != "", "the floor to be stale")
    for wrong in (-0.1, 1001.0, float("nan")):
        with pytest.raises(InputError, match="the noise is"):
            fleet.keep_noise("pi", wrong, num_threads=2)
    with pytest.raises(NoDeviceError):
        fleet.keep_noise("nobody", 0.1, num_threads=2)
