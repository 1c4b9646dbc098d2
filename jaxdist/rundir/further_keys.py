"""The keys of `run.json` beside those of its contract, as far as this package reads them."""

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict


class RecordedBest(TypedDict):
    """The best value of the watched metric."""

    metric: str
    value: float | None
    step: int


class RecordedGit(TypedDict):
    """The commit of the experiment file, and whether there were changes that are not in it."""

    commit: str
    dirty: bool


class RecordedChange(TypedDict):
    """A restart, join or leave: the newest step before it, how many processes there were from then on, its cost."""

    kind: str
    step: int
    processes: int
    seconds_lost: float | None


class RecordedExperiment(TypedDict):
    """The file of the experiment, what `--set` changed, and the hashes of the file and of those beside it."""

    file: str
    assignments: NotRequired[list[str]]
    hashes: NotRequired[Mapping[str, str]]


class RecordedField(TypedDict):
    """An array of a batch."""

    shape: list[int]
    dtype: str


class RecordedBatch(TypedDict):
    """What is known about the batches."""

    fields: Mapping[str, RecordedField]
    steps_per_epoch: int | None
    num_examples: NotRequired[int]


class RecordedIdentity(TypedDict):
    """What the run directory belongs to; see `run.components.Identity`."""

    name: str
    model: str
    data: str
    seed: int
    init_from: NotRequired[str]


class RecordedChain(TypedDict, total=False):
    """The file of step hashes, and the steps that had other bits when they were made again."""

    file: str
    unequal: list[Mapping[str, Any]]


class RecordedAudit(TypedDict, total=False):
    """The audits of a run, and what they found."""

    audits: int
    findings: list[Mapping[str, Any]]
    last_clean_step: int | None


class RecordedServer(TypedDict, total=False):
    """What a parameter server counted."""

    updates: int
    duplicates_refused: int
    fenced: int
    torn_pushes: int
    failovers: int
    rollbacks: int
    refused: int
    staleness: Mapping[str, int]


class FurtherKeys(TypedDict, total=False):
    """Each may be absent: not every kind of run writes all of them."""

    identity: RecordedIdentity
    init_from: Mapping[str, Any] | None
    experiment: RecordedExperiment | None
    batch: RecordedBatch
    best: RecordedBest | None
    changes: list[RecordedChange]
    checkpoint: int | None
    throughput: Mapping[str, float | None] | None
    cpu_threads: int | None
    jax_settings: Mapping[str, str] | None
    peak_memory_bytes: Mapping[str, int] | None
    started: str | None
    host: str | None
    git: RecordedGit | None
    data_files: Mapping[str, Any] | None
    chain: RecordedChain | None
    audit: RecordedAudit | None
    ps: RecordedServer
