"""The command line: which experiment, on what, where to. It selects and overrides; the rest is in the experiment.

JAX and all that stands on it are imported by the commands that need them, so that `--help` answers at once.
"""

import argparse
import contextlib
import json
import os
import pathlib
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxdist.config.experiments import Experiment
    from jaxdist.launch.engines.request import Request
    from jaxdist.launch.signals import StopRequest
    from jaxdist.rundir.record import RunRecord

EXIT_OK, EXIT_FAILED, EXIT_USER = 0, 1, 2
PARAMETER_SERVER = "parameter-server"


def main(experiment: str | None = None) -> None:
    """Run the command line and exit; with `experiment`, that file's own `train` command."""
    arguments = sys.argv[1:] if experiment is None else ["train", experiment, *sys.argv[1:]]
    status = run(arguments)
    runtime = sys.modules.get("jaxdist.launch.joining.runtime")
    (runtime.leave if runtime else sys.exit)(status)


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status: 0 done, 1 failed, 2 the user's mistake, 75 try again."""
    options = make_parser().parse_args(arguments)
    options.arguments = arguments
    options.command = shlex.join(["jaxdist", *arguments])
    # Deferred with the rest of the package: see the module's docstring.
    from jaxdist.errors import RunFailedError, UserError

    try:
        return options.handler(options)
    except (UserError, RunFailedError) as error:
        print(f"jaxdist: {error}", file=sys.stderr)
        return error.exit_status


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(prog="jaxdist", description="Train Flax models on many devices.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = _add(commands, "train", train_command, "train an experiment until its stop rule ends it")
    _add_experiment(train)
    train.add_argument("--processes", type=_positive, metavar="P", help="processes on this machine (default 1)")
    train.add_argument("--run-dir", type=pathlib.Path, metavar="DIR", help="default runs/NAME-TIME")
    train.add_argument("--resume", action="store_true", help="go on with the run in --run-dir (default: the newest)")
    train.add_argument("--restartable", action="store_true", help="go on with the run in --run-dir if there is one")
    train.add_argument("--json", action="store_true", help="show nothing, print the run record as one JSON object")
    _add_launch(
        _add(commands, "launch", launch_command, "start an experiment's processes: here, on hosts, by an engine")
    )
    verify = _add(commands, "verify", verify_command, "compare a few steps on 1, 2, 4, 8 devices with one device")
    _add_experiment(verify)
    verify.add_argument("--steps", type=_positive, default=5, metavar="K", help="steps on each layout (default 5)")
    verify.add_argument("--json", action="store_true", help="print the table as one JSON object")
    _add_data(_add(commands, "data", lambda options: EXIT_USER, "make a data set ready; look at one and time it"))
    chaos = _add(commands, "chaos", chaos_command, "kill an experiment's processes at random; prove bits and ledger")
    _add_experiment(chaos)
    chaos.add_argument("--processes", type=_positive, default=2, metavar="P", help="processes (default 2)")
    chaos.add_argument("--kills", type=int, default=5, metavar="N", help="processes to kill (default 5)")
    chaos.add_argument("--stops", type=int, default=1, metavar="N", help="processes to stop (default 1)")
    chaos.add_argument("--starves", type=int, default=1, metavar="N", help="processes to deny the disk (default 1)")
    chaos.add_argument("--seed", type=int, default=0, metavar="S", help="of the plan (default 0)")
    chaos.add_argument("--directory", type=pathlib.Path, metavar="DIR", help="for both runs; default a new one")
    chaos.add_argument("--json", action="store_true", help="print the result as one JSON object")
    doctor = _add(commands, "doctor", doctor_command, "what is installed, what is visible, what will bite")
    doctor.add_argument("--devices", type=_positive, metavar="N", help="fake CPU devices to try (default 8)")
    return parser


def _add(
    commands: Any, name: str, handler: Callable[[argparse.Namespace], int], summary: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    command.set_defaults(handler=handler)
    return command


def _add_data(command: argparse.ArgumentParser) -> None:
    commands = command.add_subparsers(required=True, metavar="COMMAND")
    prepare = _add(commands, "prepare", prepare_command, "write a source as sharded tokens or ArrayRecord files")
    prepare.add_argument(
        "source",
        metavar="SOURCE",
        help="text files (bytes become tokens), images, WAV files, a table, or tfds:NAME:SPLIT",
    )
    prepare.add_argument("out", metavar="OUT", help="a new folder, or one whose preparation was interrupted")
    prepare.add_argument("--shard-size", type=_positive, metavar="N", help="tokens or examples of a shard")
    inspect = _add(commands, "inspect", inspect_command, "shapes, examples, throughput, and where the time goes")
    _add_experiment(inspect)


def _add_launch(command: argparse.ArgumentParser) -> None:
    _add_experiment(command)
    command.set_defaults(resume=False)
    command.add_argument("--run-dir", type=pathlib.Path, metavar="DIR", help="on a file system that all hosts share")
    command.add_argument("--processes", type=_positive, default=1, metavar="P", help="on each host (default 1)")
    command.add_argument("--hosts", type=_positive, default=1, metavar="N", help="how many (default 1)")
    command.add_argument("--host-index", type=int, metavar="I", help="without an engine: which host this is, from 0")
    command.add_argument("--coordinator", metavar="HOST:PORT", help="without an engine: a free port of host 0")
    command.add_argument("--engine", choices=("slurm", "kubernetes", "ray"), help="starts the processes")
    command.add_argument("--dry-run", action="store_true", help="print what would be started, and start nothing")
    command.add_argument(
        "--with",
        dest="engine_settings",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="tell the engine: partition=gpu time=1:00:00, image=... claim=..., address=...",
    )


def _add_experiment(command: argparse.ArgumentParser) -> None:
    command.add_argument("experiment", metavar="EXPERIMENT", help="a Python file with get_config()")
    command.add_argument(
        "--devices", type=_positive, metavar="N", help="devices per process; fake CPU devices without accelerators"
    )
    command.add_argument("--strategy", metavar="S", help="data-parallel, zero1, fsdp, hsdp, tensor, parameter-server")
    command.add_argument("--reduction", choices=("mean", "canonical"), help="canonical: the same bits on any devices")
    command.add_argument("--max-steps", type=_positive, metavar="K", help="short for --set stop.max_steps=K")
    command.add_argument(
        "--set",
        dest="assignments",
        nargs="+",
        action="extend",
        default=[],
        metavar="A.B=VALUE",
        help="override a setting",
    )


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a positive whole number is needed; got {text!r}")
    return int(text)


def train_command(options: argparse.Namespace) -> int:
    """Train in this process, or start the processes that do."""
    from jaxdist.errors import UserError
    from jaxdist.launch import signals
    from jaxdist.launch.joining import places, runtime

    if options.strategy == PARAMETER_SERVER:
        with signals.stop_on_signal() as request:
            return _train_by_server(options, request)
    if options.processes and not runtime.in_job():
        place = places.find()
        if place is not None:
            raise UserError(f"--processes starts a job, and this process belongs to one: {place}. Leave it out.")
        return _start_processes(options)
    # From the start: a signal that comes while the processes connect is not lost either.
    with signals.stop_on_signal() as request:
        return _train_here(options, runtime.start(options.devices), request)


def _train_by_server(options: argparse.Namespace, request: "StopRequest") -> int:
    """Start the scheduler, servers and workers of a parameter server; `--devices` counts those of each worker."""
    from jaxdist import errors
    from jaxdist.paramserver.run import start as run
    from jaxdist.run import attempt as train
    from jaxdist.rundir import record

    if options.processes:
        raise errors.UserError("A parameter server has ps.workers and ps.servers; leave --processes out.")
    experiment = load(options)
    run_dir = options.run_dir or train.default_run_dir(experiment.name, resume=options.resume)
    with record_alone_on_stdout(options):
        settings = run.Options(
            experiment=options.experiment,
            run_dir=run_dir,
            assignments=overrides(options),
            resume=options.resume or (options.restartable and (run_dir / record.FILE_NAME).exists()),
            devices=options.devices or 1,
            silent=options.json,
            command=options.command,
            stop_requested=lambda: bool(request),
        )
        made = run.train(settings)
    return _report(made, run_dir, as_json=options.json)


def _start_processes(options: argparse.Namespace) -> int:
    """Start the processes of a job; the run directory is chosen here, so that all of them have the same."""
    from jaxdist.launch.supervising import fork_server

    # It imports what the processes need while this one finds out whether they are to be started at all.
    with fork_server.ForkServer(fork_server.TRAINING, experiment=options.experiment) as forks:
        from jaxdist.run import attempt as train

        experiment = load(options)
        run_dir = options.run_dir or train.default_run_dir(experiment.name, resume=options.resume)
        return train.supervise(
            experiment,
            [*options.arguments, "--run-dir", str(run_dir)],
            run_dir=run_dir,
            num_processes=options.processes,
            forks=forks,
        )


def _train_here(options: argparse.Namespace, devices: Sequence[Any], request: "StopRequest") -> int:
    from jaxdist.launch.joining import agreement, runtime
    from jaxdist.run import attempt as train
    from jaxdist.run import recovery

    with record_alone_on_stdout(options):
        experiment, run_dir, resume = _agree(options)
        if experiment.strategy == PARAMETER_SERVER:  # as the experiment says, not the command line
            return _train_by_server(options, request)
        is_over = recovery.deadline(experiment.recovery)
        made = train.train(
            experiment,
            train.RunOptions(
                run_dir=run_dir,
                resume=resume,
                silent=options.json,
                command=options.command,
                stop_requested=agreement.agreed_stop(lambda: bool(request) or is_over()),
            ),
            devices=devices,
        )
    return _report(made, run_dir, as_json=options.json and runtime.is_first())


def _agree(options: argparse.Namespace) -> tuple["Experiment", pathlib.Path, bool]:
    """Return the experiment, its run directory and whether to resume: the same on every process of the job, or else."""
    from jaxdist import errors
    from jaxdist.launch.joining import same_on_all
    from jaxdist.run import attempt as train
    from jaxdist.run import components
    from jaxdist.rundir import record

    try:
        experiment = load(options)
        run_dir = options.run_dir or train.default_run_dir(experiment.name, resume=options.resume)
        facts = same_on_all.of_experiment(options.experiment, record.plain(experiment))
        facts |= {"data and model": str(components.identity(experiment)), "--resume": options.resume}
    except errors.UserError as error:
        same_on_all.compare("experiment", {"mistake": str(error)})
        raise
    same_on_all.compare("experiment", facts | {"--run-dir": str(options.run_dir)})
    run_dir = pathlib.Path(same_on_all.from_first("run directory", str(run_dir)))
    there = options.restartable and (run_dir / record.FILE_NAME).exists()
    resume = options.resume or same_on_all.from_first("restart", str(there)) == str(True)
    return experiment, run_dir, resume


def _report(made: "RunRecord", run_dir: pathlib.Path, *, as_json: bool) -> int:
    if as_json:
        print(json.dumps(made.to_json() | {"run_dir": str(run_dir)}))
    return exit_status(made)


def exit_status(made: "RunRecord") -> int:
    """Return the exit status that goes with how a run ended."""
    from jaxdist.launch.signals import EXIT_RETRY

    if made.end_reason in ("preempted", "hang"):
        return EXIT_RETRY
    return EXIT_FAILED if made.end_reason in ("nonfinite", "error", None) else EXIT_OK


def launch_command(options: argparse.Namespace) -> int:
    """Start the processes of a job, or show what would be started."""
    from jaxdist.errors import UserError

    here = (options.hosts, options.host_index, options.coordinator)
    if options.engine and here[1:] != (None, None):
        raise UserError(
            "An engine numbers the hosts and finds a coordinator; leave --host-index and --coordinator out."
        )
    if options.engine_settings and not options.engine:
        raise UserError(f"--with tells an engine; got {options.engine_settings[0]!r} and no --engine. Name one.")
    experiment = load(options)
    if experiment.strategy == PARAMETER_SERVER:
        return _launch_servers(options, experiment)
    if options.engine:
        return _launch_by_engine(options, _request(options, experiment))
    if here != (1, None, None):
        return _launch_on_host(options)
    options.arguments = ["train", options.experiment, *train_arguments(options), "--processes", str(options.processes)]
    if options.dry_run:
        print(shlex.join(["jaxdist", *options.arguments]))
        return EXIT_OK
    return _start_processes(options)


def _launch_servers(options: argparse.Namespace, experiment: "Experiment") -> int:
    """Start a parameter server here, on a Ray cluster, or on the hosts of an engine."""
    from jaxdist.errors import UserError

    if options.processes > 1:
        raise UserError("A parameter server has ps.workers and ps.servers; leave --processes out.")
    if options.engine in ("slurm", "kubernetes"):
        return _launch_by_engine(options, _request(options, experiment))
    if options.hosts > 1:
        raise UserError(
            "Ray places a parameter server on its nodes as it likes; without an engine, `jaxdist train` starts it on "
            "the machines of --set ps.hosts=ADDRESS,ADDRESS. Leave --hosts out."
        )
    asked = _request(options, experiment)
    settings = asked.only("Ray", ("address",))
    arguments = ["train", str(asked.experiment), *asked.arguments, "--run-dir", str(asked.run_dir)]
    arguments += ["--strategy", PARAMETER_SERVER, *(["--set", "ps.engine=ray"] if options.engine else [])]
    if options.dry_run:
        print(shlex.join(["jaxdist", *arguments]))
        return EXIT_OK
    if settings:
        os.environ["RAY_ADDRESS"] = settings["address"]
    return run(arguments)


def _request(options: argparse.Namespace, experiment: "Experiment") -> "Request":
    """Return what is asked for; the run directory is chosen here, the same for every restart."""
    from jaxdist.launch.engines import kubernetes, request
    from jaxdist.run import attempt as train

    settings = request.settings_of(options.engine_settings)
    in_pods = options.engine == "kubernetes"
    run_dir = options.run_dir or train.default_run_dir(experiment.name, resume=False)
    if in_pods and not options.run_dir:
        run_dir = pathlib.Path(kubernetes.default_run_dir(run_dir.name, settings))
    return request.Request(
        name=experiment.name,
        # The file systems of pods are their own; elsewhere the processes may start in another directory.
        experiment=pathlib.Path(options.experiment) if in_pods else pathlib.Path(options.experiment).resolve(),
        arguments=train_arguments(options),
        run_dir=run_dir if in_pods else run_dir.resolve(),
        hosts=options.hosts,
        processes=options.processes,
        parameter_server=experiment.strategy == PARAMETER_SERVER,
        settings=settings,
    )


def _launch_by_engine(options: argparse.Namespace, asked: "Request") -> int:
    """Hand the job to SLURM, Kubernetes or Ray."""
    from jaxdist.launch.engines import choice

    if options.dry_run:
        print(choice.show(options.engine, asked).rstrip())
        return EXIT_OK
    return choice.start(options.engine, asked)


def _launch_on_host(options: argparse.Namespace) -> int:
    """Supervise this host's processes of a job on several hosts."""
    from jaxdist.errors import UserError
    from jaxdist.launch.supervising import hosts
    from jaxdist.run import attempt as train

    if options.host_index is None or options.coordinator is None or options.run_dir is None:
        raise UserError(
            "A job on several hosts is started on each of them, with the same --hosts, --coordinator HOST:PORT (of "
            "host 0) and --run-dir (on a file system they share), and a --host-index of its own. Name them all, or an "
            "--engine."
        )
    host = hosts.Host(
        index=options.host_index, count=options.hosts, coordinator=options.coordinator, num_processes=options.processes
    )
    arguments = ["train", options.experiment, *train_arguments(options)]
    arguments += ["--run-dir", str(options.run_dir), "--restartable"]
    if options.dry_run:
        print(shlex.join(["jaxdist", *arguments]))
        return EXIT_OK
    return train.supervise_host(load(options), arguments, host, run_dir=options.run_dir)


def train_arguments(options: argparse.Namespace) -> list[str]:
    """Return what the command line says of the experiment, as arguments of `jaxdist train`."""
    arguments = []
    for flag in ("devices", "strategy", "reduction", "max_steps"):
        value = getattr(options, flag)
        arguments += [] if value is None else [f"--{flag.replace('_', '-')}", str(value)]
    return [*arguments, "--set", *options.assignments] if options.assignments else arguments


def verify_command(options: argparse.Namespace) -> int:
    """Compare layouts; exit 1 when a promise is broken."""
    from jaxdist.launch.joining import runtime
    from jaxdist.run import verify

    devices = runtime.start(options.devices or 8)
    experiment = load(options)
    with record_alone_on_stdout(options):
        report = verify.verify(experiment, devices=devices, num_steps=options.steps)
    print(json.dumps(report.to_json()) if options.json else report)
    return EXIT_OK if report.kept else EXIT_FAILED


def prepare_command(options: argparse.Namespace) -> int:
    """Write a source as shards."""
    from jaxdist import errors
    from jaxdist.data import prepare

    with errors.as_user_error():
        print(prepare.prepare(options.source, options.out, shard_size=options.shard_size))
    return EXIT_OK


def inspect_command(options: argparse.Namespace) -> int:
    """Print what an experiment's training data are and what they cost."""
    from jaxdist import errors
    from jaxdist.data import inspect
    from jaxdist.launch.joining import runtime
    from jaxdist.run import components

    runtime.start(options.devices)
    with errors.as_user_error():
        print(inspect.render(inspect.inspect(components.make_loader(load(options)))))
    return EXIT_OK


def chaos_command(options: argparse.Namespace) -> int:
    """Compare a run in peace with one under fire; exit 1 when they differ."""
    from jaxdist.launch.supervising import chaos

    # As Ctrl-C does, so that the job it watches ends with it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    options.reduction = options.reduction or "canonical"
    experiment = load(options)
    directory = options.directory or pathlib.Path(tempfile.mkdtemp(prefix="jaxdist-chaos-"))
    report = chaos.run(
        chaos_arguments(options),
        directory,
        seed=options.seed,
        num_processes=options.processes,
        num_examples=len(experiment.data.train),
        kills=options.kills,
        stops=options.stops,
        starves=options.starves,
    )
    print(json.dumps(report.to_json()) if options.json else f"{report}\nboth runs   {directory}")
    return EXIT_OK if report.identical else EXIT_FAILED


def chaos_arguments(options: argparse.Namespace) -> list[str]:
    """Return the command of the runs that chaos compares."""
    arguments = [sys.executable, "-m", "jaxdist.cli", "train", options.experiment]
    arguments += ["--processes", str(options.processes)]
    for flag in ("devices", "strategy", "reduction", "max_steps"):
        value = getattr(options, flag)
        arguments += [] if value is None else [f"--{flag.replace('_', '-')}", str(value)]
    settings = ["recovery.hang_seconds=10", *options.assignments]
    return [*arguments, "--set", *settings, "recovery.ledger=true", "recovery.max_fruitless=1000000"]


def doctor_command(options: argparse.Namespace) -> int:
    """Print what is installed and visible."""
    from jaxdist.cli import doctor
    from jaxdist.launch.joining import runtime

    print(doctor.examine(runtime.start(options.devices or 8)))
    return EXIT_OK


def load(options: argparse.Namespace) -> "Experiment":
    """Return the experiment that the command line selects, with its overrides."""
    from jaxdist.config import experiments

    with record_alone_on_stdout(options):
        return experiments.override(experiments.load_experiment(options.experiment), overrides(options))


def record_alone_on_stdout(options: argparse.Namespace) -> contextlib.AbstractContextManager[object]:
    """With --json, send what experiments and writers print to standard error: one JSON object has standard output."""
    return contextlib.redirect_stdout(sys.stderr) if getattr(options, "json", False) else contextlib.nullcontext()


def overrides(options: argparse.Namespace) -> list[str]:
    """Return what the command line changes in the experiment, as assignments."""
    assignments = list(options.assignments)
    assignments += [f"strategy={options.strategy}"] if options.strategy else []
    assignments += [f"reduction={options.reduction}"] if options.reduction else []
    assignments += [f"stop.max_steps={options.max_steps}"] if options.max_steps else []
    return assignments


if __name__ == "__main__":
    main()
