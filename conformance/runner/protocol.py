"""One session with an implementation: a child process that answers lines of JSON (PROTOCOL.md).

A crash (the process ends, the answer is malformed, time or memory runs out) is an outcome of its own, and never taken
for a rejection. After one, `Session.ask` starts the process anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROTOCOL = 1
START_SECONDS = 120.0  # for a process to start and load its libraries
STOP_SECONDS = 5.0
LINE_LIMIT = 64 * 2**20  # bytes of one answer; larger tensors go to the file `out`
KILL_FACTOR = 10  # a process that takes so many times the memory that a case allows is ended
POLL_SECONDS = 0.1
STDERR_KEPT = 2000  # characters
MIB = 2**20

Json = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What came of a command: results, rejection, skipped, errored, or crash with body `reason` and `message`."""

    status: str
    body: Json = field(default_factory=dict)
    seconds: float = 0.0
    megabytes: float | None = None  # peak beyond the baseline; None: not measured


class StartError(Exception):
    """The implementation does not start, or not as the protocol wants it."""


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _tensor_fault(tensor: Any) -> str | None:
    if not isinstance(tensor, dict) or not {"dtype", "shape"} <= tensor.keys():
        return "a tensor needs dtype and shape"
    if not isinstance(tensor["dtype"], str):
        return "dtype is a string"
    if not isinstance(tensor["shape"], list) or not all(map(_count, tensor["shape"])):
        return "shape is a list of integers from 0"
    if tensor.keys() == {"dtype", "shape", "base64"}:
        return None if isinstance(tensor["base64"], str) else "base64 is a string"
    if tensor.keys() == {"dtype", "shape", "offset"}:
        return None if _count(tensor["offset"]) else "offset is an integer from 0"
    return "a tensor has dtype, shape and one of base64 and offset"


def fault(command: str, body: Any) -> str | None:
    """What is wrong with the parsed answer to `command`; the same rules as schemas/protocol.schema.json."""
    if not isinstance(body, dict):
        return "an answer is an object"
    status = body.get("status")
    keys = {
        "rejection": {"code": True, "where": False, "message": False},
        "skipped": {"reason": True},
        "errored": {"message": True},
    }
    if command == "start" and status != "results":
        return "start is answered with results"
    if isinstance(status, str) and status in keys:
        for key, needed in keys[status].items():
            if (needed or key in body) and not isinstance(body.get(key), str):
                return f"{status} has the string {key}"
        return None
    if status != "results":
        return "status is one of results, rejection, skipped, errored"
    if command == "start":
        if body.get("protocol") != PROTOCOL or type(body["protocol"]) is not int:
            return f"protocol is {PROTOCOL}"
        for key in ("implementation", "version"):
            if not isinstance(body.get(key), str):
                return f"start is answered with the string {key}"
        if not _strings(body.get("features")) or not _strings(body.get("operations")):
            return "features and operations are lists of strings"
        return None if "load" in body["operations"] else "operations has load"
    if command == "load":
        tensors = body.get("tensors")
        if not isinstance(tensors, dict):
            return "load is answered with the object tensors"
        return next((f"{name!r:.80}: {found}" for name in tensors if (found := _tensor_fault(tensors[name]))), None)
    if command == "product":
        if not isinstance(body.get("y"), dict) or "base64" not in body["y"]:
            return "product is answered with the tensor y, its base64 in place"
        return _tensor_fault(body["y"]) or (None if _count(body.get("grade")) else "grade is an integer from 0")
    return None


def parse_answer(command: str, line: bytes) -> Json:
    """The answer in a line; raises ValueError where it is malformed."""

    def constant(text: str) -> None:
        raise ValueError(f"{text} is not JSON")

    try:
        body = json.loads(line.decode("utf-8"), parse_constant=constant)
        json.dumps(body, ensure_ascii=False).encode("utf-8")  # raises UnicodeEncodeError, a ValueError, for surrogates
    except RecursionError:
        raise ValueError("nested too deep") from None
    found = fault(command, body)
    if found:
        raise ValueError(found)
    return dict(body)


# Memory, as Linux tells it ---------------------------------------------------------------------------------------------


def family(pid: int) -> list[int]:
    """`pid` and its descendants, as an entry point may be a script that starts the real program."""
    found, new = [pid], [pid]
    while new:
        children: list[int] = []
        for parent in new:
            with contextlib.suppress(OSError, ValueError):
                for task in os.listdir(f"/proc/{parent}/task"):
                    children += map(int, Path(f"/proc/{parent}/task/{task}/children").read_text().split())
        new = [child for child in children if child not in found]
        found += new
    return found


def resident(pid: int, key: str) -> int | None:
    """`VmRSS` or `VmHWM` of a process and its descendants in bytes; None where the system does not tell."""
    total = None
    for member in family(pid):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{member}/status").read_text().splitlines():
                if line.startswith(key + ":"):
                    total = (total or 0) + int(line.split()[1]) * 1024
    return total


def reset_peak(pid: int) -> bool:
    """Lets VmHWM begin anew; False where that is not permitted, so that peaks cannot be told apart."""
    try:
        for member in family(pid):
            Path(f"/proc/{member}/clear_refs").write_text("5")
    except OSError:
        return False
    return True


# The session -----------------------------------------------------------------------------------------------------------


