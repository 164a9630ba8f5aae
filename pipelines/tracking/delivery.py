"""Records on their way to a tracker that may be slow or away: nobody waits for it, and nothing is
lost.

A thread delivers them from a bounded queue. What could not be delivered is kept in a file, the
outbox: metrics are sent when the tracker answers again, files and registrations by the driver at
the end of the run, and where that fails too by the next start of the job.
"""

from __future__ import annotations

import json
import logging
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lidit.errors import one_line

RETRY_SECONDS = 15.0
QUEUE_LENGTH = 10_000
# a server that sends files on answers after its own upload: this long, and longer by size
FILE_SECONDS = 60.0
SLOWEST_UPLOAD = 5e6  # bytes per second
CLOSE_SECONDS = 120.0  # without anything delivered, beyond what the file on its way may take
CLOSE_AT_MOST = 600.0  # in all, beyond what the waiting files may take

log = logging.getLogger(__name__)
# Told apart by a key: "values" metrics, "artifact" a file or folder that goes into "folder",
# "register" a model that is made "from" such a folder, "whole" a model whose files are all sent,
# "image" a picture of a step, "picture" one that the description shows, "dataset".
Record = dict[str, Any]


class GoneError(Exception):
    """What was to be delivered is no longer on the disk."""


def patience(file: Path) -> float:
    """Seconds to wait for the answer to a file."""
    return FILE_SECONDS + _size(file) / SLOWEST_UPLOAD


def files_in(path: Path) -> list[Path]:
    """The file itself, or all of a folder."""
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


