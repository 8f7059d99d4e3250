"""What waits for the disk, and what does not."""

from kedge.rpc import messages as m
from kedge.rpc.protocol import local_protocol
from kedge.rpc.tracker.facts import CloseAgent, DevicesChanged, JobAccepted, JobWithdrawn, Send, ToAgent
from kedge.rpc.tracker.outbox import Outbox, Parcel
from kedge.rpc.types import Blob, JobSpec, Lease, RunTask

FACT = JobWithdrawn("j")
SPEC = JobSpec(Blob("0" * 64, 1), "main", RunTask())


def assign(connection: int, job: str = "a") -> ToAgent:
    return ToAgent(connection, m.AssignJob(Lease(job, 1), SPEC))


def welcome(connection: int) -> ToAgent:
    return ToAgent(connection, m.Welcome(local_protocol(), "t", 1000))


def parcel(*sends: Send, durable: bool = False) -> Parcel:
    return Parcel([FACT], list(sends), durable)


def left(outbox: Outbox) -> list[Send]:
    return [send for each in outbox.released() for send in each.sends]


def test_an_assignment_leaves_at_once_and_the_rest_when_it_is_durable():
    outbox, changed = Outbox(), DevicesChanged()
    one = parcel(assign(1), changed)
    assert outbox.put(one) == [assign(1)]
    assert left(outbox) == []
    one.durable = True
    assert left(outbox) == [changed], "and the assignment not again"


def test_parcels_leave_in_order():
    outbox = Outbox()
    first, second = parcel(welcome(1)), parcel(welcome(2), durable=True)
    outbox.put(first), outbox.put(second)
    assert left(outbox) == []
    first.durable = True
    assert left(outbox) == [welcome(1), welcome(2)]


def test_an_assignment_overtakes_nothing_that_its_agent_could_notice():
    outbox = Outbox()
    assert outbox.put(parcel(welcome(1), assign(1), assign(2))) == [assign(2)], "no job before the greeting"
    assert outbox.put(parcel(assign(1, "b"))) == []
    closing = parcel(CloseAgent(3))
    outbox.put(closing)
    assert outbox.put(parcel(assign(3))) == []


def test_an_assignment_overtakes_the_receipt_of_the_last_result():
    outbox = Outbox()
    outbox.put(parcel(ToAgent(1, m.ResultAccepted("a"))))
    assert outbox.put(parcel(ToAgent(1, m.ResultAccepted("b")), assign(1, "c"))) == [assign(1, "c")]


def test_an_assignment_does_not_overtake_the_receipt_of_its_own_jobs_last_result():
    """The agent holds that result until then, perhaps under the same lease: it would be taken for the new one's."""
    outbox = Outbox()
    assert outbox.put(parcel(ToAgent(1, m.ResultAccepted("a")), assign(1, "a"))) == []
    outbox = Outbox()
    receipt = parcel(ToAgent(1, m.ResultAccepted("a")))
    outbox.put(receipt)
    assert outbox.put(parcel(assign(2, "a"))) == [assign(2, "a")], "another agent"
    assert outbox.put(parcel(assign(1, "a"))) == []


def test_a_job_leaves_before_it_is_stored_and_is_called_off_at_once_where_it_is_refused():
    outbox, abort = Outbox(), ToAgent(1, m.AbortJob(Lease("a", 1), "it cannot be stored"))
    accepted = Parcel([JobAccepted("a", 1, SPEC, (), "", 0)], [assign(1)])
    assert outbox.put(accepted) == [assign(1)]
    busy = Outbox()
    busy.put(parcel(ToAgent(3, m.ResultAccepted("z"))))
    assert busy.put(Parcel([JobAccepted("a", 1, SPEC, (), "", 0)], [assign(1)])) == [], "it is gathered with others"
    assert busy.put(parcel(assign(2))) == [], "and leaves when it is stored, whichever device has it"
    other = ToAgent(2, m.AbortJob(Lease("b", 1), "somebody cancelled it"))
    refusal = Parcel([JobWithdrawn("a")], [abort, other])
    assert outbox.put(refusal, hasten=False) == [abort], "and what is true only once it is stored waits"
    assert outbox.put(parcel(assign(2, "c"))) == [], "the next job comes after the word that calls off the last one"
    accepted.durable = refusal.durable = True
    assert left(outbox) == [other]


def test_what_has_left_holds_up_nothing():
    outbox, greeting = Outbox(), parcel(welcome(1))
    outbox.put(greeting)
    greeting.durable = True
    assert left(outbox) == [welcome(1)]
    assert outbox.put(parcel(assign(1))) == [assign(1)]


def test_where_the_disk_takes_nothing_all_waits():
    assert Outbox().put(parcel(assign(1)), hasten=False) == []
