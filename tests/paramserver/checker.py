"""Checks a simulated run by its events alone, without code of the parameter server, whose mistakes it must not share.

Every update names the fingerprint of the history before and after it, so the history of a shard is the path from its
final fingerprint back to 0. Updates that no surviving copy has are not on this path.
"""

from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np


class Broken(AssertionError):
    """An invariant does not hold; the message begins with its name."""


def require(condition, rule, text):
    if not condition:
        raise Broken(f"{rule}: {text}")


def named(events, kind):
    return [event for event in events if type(event.what).__name__ == kind]


class Run:
    """A run's events, put in the order the rules below want."""

    def __init__(self, simulation):
        self.settings = simulation.settings
        self.events = simulation.events
        self.processes = simulation.processes
        self.initial = simulation.params
        self.gradient = simulation.gradient
        self.troubled_until = simulation.faults.until
        self.clip, self.num_params = simulation.clip, simulation.num_params
        self.rounded, self.computes_wrongly = simulation.rounded, simulation.computes_wrongly
        s = self.settings
        self.sync = s.mode == "sync" or (s.mode == "bounded" and s.max_staleness == 0)
        self.memberships = [event.what.membership for event in named(self.events, "MembershipRecord")]
        # When the run returned to a cut for the last time, in which term, and how many incarnations there were then.
        back = [event for event in named(self.events, "MembershipRecord") if event.what.trained is not None]
        self.restore_term, self.incarnations_before = back[-1].what.membership.term, back[-1].what.incarnations
        self.failed = any(event.what.reason == "error" for event in named(self.events, "Exit"))
        if self.failed:
            return  # only the rules of EVEN_IN_FAILURE apply
        cuts = [event.what for event in named(self.events, "CutRead")]
        require(bool(cuts), "result", "no one read the params at the end")
        self.halt_at, self.target_step = simulation.halt_at, simulation.target_step
        self.end, last = named(self.events, "StopRecord")[-1].what, cuts[-1].offer
        require(last.step == self.end.step, "result", f"the params read last are of step {last.step}, not {self.end}")
        self.trained = {*range(last.trained.step), *last.trained.beyond}
        self.final, self.final_opt, self.final_chains = cuts[-1].params, cuts[-1].opt_state, cuts[-1].chains
        self.paths = [self._path(shard) for shard in range(s.servers)]

    def _path(self, shard):
        parents = {}
        for event in named(self.events, "Applied"):
            if event.what.shard == shard:
                parents[event.what.after] = event.what
        path, chain = [], self.final_chains[shard]
        while chain:
            require(chain in parents, "history", f"shard {shard} holds an update that was not recorded")
            path.append(parents[chain])
            chain = parents[chain].before
        path.reverse()
        return path


def identity(contributor):
    return contributor.worker, contributor.incarnation, contributor.sequence


def applied_once(run):
    for shard, path in enumerate(run.paths):
        counts = Counter(identity(c) for update in path for c in update.contributors)
        twice = [who for who, n in counts.items() if n > 1]
        require(
            not twice, "exactly once", f"shard {shard} applied (worker, incarnation, sequence) {twice} more than once"
        )
        versions = [update.version for update in path]
        require(versions == list(range(1, len(path) + 1)), "versions", f"shard {shard} went through {versions}")


def batch_range(settings, step):
    steps = (settings.num_examples + settings.global_batch_size - 1) // settings.global_batch_size
    start = (step % steps) * settings.global_batch_size
    return step // steps, start, min(start + settings.global_batch_size, settings.num_examples)


def same_contributors(run):
    if not run.sync:
        return
    for step, updates in enumerate(zip(*run.paths, strict=False), 1):
        first = [identity(c) for c in updates[0].contributors]
        for shard, update in enumerate(updates):
            got = [identity(c) for c in update.contributors]
            require(got == first, "same contributors", f"step {step}: shard 0 has {first}, shard {shard} has {got}")


