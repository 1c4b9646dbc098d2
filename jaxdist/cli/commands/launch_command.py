"""`jaxdist launch`: the processes of a job, here, on several hosts, or by SLURM, Kubernetes or Ray."""

import argparse
import os
import pathlib
import shlex

from jaxdist.cli import main, parser, remote_runs, selected_experiment
from jaxdist.cli.commands import train_command
from jaxdist.config import hidden_settings
from jaxdist.config.experiment import Experiment
from jaxdist.errors import ExitStatus, UserError
from jaxdist.launch.engines import choice, kubernetes
from jaxdist.launch.engines import request as requests
from jaxdist.launch.supervising import hosts
from jaxdist.run import directory, supervised

_HANDED = "A batch script or manifest"


def launch(options: argparse.Namespace) -> int:
    """Start the processes of a job, or show what would be started."""
    _check(options)
    experiment = selected_experiment.load(options)
    remote_runs.check_launch(options, experiment)
    if experiment.strategy == parser.PARAMETER_SERVER:
        return _launch_servers(options, experiment)
    if options.engine:
        hidden_settings.refuse(options.assignments, experiment, _HANDED)
        return _launch_by_engine(options, _request(options, experiment))
    if (options.hosts, options.host_index, options.coordinator) != (1, None, None):
        return _launch_on_host(options, experiment)
    processes = ["--processes", str(options.processes)]
    options.arguments = ["train", options.experiment, *selected_experiment.as_arguments(options), *processes]
    if options.dry_run:
        return _show(options.arguments)
    return remote_runs.train(options, train_command.supervise)


def _check(options: argparse.Namespace) -> None:
    if options.engine and (options.host_index, options.coordinator) != (None, None):
        raise UserError(
            "An engine numbers the hosts and finds a coordinator; leave --host-index and --coordinator out."
        )
    if options.engine_settings and not options.engine:
        raise UserError(f"--with tells an engine; got {options.engine_settings[0]!r} and no --engine. Name one.")


def _show(arguments: list[str]) -> int:
    print(shlex.join(["jaxdist", *arguments]))
    return ExitStatus.OK


def _request(options: argparse.Namespace, experiment: Experiment) -> requests.Request:
    """Return the request to an engine; the run directory is chosen here, the same for every restart."""
    settings = requests.settings_of(options.engine_settings)
    in_pods = options.engine == "kubernetes"
    run_dir = options.run_dir or directory.default_run_dir(experiment.name, resume=False)
    if in_pods and not options.run_dir:
        run_dir = pathlib.Path(kubernetes.default_run_dir(run_dir.name, settings))
    return requests.Request(
        name=experiment.name,
        # Pods have file systems of their own; elsewhere the processes may start in another directory.
        experiment=pathlib.Path(options.experiment) if in_pods else pathlib.Path(options.experiment).resolve(),
        arguments=selected_experiment.as_arguments(options),
        run_dir=run_dir if in_pods else run_dir.resolve(),
        hosts=options.hosts,
        processes=options.processes,
        parameter_server=experiment.strategy == parser.PARAMETER_SERVER,
        settings=settings,
    )


def _launch_by_engine(options: argparse.Namespace, asked: requests.Request) -> int:
    """Hand the job to SLURM, Kubernetes or Ray."""
    if options.dry_run:
        print(choice.show(options.engine, asked).rstrip())
        return ExitStatus.OK
    return choice.start(options.engine, asked)


def _launch_on_host(options: argparse.Namespace, experiment: Experiment) -> int:
    """Supervise this host's processes of a job on several hosts."""
    if options.host_index is None or options.coordinator is None or options.run_dir is None:
        raise UserError(
            "A job on several hosts is started on each of them, with the same --hosts, --coordinator HOST:PORT (of "
            "host 0) and --run-dir (on a file system they share), and a --host-index of its own. Name them all, or an "
            "--engine."
        )
    host = hosts.Host(
        index=options.host_index, count=options.hosts, coordinator=options.coordinator, num_processes=options.processes
    )
    arguments = ["train", options.experiment, *selected_experiment.as_arguments(options)]
    arguments += ["--run-dir", str(options.run_dir), "--restartable"]
    arguments = hidden_settings.hide(options.assignments, experiment, arguments)
    if options.dry_run:
        return _show(arguments)
    return supervised.supervise_host(experiment, arguments, host, run_dir=options.run_dir)


def _launch_servers(options: argparse.Namespace, experiment: Experiment) -> int:
    """Start a parameter server here, on a Ray cluster, or on the hosts of an engine."""
    if options.processes > 1:
        raise UserError("A parameter server has ps.workers and ps.servers; leave --processes out.")
    if options.engine:
        hidden_settings.refuse(options.assignments, experiment, _HANDED)
    asked = _request(options, experiment)
    if options.engine in ("slurm", "kubernetes"):
        return _launch_by_engine(options, asked)
    if options.hosts > 1:
        raise UserError(
            "Ray places a parameter server on its nodes as it likes; without an engine, `jaxdist train` starts it on "
            "the machines of --set ps.hosts=ADDRESS,ADDRESS. Leave --hosts out."
        )
    settings = asked.only("Ray", ("address",))
    arguments = ["train", str(asked.experiment), *asked.arguments, "--run-dir", str(asked.run_dir)]
    arguments += ["--strategy", parser.PARAMETER_SERVER, *(["--set", "ps.engine=ray"] if options.engine else [])]
    if options.dry_run:
        return _show(arguments)
    if settings:
        os.environ["RAY_ADDRESS"] = settings["address"]
    return main.run(arguments)
