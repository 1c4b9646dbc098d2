"""The disk of a simulated run: log, files and boot numbers. Records may be written in part, and files not at all."""

import zlib
from collections.abc import Callable

from jaxdist.paramserver.protocol import messages
from jaxdist.paramserver.simulator.fault_rates import Faults, Hardware
from jaxdist.paramserver.simulator.seeded_time import SeededTime
from jaxdist.paramserver.wire import encoding, log_frames

SLOWEST = 1.5


class Death(BaseException):
    """The process died at this moment. No code of production catches it."""


class Disk:
    """What the processes of a run share on disk."""

    def __init__(self, timeline: SeededTime, faults: Faults, hardware: Hardware) -> None:
        self._timeline, self._faults, self._hardware = timeline, faults, hardware
        self.log, self._frames = bytearray(), log_frames.LogFrames()
        self.files: dict[str, bytes] = {}
        self.boots: dict[str, int] = {}

    def _chance(self, share: float) -> bool:
        return bool(share) and self._timeline.now < self._faults.until and self._timeline.rng.random() < share

    def records(self) -> list[messages.Message]:
        """Return the records of the log; an incomplete one is removed before anything is appended after it."""
        self._frames = log_frames.LogFrames()
        records = [encoding.decode(record) for record in self._frames.read(bytes(self.log))]
        del self.log[self._frames.size :]
        return records

    def sync_seconds(self) -> float:
        """Return how long it takes until a log record is durable."""
        seconds = self._timeline.rng.uniform(*self._hardware.fsync_seconds)
        return seconds + self._slowness()

    def _slowness(self) -> float:
        return self._timeline.rng.uniform(0.0, SLOWEST) if self._chance(self._faults.disk_slow) else 0.0

    def append(self, record: messages.Message, note: Callable[[], None]) -> None:
        """Append a record and call `note`; or die before, in the middle of it, or after it."""
        data, rng = self._frames.frame(encoding.to_bytes(record)), self._timeline.rng
        crash = self._chance(self._faults.crash_at_append)
        if crash and rng.random() < 0.7:
            self.log += data[: rng.randrange(len(data))]  # before the fsync: any part may have reached the disk
            raise Death
        self.log += data
        note()
        if crash:
            raise Death

    def replace(self, record: messages.Message, note: Callable[[], None]) -> None:
        """Replace the log by a record and call `note`; or die before it or after it."""
        crash = self._chance(self._faults.crash_at_append)
        if crash and self._timeline.rng.random() < 0.5:
            raise Death  # before the rename: the log is still the old one
        self._frames = log_frames.LogFrames()
        self.log = bytearray(self._frames.frame(encoding.to_bytes(record)))
        note()
        if crash:
            raise Death

    def write(
        self,
        name: str,
        content: messages.Message,
        *,
        lives: Callable[[], bool],
        note: Callable[[], None],
        done: Callable[[int, str], None],
    ) -> None:
        """Write a file later and call `note`; then, if the process still lives, `done` with its CRC-32 and an error."""
        data, rng = encoding.to_bytes(content), self._timeline.rng
        full = self._chance(self._faults.disk_full)

        def finish() -> None:
            alive = lives()
            # A process that died meanwhile may have renamed the file, or not.
            if not full and (alive or rng.random() < 0.5):
                self.files[name] = data
                note()
            if alive:
                done(zlib.crc32(data), "no space left on device" if full else "")

        self._timeline.at(rng.uniform(0.001, 0.05) + self._slowness(), finish)

    def load(self, name: str, done: Callable[[object | None], None]) -> None:
        """Read a file later, then call `done` with its content; None if it is missing."""

        def finish() -> None:
            data = self.files.get(name)
            done(None if data is None else encoding.decode(data))

        self._timeline.at(self._timeline.rng.uniform(0.001, 0.02), finish)