def examples_once(run):
    (examples_once_sync if run.sync else examples_once_async)(run)


def examples_once_sync(run):
    for shard, path in enumerate(run.paths):
        require(len(path) == run.end.step, "complete", f"shard {shard} made {len(path)} steps")
        for step, update in enumerate(path):
            epoch, start, stop = batch_range(run.settings, step)
            at = start
            for lease in sorted((c.lease for c in update.contributors), key=lambda lease: lease.start):
                require(lease.epoch == epoch, "examples", f"step {step} took examples of epoch {lease.epoch}")
                require(lease.start == at, "examples", f"step {step}: range starts at {lease.start}, expected {at}")
                at = lease.stop
            require(at == stop, "examples", f"step {step} covers examples up to {at} of {stop}")


def examples_once_async(run):
    on_shards = defaultdict(set)
    for shard, path in enumerate(run.paths):
        for update in path:
            (c,) = update.contributors
            wanted = batch_range(run.settings, c.lease.step)
            require((c.lease.epoch, c.lease.start, c.lease.stop) == wanted, "examples", f"{c.lease} is {wanted}")
            on_shards[c.lease.step, identity(c)].add(shard)
    whole = Counter(step for (step, _), shards in on_shards.items() if len(shards) == run.settings.servers)
    expected = dict.fromkeys(run.trained, 1)
    require(dict(whole) == expected, "examples", f"pushes on all shards, by batch: {dict(sorted(whole.items()))}")


def fenced_stay_out(run):
    members = {
        membership.term: {(m.worker, m.incarnation) for m in membership.members} for membership in run.memberships
    }
    if run.sync:
        return  # there the commit decides, and a push staged by a worker that has died may still be chosen
    for shard, path in enumerate(run.paths):
        for update in path:
            for c in update.contributors:
                inside = (c.worker, c.incarnation) in members[update.term]
                require(inside, "fencing", f"shard {shard} applied a push of {identity(c)}, no member of {update.term}")


def bounded_reads(run):
    if run.settings.mode != "bounded" or run.sync:
        return
    bound = run.settings.max_staleness
    for shard, path in enumerate(run.paths):
        for made, update in enumerate(path):
            who = f"worker {update.contributors[0].worker} at clock {update.clock}"
            for missed in path[made - update.staleness : made]:
                text = f"{who} updated shard {shard} without having read the update at clock {missed.clock}"
                require(missed.clock >= update.clock - bound, "bounded reads", f"{text}, though the bound is {bound}")
    for event in named(run.events, "Served"):
        read = event.what
        path = run.paths[read.shard]
        chains = [0, *(update.after for update in path)]
        if read.chain not in chains:
            continue  # served from a history that was rolled back with whatever was computed from it
        for update in path[chains.index(read.chain) :]:
            require(
                update.clock >= read.clock - bound,
                "bounded reads",
                f"worker {read.worker} read shard {read.shard} at clock {read.clock} without the update of worker "
                f"{update.contributors[0].worker} at clock {update.clock}, though the bound is {bound}",
            )


def reads_have_a_future(run):
    """Whatever was served since the last roll-back is part of the history that survives."""
    for event in named(run.events, "Served"):
        read = event.what
        if read.term < run.restore_term:
            continue
        chains = [0, *(update.after for update in run.paths[read.shard])]
        require(read.chain in chains, "reads", f"shard {read.shard} served a history that did not survive")


def one_primary(run):
    leaders = defaultdict(set)
    for event in named(run.events, "Leads"):
        leaders[event.what.shard, event.what.term].add((event.process, event.boot))
    for (shard, term), names in leaders.items():
        require(len(names) == 1, "one primary", f"shard {shard} has primaries {names} in term {term}")


