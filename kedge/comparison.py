"""Which of two artifacts is faster on a device: blocks in turn, a floor of noise, and a verdict.

Each block times A, A once more and B in random order, every one in a new runner: what changes slowly (heat, clocks, the
load of others) meets all three alike, and what changes from process to process (where memory lies) is in the noise. The
ratios B / A of the blocks are compared; those of A / A say what a difference of nothing looks like.

The interval of the median ratio is that of order statistics, as for every median here (`kedge.rpc.measure`). The floor
of noise is the larger bound of the interval of A / A, or the median of those of earlier comparisons on the same device,
which are kept in a file, whichever is larger.
"""

from __future__ import annotations

import json
import math
import random
import re
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kedge.rpc.artifact import Artifact
from kedge.rpc.errors import JobError, KedgeError, UsageError
from kedge.rpc.measure import median_interval

#: With fewer blocks the interval of the median has less than 95 % confidence.
MIN_BLOCKS = 6
#: A difference that nobody would call one, whatever the noise.
SAME_WITHIN = 0.01
#: Floors of a device that are remembered.
_KEPT_FLOORS = 50
ARMS = ("a", "again", "b")

Inputs = Mapping[str, Any]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Floors:
    """The noise of earlier comparisons on one device: of the larger bound of A / A's interval, as a logarithm."""

    path: Path | None
    found: tuple[float, ...] = ()

    @classmethod
    def of(cls, folder: Path, device: str) -> Floors:
        """Those in `folder` for a device; none where nothing was kept yet.

        Raises:
            KedgeError: the file is not what `keep` writes.
        """
        path = folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', device)}.json"
        try:
            found = json.loads(path.read_text())["floors"]
            return cls(path, tuple(float(value) for value in found))
        except FileNotFoundError:
            return cls(path)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise KedgeError(
                f"cannot read the noise of {device} in {path}: {error}", hint="remove that file"
            ) from error

    def keep(self, floor: float) -> None:
        """Remember one more, the file whole or not at all; raises KedgeError where it cannot be written."""
        if self.path is None:
            return
        floors = [*self.found, floor][-_KEPT_FLOORS:]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False) as file:
                json.dump({"floors": floors}, file)
            Path(file.name).replace(self.path)
        except OSError as error:
            raise KedgeError(f"cannot keep the noise of the device in {self.path}: {error.strerror}") from error


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came of it. Ratios are B's time over A's; an interval holds the median ratio with 95 % confidence.

    `superiority` is how often a block of B is faster than one of A, over all pairs of blocks (Vargha and Delaney's A):
    0.5 means no difference. `verdict` is faster, slower, same, inconclusive or invalid, said of B.
    """

    blocks: tuple[Mapping[str, float], ...]
    ratio: float
    interval: tuple[float, float]
    noise: float
    superiority: float
    verdict: str
    reasons: tuple[str, ...] = ()
    device: str = ""

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON-able values; times in nanoseconds of one call, by block and arm."""
        return {
            "device": self.device,
            "verdict": self.verdict,
            "ratio": self.ratio,
            "interval_95": list(self.interval),
            "noise": self.noise,
            "superiority": self.superiority,
            "reasons": list(self.reasons),
            "blocks_ns": [dict(block) for block in self.blocks],
        }

    def __str__(self) -> str:
        a, b = (statistics.median(block[arm] for block in self.blocks) / 1e6 for arm in ("a", "b"))
        low, high = self.interval
        lines = [
            f"A {a:.4g} ms, B {b:.4g} ms: B takes {self.ratio:.4g} of A's time (95% interval {low:.4g} .. {high:.4g})",
            f"noise of this device: {self.noise:.2%}; a block of B is faster than one of A in {self.superiority:.0%}"
            f" of pairs; {len(self.blocks)} blocks in random order",
            f"verdict: {_VERDICTS[self.verdict]}",
        ]
        return "\n".join(lines + [f"  - {reason}" for reason in self.reasons])


_VERDICTS = {
    "faster": "B is faster",
    "slower": "B is slower",
    "same": "no difference beyond the noise",
    "inconclusive": "inconclusive: more blocks (--blocks), longer samples or a quieter device would tell",
    "invalid": "invalid: the times say nothing",
}


@dataclass(slots=True)
class _Taken:
    """Samples so far, and what was said of them."""

    blocks: list[dict[str, float]] = field(default_factory=list)
    reasons: dict[str, None] = field(default_factory=dict)
    invalid: bool = False


def compare(
    artifacts: tuple[Artifact, Artifact],
    inputs: tuple[Inputs, Inputs],
    place: Any,
    *,
    function: str = "",
    blocks: int = 10,
    repeat: int = 3,
    min_repeat_ms: float = 20,
    seed: int | None = None,
    floors: Floors = Floors(None),
    device: str = "",
    progress: Progress = lambda what, done, total: None,
) -> Comparison:
    """Time two artifacts in turn on one device, and say which is faster.

    Args:
        artifacts: A and B.
        inputs: of A and of B, by name.
        place: a session on a device, or `kedge.local()`: what `load` gives is timed.
        blocks: how many times each is timed, in runners of their own; at least MIN_BLOCKS.
        repeat, min_repeat_ms: of one timing, as for `time`; its median is what counts.
        seed: of the order; drawn unless given.
        floors: the noise of earlier comparisons on the device; this one's is added.

    Raises:
        UsageError: too few blocks.
        InputError, JobError: as `time` does.
        KedgeError: the noise cannot be kept.
    """
    if blocks < MIN_BLOCKS:
        raise UsageError(f"{blocks} blocks show no interval", hint=f"at least {MIN_BLOCKS} do")
    order, taken = random.Random(seed), _Taken()
    by_arm = {"a": (artifacts[0], inputs[0]), "again": (artifacts[0], inputs[0]), "b": (artifacts[1], inputs[1])}
    for number in range(blocks):
        progress(f"block {number + 1} of {blocks}", number, blocks)
        taken.blocks.append({})
        for arm in order.sample(ARMS, len(ARMS)):
            artifact, data = by_arm[arm]
            with ExitStack() as stack:
                model = place.load(artifact)
                stack.enter_context(model if hasattr(model, "__exit__") else nullcontext(model))
                timing = model.time(data, function=function, repeat=repeat, min_repeat_ms=min_repeat_ms)
            taken.invalid |= timing.verdict == "invalid"
            taken.reasons.update(dict.fromkeys(timing.reasons if timing.verdict in ("invalid", "emulated") else ()))
            taken.blocks[-1][arm] = statistics.median(timing.samples_ns) if timing.samples_ns else 0.0
            if taken.blocks[-1][arm] <= 0:
                raise JobError(f"a timing says nothing: {'; '.join(timing.reasons)}", outcome="invalid_measurement")
    found = judge(taken.blocks, floors.found, tuple(taken.reasons), invalid=taken.invalid, device=device)
    if not taken.invalid:
        floors.keep(_noise(taken.blocks))
    return found


def judge(
    blocks: Sequence[Mapping[str, float]],
    floors: Sequence[float] = (),
    reasons: Sequence[str] = (),
    *,
    invalid: bool = False,
    device: str = "",
) -> Comparison:
    """What blocks say that hold the time of `a`, of `again` (A once more) and of `b`; `floors` are earlier noise."""
    logs = [math.log(block["b"] / block["a"]) for block in blocks]
    low, high = _interval(logs)
    noise = max(_noise(blocks), statistics.median(floors) if floors else 0.0)
    wins = sum((b["b"] < a["a"]) + 0.5 * (b["b"] == a["a"]) for a in blocks for b in blocks)
    if invalid:
        verdict = "invalid"
    elif high < -noise:
        verdict = "faster"
    elif low > noise:
        verdict = "slower"
    elif max(abs(low), abs(high)) <= max(noise, SAME_WITHIN):
        verdict = "same"
    else:
        verdict = "inconclusive"
    return Comparison(
        blocks=tuple(blocks),
        ratio=math.exp(statistics.median(logs)),
        interval=(math.exp(low), math.exp(high)),
        noise=math.expm1(noise),
        superiority=wins / len(blocks) ** 2,
        verdict=verdict,
        reasons=tuple(reasons),
        device=device,
    )


def _noise(blocks: Sequence[Mapping[str, float]]) -> float:
    """The larger bound of the interval of A / A, as a logarithm."""
    low, high = _interval([math.log(block["again"] / block["a"]) for block in blocks])
    return max(abs(low), abs(high))


def _interval(logs: Sequence[float]) -> tuple[float, float]:
    found = median_interval(logs)
    if found is None:
        raise UsageError(f"{len(logs)} blocks show no interval", hint=f"at least {MIN_BLOCKS} do")
    return found
