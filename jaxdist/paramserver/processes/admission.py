"""The door of a running parameter-server run: commands that join it, leave it, or keep the processes of a machine.

The process that started the run listens on a socket of this machine, which only the same user may use, and, with
`ps.hosts`, on a port, where both ends prove that they know the token (`wire.greeting`). Messages are JSON objects, one
a line. A command says {"hello": "join"} and gets the spec and, on this machine, the secrets. It says {"addresses":
[...], "facts": {...}} and gets the names of its workers. It stays connected as long as they run: a connection that
ends, or is silent, means that they are lost. {"hello": "leave", "count": N} takes workers out; {"hello": "machine",
"host": H} keeps the processes of a machine of `ps.hosts` and gets their names.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxdist.config import hidden_settings
from jaxdist.errors import UserError
from jaxdist.paramserver.processes import peer_addresses, run_folder
from jaxdist.paramserver.processes.run_folder import Spec
from jaxdist.paramserver.protocol import messages
from jaxdist.paramserver.protocol.settings import OBSERVER, worker_name
from jaxdist.paramserver.wire import greeting, streams
from jaxdist.paramserver.wire.incoming import GREETING_SECONDS
from jaxdist.paramserver.wire.security import CERTIFICATE, KEY, ROOT, TOKEN, Security
from jaxdist.rundir import record

ALIVE_SECONDS, SILENT_SECONDS = 1.0, 30.0
"""How often a command says that it lives, and after how long a silent one counts as lost."""
MAX_LINE = 1 << 20
_MOST_STRANGERS = 16
_LANE = 9
"""Says in the greeting that a connection is none of the run's messages."""


