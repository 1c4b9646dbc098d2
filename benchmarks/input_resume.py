"""How many examples a run that stops on 4 hosts and continues on 2 repeats and loses: ours and others.

`python input_resume.py SIDE` prints one JSON object. Each side trains 30 steps of an epoch of 1,000 examples on 4
hosts, saves its state, restores it on 2 hosts and finishes the epoch. The others have one state per host; the first two
are restored, as in a job in which each host finds its own file.
"""

import collections
import json
import sys
from collections.abc import Callable

NUM_EXAMPLES, HOST_BATCH, STEPS_BEFORE = 1000, 4, 30


def ours() -> list[int]:
    import numpy as np

    from jaxdist.data import ArraySource, Loader

    source, seen, position = ArraySource({"id": np.arange(NUM_EXAMPLES)}), [], None
    for num_hosts, num_steps in ((4, STEPS_BEFORE), (2, NUM_EXAMPLES)):
        size = num_hosts * HOST_BATCH
        hosts = [
            iter(Loader(source, global_batch_size=size, seed=0, num_epochs=1, start=position,
                        rows=np.arange(host * HOST_BATCH, (host + 1) * HOST_BATCH)))
            for host in range(num_hosts)
        ]  # fmt: skip
        for _, made in zip(range(num_steps), zip(*hosts)):
            position = made[0].position
            seen += [int(i) for batch, _ in made for i in batch["id"][batch["mask"] == 1]]
    return seen


def grain() -> list[int]:
    import grain

    def make(host: int, num_hosts: int):
        return iter(
            grain.DataLoader(
                data_source=range(NUM_EXAMPLES),
                sampler=grain.samplers.IndexSampler(
                    NUM_EXAMPLES, num_epochs=1, seed=0, shuffle=True,
                    shard_options=grain.sharding.ShardOptions(host, num_hosts),
                ),
                operations=[grain.transforms.Batch(HOST_BATCH)],
            )
        )  # fmt: skip

    return resized(make, lambda iterator: iterator.get_state(), adapted_grain_state)


def adapted_grain_state(state: bytes, num_hosts: int) -> bytes:
    """The state names the number of shards and refuses another one; a user who resizes edits it."""
    values = json.loads(state)
    return json.dumps(
        {**values, "sampler": values["sampler"].replace("shard_count=4", f"shard_count={num_hosts}")}
    ).encode()


def torchdata() -> list[int]:
    import torch
    from torchdata.stateful_dataloader import StatefulDataLoader
    from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

    class Loader:
        def __init__(self, host: int, num_hosts: int):
            data = torch.arange(NUM_EXAMPLES)
            sampler = StatefulDistributedSampler(data, num_replicas=num_hosts, rank=host, shuffle=True, seed=0)
            self._loader = StatefulDataLoader(data, HOST_BATCH, sampler=sampler)
            self._iterator = None

        def set_state(self, state: dict) -> None:
            self._loader.load_state_dict(state)

        def get_state(self) -> dict:
            return self._loader.state_dict()

        def __iter__(self):
            return self

        def __next__(self):
            if self._iterator is None:
                self._iterator = iter(self._loader)
            return next(self._iterator)

    return resized(Loader, lambda loader: loader.get_state(), lambda state, num_hosts: state)


def resized(make: Callable, get_state: Callable, adapt: Callable) -> list[int]:
    seen: list[int] = []
    hosts = [make(host, 4) for host in range(4)]
    for _ in range(STEPS_BEFORE):
        seen += [int(i) for host in hosts for i in next(host)]
    states = [get_state(host) for host in hosts]
    for host in range(2):
        iterator = make(host, 2)
        iterator.set_state(adapt(states[host], 2))
        seen += [int(i) for batch in iterator for i in batch]
    return seen


if __name__ == "__main__":
    counts = collections.Counter({"ours": ours, "grain": grain, "torchdata": torchdata}[sys.argv[1]]())
    repeated = sum(count - 1 for count in counts.values())
    print(json.dumps({"repeated": repeated, "lost": NUM_EXAMPLES - len(counts)}))
