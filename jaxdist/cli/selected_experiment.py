"""The experiment that a command line selects, with its overrides; and the same selection as arguments of a command."""

import argparse
import contextlib
import functools
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence

import jax

from jaxdist import errors
from jaxdist.config import hidden_settings
from jaxdist.config.experiment import Experiment
from jaxdist.config.loading import load_experiment
from jaxdist.config.overrides import override
from jaxdist.launch import own_command_line, waiting
from jaxdist.launch.joining import runtime
from jaxdist.run.diagnosis import trials
from jaxdist.spmd.canonical import thread_pool


def start(
    options: argparse.Namespace, num_devices: int | None = None
) -> tuple[Sequence[jax.Device], Callable[[], Experiment]]:
    """Start JAX on `num_devices` devices (default: --devices) as the selected experiment needs it.

    Returns the devices and what returns the experiment, loaded once, or raises UserError: it is loaded before JAX
    starts, since its settings decide the number of threads, but a job's processes tell its mistakes together.
    """
    if options.reduction == "canonical":  # an experiment may start JAX when it is loaded
        thread_pool.fix(thread_pool.LEAST)
    loaded = functools.cache(functools.partial(load, options))

    def threads() -> int | None:
        with contextlib.suppress(errors.UserError):
            return threads_of(loaded())
        return None

    return runtime.start(num_devices or options.devices, threads=threads), loaded


def threads_of(experiment: Experiment) -> int | None:
    """Return the number of XLA's threads for CPU devices that the experiment needs; None for any."""
    return thread_pool.canonical_size(experiment.logical_shards) if experiment.reduction == "canonical" else None


def load(options: argparse.Namespace) -> Experiment:
    """Return the experiment that the command line selects, with its overrides."""
    silent = getattr(options, "json", False)
    with record_alone_on_stdout(options), waiting.shown(f"loading {options.experiment}", silent=silent):
        given = assignments(options)
        _tell_repeated(given)
        experiment = override(load_experiment(options.experiment), given)
        with errors.as_user_error():
            if getattr(options, "fast_dev_run", False):
                experiment = trials.few_steps(experiment)
            if getattr(options, "overfit_batch", False):
                experiment = trials.one_batch(experiment)
    options.command = shown_command(options, experiment)
    own_command_line.cover(hidden_settings.shown(options.assignments, experiment))
    return experiment


def _tell_repeated(given: Sequence[str]) -> None:
    """Warn of a setting that the command line gives several values; they are not shown, one may be a secret."""
    names = [each.partition("=")[0] for each in dict.fromkeys(given)]
    for name in sorted({name for name in names if names.count(name) > 1}):
        warnings.warn(f"The command line sets {name} to {names.count(name)} values; the last one counts.", stacklevel=2)


def shown_command(options: argparse.Namespace, experiment: Experiment) -> str:
    """Return the command line for the run record, the values of secret settings replaced by `***`."""
    shown = hidden_settings.shown(options.assignments, experiment)
    arguments = getattr(options, "arguments", [])
    return shlex.join(["jaxdist", *(shown.get(argument, argument) for argument in arguments)])


@contextlib.contextmanager
def record_alone_on_stdout(options: argparse.Namespace) -> Iterator[None]:
    """With --json, send what experiments and writers print to standard error: standard output has one JSON object.

    Also what native code and the commands that an experiment starts write there.
    """
    if not getattr(options, "json", False):
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def assignments(options: argparse.Namespace) -> list[str]:
    """Return what the command line changes in the experiment, as assignments."""
    return [*hidden_settings.reveal(options.assignments), *_of_flags(options)]


def shown_assignments(options: argparse.Namespace, experiment: Experiment) -> list[str]:
    """Return the same to be shown, the values of secret settings replaced by `***`."""
    shown = hidden_settings.shown(options.assignments, experiment)
    return [*(shown.get(each, each) for each in options.assignments), *_of_flags(options)]


def _of_flags(options: argparse.Namespace) -> list[str]:
    found = [f"strategy={options.strategy}"] if options.strategy else []
    found += [f"reduction={options.reduction}"] if options.reduction else []
    found += [f"stop.max_steps={options.max_steps}"] if options.max_steps else []
    found += ["data.strict=true"] if getattr(options, "strict", False) else []
    return found


def as_arguments(options: argparse.Namespace, *, before: Sequence[str] = (), after: Sequence[str] = ()) -> list[str]:
    """Return the same selection as arguments of `jaxdist train`, with assignments before and after the user's own."""
    arguments = []
    for flag in ("devices", "strategy", "reduction", "max_steps"):
        value = getattr(options, flag)
        arguments += [] if value is None else [f"--{flag.replace('_', '-')}", str(value)]
    settings = [*before, *options.assignments, *after]
    return [*arguments, "--set", *settings] if settings else arguments
