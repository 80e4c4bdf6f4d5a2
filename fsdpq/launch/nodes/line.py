"""A connection between two launchers: lines of JSON, and signs of life while nobody says anything.

A thread reads, and sends a sign every second, so that a launcher that is busy is not taken for one
that is lost. Nothing that is received is run or unpickled.
"""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import threading
import time
from typing import Any, cast

Message = dict[str, Any]

BEAT_S = 1.0
"""Time between two signs of life."""
MAX_BYTES = 64 * 10**6
"""A line that is longer is no launcher's."""

ENDED = "its launcher ended"
"""Why there is nobody where the process is gone."""

_SIGN = b"{}\n"


class Line:
    """One end of a connection.

    Args:
        connection: open.
        silence_s: seconds without a sign after which the other end counts as lost.

    Attributes:
        own_address: of this end.
        other_address: of the other one, as this machine reaches it.
        lost: why there is nobody at the other end, empty while there is.
    """

    def __init__(self, connection: socket.socket, *, silence_s: float) -> None:
        self.lost = ""
        self.own_address, self.other_address = _addresses(connection)
        self._socket = connection
        self._silence_s = silence_s
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._rest = b""
        self._sending = threading.Lock()
        self._closed = False
        connection.settimeout(BEAT_S / 4)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=self._serve, daemon=True, name="launcher-line").start()

    def send(self, message: Message) -> None:
        """Sends a message; nothing happens where the other end is lost."""
        self._send(json.dumps(message).encode() + b"\n")

    def receive(self, timeout_s: float = 0.0) -> Message | None:
        """Returns the next message, None where there is none within the time, or ever again."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return self._inbox.get(timeout=0.02) if timeout_s else self._inbox.get_nowait()
            except queue.Empty:
                if self.lost or time.monotonic() >= deadline:
                    return None

    def close(self) -> None:
        """Ends the connection; what was sent still arrives."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def _serve(self) -> None:
        with self._socket:
            self._listen()

    def _listen(self) -> None:
        heard = signed = time.monotonic()
        while not self.lost and not self._closed:
            now = time.monotonic()
            if now - signed >= BEAT_S:
                signed = now
                self._send(_SIGN)
            if self._read():
                heard = time.monotonic()
            elif not self.lost and time.monotonic() - heard > self._silence_s:
                self.lost = f"it was not heard from for {self._silence_s:g} s: it was switched "
                self.lost += "off, is stopped, or its network is cut"

    def _read(self) -> bool:
        """Waits a moment for bytes; returns whether any came."""
        try:
            received = self._socket.recv(1 << 16)
        except TimeoutError:
            return False
        except OSError as error:
            self.lost = self.lost or _broken(error)
            return False
        if not received:
            self.lost = self.lost or ENDED
            return False
        *lines, self._rest = (self._rest + received).split(b"\n")
        for line in lines:
            self._take(line)
        if len(self._rest) > MAX_BYTES:
            self.lost = "it does not speak as a launcher of fsdpq does"
        return True

    def _take(self, line: bytes) -> None:
        try:
            message: Any = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            self.lost = "it does not speak as a launcher of fsdpq does"
        elif message:
            self._inbox.put(cast("Message", message))

    def _send(self, content: bytes) -> None:
        with self._sending:
            try:
                view = memoryview(content)
                deadline = time.monotonic() + self._silence_s
                while view and not self.lost:
                    try:
                        view = view[self._socket.send(view) :]
                    except TimeoutError:
                        if time.monotonic() > deadline:
                            raise
            except OSError as error:
                self.lost = self.lost or _broken(error)


def _broken(error: OSError) -> str:
    """Returns in words why a connection is gone; of a process that is, the system tells either."""
    if isinstance(error, ConnectionResetError | BrokenPipeError):
        return ENDED
    return f"the connection broke ({error.strerror or error})"


def _addresses(connection: socket.socket) -> tuple[str, str]:
    try:
        return str(connection.getsockname()[0]), str(connection.getpeername()[0])
    except OSError:  # it is gone already, which the first reading finds
        return "", ""
