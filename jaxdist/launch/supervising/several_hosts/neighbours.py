"""What the supervisors of several hosts, and their processes, say to each other.

Each supervisor keeps its host's directory in memory and answers at an address that it writes into the run directory,
which all of them share, beside a secret that only their user can read. A process sends each snapshot to the supervisor
of the next host, which stores it beside the snapshots of its own processes. So a host that is lost takes nothing along.

A request is a JSON object; a snapshot follows its request as it is stored. Connections are those of `multiprocessing`,
which proves the secret to both sides; nothing is unpickled, and nothing is encrypted.
"""

import contextlib
import json
import os
import pathlib
import queue
import secrets
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge
from typing import Any, TypeAlias

import numpy as np

from jaxdist.checkpoint import slots
from jaxdist.rundir import files

JSON: TypeAlias = dict[str, Any]
FOLDER_NAME = "hosts"
"""In the run directory: the secret, the addresses of the supervisors, who takes part."""
_SECRET_NAME = "secret"
_ANSWER_SECONDS = 3.0
_FETCH_SECONDS = 600.0
_LOST = (OSError, EOFError, AuthenticationError, ValueError, KeyError)


def secret(folder: pathlib.Path) -> bytes:
    """Return the secret of the job, made by the first that asks."""
    folder.mkdir(parents=True, exist_ok=True)
    path, draft = folder / _SECRET_NAME, folder / f".{secrets.token_hex(8)}"
    if not path.exists():
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
        draft.unlink()
    return path.read_bytes()


def announce(folder: pathlib.Path, host: int, address: str) -> None:
    """Say where the supervisor of a host answers."""
    files.write_text(folder / f"host-{host}.json", json.dumps({"address": address}))


def announced(folder: pathlib.Path) -> dict[int, str]:
    """Return where the supervisor of each host said that it answers, HOST:PORT."""
    found = {}
    for path in folder.glob("host-*.json"):
        with contextlib.suppress(*_LOST):
            found[int(path.stem.removeprefix("host-"))] = str(json.loads(path.read_text())["address"])
    return found


class CopyKeeper:
    """While entered, answers the other hosts, in threads.

    `host` is the address to listen at, without port. `is_running` says whether processes of this host train; `ended` is
    called with the term of an attempt that has ended on another host.

    Attributes:
      address: HOST:PORT.
    """

    def __init__(
        self,
        memory: pathlib.Path,
        key: bytes,
        host: str,
        *,
        is_running: Callable[[], bool],
        ended: Callable[[int], object],
    ):
        self._memory, self._key, self._is_running, self._ended = memory, key, is_running, ended
        self._lock = threading.Lock()
        self._slots: dict[int, slots.Slots] = {}
        self._watchers: list[Connection] = []
        family = "AF_INET6" if ":" in host else "AF_INET"
        self._listener = Listener((host, 0), family, backlog=64)
        port = self._listener.address[1]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def __enter__(self) -> "CopyKeeper":
        threading.Thread(target=self._accept, name="jaxdist-hosts", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def say_over(self) -> None:
        """Tell those who watch this supervisor that it ends because the job does: it is not lost."""
        with self._lock:
            for channel in self._watchers:
                with contextlib.suppress(OSError):
                    channel.send_bytes(b"{}")

    def forget_order(self) -> None:
        """Have the order in which slots are overwritten read again: an attempt begins."""
        with self._lock:
            self._slots.clear()

    def _accept(self) -> None:
        while True:
            try:
                channel = self._listener.accept()
            except ConnectionError:  # one that has gone already
                continue
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(channel,), name="jaxdist-host", daemon=True).start()

    def _serve(self, channel: Connection) -> None:
        with channel, contextlib.suppress(*_LOST):
            deliver_challenge(channel, self._key)  # in this thread: a silent stranger delays no other host
            answer_challenge(channel, self._key)
            while True:
                reply = self._answer(channel, json.loads(channel.recv_bytes()))
                if reply is not None:
                    channel.send_bytes(json.dumps(reply).encode())

    def _answer(self, channel: Connection, request: JSON) -> JSON | None:
        match request:
            case {"keep": int() as process, "parts": int() as count}:
                header, *parts = [channel.recv_bytes() for _ in range(1 + count)]
                with self._lock:
                    if process not in self._slots:
                        self._slots[process] = slots.Slots(self._memory, process)
                    self._slots[process].write(header, [np.frombuffer(part, np.uint8) for part in parts])
                return {"kept": process}
            case {"ended": int() as term}:
                self._ended(term)
                return {"running": self._is_running()}
            case {"watch": True}:
                with self._lock:
                    self._watchers.append(channel)
                return None
            case {"list": True}:
                return {"files": {path.name: file.header for path, file in self._files()}}
            case {"fetch": str() as name}:
                file = slots.open_slot(self._memory / pathlib.Path(name).name)
                channel.send_bytes(b"" if file is None else file.header_text())
                channel.send_bytes(b"" if file is None else file.data())
                return {"fetched": name}
        return {"running": self._is_running()}

    def _files(self) -> list[tuple[pathlib.Path, slots.SlotFile]]:
        return [(path, file) for _, path in slots.paths_in(self._memory) if (file := slots.open_slot(path)) is not None]


