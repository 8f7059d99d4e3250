"""Cores kept for timings: who is where, and what others did there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kedge.device_agent.cores import MIN_WATCH_S, Watch, busy_s, parse_cores
from kedge.rpc.errors import UsageError
from kedge.rpc.measure import judge
from kedge.rpc.types import Measurement, Pinning, TimeOptions, Verdict

CORES = sorted(os.sched_getaffinity(0))
TICK = os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(("text", "cores"), [("3", (3,)), ("2-3", (2, 3)), ("3,1-2,2", (1, 2, 3)), ("0,3", (0, 3))])
def test_a_list_of_cores(text: str, cores: tuple[int, ...]) -> None:
    assert parse_cores(text, {0, 1, 2, 3}) == cores


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no list of cores"), ("a", "no list of cores"), ("2-", "no list of cores"), ("3-2", "no list of cores"),
        ("-1", "no list of cores"), ("1,,2", "no list of cores"), ("7", "may not run on 7"), ("0-3", "leaves no core"),
    ],
)  # fmt: skip
def test_what_is_none(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_cores(text, {0, 1, 2, 3})


def test_busy_is_all_but_idle_and_waiting() -> None:
    text = "cpu 1 1 1 1 1 1 1 1 0 0\ncpu0 1 2 4 1000 1000 8 16 32 9 9\ncpu1 64 0 0 7 7 0 0 0 0 0\nctxt 7\n"
    assert busy_s(text, (0,)) == 63 / TICK
    assert busy_s(text, (0, 1)) == 127 / TICK
    assert busy_s(text, (0, 2)) is None


def test_a_share_of_nothing_is_none(tmp_path: Path) -> None:
    assert Watch(os.getpid(), CORES).others_share() is None, "it was shorter than the kernel can tell"
    assert Watch(os.getpid(), CORES, root=tmp_path).others_share() is None


def test_what_others_do_on_a_core_is_seen_and_what_the_process_does_is_not() -> None:
    """Two processes spin on one core: to either, the other one is the others."""
    core = CORES[-1]
    spin = f"import os; os.sched_setaffinity(0, [{core}]); print(flush=True)\nwhile True: pass"
    spinners = [subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for spinner in spinners:
            assert spinner.stdout is not None
            spinner.stdout.readline()
        with_both = Watch(spinners[0].pid, [core])
        work = Watch(os.getpid(), [core])
        time.sleep(3 * MIN_WATCH_S)  # spinning, it would take turns with them
        share, of_all = with_both.others_share(), work.others_share()
        assert share is not None and of_all is not None
        assert 0.2 < share < of_all, "half of it, if nobody else is there"
        assert of_all > 0.8
    finally:
        for spinner in spinners:
            spinner.send_signal(signal.SIGKILL)
            spinner.communicate()


QUIET = Measurement(TimeOptions(number=1000), (1e6,) * 9, resolution_ns=1, num_threads=2)


@pytest.mark.parametrize(
    ("pinning", "verdict"),
    [
        (Pinning((2, 3), True, True, 0.05), Verdict.VALID),
        (Pinning((2, 3), True, True, None), Verdict.VALID),
        (Pinning((2, 3), True, True, 0.2), Verdict.SUSPECT),
        (Pinning((0, 1, 2, 3), False, False, 0.5), Verdict.VALID),  # two of four cores are left to others
        (Pinning((0, 1, 2, 3), False, False, 0.6), Verdict.SUSPECT),
    ],
)
def test_a_measurement_whose_cores_others_use_is_suspect(pinning: Pinning, verdict: Verdict) -> None:
    found, reasons = judge(replace(QUIET, pinning=pinning), num_cores=4)
    assert found is verdict
    assert [reason for reason in reasons if "others used" not in reason] == []
