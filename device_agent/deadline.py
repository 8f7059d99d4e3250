"""Until when an exchange with a runner may take."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Optional

#: How long the rest of a reply may take to be read that was there when its deadline had passed.
_LAST_CALL_S = 0.5


class Expired(Exception):
    """The moment of a `Deadline` has passed."""


@dataclass
class Deadline:
    """Until when a request may take; a cancel moves the moment and says so."""

    moment: float
    cancelled: bool = False
    #: Once the moment has passed: until when may be taken what has come already.
    last_call: Optional[float] = None

    def left_s(self) -> float:
        """How long may be waited, in seconds: 0 for a look at what is there; raises Expired after that."""
        now = time.monotonic()
        if now < self.moment:
            return self.moment - now
        # This process may have been the one that slept: a reply in time is not late because it was read late.
        self.last_call = now + _LAST_CALL_S if self.last_call is None else self.last_call
        if now > self.last_call:
            raise Expired
        return 0.0
