"""Which of two artifacts is faster on a device: blocks in turn, a floor of noise, and a verdict.

Each block times A, A once more and B in random order, every one in a new runner: what changes slowly (heat, clocks, the
load of others) meets all three alike, and what changes from process to process (where memory lies) is in the noise. The
ratios B / A of the blocks are compared; those of A / A say what a difference of nothing looks like.

The interval of the median ratio is that of order statistics, as for every median here (`kedge.rpc.measure`). The floor
of noise is the larger bound of the interval of A / A, or what earlier comparisons on the same device found, whichever
is larger. Those are kept where the device is (`kedge.places`); where they are stale, this one's own A / A is all.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from kedge.places import Place
from kedge.rpc.artifact import Artifact
from kedge.rpc.client.timing import Timing
from kedge.rpc.errors import JobError, KedgeError, UsageError
from kedge.rpc.measure import median_interval
from kedge.rpc.noise import day_of
from kedge.rpc.types import NoiseFloor

#: With fewer blocks the interval of the median has less than 95 % confidence.
MIN_BLOCKS = 6
#: A difference that nobody would call one, whatever the noise.
SAME_WITHIN = 0.01
ARMS = ("a", "again", "b")

Inputs = Mapping[str, Any]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came of it. Ratios are B's time over A's; an interval holds the median ratio with 95 % confidence.

    `superiority` is how often a block of B is faster than one of A, over all pairs of blocks (Vargha and Delaney's A):
    0.5 means no difference. `noise` is a share: ratios within it mean nothing. `own_noise` is what this comparison
    found, `kept` what earlier ones did. `verdict` is faster, slower, same, inconclusive or invalid, said of B.
    """

    blocks: tuple[Mapping[str, float], ...]
    ratio: float
    interval: tuple[float, float]
    noise: float
    own_noise: float
    superiority: float
    verdict: str
    reasons: tuple[str, ...] = ()
    device: str = ""
    kept: NoiseFloor | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON-able values; times in nanoseconds of one call, by block and arm."""
        return {
            "device": self.device,
            "verdict": self.verdict,
            "ratio": self.ratio,
            "interval_95": list(self.interval),
            "noise": self.noise,
            "noise_here": self.own_noise,
            "noise_kept": None if self.kept is None else asdict(self.kept),
            "superiority": self.superiority,
            "reasons": list(self.reasons),
            "blocks_ns": [dict(block) for block in self.blocks],
        }

    def __str__(self) -> str:
        a, b = (statistics.median(block[arm] for block in self.blocks) / 1e6 for arm in ("a", "b"))
        low, high = self.interval
        lines = [
            f"A {a:.4g} ms, B {b:.4g} ms: B takes {self.ratio:.4g} of A's time (95% interval {low:.4g} .. {high:.4g})",
            f"noise of this device: {self.noise:.2%} ({self._noise()})",
            f"a block of B is faster than one of A in {self.superiority:.0%} of pairs; "
            f"{len(self.blocks)} blocks in random order",
            f"verdict: {_VERDICTS[self.verdict]}",
        ]
        return "\n".join(lines + [f"  - {reason}" for reason in self.reasons])

    def _noise(self) -> str:
        """Where the floor of noise comes from."""
        own = f"A beside A here: {self.own_noise:.2%}"
        if self.kept is None:
            return f"{own}; nothing was known before"
        if self.kept.stale:
            return f"{own}; what was known does not count: {self.kept.stale}"
        known, day = self.kept.comparisons, day_of(self.kept.measured_unix_ms)
        earlier = "1 earlier comparison" if known == 1 else f"{known} earlier comparisons, the last"
        return f"{own}; {earlier} on {day}: {self.kept.relative:.2%}"


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
    suspected: list[str] = field(default_factory=list)
    invalid: bool = False
    #: Threads and place, of every timing.
    where: tuple[int, str] = (0, "cpu")

    def add(self, arm: str, timing: Timing, on: str) -> None:
        """The timing of one arm of the last block; raises JobError where it says nothing at all."""
        self.invalid |= timing.verdict == "invalid"
        if timing.verdict in ("invalid", "emulated"):
            self.reasons.update(dict.fromkeys(timing.reasons))
        elif timing.verdict == "suspect":
            self.suspected.append("; ".join(timing.reasons))
        self.where = timing.measurement.num_threads, on
        self.blocks[-1][arm] = statistics.median(timing.samples_ns) if timing.samples_ns else 0.0
        if self.blocks[-1][arm] <= 0:
            raise JobError(f"a timing says nothing: {'; '.join(timing.reasons)}", outcome="invalid_measurement")

    def all_reasons(self) -> list[str]:
        """What there is to say of the timings."""
        if not self.suspected:
            return list(self.reasons)
        of_all = f"{len(self.suspected)} of {len(self.blocks) * len(ARMS)} timings are suspect"
        return [*self.reasons, f"{of_all}, such as: {self.suspected[0]}"]


def compare(
    artifacts: tuple[Artifact, Artifact],
    inputs: tuple[Inputs, Inputs],
    place: Place,
    *,
    function: str = "",
    blocks: int = 10,
    repeat: int = 3,
    min_repeat_ms: float = 20,
    seed: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Comparison:
    """Time two artifacts in turn on one device, and say which is faster.

    Args:
        artifacts: A and B.
        inputs: of A and of B, by name.
        place: where, with what is known of the noise there; what this comparison finds is added.
        blocks: how many times each is timed, in runners of their own; at least MIN_BLOCKS.
        repeat, min_repeat_ms: of one timing, as for `time`; its median is what counts.
        seed: of the order; drawn unless given.

    Raises:
        UsageError: too few blocks.
        InputError, JobError: as `time` does.
        KedgeError: what is known of the noise cannot be read.
    """
    if blocks < MIN_BLOCKS:
        raise UsageError(f"{blocks} blocks show no interval", hint=f"at least {MIN_BLOCKS} do")
    order, taken = random.Random(seed), _Taken()
    kept: NoiseFloor | None = None
    by_arm = {"a": (artifacts[0], inputs[0]), "again": (artifacts[0], inputs[0]), "b": (artifacts[1], inputs[1])}
    for number in range(blocks):
        progress(f"block {number + 1} of {blocks}", number, blocks)
        taken.blocks.append({})
        for arm in order.sample(ARMS, len(ARMS)):
            artifact, data = by_arm[arm]
            with place.loaded(artifact) as model:
                timing = model.time(data, function=function, repeat=repeat, min_repeat_ms=min_repeat_ms)
                taken.add(arm, timing, model.device)
        if number == 0:  # if that cannot be read, it is better known before the other blocks have taken their time
            kept = place.noise(*taken.where)
    known = kept.relative if kept is not None and not kept.stale else 0.0
    found = judge(taken.blocks, known, taken.all_reasons(), invalid=taken.invalid)
    return replace(found, device=place.name, kept=kept, reasons=(*found.reasons, *_keep(place, taken, found)))


def _keep(place: Place, taken: _Taken, found: Comparison) -> tuple[str, ...]:
    """Add to what is known of the noise; where that fails, the comparison stands, and the reason is told."""
    if taken.invalid:
        return ()
    try:
        place.keep_noise(found.own_noise, *taken.where)
    except KedgeError as error:
        return (f"what this says of the noise is not kept: {error}",)
    return ()


def judge(
    blocks: Sequence[Mapping[str, float]], known: float = 0.0, reasons: Sequence[str] = (), *, invalid: bool = False
) -> Comparison:
    """What blocks say that hold the time of `a`, of `again` (A once more) and of `b`; `known` is earlier noise."""
    logs = [math.log(block["b"] / block["a"]) for block in blocks]
    low, high = _interval(logs)
    own = _noise(blocks)
    noise = max(own, math.log1p(known))
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
        own_noise=math.expm1(own),
        superiority=wins / len(blocks) ** 2,
        verdict=verdict,
        reasons=tuple(reasons),
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
