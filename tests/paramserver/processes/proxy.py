"""A bad network between the processes of a run: every message passes a proxy that may lose it or deliver it twice."""

import contextlib
import random
import socket
import threading

from jaxdist.paramserver.processes import crew, run_folder
from jaxdist.paramserver.protocol.settings import OBSERVER
from jaxdist.paramserver.run import start
from jaxdist.paramserver.wire import encoding, greeting, incoming, streams

SECONDS = 20.0


class Proxy:
    """A proxy of the process at `target`: the sender is told that all has arrived, whatever happened to it."""

    def __init__(self, target, *, lost, repeated, seed):
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._lost, self._repeated, self._random = lost, repeated, random.Random(seed)
        self.passed = self.lost = self.repeated = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open = {self._listener}
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):  # closed
            while True:
                caller, _ = self._listener.accept()
                threading.Thread(target=self._pass_on, args=(caller,), daemon=True).start()

    def _pass_on(self, caller):
        self._open.add(caller)
        with caller, contextlib.suppress(OSError, EOFError), socket.create_connection(self._target, SECONDS) as process:
            self._open.add(process)
            caller.sendall(receive(process, greeting.CHALLENGE_BYTES))
            answer = receive(caller, greeting.ANSWER_BYTES)
            process.sendall(answer)
            caller.sendall(receive(process, greeting.WELCOME_BYTES))
            process.settimeout(None)
            threading.Thread(target=close_with, args=(process, caller), daemon=True).start()
            self._pass_messages(caller, process, answer[greeting.CHALLENGE_BYTES] == incoming.BULK)

    def _pass_messages(self, caller, process, acknowledged):
        for number in range(1, 1 << 30):
            prefix = receive(caller, encoding.PREFIX_BYTES)
            message = prefix + receive(caller, encoding.declared_bytes(prefix) - len(prefix))
            drawn = self._random.random()
            times = 0 if drawn < self._lost else 2 if drawn < self._lost + self._repeated else 1
            self.passed += 1
            self.lost += times == 0
            self.repeated += times == 2
            process.sendall(times * message)
            if acknowledged:
                caller.sendall(incoming.ACK.pack(number))

    def close(self):
        for each in list(self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


def receive(connection, count):
    """Return the next `count` bytes; raise EOFError if the connection ends first."""
    data = bytearray()
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def close_with(process, caller):
    """Close the connection of the caller when the process closes its own; what it acknowledges is read and dropped."""
    with contextlib.suppress(OSError):
        while process.recv(1 << 16):
            pass
        caller.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def between_all(monkeypatch, *, lost, repeated):
    """Have all processes of the runs inside, the observer too, reach each other through proxies; yield those."""
    proxies, place, command, connect = {}, start._place, crew.command, streams.Wire

    def placed(*arguments):
        keeper, peers, security = place(*arguments)
        for seed, (name, address) in enumerate(sorted(peers.items())):
            proxies[name] = Proxy(address, lost=lost, repeated=repeated, seed=seed)
        return keeper, peers, security

    def seen_by(name, peers):
        return {other: peers[name] if other == name else proxies[other].address for other in peers}

    def started(name, directory):
        spec = run_folder.Spec.read(directory / run_folder.SPEC_NAME)
        spec.peers.update(seen_by(name, spec.peers))
        path = directory / f"{name.replace('/', '-')}.json"
        spec.write(path)
        return [*command(name, directory)[:-1], str(path)]

    def connected(*, peers, **others):
        return connect(peers=seen_by(OBSERVER, peers), **others)

    monkeypatch.setattr(start, "_place", placed)
    monkeypatch.setattr(crew, "command", started)
    monkeypatch.setattr(streams, "Wire", connected)
    try:
        yield proxies
    finally:
        monkeypatch.undo()
        for proxy in proxies.values():
            proxy.close()
