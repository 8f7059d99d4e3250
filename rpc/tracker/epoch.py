"""Fencing: of several trackers on one database only the one that leads can write.

Each leadership has a number, higher than all before it, in the one row of the table `leadership`. Every transaction
that writes begins by writing that row on the condition that the number is still its own. Whoever takes the lead
changes the number first, and waits for such a transaction to end, so that nothing of an earlier leader comes after.

The same row counts transactions: after a lost connection it tells whether the last one had been committed.
"""

from __future__ import annotations

import sqlalchemy as sa

from kedge.rpc.tracker.schema import StoreAwayError, leadership


class FencedError(StoreAwayError):
    """Another tracker leads by now: nothing was written."""


class Epoch:
    """One leadership, as the thread that writes for it sees it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._count = 0

    def enter(self, connection: sa.Connection) -> int:
        """Begin to write in a transaction; returns its number. Raises FencedError where another tracker leads."""
        self._count += 1
        ours = sa.update(leadership).where(leadership.c.epoch == self.number)
        if connection.execute(ours.values(transactions=self._count)).rowcount != 1:
            raise FencedError(
                f"another tracker leads since this one's epoch {self.number}", hint="it follows now, and relays"
            )
        return self._count

    def check(self, connection: sa.Connection) -> None:
        """For a transaction beside those of the store's thread, which are counted; raises FencedError."""
        self.committed(connection, 0)

    def committed(self, connection: sa.Connection, transaction: int) -> bool:
        """Whether the newest transaction of this epoch is that one, or a later one; raises FencedError."""
        # Locked: it waits for a transaction whose connection was lost while it ended.
        row = connection.execute(sa.select(leadership).with_for_update()).one()
        if row.epoch != self.number:
            raise FencedError(f"another tracker leads since this one's epoch {self.number}")
        return bool(row.transactions >= transaction)


def take_lead(connection: sa.Connection, tracker: str, now_ms: int) -> Epoch:
    """The next epoch, from now on led by `tracker`. Whoever calls this holds the lock that one tracker can hold."""
    values = {"epoch": leadership.c.epoch + 1, "transactions": 0, "tracker": tracker, "since_ms": now_ms}
    return Epoch(connection.execute(sa.update(leadership).values(values).returning(leadership.c.epoch)).scalar_one())
