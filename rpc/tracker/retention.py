"""Which jobs are forgotten, with their results and idempotency keys: the oldest, by age, by number and by size."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from kedge.rpc.tracker.schema import jobs, keys, outputs, results

#: So many are forgotten in one transaction: commits of new facts wait no longer than that takes.
PIECE = 100
_MS_PER_DAY = 86_400_000


@dataclass(frozen=True, slots=True)
class Retention:
    """The newest `jobs` of those that are done are kept, none longer than `days`, and all for `least_s`.

    Where their specs and results take more than `bytes` together the oldest go, too. `least_s` keeps whoever waits for
    a result from finding its job gone. It is looked for what may go `every_s` seconds.
    """

    jobs: int = 100_000
    days: float = 30.0
    bytes: int = 32 << 30
    least_s: float = 600.0
    every_s: float = 60.0


def forget_some(connection: sa.Connection, keep: Retention, now_ms: int) -> tuple[list[str], list[str]]:
    """Delete up to `PIECE` of the jobs that need not be kept; returns them, and their idempotency keys."""
    total = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(results.c.bytes), 0)).select_from(results)
    stored, size = connection.execute(total).one()
    too_many, too_much = stored - keep.jobs, int(size) - keep.bytes
    too_old = now_ms - round(keep.days * _MS_PER_DAY)
    oldest = sa.select(results.c.job_id, results.c.finished_ms, results.c.bytes)
    oldest = oldest.where(results.c.finished_ms < now_ms - round(keep.least_s * 1000))
    gone: list[str] = []
    for row in connection.execute(oldest.order_by(results.c.finished_ms, results.c.job_id).limit(PIECE)):
        if row.finished_ms >= too_old and too_many <= 0 and too_much <= 0:
            break
        gone.append(row.job_id)
        too_many, too_much = too_many - 1, too_much - row.bytes
    if not gone:
        return [], []
    their_keys = list(connection.execute(sa.select(keys.c.key).where(keys.c.job_id.in_(gone))).scalars())
    delete_jobs(connection, gone)
    return gone, their_keys


def gone_of(connection: sa.Connection, job_ids: list[str], their_keys: list[str]) -> tuple[list[str], list[str]]:
    """Those of these jobs, and of their idempotency keys, that are not stored."""
    if not job_ids:
        return [], []
    left = set(connection.execute(sa.select(jobs.c.id).where(jobs.c.id.in_(job_ids))).scalars())
    kept = set(connection.execute(sa.select(keys.c.key).where(keys.c.key.in_(their_keys))).scalars())
    return [job for job in job_ids if job not in left], [key for key in their_keys if key not in kept]


def delete_jobs(connection: sa.Connection, job_ids: list[str]) -> None:
    """Delete jobs with all that is stored of them."""
    for column in (outputs.c.job_id, results.c.job_id, keys.c.job_id, jobs.c.id):
        connection.execute(sa.delete(column.table).where(column.in_(job_ids)))
