"""The parser of the command line. It loads neither JAX nor the package's work: `--help` answers immediately.

A command's handler is named as text, "module:function", and imported once the command is known.
"""

import argparse
import difflib
import importlib
import importlib.metadata
import pathlib
import shlex
from collections.abc import Callable
from typing import Any

from jaxdist import extras
from jaxdist.errors import ExitStatus, say
from jaxdist.rundir.remote.run_address import RunPlace, place_of_run

PARAMETER_SERVER = "parameter-server"
"""The strategy whose processes have different roles."""

_LEAST_STEPS = 10


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = _Parser(prog="jaxdist", description="Train Flax models on many devices.")
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and exit")
    parser.add_argument(
        "--print-completion", action=_PrintCompletion, choices=("bash", "zsh", "tcsh"), help="print a completion script"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(_add(commands, "train", "train_command:train", "train an experiment until its stop rule ends it"))
    summary = "start an experiment's processes: here, on hosts, by an engine"
    _add_launch(_add(commands, "launch", "launch_command:launch", summary))
    summary = "compare a few steps on 1, 2, 4, 8 devices with one device"
    _add_verify(_add(commands, "verify", "verify_command:verify", summary))
    _add_data(_add(commands, "data", "", "prepare a data set; inspect and time one"))
    _add_uses(commands)
    _add_sweep(_add(commands, "sweep", "sweep_command:sweep", "train with several values of settings, and rank them"))
    _add_lr_range(
        _add(commands, "lr-range", "lr_range_command:lr_range", "find a learning rate: raise it step by step")
    )
    summary = "compare the activations of a model at several widths (muP)"
    _add_coordinate_check(_add(commands, "coordinate-check", "coordinate_check_command:coordinate_check", summary))
    summary = "kill processes at random; compare the bits and the ledger"
    _add_chaos(_add(commands, "chaos", "chaos_command:chaos", summary))
    _add_join(commands)
    _add_plan(_add(commands, "plan", "plan_command:plan", "estimate memory, time and price on other hardware"))
    doctor = _add(commands, "doctor", "doctor_command:doctor", "show versions, extras, devices and likely problems")
    doctor.add_argument("--devices", type=_positive, metavar="N", help="fake CPU devices to try (default 8)")
    return parser


def find_handler(name: str) -> Callable[..., int]:
    """Return the function that `name`, "module:function", names."""
    module, _, function = name.partition(":")
    handler: Callable[..., int] = getattr(importlib.import_module(module), function)
    return handler


def _add(commands: Any, name: str, handler: str, summary: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    command.set_defaults(handler=f"jaxdist.cli.commands.{handler}")
    command.add_argument("--traceback", action="store_true", help="show the traceback of a mistake")
    return command


def _add_data(command: argparse.ArgumentParser) -> None:
    commands = command.add_subparsers(required=True, metavar="COMMAND")
    prepare = _add(commands, "prepare", "data_command:prepare", "write a source as sharded tokens or ArrayRecord files")
    prepare.add_argument(
        "source",
        metavar="SOURCE",
        help="text files (bytes become tokens), images, WAV files, a table, or tfds:NAME:SPLIT",
    )
    prepare.add_argument("out", metavar="OUT", help="a new folder, or one whose preparation was interrupted")
    prepare.add_argument("--shard-size", type=_positive, metavar="N", help="tokens or examples of a shard")
    prepare.add_argument(
        "--tokenizer", metavar="T", help="of text: bpe:SIZE trains one; or a .json or .model file (default: bytes)"
    )
    inspect = _add(commands, "inspect", "data_command:inspect", "shapes, examples, throughput, and where the time goes")
    unused = "without effect on the data"
    _add_experiment(inspect, strategy=unused, reduction=unused, max_steps=unused)


def _add_plan(command: argparse.ArgumentParser) -> None:
    _add_experiment(
        command, devices="refused: the topology says how many", max_steps="steps whose time and price are shown"
    )
    command.add_argument("--topology", required=True, metavar="T", help="cpu:64, tpu:v5e:16x16, gpu:h100:8")
    command.add_argument(
        "--search", action="store_true", help="try strategies, microbatches and remat, and rank what fits"
    )
    command.add_argument("--sweep-devices", metavar="N,N", help="efficiency on these numbers of devices")
    command.add_argument("--calibrate", action="store_true", help="cpu:N: predict times by rates measured here, once")
    command.add_argument("--price-per-hour", type=float, metavar="P", help="price of an hour of the whole topology")
    command.add_argument("--out", type=pathlib.Path, metavar="FILE", help="write the plan as a page, too")
    command.add_argument("--json", action="store_true", help="print the plan as one JSON object")


def _add_uses(commands: Any) -> None:
    """Add what is done with a run that is trained."""
    _add_replay(commands)
    runs = _add(commands, "runs", "use_command:runs", "list the runs of a folder, or compare some")
    runs.add_argument(
        "paths", nargs="*", metavar="DIR", help="a folder (default runs), or `compare` and two run directories or more"
    )
    runs.add_argument("--json", action="store_true", help="print JSON")
    report = _add(commands, "report", "use_command:report", "show one run or several as a page of charts")
    report.add_argument("run_dirs", nargs="+", type=_place, metavar="RUN_DIR", help="run directories")
    report.add_argument(
        "--out",
        type=pathlib.Path,
        metavar="FILE",
        help="of the page (default report.html, with one run in its directory)",
    )
    report.add_argument("--live", action="store_true", help="serve the page to this machine while the runs train")
    report.add_argument("--port", type=_positive, default=0, metavar="N", help="with --live (default: a free one)")
    evaluate = _add(commands, "eval", "use_command:evaluate", "evaluate a trained model")
    evaluate.add_argument(
        "--data", default="eval", metavar="NAME", help="eval (default), train, a file, a folder or tfds:NAME:SPLIT"
    )
    evaluate.add_argument("--json", action="store_true", help="print the metrics as one JSON object")
    predict = _add(commands, "predict", "use_command:predict", "write a trained model's outputs for some examples")
    export = _add(commands, "export", "use_command:export", "write a trained model in a format that others read")
    for command in (evaluate, predict, export):
        _add_run(command)
        command.add_argument(
            "--checkpoint", type=_checkpoint, default="best", metavar="C", help="best (default), last, or a step"
        )
    predict.add_argument(
        "input",
        metavar="INPUT",
        help="a .npz, .npy, .csv or .parquet file; or a file or folder of images or sounds",
    )
    predict.add_argument("out", type=pathlib.Path, metavar="OUT", help="a new .npz, .csv or .parquet file")
    export.add_argument(
        "out", type=pathlib.Path, metavar="OUT", help="a new file, or folder for orbax and hugging-face"
    )
    formats = ("safetensors", "npz", "orbax", "jax-export")
    export.add_argument("--format", required=True, choices=formats, help="of the file")
    export.add_argument(
        "--names",
        default="jaxdist",
        choices=("jaxdist", "hugging-face"),
        help="of the arrays in safetensors; hugging-face writes a folder for transformers",
    )


def _add_replay(commands: Any) -> None:
    replay = _add(commands, "replay", "replay_command:replay", "compute a step of a canonical run again and compare")
    _add_run(replay)
    replay.add_argument("--step", type=_positive, required=True, metavar="N", help="the step; the first is 1")
    diff = _add(
        commands, "diff", "replay_command:diff", "the first step, leaf and logical shard in which two runs differ"
    )
    diff.add_argument("run_dirs", nargs=2, type=_place, metavar="RUN_DIR", help="two canonical runs")
    for command in (replay, diff):
        command.add_argument("--json", action="store_true", help="print the result as one JSON object")


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("run_dir", type=_place, metavar="RUN_DIR", help="the run directory, or its address")
    command.add_argument("--experiment", metavar="FILE", help="the experiment, where its file was moved")
    command.add_argument("--devices", type=_positive, metavar="N", help="devices to compute on")


def _checkpoint(text: str) -> str:
    if text not in ("best", "last") and not text.isdigit():
        raise argparse.ArgumentTypeError(f"best, last or a step is needed; got {text!r}")
    return text


def _add_launch(command: argparse.ArgumentParser) -> None:
    _add_experiment(command)
    command.set_defaults(resume=False)
    command.add_argument(
        "--run-dir",
        type=_place,
        metavar="DIR",
        help="on a file system that all hosts share",
    )
    command.add_argument("--processes", type=_positive, default=1, metavar="P", help="on each host (default 1)")
    command.add_argument("--hosts", type=_positive, default=1, metavar="N", help="hosts of the job (default 1)")
    command.add_argument("--host-index", type=int, metavar="I", help="without an engine: which host this is, from 0")
    command.add_argument("--coordinator", metavar="HOST:PORT", help="without an engine: host 0 and a free port on it")
    command.add_argument("--engine", choices=("slurm", "kubernetes", "ray"), help="what starts the processes")
    command.add_argument("--dry-run", action="store_true", help="print what would be started, and start nothing")
    command.add_argument(
        "--with",
        dest="engine_settings",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="settings for the engine: partition=gpu time=1:00:00, image=... claim=..., address=...",
    )


def _add_train(command: argparse.ArgumentParser) -> None:
    _add_experiment(command)
    command.add_argument("--processes", type=_positive, metavar="P", help="processes on this machine (default 1)")
    command.add_argument(
        "--run-dir", type=_place, metavar="DIR", help="of the run, or s3://... (default runs/NAME-TIME)"
    )
    command.add_argument("--resume", action="store_true", help="continue the run in --run-dir (default: the newest)")
    command.add_argument(
        "--checkpoint", type=_positive, metavar="STEP", help="with --resume: continue from this step, not the newest"
    )
    command.add_argument("--overwrite", action="store_true", help="replace the run in --run-dir if there is one")
    command.add_argument("--replace", metavar="STARTED", help=argparse.SUPPRESS)  # from a supervisor to its processes
    command.add_argument("--restartable", action="store_true", help="continue the run in --run-dir if there is one")
    command.add_argument("--strict", action="store_true", help="compare all contents of the data, not samples of them")
    command.add_argument("--profile", metavar="FIRST:LAST", help="trace these steps into RUN_DIR/profile, for XProf")
    trial = command.add_mutually_exclusive_group()
    trial.add_argument(
        "--fast-dev-run", action="store_true", help="try all: three steps, an evaluation, a checkpoint; nothing is kept"
    )
    trial.add_argument(
        "--overfit-batch", action="store_true", help="train and evaluate on one batch: the loss should fall to about 0"
    )
    trial.add_argument("--dry-run", action="store_true", help="compile all, show sizes and memory; train nothing")
    command.add_argument("--json", action="store_true", help="show nothing, print the run record as one JSON object")


def _add_verify(command: argparse.ArgumentParser) -> None:
    _add_experiment(command, devices="the most devices to try (default 8)", max_steps=_STEPS_DECIDES)
    command.add_argument("--steps", type=_positive, default=5, metavar="K", help="steps on each layout (default 5)")
    command.add_argument("--json", action="store_true", help="print the table as one JSON object")


def _add_chaos(command: argparse.ArgumentParser) -> None:
    _add_experiment(command)
    command.add_argument("--processes", type=_positive, metavar="P", help="processes (default 2)")
    command.add_argument("--kills", type=_whole, default=5, metavar="N", help="processes to kill (default 5)")
    command.add_argument("--stops", type=_whole, default=1, metavar="N", help="processes to stop (default 1)")
    command.add_argument("--starves", type=_whole, default=1, metavar="N", help="how many to deny the disk (default 1)")
    command.add_argument("--joins", type=_whole, default=0, metavar="N", help="how often processes join (default 0)")
    command.add_argument("--leaves", type=_whole, default=0, metavar="N", help="how often processes leave (default 0)")
    command.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the plan (default 0)")
    command.add_argument("--directory", type=pathlib.Path, metavar="DIR", help="for both runs (default: a new one)")
    command.add_argument("--json", action="store_true", help="print the result as one JSON object")


def _add_sweep(command: argparse.ArgumentParser) -> None:
    _add_experiment(command)
    command.add_argument(
        "--over",
        nargs="+",
        action="extend",
        required=True,
        metavar="A.B=VALUES",
        help="values between commas, or a range: 1e-5:1e-2, 1e-5:1e-2:log",
    )
    chosen = command.add_mutually_exclusive_group()
    chosen.add_argument("--random", action="store_true", help="draw trials by chance (default: every combination)")
    chosen.add_argument("--optuna", action="store_true", help="have Optuna propose trials from what others gave")
    command.add_argument("--trials", type=_positive, metavar="N", help="with --random or --optuna: how many")
    command.add_argument("--seed", type=_whole, default=0, metavar="S", help="of what is drawn (default 0)")
    command.add_argument("--metric", metavar="M", help="to rank by (default: the experiment's, see the guide)")
    command.add_argument("--mode", choices=("max", "min"), help="which values of --metric are good")
    command.add_argument("--parallel", type=_positive, default=1, metavar="P", help="trials at once (default 1)")
    command.add_argument("--sweep-dir", type=pathlib.Path, metavar="DIR", help="(default runs/NAME-sweep-TIME)")
    command.add_argument("--resume", action="store_true", help="run what is left in --sweep-dir (default: the newest)")
    command.add_argument("--json", action="store_true", help="print the ranking as one JSON object")
    # From a sweep to its processes.
    command.add_argument("--worker-of", type=pathlib.Path, metavar="DIR", help=argparse.SUPPRESS)


def _add_lr_range(command: argparse.ArgumentParser) -> None:
    _add_experiment(command, max_steps=_STEPS_DECIDES)
    command.add_argument("--range", default="1e-6:1", metavar="LOW:HIGH", help="first and last rate (default 1e-6:1)")
    command.add_argument("--steps", type=_several, default=100, metavar="K", help="steps between them (default 100)")
    command.add_argument("--plot", type=pathlib.Path, metavar="FILE", help="draw the curve as an HTML page")
    command.add_argument("--json", action="store_true", help="print the curve and the suggestion as one JSON object")


def _add_join(commands: Any) -> None:
    """Add what changes the number of processes of a running job."""
    join = _add(commands, "join", "join_command:join", "add processes of this machine to a running job")
    join.add_argument("--processes", type=_positive, default=1, metavar="P", help="how many join (default 1)")
    leave = _add(commands, "leave", "join_command:leave", "take processes out of a running job, the newest first")
    leave.add_argument("--processes", type=_positive, default=1, metavar="P", help="how many leave (default 1)")
    join.add_argument(
        "--experiment", type=pathlib.Path, metavar="FILE", help="of a run at an address: its experiment on this machine"
    )
    running = "of a job started with --processes, or of a parameter server"
    join.add_argument("run", type=_run, metavar="RUN_DIR", help=f"{running}; or the address of that, HOST:PORT")
    leave.add_argument("run_dir", type=_local, metavar="RUN_DIR", help=running)


def _add_coordinate_check(command: argparse.ArgumentParser) -> None:
    _add_experiment(command, max_steps=_STEPS_DECIDES)
    command.add_argument("--widths", default="64,128,256", metavar="N,N", help="of the model (default 64,128,256)")
    command.add_argument("--steps", type=_positive, default=4, metavar="K", help="steps to train (default 4)")
    command.add_argument("--plot", type=pathlib.Path, metavar="FILE", help="draw the activations as an HTML page")
    command.add_argument("--json", action="store_true", help="print all sizes as one JSON object")


_STEPS_DECIDES = "without effect: --steps decides"


def _add_experiment(command: argparse.ArgumentParser, **other_help: str) -> None:
    """Add the experiment and what changes it; `other_help` says what some of that means for this command."""
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
    for action in command._actions:
        action.help = other_help.get(action.dest, action.help)


def _place(text: str) -> RunPlace:
    if not text.strip():  # of a variable that is not set
        raise argparse.ArgumentTypeError(f"a run directory, or its address, is needed; got {text!r}")
    return place_of_run(text)


def _local(text: str) -> pathlib.Path:
    if "://" in text or not text.strip():
        raise argparse.ArgumentTypeError(f"a run directory on this machine is needed; got {text!r}")
    return pathlib.Path(text)


def _run(text: str) -> str:
    return str(_local(text))


def _at_least(least: int, kind: str) -> Callable[[str], int]:
    def whole(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"a {kind} is needed; got {text!r}")
        return int(text)

    return whole


_positive = _at_least(1, "positive whole number")
_whole = _at_least(0, "whole number")
_several = _at_least(_LEAST_STEPS, f"whole number of at least {_LEAST_STEPS}")


class _Parser(argparse.ArgumentParser):
    """Names the command's nearest option where one is unknown."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            option = unknown[0].partition("=")[0]
            known = [name for name in self._option_string_actions if name.startswith("--")]
            near = difflib.get_close_matches(option, known, n=1) if option.startswith("-") else []
            proposal = f" Did you mean {near[0]!r}?" if near else ""
            setting = unknown[0].lstrip("-")
            if not near and "=" in setting and "--set" in known:
                proposal = f" Settings of the experiment follow --set: --set {shlex.quote(setting)}."
            self.error(f"unrecognized arguments: {shlex.join(unknown)}.{proposal}")
        return found, unknown


class _ShowVersion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"jaxdist {importlib.metadata.version('jaxdist')}")
        parser.exit()


class _PrintCompletion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, shell: Any, option: str | None = None) -> None:
        try:
            shtab = extras.require("shtab", extra="completion")
        except extras.MissingExtra as missing:
            say(missing)
            parser.exit(ExitStatus.USER)
        print(shtab.complete(parser, shell))
        parser.exit()
