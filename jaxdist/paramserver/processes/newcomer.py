"""The side of `jaxdist join` and `jaxdist leave`: workers of this machine, or of another one, join a running run.

By the run's directory on the machine that started it, the command gets all it needs through a socket of that machine.
By an address, the token of the run must be in the environment, and the experiment file and its data must be on this
machine, too; nothing of the run's directory is needed. It stays until the run ends, or its workers have left.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from jaxdist.errors import ExitStatus, UserError, as_user_error, say
from jaxdist.launch import signals as stop_signals
from jaxdist.launch.joining import coordinator
from jaxdist.paramserver.processes import admission, peer_addresses, run_folder
from jaxdist.paramserver.processes.crew import LocalCrew
from jaxdist.paramserver.protocol.settings import SCHEDULER, worker_number
from jaxdist.paramserver.wire.security import TOKEN, Security
from jaxdist.rundir import lock

_LOOK_SECONDS = 0.1
GONE = "The run has ended without a word; its workers here are ended too."


def join(run_dir: pathlib.Path, num_workers: int) -> int:
    """Join the run in a directory with workers of this machine; return the exit status.

    Raises:
      UserError: it is not running on this machine.
    """
    with admission.knock(_door(run_dir), Security()) as line:
        return _take_part(line, num_workers, run_dir / run_folder.DIRECTORY_NAME, None)


def join_at(address: str, num_workers: int, experiment: pathlib.Path | None) -> int:
    """Join the run at an address with workers of this machine; return the exit status.

    `address` is the `host:port` that the run shows at its start; `experiment` is its file on this machine, None where
    it has the same path.

    Raises:
      UserError: there is no such run, the token is wrong, or this machine differs.
    """
    with as_user_error():
        security = Security.read(os.environ)
        security.check(address.rpartition(":")[0])
    with admission.knock(("", address), security) as line:
        folder = pathlib.Path(tempfile.mkdtemp(prefix="jaxdist-joined-"))
        try:
            return _take_part(line, num_workers, folder, experiment)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def leave(run_dir: pathlib.Path, num_workers: int) -> None:
    """Have workers leave the run in a directory after their step, the newest first.

    Raises:
      UserError: it is not running on this machine, or no worker would be left.
    """
    with admission.knock(_door(run_dir), Security()) as line:
        line.say(hello="leave", count=num_workers)
        answer = line.hear() or {"error": "The run has ended."}
    if "error" in answer:
        raise UserError(answer["error"])


def _door(run_dir: pathlib.Path) -> tuple[str, str]:
    if not lock.is_locked(run_dir):
        raise UserError(f"Only a run that is training can be joined or left; the one in {run_dir} is not. Start it.")
    path = run_dir / run_folder.DIRECTORY_NAME / run_folder.SPEC_NAME
    try:
        return run_folder.Spec.read(path).door[0], ""
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"A run is joined and left through what {path} says, and that file cannot be read: {error}. Stop the run "
            "and continue it with --resume, which writes the file anew."
        ) from error


def _take_part(line: admission.Line, num_workers: int, directory: pathlib.Path, experiment: pathlib.Path | None) -> int:
    line.say(hello="join")
    greeting = line.hear()
    if not greeting:
        raise UserError("The run has just ended.")
    spec = _spec_here(run_folder.Spec.of(greeting["spec"]), greeting, directory, experiment)
    host = coordinator.own_address(spec.peers[SCHEDULER])
    given = peer_addresses.free_addresses(host, num_workers)
    line.say(addresses=given, facts=admission.facts_of(pathlib.Path(spec.experiment)))
    answer = line.hear() or {"error": "The run has just ended."}
    if "error" in answer:
        raise UserError(answer["error"])
    names = answer["names"]
    for name, address in zip(names, given):
        peer_addresses.announce(directory, name, address)
    if spec.directory == str(directory):
        spec.write(directory / run_folder.SPEC_NAME)
    joins, them = ("1 worker joins", "it") if len(names) == 1 else (f"{len(names)} workers join", "them")
    crew = LocalCrew(names, directory, greeting.get("token") or os.environ.get(TOKEN, ""))
    say(f"{joins} the run at the end of a step. Ctrl-C, or SIGTERM, takes {them} out again.")
    return Keeper(line, crew).run()


def _spec_here(
    spec: run_folder.Spec, greeting: dict[str, Any], directory: pathlib.Path, experiment: pathlib.Path | None
) -> run_folder.Spec:
    """Return the spec as workers of this machine need it."""
    if "token" in greeting:  # the machine that started the run
        os.environ.update(greeting["secrets"])
        os.chdir(greeting["folder"])  # data may be at paths relative to it
        return spec
    path = experiment or pathlib.Path(spec.experiment)
    if not path.is_file():
        raise UserError(
            f"This machine needs the experiment file of the run; there is no {path}. Copy it here, and name it with "
            "--experiment."
        )
    return dataclasses.replace(spec, experiment=str(path.absolute()), directory=str(directory))


class Keeper:
    """Keeps the processes of a guest alive until the run is over or they have left.

    `line` is the connection to the process that started the run. The crew of this machine is not started yet. At `host`
    the processes of a lost machine would listen here.
    """

    def __init__(self, line: admission.Line, crew: LocalCrew, host: str = "") -> None:
        self._line, self._crew, self._host = line, crew, host
        self._over: str | None = None
        self._heard: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._asked_at: float | None = None

    def run(self) -> int:
        """Return the exit status: 0 if the run has ended or its processes have left it, RETRY if it was lost."""
        threading.Thread(target=self._read, daemon=True, name="jaxdist-door").start()
        self._crew.start()
        alive_at = 0.0
        try:
            with stop_signals.handled(self._leave):
                while self._over is None and self._crew.names:
                    while not self._heard.empty():
                        self._heard.get()()
                    for name, boot in self._crew.look_after().items():
                        self._say(died=name, boot=boot)
                    if left := self._crew.take_left():
                        self._say(left=left)
                    if time.monotonic() >= alive_at:
                        alive_at = time.monotonic() + admission.ALIVE_SECONDS
                        self._say(alive=True)
                    time.sleep(_LOOK_SECONDS)
            self._say(bye=True)
        finally:
            self._crew.close(orderly=self._over is not None and self._over != GONE)
        say(self._over or "The workers have left the run.")
        return ExitStatus.RETRY if self._over == GONE else ExitStatus.OK

    def _read(self) -> None:
        while message := self._line.hear():
            match message:
                case {"leave": [*names]}:
                    self._heard.put(functools.partial(self._crew.retire, names))
                case {"missed": [*names]}:
                    self._heard.put(functools.partial(self._crew.note_missed, names))
                case {"place": [*names]}:
                    self._heard.put(functools.partial(self._place, names))
                case {"moved": dict() as moved}:
                    for name, address in moved.items():
                        peer_addresses.announce(self._crew.directory, name, address)
                case {"over": str() as text}:
                    self._over = text
                    return
        self._over = self._over or GONE

    def _place(self, names: Sequence[str]) -> None:
        """Start processes of a machine that was lost, here."""
        for name, address in zip(names, peer_addresses.free_addresses(self._host, len(names))):
            peer_addresses.announce(self._crew.directory, name, address)
            self._crew.add(name)
            say(f"{name} of a machine that was lost runs here from now on.")

    def _leave(self, *_: object) -> None:
        """Have the workers leave after their step; asked again, a second or more later, end them.

        The servers of a machine of `ps.hosts` are needed until the run has ended, however often it is asked.
        """
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            self._heard.put(self._retire)
        elif not self._host and time.monotonic() - self._asked_at >= stop_signals.SAME_REQUEST_SECONDS:
            self._over = "The processes were ended."

    def _retire(self) -> None:
        workers = [name for name in self._crew.names if worker_number(name) is not None]
        self._crew.retire(workers)
        stay = [name for name in self._crew.names if name not in workers]
        stays = f" The run still needs {', '.join(stay)} of this machine." if stay else ""
        say(f"The workers leave after their step.{stays}")

    def _say(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # the run is over, which the other thread hears
            self._line.say(**message)