class Copier:
    """Sends the snapshots of a process to the supervisor of the next host; waits until they are stored.

    After a failure it sends none: the job is about to end, and the next attempt has other neighbours.
    """

    def __init__(self, address: str, key: bytes):
        self._address, self._key = address, key
        self._channel: Connection | None = None
        self._over = False

    def __call__(self, process: int, header: bytes, buffers: Sequence[np.ndarray]) -> None:
        """Send one snapshot of process number `process`."""
        if self._over:
            return
        try:
            self._channel = self._channel or _connect(self._address, self._key)
            self._channel.send_bytes(json.dumps({"keep": process, "parts": len(buffers)}).encode())
            self._channel.send_bytes(header)
            for buffer in buffers:
                self._channel.send_bytes(buffer.data)
            self._channel.recv_bytes()
        except _LOST:
            self._over = True


def ask(address: str, key: bytes, request: Mapping[str, Any], *, seconds: float = _ANSWER_SECONDS) -> JSON | None:
    """Return the answer of the supervisor at `address`, None if none comes in time: it may be stopped, or cut off."""
    answers: queue.SimpleQueue[JSON | None] = queue.SimpleQueue()

    def run() -> None:
        found = None
        with contextlib.suppress(*_LOST), _connect(address, key) as channel:
            channel.send_bytes(json.dumps(request).encode())
            found = json.loads(channel.recv_bytes())
        answers.put(found)

    threading.Thread(target=run, name="jaxdist-ask", daemon=True).start()
    with contextlib.suppress(queue.Empty):
        return answers.get(timeout=seconds)
    return None


def watch(address: str, key: bytes, lost: Callable[[], object]) -> None:
    """Have `lost` called when the supervisor at `address` has ended before the job is over; returns at once."""

    def run() -> None:
        with contextlib.suppress(*_LOST), _connect(address, key) as channel:
            channel.send_bytes(json.dumps({"watch": True}).encode())
            channel.recv_bytes()
            return
        lost()

    threading.Thread(target=run, name="jaxdist-watch", daemon=True).start()


def gather(memory: pathlib.Path, identity: str, addresses: Sequence[str], key: bytes) -> None:
    """Fetch into `memory` what other hosts have of the newest step which all of them together have whole."""
    found: dict[int, list[tuple[str, str, JSON]]] = {}
    for address in addresses:
        reply = ask(address, key, {"list": True}) or {"files": {}}
        for name, header in reply["files"].items():
            if header["identity"] == identity:
                found.setdefault(header["step"], []).append((address, name, header))
    own = {step: [file.header for file in files] for step, files in slots.by_step(memory, identity).items()}
    for step in sorted({*found, *own}, reverse=True):
        theirs = found.get(step, [])
        if slots.covers([*own.get(step, []), *(header for _, _, header in theirs)]):
            if not slots.covers(own.get(step, [])):
                for address, name, _ in theirs:
                    _fetch(memory, name, address, key)
            return


def _fetch(memory: pathlib.Path, name: str, address: str, key: bytes) -> None:
    """Store a snapshot of another host, unless one of that process and step is here."""
    with contextlib.suppress(*_LOST), _connect(address, key) as channel:
        channel.send_bytes(json.dumps({"fetch": name}).encode())
        if not channel.poll(_FETCH_SECONDS):
            return
        header, data = channel.recv_bytes(), np.frombuffer(channel.recv_bytes(), np.uint8)
        process = int(name.split(".")[0].removeprefix("process-"))
        step = json.loads(header)["step"] if header else None
        here = {file.header["step"] for path in slots.of_process(memory, process) if (file := slots.open_slot(path))}
        if step is not None and step not in here:
            slots.Slots(memory, process).write(header, [data])


def _connect(address: str, key: bytes) -> Connection:
    host, _, port = address.rpartition(":")
    target = host.strip("[]"), int(port)
    socket.create_connection(target, _ANSWER_SECONDS).close()  # `Client` itself would wait for minutes
    return Client(target, "AF_INET6" if ":" in target[0] else "AF_INET", authkey=key)
