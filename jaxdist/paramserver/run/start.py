"""Runs training by parameter server: checks the settings, resumes, starts the processes and watches them."""

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

from jaxdist import errors
from jaxdist.checkpoint import checkpoints
from jaxdist.config import hidden_settings
from jaxdist.config.experiment import Experiment
from jaxdist.config.loading import load_experiment
from jaxdist.config.overrides import override
from jaxdist.launch.joining import same_on_all
from jaxdist.launch.supervising import local_job
from jaxdist.paramserver.processes import admission, faults, machines, open_crew, peer_addresses, ray_crew, run_folder
from jaxdist.paramserver.processes.crew import Crew, LocalCrew
from jaxdist.paramserver.protocol import succession
from jaxdist.paramserver.protocol.settings import OBSERVER, SCHEDULER, worker_name
from jaxdist.paramserver.run import observer, resume, shared_plan
from jaxdist.paramserver.wire import streams
from jaxdist.paramserver.wire.security import TOKEN, Security, new_token
from jaxdist.run import bookkeeping, components, directory, rescue
from jaxdist.run.warm_start import beginning
from jaxdist.rundir import record, writers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line decides.

    Attributes:
      experiment: path of the experiment file.
      run_dir: the run directory.
      assignments: overrides of the experiment, including settings under `ps.`.
      resume: whether to continue from the newest checkpoint in `run_dir`.
      overwrite: whether to replace the run in `run_dir`, if there is one.
      devices: number of devices of each worker.
      silent: whether to show nothing.
      command: the command line, for the run record.
      stop_requested: called often; True ends the run as preempted.
      identity: identity of the experiment, if known; computing it may read every file of the data.
    """

    experiment: str
    run_dir: pathlib.Path
    assignments: Sequence[str] = ()
    resume: bool = False
    overwrite: bool = False
    devices: int = 1
    silent: bool = False
    command: str = ""
    stop_requested: Callable[[], bool] = lambda: False
    identity: components.Identity | None = None


def train(options: Options) -> record.RunRecord:
    """Train by parameter server until the stop rule ends the run; write and return the run record.

    Raises:
      UserError: the settings are invalid, the run directory cannot be used, or the checkpoint is damaged.
      RunFailedError: a process dies repeatedly, or state was lost that the chosen durability does not protect.
    """
    with contextlib.ExitStack() as stack:
        with errors.as_user_error():
            plan = _checked_plan(options)
            experiment = plan.experiment
            identity = components.identity_of(experiment, plan.loader.beginning.fingerprint)
            weights = None if options.resume else _check_weights(plan, options)
            earlier = _take_run_dir(options, experiment, identity, stack)
            hashes = same_on_all.files_of(options.experiment)
            directory.tell_of_edits(experiment, earlier, hashes)
            folder = options.run_dir / run_folder.DIRECTORY_NAME
            checkpointer = stack.enter_context(
                contextlib.closing(directory.open_checkpoints(experiment, options.run_dir, identity))
            )
            start = _begin(plan, options, checkpointer, folder, earlier, weights)
            # Before the crew: what the spec hides, the processes find in the environment of this one.
            assignments = hidden_settings.hide(options.assignments, experiment, options.assignments)
            kept, peers, security = _place(options, plan, folder)
            stack.callback(kept.close, orderly=False)
            spec = _write_spec(options, assignments, plan, start, folder, peers, identity.data)
            attempt = observer.facts_of(
                plan,
                options.run_dir,
                start,
                earlier,
                identity=identity,
                silent=options.silent,
                command=options.command,
                num_devices=options.devices,
                source=bookkeeping.ExperimentSource(
                    str(pathlib.Path(options.experiment).absolute()),
                    tuple(hidden_settings.without(options.assignments, experiment)),
                    hashes,
                ),
            )
            watcher = observer.Observer(plan, start, checkpointer, attempt)
            door = admission.Admission(spec, folder, security, first_worker=plan.settings.workers)
            seconds = open_crew.LOST_AFTER * plan.settings.timers.dead_after
            crew = open_crew.OpenCrew(kept, door, lost_after_seconds=seconds)
        if spec.door[1] and not options.silent:
            machines.say_without_address(plan.experiment.ps.hosts)
            errors.say(f"Other machines join this run with its token: jaxdist join {spec.door[1]}")
        known = peer_addresses.Addresses(peers, folder)
        return _watch(watcher, crew, known, security.for_attempt(spec.attempt), options.stop_requested)


def _checked_plan(options: Options) -> shared_plan.Plan:
    """Return the plan of the run, after the checks that need no run directory."""
    experiment = override(load_experiment(options.experiment), options.assignments)
    writers.check(experiment.writers)
    if experiment.ps.hosts:
        hidden_settings.refuse(options.assignments, experiment, "A directory that several machines share")
    known = options.identity.data if options.identity else None
    plan = shared_plan.make_plan(experiment, experiment.ps, fingerprint=known)
    shared_plan.check_microbatches(plan, options.devices)
    shared_plan.check_early(plan)
    machines.security_of(experiment.ps.hosts)
    _peers_on_hosts(plan)
    if experiment.ps.engine == "ray":
        ray_crew.connect()
    return plan


def _check_weights(plan: shared_plan.Plan, options: Options) -> beginning.WarmStart | None:
    beginning.check_not_removed(plan.experiment, options.run_dir, overwrite=options.overwrite)
    return beginning.check(plan.experiment, shared_plan.initial_shapes(plan))


def _take_run_dir(
    options: Options, experiment: Experiment, identity: components.Identity, stack: contextlib.ExitStack
) -> record.RunRecord | None:
    """Lock and prepare the run directory; return the record of the run that is resumed, with what a killed one left."""
    prepare = functools.partial(
        directory.prepare_run_dir,
        experiment,
        identity,
        options.run_dir,
        resume=options.resume,
        overwrite=options.overwrite,
    )
    earlier = directory.take_run_dir(options.run_dir, prepare, stack, purpose=options.command)
    directory.tell_of_times(experiment, earlier)
    if options.overwrite:
        directory.set_run_aside(options.run_dir, of_job=False)
    if earlier is None:
        resume.clear(options.run_dir / run_folder.DIRECTORY_NAME)
    if options.resume:
        left = rescue.Rescue.of(options.run_dir, identity, directory.what_stays(experiment))
        earlier = rescue.save_left(left) or earlier
    return earlier


def _begin(
    plan: shared_plan.Plan,
    options: Options,
    checkpointer: checkpoints.Checkpointer,
    folder: pathlib.Path,
    earlier: record.RunRecord | None,
    weights: beginning.WarmStart | None,
) -> resume.Start:
    """Return where the run starts: at what is saved, else with the weights of `init_from`, else anew."""
    trained_with = earlier.config.get("global_batch_size") if earlier else None
    with directory.naming_what_changed(plan.experiment, earlier):
        start = resume.begin(plan, checkpointer, folder, trained_with=trained_with)
    if start.state is not None:
        return start
    directory.check_nothing_is_lost(earlier, options.run_dir, checkpointer)
    return _begin_with(plan, weights or _check_weights(plan, options), folder, earlier) or start


def _begin_with(
    plan: shared_plan.Plan,
    weights: beginning.WarmStart | None,
    folder: pathlib.Path,
    earlier: record.RunRecord | None,
) -> resume.Start | None:
    """Return the start of a run with the weights of `init_from`; None without."""
    if weights is None:
        return None
    if earlier is not None:
        beginning.check_same(weights, earlier.extra.get("init_from"))
    found = beginning.open_for(plan.experiment, shared_plan.initial_shapes(plan))
    assert found is not None
    leaves = beginning.replace_leaves(found, shared_plan.initial_leaves(plan))
    return dataclasses.replace(resume.begin_with(plan, leaves, folder), began_with=weights)


def _place(options: Options, plan: shared_plan.Plan, directory: pathlib.Path) -> tuple[Crew, dict[str, str], Security]:
    """Return the crew that keeps the processes running, their addresses, and how they authenticate to each other."""
    chosen, names = plan.experiment.ps, process_names(plan)
    security = machines.security_of(chosen.hosts, is_told=not options.silent)
    if chosen.engine == "ray":
        # Actors have the environment variables of the cluster, not those of this process.
        environment = {name: os.environ[name] for name in (faults.FAULTS,) if name in os.environ}
        environment |= hidden_settings.for_other_machines()
        cluster = ray_crew.RayCrew(names, directory, {TOKEN: security.token, **environment}, devices=options.devices)
        return cluster, {**cluster.peers, OBSERVER: cluster.own_address()}, security
    if chosen.hosts:
        peers = _peers_on_hosts(plan)
        return LocalCrew(machines.names_at(peers, chosen.hosts[0]), directory, security.token), peers, security
    return LocalCrew(names, directory, security.token), _local_ports([OBSERVER, *names]), security


def _peers_on_hosts(plan: shared_plan.Plan) -> dict[str, str]:
    """Return the addresses of the processes on `ps.hosts`, {} without; ValueError if ours cannot be had."""
    chosen, names = plan.experiment.ps, process_names(plan)
    if not chosen.hosts:
        return {}
    machines.check(chosen.hosts, names)
    peers = machines.assign(names, chosen.hosts, chosen.port)
    peers[OBSERVER] = f"{chosen.hosts[0]}:{chosen.port + len(names)}"
    here = machines.names_at(peers, chosen.hosts[0])
    machines.check_ports([*(peers[name] for name in (*here, OBSERVER)), _door(plan)])
    return peers


def _local_ports(names: Sequence[str]) -> dict[str, str]:
    return {
        name: f"{local_job.LOOPBACK}:{port}"
        for name, port in zip(names, local_job.quiet_ports(len(names)), strict=True)
    }


def _write_spec(
    options: Options,
    assignments: Sequence[str],
    plan: shared_plan.Plan,
    start: resume.Start,
    directory: pathlib.Path,
    peers: dict[str, str],
    fingerprint: str,
) -> run_folder.Spec:
    """Remove the files of an earlier attempt; write and return the Spec of this one."""
    run_folder.remove_earlier(directory)
    spec = run_folder.Spec(
        attempt=new_token(),
        experiment=str(pathlib.Path(options.experiment).absolute()),
        assignments=list(assignments),
        settings=dataclasses.asdict(plan.settings),
        peers=peers,
        directory=str(directory.absolute()),
        resume=start.saved_cut,
        devices=options.devices,
        kind=plan.kind,
        data=fingerprint,
        door=(f"jaxdist-{new_token()}", _door(plan)),
        ledger=plan.experiment.recovery.ledger,
        threads=shared_plan.num_threads(plan),
        clock=run_folder.clock_of_machine(),
    )
    spec.write(directory / run_folder.SPEC_NAME)
    return spec


def _door(plan: shared_plan.Plan) -> str:
    """Return the address at which commands of other machines may join; "" if all processes are on this machine."""
    chosen = plan.experiment.ps
    return f"{chosen.hosts[0]}:{chosen.port + len(process_names(plan)) + 1}" if chosen.hosts else ""


def process_names(plan: shared_plan.Plan) -> list[str]:
    """Return the names of all processes of a run, except the observer."""
    workers = [worker_name(number) for number in range(plan.settings.workers)]
    return [SCHEDULER, *succession.server_names(plan.settings), *workers]


def _watch(
    watcher: observer.Observer,
    crew: Crew,
    peers: Mapping[str, str],
    security: Security,
    stop_requested: Callable[[], bool],
) -> record.RunRecord:
    line = streams.Wire(listen=peers[OBSERVER], peers=peers, receive=watcher.world.receive, security=security)
    try:
        return watcher.run(crew, line, stop_requested)
    finally:
        crew.close(orderly=False)
        line.close()