class Outbox:
    """Records for the tracker: in memory until they are delivered or the run is closed, then in a
    file.

    One line per record; a process's workers and driver share the file, one after the other.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        # lines added and neither delivered nor, for metrics, in the file
        self._pending: Counter[str] = Counter()
        self._delivered: set[str] = set()  # lines, but of metrics
        # lines that came into the file while they still waited for their turn
        self._ahead: set[str] = set()

    def add(self, record: Record) -> str:
        """Accept a record; its line in the file names it from here on."""
        line = json.dumps(record)
        with self._lock:
            self._pending[line] += 1
        return line

    def mark_sent(self, line: str, delivered: bool = True, all_of_it: bool = False) -> None:
        """A record is no longer pending. delivered: False where it went into the file and not to
        the tracker;
        all_of_it: once for all the times that it was added.
        """
        with self._lock:
            self._pending[line] -= 1
            if all_of_it or self._pending[line] <= 0:
                del self._pending[line]
            if delivered:
                self._delivered.add(line)

    def is_delivered(self, line: str) -> bool:
        return line in self._delivered and line not in self._pending

    def lines(self) -> list[str]:
        with self._lock:
            return self._read()

    def unsent(self) -> list[Record]:
        """The records that the tracker lacks, of this process and of those before it whose file can
        be read.
        """
        with self._lock:
            lines = dict.fromkeys(self._pending)
            with suppress(OSError):
                lines = dict.fromkeys([*self._read(), *lines])
        return [
            record for line in lines if not self.is_delivered(line) and (record := _parsed(line))
        ]

    def append(self, line: str) -> None:
        """Write one line, unless `write_pending` has written it before its turn."""
        with self._lock:
            if line not in self._ahead:
                self._append([line])

    def write_pending(self) -> None:
        """Write every pending record into the file: a kill from here on loses nothing."""
        with self._lock:
            here = set(self._read())
            if new := [line for line in self._pending if line not in here]:
                self._append(new)
            self._ahead = set(self._pending)

    def remove(self, done: set[str]) -> None:
        """Take lines out of the file, and the file away with its last line."""
        with self._lock:
            left = [line for line in self._read() if line not in done]
            if not left:
                self.path.unlink(missing_ok=True)
                return
            fresh = self.path.with_suffix(".new")
            fresh.write_text("".join(f"{line}\n" for line in left))
            fresh.replace(self.path)

    def _read(self) -> list[str]:
        return self.path.read_text(errors="replace").splitlines() if self.path.exists() else []

    def _append(self, lines: list[str]) -> None:
        with self.path.open("a") as file:
            file.write("".join(f"{line}\n" for line in lines))


class Delivery:
    """Sends records in order, from its own thread.

    send: brings one to the tracker; raises whatever it likes where it cannot, GoneError where
    nobody ever will.
    is_connected: whether there is a run to log into; its argument says whether this is the last
    chance. Never raises.
    everything: whether this process sends files and registrations of the outbox at its end, too.
    """

    def __init__(
        self,
        path: Path,
        send: Callable[[Record], None],
        is_connected: Callable[[bool], bool],
        everything: bool,
    ) -> None:
        self.outbox = Outbox(path)
        self._send, self._is_connected, self._everything = send, is_connected, everything
        # records as lines of the outbox; None ends
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._lost: set[str] = set()  # artifact folders that will never be whole
        self._given_up = False
        self._last_failure = -RETRY_SECONDS
        self._last_delivery = time.monotonic()
        self._file: Path | None = None  # on its way
        self._thread = threading.Thread(target=self._deliver, name="tracking", daemon=True)
        self._thread.start()

    def put(self, record: Record) -> None:
        full = self._queue.qsize() >= QUEUE_LENGTH
        if full and "values" in record:
            log.warning(
                "tracking falls behind, %d entries wait: %s dropped", QUEUE_LENGTH, _name(record)
            )
            return
        line = self.outbox.add(record)
        if not full:  # else it goes at the end, from the outbox
            self._queue.put(line)

    def close(self) -> None:
        """Wait until everything is delivered, or nothing arrives any more; what is left stays in
        the outbox.
        """
        try:
            self.outbox.write_pending()
        except OSError as error:
            log.warning("%s: cannot be written: %s", self.outbox.path, one_line(error, 200))
        self._queue.put(None)
        began = time.monotonic()
        waiting = sum(_size(file) for record in self.outbox.unsent() for file in _files(record))
        at_most = began + CLOSE_AT_MOST + waiting / SLOWEST_UPLOAD
        warn_at = began + RETRY_SECONDS
        while self._thread.is_alive():
            now, file = time.monotonic(), self._file
            transfer = patience(file) if file else 0.0
            if now > min(at_most, max(began, self._last_delivery) + CLOSE_SECONDS + transfer):
                break
            if now > warn_at:
                warn_at = math.inf
                log.warning("waiting for the tracker to take %s", file or "what is left")
            self._thread.join(timeout=0.2)
        self._given_up = self._thread.is_alive()
        if names := list(dict.fromkeys(_name(record) for record in self.outbox.unsent())):
            log.warning(
                "%s %.0f s: %s%s; kept in %s until the end of the run or the next start of this "
                "job",
                "the tracker is given up after"
                if self._given_up
                else "the tracker did not take everything in",
                time.monotonic() - began,
                ", ".join(names[:5]),
                f" and {len(names) - 5} more" if len(names) > 5 else "",
                self.outbox.path,
            )

    def abandon(self) -> None:
        """End the thread with nothing delivered: the job is refused before it began."""
        self._given_up = True
        self._queue.put(None)
        self._thread.join()

    # -- for `send` --------------------------------------------------------------------------------

    @contextmanager
    def sending(self, file: Path) -> Iterator[None]:
        """Around each file: `close` waits for it, and sees that it arrived."""
        self._file = file
        try:
            yield
            self._last_delivery = time.monotonic()
        finally:
            self._file = None

    def require_arrived(self, folder: str) -> None:
        """Raises ConnectionError while something for this artifact folder waits, GoneError where it
        never will come.
        """
        if folder in self._lost:
            raise GoneError(f"not all of {folder} was there to be sent")
        if any(record.get("folder") == folder for record in self.outbox.unsent()):
            raise ConnectionError(f"{folder} has not arrived yet")

    # -- the thread --------------------------------------------------------------------------------

    def _deliver(self) -> None:
        # a start that waits for the store's answer has not put anything yet
        self._is_connected(False)
        while (line := self._queue.get()) is not None:
            if self._given_up:
                return
            record = json.loads(line)
            try:
                if "values" in record:
                    self._send_metrics(record, line)
                    self.outbox.mark_sent(line, delivered=False)
                else:
                    self._attempt(record)
                    self.outbox.mark_sent(line)
            except Exception as error:  # see the module's promise
                self._last_failure = time.monotonic()
                log.warning(
                    "%s not tracked, tried again at the end: %s",
                    _name(record),
                    one_line(error, 200),
                )
        if self._given_up:
            return
        try:
            self._is_connected(True)
            self._flush_outbox(self._everything)
        except Exception as error:
            log.warning("%s: %s", self.outbox.path, one_line(error, 200))

    def _attempt(self, record: Record) -> None:
        if not self._is_connected(False):
            raise ConnectionError("the tracker has not answered yet")
        self._send(record)
        self._last_delivery = time.monotonic()

    def _send_metrics(self, record: Record, line: str) -> None:
        if (
            time.monotonic() - self._last_failure >= RETRY_SECONDS
            and self._flush_outbox()
            and self._log(record)
        ):
            return
        self.outbox.append(line)

    def _log(self, record: Record) -> bool:
        """Send one record of metrics. False when the tracker does not answer."""
        if not self._is_connected(False):
            return False
        try:
            self._attempt(record)
        except Exception as error:
            if time.monotonic() - self._last_failure >= RETRY_SECONDS:
                log.warning("metrics wait in %s: %s", self.outbox.path, one_line(error, 200))
            self._last_failure = time.monotonic()
            return False
        return True

    def _flush_outbox(self, everything: bool = False) -> bool:
        """Send what an outage left behind, oldest first. True when no metrics are left.

        everything: files and registrations too. They wait for the driver's end.
        """
        done: set[str] = set()
        answers = True
        for line in self.outbox.lines():
            if self._given_up:
                break
            record = _parsed(line)
            if not record:  # a kill while it was written; the resumed run logs this step again
                log.warning("%s: a torn line is left out", self.outbox.path)
                done.add(line)
            elif "values" in record:
                answers = answers and self._log(record)  # in order: none after one that is missing
                if answers:
                    done.add(line)
            elif self.outbox.is_delivered(line) or (everything and self._send_again(record, line)):
                done.add(line)
        if done:
            self.outbox.remove(done)
        return answers

    def _send_again(self, record: Record, line: str) -> bool:
        """True where it need not stay in the outbox."""
        try:
            self._attempt(record)
        except GoneError as error:
            log.warning("%s not tracked, and never will be: %s", _name(record), error)
            if "artifact" in record:
                self._lost.add(record["folder"])
        except Exception as error:
            log.warning("%s not tracked: %s", _name(record), one_line(error, 200))
            return False
        self.outbox.mark_sent(line, all_of_it=True)  # it was read after the last time it was logged
        return True


def _parsed(line: str) -> Record:
    """A line of the outbox; empty where it is torn."""
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _name(record: Record) -> str:
    for kind in ("artifact", "image", "picture", "dataset"):
        if kind in record:
            return f"{kind} {record[kind]}"
    if "whole" in record:
        return f"the model {record['whole']}"
    return f"registration of model {record['register']}" if "register" in record else "metrics"


def _files(record: Record) -> list[Path]:
    return [
        file
        for kind in ("artifact", "picture")
        if kind in record
        for file in files_in(Path(record[kind]))
    ]


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # gone since it was listed
        return 0