def acknowledged_survive(run):
    if run.sync:
        return  # there `examples_once` demands every step there is
    held = [{identity(c) for update in path for c in update.contributors} for path in run.paths]
    for event in named(run.events, "PushAck"):
        ack = event.what
        if ack.status in ("applied", "duplicate") and ack.incarnation > run.incarnations_before:
            who = identity(ack)
            require(who in held[ack.shard], "acknowledged", f"shard {ack.shard} acknowledged {who} and lost it")


def stop_together(run):
    exits = {event.process: event.what for event in named(run.events, "Exit")}
    ended = {event.process for event in named(run.events, "Ended")}
    require(set(exits) | ended == set(run.processes), "stop", f"only {sorted(exits)} ended")
    ends = {(end.step, end.reason) for end in exits.values() if end.reason != "left"}
    require(len(ends) == 1, "stop", f"the processes ended with {ends}")
    decided = {(e.what.step, e.what.reason) for e in named(run.events, "StopRecord")}
    require(len(decided) == 1, "stop", f"the end was decided as {decided}")
    require(run.failed or ends == decided, "stop", f"the processes ended with {ends}, decided was {decided}")


def ends_are_due(run):
    """A run ends at its last step, or earlier for a reason that it has; and soon if it is told to."""
    step, reason = run.end.step, run.end.reason
    due = {
        "max_steps": step == run.settings.max_steps,
        "preempted": end_of(run) >= run.halt_at,
        "target_reached": step >= run.target_step,
        "nonfinite": run.settings.stop_on_nonfinite,  # and see replay_sync
    }
    require(due[reason], "end", f"the run ended at step {step} with {reason}")
    late = end_of(run) - max(run.halt_at, run.troubled_until)
    require(late < LONGEST_LEAVE, "end", f"the run was told to end {late:.1f} s before it did")


def incarnations_are_new(run):
    given = {}
    for membership in run.memberships:
        for member in membership.members:
            owner = given.setdefault(member.incarnation, member.worker)
            require(owner == member.worker, "incarnations", f"{member.incarnation} was given out twice")
    terms = [membership.term for membership in run.memberships]
    require(terms == sorted(set(terms)), "terms", f"they do not grow: {terms}")


def snapshots_are_whole(run):
    """A manifest becomes durable after the files it names; these are one cut and hold their exactly-once tables."""
    files = {}
    for event in run.events:
        if not isinstance(event.what, tuple):
            continue
        _, name, content = event.what
        files[name] = content
        if type(content).__name__ != "SavedCut":
            continue
        missing = [shard.name for shard in content.shards if shard.name not in files]
        require(not missing, "snapshots", f"{name} is durable before {missing}")
        states = [files[shard.name] for shard in content.shards]
        if run.sync:
            versions = {state.version for state in states}
            require(versions == {content.step}, "snapshots", f"{name} of step {content.step} has versions {versions}")
        for state in states:
            require(bool(state.seen) or not state.version, "snapshots", f"{name} lacks its exactly-once table")


def cuts_are_whole(run):
    """What the observer reads are all updates of the steps that its offer names, on each shard, and no others."""
    made = {(e.what.shard, e.what.after): e.what for e in named(run.events, "Applied")}
    heard = defaultdict(set)
    for event in run.events:
        kind, what = type(event.what).__name__, event.what
        if kind == "ReadAnswer":
            heard[what.term, what.number, what.shard].add(what.chain)
        if kind != "CutRead":
            continue
        offer = what.offer
        expected = {*range(offer.trained.step), *offer.trained.beyond}
        for shard, chain in enumerate(what.chains):
            parts = heard[offer.term, offer.number, shard]
            require(parts == {chain}, "cuts", f"two parts of shard {shard} are of other steps: {offer.number}")
            steps = set()
            while chain:
                steps |= {c.lease.step for c in made[shard, chain].contributors}
                chain = made[shard, chain].before
            steps = steps if run.sync else steps & expected  # a push that is torn is on some of the shards
            require(steps == expected, "cuts", f"shard {shard} was read with the steps {steps}, not {expected}")


