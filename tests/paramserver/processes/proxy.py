"""A bad network between the processes of a run: every message passes a proxy that may lose it or deliver it twice."""

import contextlib
import random
from concurrent import futures

import grpc

from jaxdist.paramserver.processes import crew, run_folder
from jaxdist.paramserver.run import start
from jaxdist.paramserver.wire import streams

SECONDS = 20.0


class Proxy:
    """A proxy of the process at `target`: the sender is told that all has arrived, whatever happened to it."""

    def __init__(self, target, *, lost, repeated, seed):
        self._lost, self._repeated, self._random = lost, repeated, random.Random(seed)
        self.passed = self.lost = self.repeated = 0
        self._channel = grpc.insecure_channel(target, options=streams._OPTIONS)
        self._call = self._channel.stream_unary(streams.METHOD)
        self._server = grpc.server(futures.ThreadPoolExecutor(8), options=streams._OPTIONS)
        service, method = streams.METHOD[1:].split("/")
        handler = grpc.stream_unary_rpc_method_handler(self._deliver)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def _deliver(self, blocks, context):
        blocks, drawn = list(blocks), self._random.random()
        times = 0 if drawn < self._lost else 2 if drawn < self._lost + self._repeated else 1
        self.passed += 1
        self.lost += times == 0
        self.repeated += times == 2
        secret = [pair for pair in context.invocation_metadata() if pair[0] == streams._METADATA]
        for _ in range(times):
            with contextlib.suppress(grpc.RpcError):  # a process that is away
                self._call(iter(blocks), timeout=SECONDS, metadata=secret)
        return b""

    def close(self):
        self._server.stop(None)
        self._channel.close()


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
        return connect(peers=seen_by(run_folder.OBSERVER, peers), **others)

    monkeypatch.setattr(start, "_place", placed)
    monkeypatch.setattr(crew, "command", started)
    monkeypatch.setattr(streams, "Wire", connected)
    try:
        yield proxies
    finally:
        monkeypatch.undo()
        for proxy in proxies.values():
            proxy.close()