class Line:
    """One connection, on which either end sends JSON objects."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel, self._heard, self._lock = channel, b"", threading.Lock()

    def say(self, **message: Any) -> None:
        """Send a message; OSError if the other end is gone."""
        with self._lock:
            self._channel.sendall(json.dumps(message).encode() + b"\n")

    def hear(self) -> dict[str, Any]:
        """Return the next message; {} once the other end is gone, silent for long, or says something else."""
        with contextlib.suppress(OSError, ValueError):
            while b"\n" not in self._heard:
                data = self._channel.recv(65536)
                if not data or len(self._heard) > MAX_LINE:
                    return {}
                self._heard += data
            line, _, self._heard = self._heard.partition(b"\n")
            content = json.loads(line)
            return content if isinstance(content, dict) else {}
        return {}

    def close(self) -> None:
        """End the connection: the other end hears nothing more."""
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)


def facts_of(experiment: pathlib.Path) -> dict[str, str | None]:
    """Return what must be equal on all machines of a run: versions, the code of the package, and the experiment."""
    package = hashlib.sha256()
    for path in sorted(pathlib.Path(__file__).parents[2].rglob("*.py")):
        package.update(path.read_bytes())
    return {
        **{f"version of {name}": version for name, version in record.versions().items()},
        "code of jaxdist": package.hexdigest()[:12],
        "experiment file": hashlib.sha256(experiment.read_bytes()).hexdigest()[:12],
    }


def difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """Return the sentence on facts of a machine that joins which differ from those of the run; "" if none does."""
    wrong = [name for name in sorted({*theirs, *ours}) if theirs.get(name) != ours.get(name)]
    if not wrong:
        return ""
    named = ", ".join(f"{name} is {theirs.get(name)} there and {ours.get(name)} in the run" for name in wrong)
    return f"All machines of a run must run the same; {named}. Make them equal and join again."


@dataclasses.dataclass(eq=False)
class Guest:
    """A command that is connected.

    Attributes:
      line: the connection.
      names: the processes that it keeps, which may become fewer and more.
      host: of a machine of `ps.hosts`; "" for one that joined.
      lost: whether the connection ended without a word.
    """

    line: Line
    names: list[str]
    host: str = ""
    lost: bool = False


class Admission:
    """Takes in commands while it is open. `deaths` and the like are called by the thread that watches the run.

    The `door` of the spec says where to listen; `security` is that of the run, not of one attempt. `first_worker` is
    the number of the first worker that joins.
    """

    def __init__(self, spec: Spec, directory: pathlib.Path, security: Security, *, first_worker: int) -> None:
        self.spec, self._directory, self._security = spec, directory, security
        self.guests: list[Guest] = []
        self._next, self._lock = first_worker, threading.RLock()
        self._deaths: list[messages.Died] = []
        self._leaves = 0
        self._strangers = threading.BoundedSemaphore(_MOST_STRANGERS)
        self._tls = streams.tls_of(security)
        self._facts: dict[str, str | None] = {}
        self.own: list[str] = []
        """The workers of the crew of this machine."""
        self._listeners: list[socket.socket] = []

    def open(self) -> None:
        """Begin to listen; OSError if the port is in use."""
        here, address = self.spec.door
        self._facts = facts_of(pathlib.Path(self.spec.experiment))
        local = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listeners.append(local)
        local.bind(f"\0{here}")  # a name without a file: it ends with this process
        local.listen()
        if address:
            host, _, port = address.rpartition(":")
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._listeners.append(socket.create_server((host.strip("[]"), int(port)), family=family))
        for listener in self._listeners:
            threading.Thread(target=self._accept, args=(listener,), daemon=True, name="jaxdist-door").start()

    def close(self, text: str = "The run has ended.") -> None:
        """Tell all commands that the run is over, and listen no more."""
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        with self._lock:
            guests, self.guests = self.guests, []
        for guest in guests:
            with contextlib.suppress(OSError):
                guest.line.say(over=text)
            guest.line.close()

    # What the thread that watches the run asks for.

    def deaths(self) -> list[messages.Died]:
        """Return the processes that ended since the last call."""
        with self._lock:
            found, self._deaths = self._deaths, []
        return found

    def leaves(self) -> int:
        """Return how many workers of this machine's crew are asked to leave, since the last call."""
        with self._lock:
            found, self._leaves = self._leaves, 0
        return found

    def lost_hosts(self) -> list[Guest]:
        """Return the machines of `ps.hosts` that were lost since the last call, with their processes."""
        with self._lock:
            found = [guest for guest in self.guests if guest.lost and guest.host]
            self.guests = [guest for guest in self.guests if not guest.lost]
        return found

    def tell_missed(self) -> None:
        """Tell commands which of their processes the scheduler misses: they may have no directory in common."""
        with self._lock:
            guests = list(self.guests)
        for guest in guests:
            missed = [name for name in guest.names if run_folder.take_silent(self._directory, name)]
            if missed:
                with contextlib.suppress(OSError):
                    guest.line.say(missed=missed)

    def move(self, name: str, address: str) -> None:
        """Tell all processes of the run that `name` listens at `address` from now on."""
        peer_addresses.announce(self._directory, name, address)
        with self._lock:
            guests = list(self.guests)
        for guest in guests:
            with contextlib.suppress(OSError):
                guest.line.say(moved={name: address})

    def own_host(self) -> str:
        """Return the address at which the processes of this machine listen."""
        return self.spec.peers[OBSERVER].rpartition(":")[0]

    # Connections.

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # closed at the end
            while True:
                channel, _ = listener.accept()
                threading.Thread(target=self._serve, args=(channel,), daemon=True, name="jaxdist-guest").start()

    def _serve(self, channel: socket.socket) -> None:
        with channel, contextlib.suppress(OSError, greeting.Refused):
            local = channel.family == socket.AF_UNIX
            if not self._strangers.acquire(blocking=False):
                return
            try:
                channel.settimeout(GREETING_SECONDS)
                known = _check_user(channel) if local else self._greet(channel)
            finally:
                self._strangers.release()
            known.settimeout(SILENT_SECONDS)
            self._talk(Line(known), local=local)

    def _greet(self, channel: socket.socket) -> socket.socket:
        if self._tls is not None:
            channel = self._tls.listening.wrap_socket(channel, server_side=True)
        challenged = greeting.challenge()
        channel.sendall(challenged)
        welcome, lane = greeting.check(self._security.token, challenged, receive(channel, greeting.ANSWER_BYTES))
        channel.sendall(welcome)
        if lane != _LANE:
            raise greeting.Refused("This port is for commands that join the run.")
        return channel

    def _talk(self, line: Line, *, local: bool) -> None:
        match line.hear():
            case {"hello": "join"}:
                self._take_in(line, local=local)
            case {"hello": "leave", "count": int() as count}:
                line.say(**self._lower(count))
            case {"hello": "machine", "host": str() as host}:
                names = self._names_of(host)
                if names:
                    self._stay(Guest(line, names, host))
                else:
                    line.say(names=[])

    def _take_in(self, line: Line, *, local: bool) -> None:
        # Of this machine, a command gets all that its workers need, whatever the variables in its own environment say.
        certificates = {name: os.environ.get(name, "") for name in (CERTIFICATE, KEY, ROOT)}
        known = hidden_settings.for_other_machines() | certificates
        secrets = {"token": self._security.token, "secrets": known} if local else {}
        spec = dataclasses.replace(self.spec, peers=dict(peer_addresses.Addresses(self.spec.peers, self._directory)))
        line.say(spec=dataclasses.asdict(spec), folder=os.getcwd(), **secrets)
        match line.hear():
            case {"addresses": [*given], "facts": dict() as facts}:
                if wrong := difference(facts, self._facts):
                    line.say(error=wrong)
                    return
                self._stay(Guest(line, self._enrol([str(each) for each in given])))

    def _enrol(self, given: Sequence[str]) -> list[str]:
        """Return the names of new workers at these addresses; a number is never used again."""
        with self._lock:
            names = [worker_name(self._next + number) for number in range(len(given))]
            self._next += len(given)
        for name, address in zip(names, given):
            peer_addresses.announce(self._directory, name, address)
        return names

    def _names_of(self, host: str) -> list[str]:
        """Return the processes that run on a machine, as far as they were not placed elsewhere."""
        known = peer_addresses.Addresses(self.spec.peers, self._directory)
        at_start = [name for name, address in self.spec.peers.items() if address.rpartition(":")[0] == host]
        with self._lock:
            self.guests = [guest for guest in self.guests if guest.host != host]  # it came back before it was missed
        return [name for name in at_start if known[name] == self.spec.peers[name]]

    def _stay(self, guest: Guest) -> None:
        """Listen to a command until it goes."""
        with self._lock:
            self.guests.append(guest)
        guest.line.say(names=guest.names)
        said: dict[str, Any] = {}
        while message := guest.line.hear():
            said = message
            match message:
                case {"died": str() as name, "boot": int() as boot}:
                    self._note_death(name, boot)
                case {"left": [*names]}:
                    guest.names[:] = [name for name in guest.names if name not in names]
        guest.lost = "bye" not in said
        with self._lock:
            for name in guest.names:
                self._note_death(name, time.time_ns())
            if not guest.host or not guest.lost:
                self.guests = [each for each in self.guests if each is not guest]

    def _note_death(self, name: str, boot: int) -> None:
        with self._lock:
            self._deaths.append(messages.Died(name, boot))

    def _lower(self, count: int) -> dict[str, Any]:
        """Have workers leave, the newest first; return the answer."""
        with self._lock:
            joined = [guest for guest in self.guests if not guest.host]
            there = sum(len(guest.names) for guest in joined) + len(self.own)
            if not 0 < count < there:
                return {
                    "error": f"A run keeps at least one worker; this one has {there}, so {count} cannot leave. To end "
                    "all of them, end the run."
                }
            left = count
            for guest in reversed(joined):
                names = guest.names[max(len(guest.names) - left, 0) :]
                left -= len(names)
                with contextlib.suppress(OSError):
                    guest.line.say(leave=names)
            self._leaves += left
        return {"left": count}