def step_by_hand(run, params, velocity, grads, norm_squared):
    if run.clip:
        factor = np.float32(min(1.0, run.clip / (norm_squared**0.5 + 1e-12)))
        grads = [factor * g for g in grads]
    velocity = [np.float32(0.9) * v + g for v, g in zip(velocity, grads)]
    moved = [p - np.float32(0.1) * v for p, v in zip(params, velocity)]
    return moved[: run.num_params] + list(grads[run.num_params :]), velocity


def mean_by_hand(run, total, block, counted, num_examples):
    """Params have the mean over what the loss counted, model state the mean over all examples."""
    return total / np.float32(counted if block < run.num_params else num_examples)


def same_bits(run):
    """The params and optimizer state that are read last have the bits that one process computes from the history."""
    replay = replay_sync(run) if run.sync else replay_async(run)
    # The squares of a global norm may be added in another order.
    equal = (lambda a, b: np.allclose(a, b, rtol=1e-5, atol=1e-6)) if run.clip else np.array_equal
    for shard, (params, velocity) in enumerate(replay or ()):
        for found, due in ((run.final, params), (run.final_opt, velocity)):
            for block, (got, want) in enumerate(zip(found[shard], due, strict=True)):
                require(equal(got, want), "same bits", f"shard {shard}, block {block}: {got} is not {want}")