class Session:
    """A conversation with the implementation that `command` starts; a context manager."""

    def __init__(self, command: list[str], start_seconds: float = START_SECONDS) -> None:
        self.command, self.start_seconds = command, start_seconds
        self.about: Json = {}  # the answer to start
        self.starts = 0
        self.asked = 0  # of the process that runs, or ran last
        self._process: subprocess.Popen[bytes] | None = None
        self._failed_starts = 0

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the process and asks who it is; raises StartError."""
        if self._failed_starts >= 3:
            raise StartError("the implementation could not be started three times in a row")
        try:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise StartError(f"{self.command[0]}: {error.strerror or error}") from None
        self.starts, self.asked = self.starts + 1, 0
        self._chunks: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._buffer, self._stderr = bytearray(), ""
        self._baseline: int | None = None
        for work in (self._read_stdout, self._read_stderr):
            threading.Thread(target=work, args=(self._process,), daemon=True).start()
        answer = self._exchange({"command": "start", "protocol": PROTOCOL}, self.start_seconds, None)
        if answer.status == "crash":
            self._failed_starts += 1
            raise StartError(f"no start: {answer.body['message']}")
        self._failed_starts = 0
        self.about = answer.body
        self._baseline = resident(self._process.pid, "VmRSS")

    def ask(self, request: Json, seconds: float, megabytes: int) -> Answer:
        """The answer to load, product or write within `seconds`; the peak of memory is measured against the state after start."""
        if self._process is None:
            try:
                self.start()
            except StartError as error:
                self._end()
                return Answer("crash", {"reason": "died", "message": str(error)})
        self.asked += 1
        return self._exchange(request, seconds, megabytes)

    def stop(self) -> None:
        """Says stop, which has no answer, and ends the process if it does not end by itself."""
        process = self._process
        if process is not None:
            with contextlib.suppress(OSError):
                assert process.stdin is not None
                process.stdin.write(b'{"command": "stop"}\n')
                process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
        self._end()

    def _read_stdout(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        chunks = self._chunks
        while chunk := process.stdout.read1(2**20):  # type: ignore[attr-defined]
            chunks.put(chunk)
        chunks.put(b"")  # the end

    def _read_stderr(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr is not None
        while chunk := process.stderr.read1(2**16):  # type: ignore[attr-defined]
            if process is self._process:
                self._stderr = (self._stderr + chunk.decode("utf-8", "replace"))[-STDERR_KEPT:]

    def _exchange(self, request: Json, seconds: float, megabytes: int | None) -> Answer:
        """Sends a line and waits for one."""
        process = self._process
        assert process is not None and process.stdin is not None
        # what comes before start is the answer to start, as nobody knows which of the two was first
        if request["command"] != "start" and (self._buffer or not self._chunks.empty()):
            return self._crash("malformed", "output, or the end, before a command was given", 0, None)
        measured = self._baseline is not None and megabytes is not None and reset_peak(process.pid)
        start = time.monotonic()
        with contextlib.suppress(OSError):  # of a process that has ended; what it said last is read below
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        scanned = 0
        while (end := self._buffer.find(b"\n", scanned)) < 0:
            scanned = len(self._buffer)
            passed = time.monotonic() - start
            peak = self._peak(measured)
            if megabytes is not None and peak is not None and peak > KILL_FACTOR * megabytes:
                return self._crash("memory", f"ended at {peak:.0f} MiB; {megabytes} MiB are allowed", passed, peak)
            if passed > seconds:
                return self._crash("timeout", f"no answer in {seconds:g} s", passed, peak)
            if scanned > LINE_LIMIT:
                return self._crash("malformed", f"an answer of more than {LINE_LIMIT} bytes", passed, peak)
            try:
                chunk = self._chunks.get(timeout=min(POLL_SECONDS, max(0.001, seconds - passed)))
            except queue.Empty:
                continue
            if not chunk:
                message = f"the process ended with status {self._status(process)}"
                return self._crash("died", f"{message} {self._last_words()}".strip(), time.monotonic() - start, None)
            self._buffer += chunk
        passed, peak = time.monotonic() - start, self._peak(measured)
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            body = parse_answer(request["command"], line)
        except ValueError as error:
            shown = line[:100].decode("utf-8", "replace")
            return self._crash("malformed", f"malformed answer ({error}): {shown!r}", passed, peak)
        return Answer(body["status"], body, passed, peak)

    def _peak(self, measured: bool) -> float | None:
        """MiB beyond the baseline since the peak was reset."""
        if not measured or self._process is None or self._baseline is None:
            return None
        peak = resident(self._process.pid, "VmHWM")
        return None if peak is None else max(0.0, (peak - self._baseline) / MIB)

    def _status(self, process: subprocess.Popen[bytes]) -> int | None:
        try:
            return process.wait(1)
        except subprocess.TimeoutExpired:
            return None  # it closed its output and lives on

    def _last_words(self) -> str:
        time.sleep(0.05)  # the other thread may still be reading them
        lines = self._stderr.strip().splitlines()
        return f"({lines[-1]:.200})" if lines else ""

    def _crash(self, reason: str, message: str, seconds: float, megabytes: float | None) -> Answer:
        self._end()
        return Answer("crash", {"reason": reason, "message": message}, seconds, megabytes)

    def _end(self) -> None:
        """Ends the process and what it started, if it is still there."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        process.wait()
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