def _check_user(channel: socket.socket) -> socket.socket:
    """Return the connection if the same user is at its other end."""
    user = struct.unpack("3i", channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))[1]
    if user != os.getuid():
        raise greeting.Refused("Another user.")
    return channel


def receive(channel: socket.socket, count: int) -> bytes:
    """Return exactly `count` bytes; OSError if there are fewer."""
    data = b""
    while len(data) < count:
        part = channel.recv(count - len(data))
        if not part:
            raise ConnectionResetError("The other end closed the connection.")
        data += part
    return data


@contextlib.contextmanager
def knock(door: tuple[str, str], security: Security) -> Iterator[Line]:
    """Connect to the door of a run: to the socket of this machine, or else to its port.

    Raises:
      UserError: no run is there, or the token is wrong.
    """
    here, address = door
    with contextlib.ExitStack() as stack:
        try:
            channel = _connect_here(here) if here else _connect_there(address, security)
        except (OSError, ssl.SSLError) as error:
            where, why = f"at {address}" if address else "on this machine", str(error.strerror or error).rstrip(".")
            raise UserError(
                f"The run cannot be reached {where}: {why}. Join a run that is training by its directory on the "
                f"machine that started it, or by its address, with its token ({TOKEN}), or certificates where it has "
                f"some ({CERTIFICATE}, {KEY}, {ROOT})."
            ) from error
        except greeting.Refused as error:
            raise UserError(
                f"The run at {address} did not accept the token, or is not one of this version of jaxdist. Set "
                "JAXDIST_PS_TOKEN to that of the run."
            ) from error
        stack.enter_context(channel)
        channel.settimeout(None)
        yield Line(channel)


def _connect_here(name: str) -> socket.socket:
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        channel.connect(f"\0{name}")
    except OSError:
        channel.close()
        raise
    return channel


def _connect_there(address: str, security: Security) -> socket.socket:
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    channel = socket.create_connection((host, int(port)), timeout=GREETING_SECONDS)
    try:
        tls = streams.tls_of(security)
        if tls is not None:
            channel = tls.calling.wrap_socket(channel, server_hostname=host)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # a machine that is lost sends no reset
            channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * SILENT_SECONDS))
        challenged = receive(channel, greeting.CHALLENGE_BYTES)
        answer, expected = greeting.answer(security.token, challenged, _LANE)
        channel.sendall(answer)
        try:
            greeting.compare(receive(channel, greeting.WELCOME_BYTES), expected)
        except OSError as error:  # it closes the connection when the proof is wrong
            raise greeting.Refused(str(error)) from error
    except BaseException:
        channel.close()
        raise
    return channel