def replay_sync(run):
    """Train on whole batches, slice by slice in ascending order, without any faults.

    Which worker computed a slice matters only if workers round differently.
    """
    s = run.settings
    slices = s.workers - s.backup_workers
    params = [list(shard) for shard in run.initial]
    velocity = [[np.zeros_like(p) for p in shard] for shard in params]
    for step in range(run.end.step):
        epoch, start, stop = batch_range(s, step)
        cuts = [start + (stop - start) * i // slices for i in range(slices + 1)]
        workers = [c.worker for c in sorted(run.paths[0][step].contributors, key=lambda c: c.lease.slice)]
        require(len(workers) == slices, "examples", f"step {step + 1} has {len(workers)} pushes for {slices} slices")
        leases = [Examples(epoch, a, b) for a, b in pairwise(cuts)]
        pushes = [run.rounded(run.gradient(lease, params), w) for lease, w in zip(leases, workers, strict=True)]
        counted = sum(push.count for push in pushes)
        if counted and not all(push.finite for push in pushes):
            due = not s.stop_on_nonfinite or (step + 1, "nonfinite") == (run.end.step, run.end.reason)
            require(due, "end", f"step {step + 1} is not finite, and the run ended with {run.end}")
            continue
        if not counted:
            continue
        grads = []
        for shard in range(s.servers):
            sums = list(pushes[0].pieces[shard])
            for push in pushes[1:]:
                sums = [a + b for a, b in zip(sums, push.pieces[shard])]
            examples = sum(push.num_examples for push in pushes)
            grads.append([mean_by_hand(run, total, block, counted, examples) for block, total in enumerate(sums)])
        squares = sum(float((g.astype(np.float64) ** 2).sum()) for shard in grads for g in shard[: run.num_params])
        for shard in range(s.servers):
            params[shard], velocity[shard] = step_by_hand(run, params[shard], velocity[shard], grads[shard], squares)
    return list(zip(params, velocity))


class Examples:
    def __init__(self, epoch, start, stop):
        self.epoch, self.start, self.stop = epoch, start, stop


def replay_async(run):
    """Compute every push again from the versions it pulled; None when a torn push hides one of those."""
    pulled = defaultdict(dict)
    for shard, path in enumerate(run.paths):
        for update in path:
            pulled[identity(update.contributors[0])][shard] = update.version - 1 - update.staleness
    if any(len(versions) < run.settings.servers for versions in pulled.values()):
        return None
    states = [[(list(params), [np.zeros_like(p) for p in params])] for params in run.initial]
    left = [list(path) for path in run.paths]
    gradients = {}
    while any(left):
        moved = False
        for shard, updates in enumerate(left):
            while updates:
                (c,) = updates[0].contributors
                versions = pulled[identity(c)]
                if identity(c) not in gradients:
                    if any(len(states[n]) <= versions[n] for n in versions):
                        break
                    params = [states[n][versions[n]][0] for n in range(len(states))]
                    gradients[identity(c)] = run.rounded(run.gradient(c.lease, params), c.worker)
                push = gradients[identity(c)]
                after = states[shard][-1]
                if push.finite and push.count:
                    totals = enumerate(push.pieces[shard])
                    grads = [mean_by_hand(run, total, n, push.count, push.num_examples) for n, total in totals]
                    after = step_by_hand(run, *after, grads, push.norm_squared)
                states[shard].append(after)
                updates.pop(0)
                moved = True
        require(moved, "causality", "pushes depend on each other in a circle")
    return [history[-1] for history in states]


def failures_are_due(run):
    """A run ends with an error only where a shard is lost for good or copies differ, and it says so."""
    if not run.failed:
        return
    why = [event.what.text for event in named(run.events, "Fail")]
    differ = run.computes_wrongly and any("computed wrongly" in text for text in why)
    require(bool(named(run.events, "Vanished")) or differ, "failure", f"no process vanished, and the run ended: {why}")
    require(differ or any("there is no saved cut" in text for text in why), "failure", f"the reason is not told: {why}")


def copies_agree(run):
    """Two copies of a shard with the same history have the same bits, or the run ends and says that they differ."""
    if run.failed:
        return
    bits = {}
    for event in named(run.events, "State"):
        state = event.what
        seen = bits.setdefault((state.shard, state.chain), state.checksum)
        require(seen == state.checksum, "copies", f"copies of shard {state.shard} differ, and no one noticed")


def no_resend_storm(run):
    """A large message is not sent again on a connection on which it still travels."""
    travelling = set()
    for event in run.events:
        kind = type(event.what).__name__
        if kind == "Sent":
            key = event.what.connection, event.what.identity
            require(key not in travelling, "resend storm", f"{event.what.num_bytes} bytes are sent twice: {key[0]}")
            travelling.add(key)
        elif kind == "Arrived":
            travelling.discard((event.what.connection, event.what.identity))


def only_the_silent_are_dropped(run):
    """A start that is dropped as silent has said nothing for long: no heartbeat, not even one that waits, no request.

    What the starts before and after it say is no sign that it is there.
    """
    said, boots = {}, {}
    for event in run.events:
        kind = type(event.what).__name__
        if kind == "MembershipRecord":
            boots = {row.name: row.boot for row in event.what.boots}
        elif kind in ("Waits", "Register") and event.process == "scheduler":
            message = event.what.message if kind == "Waits" else event.what
            said[message.name, message.boot] = event.time
        elif kind == "Warn" and event.what.text.startswith("Worker") and "is silent" in event.what.text:
            name = "worker/" + event.what.text.split()[1]
            since = event.time - said.get((name, boots[name]), -1e9)
            least = run.settings.timers.dead_after / 2
            require(since >= least, "needless eviction", f"{name} was dropped {since:.2f} s after it was heard")


def the_log_stays_short(run):
    """The log is replaced by one record before it is long, cuts or not."""
    length = longest = 0
    for event in run.events:
        kind = type(event.what).__name__
        if kind in ("CommitRecord", "CompleteRecord"):
            length += 1
            longest = max(longest, length)
        elif kind == "StateRecord":
            length = 0
    require(longest <= MOST_LOGGED_STEPS, "log", f"{longest} steps follow each other in the log")


MOST_LOGGED_STEPS = 130


def saved_cuts_survive(run):
    """A roll-back goes to the newest cut that was acknowledged."""
    newest = None
    for event in run.events:
        kind = type(event.what).__name__
        if kind == "SavedCutRecord":
            newest = event.what.name
        elif kind == "MembershipRecord" and event.what.trained is not None and event.what.membership.term > 1:
            got = event.what.membership.restore
            require(got == (newest or ""), "saved cuts", f"a roll-back went to {got!r}, though {newest!r} was saved")


def end_of(run):
    """When the scheduler decided the end."""
    return named(run.events, "StopRecord")[0].time


def leave_when_asked(run):
    """A worker that was asked to leave has ended soon, or when faults allow it; one that left takes part no more."""
    ended = {e.process: e.time for e in run.events if type(e.what).__name__ in ("Exit", "Ended")}
    for event in named(run.events, "AskedToLeave"):
        since = max(event.time, run.troubled_until)
        late = min(ended[event.process], end_of(run)) - since
        require(late < LONGEST_LEAVE, "leaving", f"{event.process} was asked to leave and stayed for {late:.1f} s")


def the_silent_are_restarted(run):
    """Who is silent for good is started again while the run continues."""
    for event in named(run.events, "Vanished"):
        left = end_of(run) - max(event.time, run.troubled_until)
        again = any(
            register.what.name == event.process and register.what.boot > event.boot
            for register in named(run.events, "Register")
        )
        ended = any(e.process == event.process and e.time < end_of(run) for e in named(run.events, "Ended"))
        require(again or ended or left < LONGEST_SILENCE, "silence", f"{event.process} was silent for {left:.1f} s")


LONGEST_LEAVE, LONGEST_SILENCE = 10.0, 10.0
"""Seconds without faults: many times what the slowest machines and the timers of a run make of it."""


def who_left(run):
    """Return the (worker, incarnation) of workers that the scheduler took out because they asked.

    A start that is asked to leave before it has joined takes out the one before it, which was killed.
    """
    found, members, boots, leave = set(), {}, {}, None
    for event in run.events:
        kind = type(event.what).__name__
        if kind == "Leave" and event.process == "scheduler":
            leave = event
        elif kind == "MembershipRecord":
            before, members = members, {m.worker: m.incarnation for m in event.what.membership.members}
            if leave and leave.time == event.time and leave.what.boot == boots.get(leave.what.name):
                worker = int(leave.what.name.split("/")[1])
                if worker in before and worker not in members:
                    found.add((worker, before[worker]))
            boots = {row.name: row.boot for row in event.what.boots}
    return found


def leaving_tears_nothing(run):
    """What a worker pushed before it left is on all shards or on none: it finished its lease."""
    if run.sync or run.restore_term > 1:
        return  # a roll-back may return to a cut between the two
    fenced = {(e.process, e.what.incarnation) for e in named(run.events, "PushAck") if e.what.status == "fenced"}
    left = {who for who in who_left(run) if (f"worker/{who[0]}", who[1]) not in fenced}
    on_shards = Counter()
    for path in run.paths:
        on_shards.update(identity(c) for update in path for c in update.contributors)
    for who, count in on_shards.items():
        whole = who[:2] not in left or count == run.settings.servers
        require(whole, "leaving", f"{who} left after its push was on {count} of {run.settings.servers} shards")


EVEN_IN_FAILURE = (
    failures_are_due,
    stop_together,
    one_primary,
    incarnations_are_new,
    snapshots_are_whole,
    cuts_are_whole,
    no_resend_storm,
    only_the_silent_are_dropped,
    the_log_stays_short,
    saved_cuts_survive,
    leave_when_asked,
    the_silent_are_restarted,
)
RULES = (
    *EVEN_IN_FAILURE,
    ends_are_due,
    copies_agree,
    applied_once,
    same_contributors,
    examples_once,
    fenced_stay_out,
    bounded_reads,
    reads_have_a_future,
    acknowledged_survive,
    leaving_tears_nothing,
    same_bits,
)


def check(simulation):
    """Raise Broken if the run broke a rule."""
    run = Run(simulation)
    for rule in EVEN_IN_FAILURE if run.failed else RULES:
        rule(run)
