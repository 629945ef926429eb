"""A rendezvous of all processes before JAX connects them.

JAX aborts a process whose peers do not join, without saying which are missing. So process 0 first
waits for the others at the same address, then tells them all to continue or what is wrong.
"""

import contextlib
import socket
import time

from lsjax.runtime.errors import UserError

_GO = "go"
_PATIENCE = 5  # seconds to wait longer than process 0 does, to hear from it what is wrong


def rendezvous(address: str, count: int, number: int, timeout: float) -> None:
    """Returns once processes 0 .. count - 1 have all called it.

    Args:
      address: host:port of process 0. The port is free again afterwards.
      count: number of processes.
      number: index of this process.
      timeout: seconds to wait.

    Raises:
      UserError: a process is missing or came twice, an index is out of range, or process 0's port
        cannot be opened or reached. The message says which.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout
    if number == 0:
        _call(int(port), count, deadline, timeout)
    else:
        _answer(host.strip("[]"), int(port), number, deadline, timeout)


def _call(port: int, count: int, deadline: float, timeout: float) -> None:
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(socket.create_server(("", port)))
        except OSError as error:
            raise UserError(
                f"port {port} of coordinator_address cannot be opened: {error}; choose another."
            ) from None
        present: dict[int, socket.socket] = {}
        verdict = _GO
        while len(present) < count - 1 and verdict == _GO:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = sorted(set(range(1, count)) - present.keys())
                verdict = (
                    f"waited {timeout:g} s, but of {count} processes these have not come: "
                    f"{', '.join(map(str, missing))}; start them with the same "
                    "coordinator_address and num_processes, or raise coordinator_timeout."
                )
                continue
            stack.enter_context(connection)
            number = _read(connection)
            if not number.isdecimal() or not 0 < int(number) < count:
                verdict = f"a process came as process_id {number}, but num_processes is {count}."
            elif int(number) in present:
                verdict = f"two processes came as process_id {number}; give each its own."
            present[int(number) if number.isdecimal() else -1] = connection
        for connection in present.values():
            with contextlib.suppress(OSError):
                connection.sendall(f"{verdict}\n".encode())
    if verdict != _GO:
        raise UserError(verdict)


def _answer(host: str, port: int, number: int, deadline: float, timeout: float) -> None:
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=1)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"waited {timeout:g} s, but process 0 is not at {host}:{port} ({error}); "
                    "start it with the same coordinator_address, or raise coordinator_timeout."
                ) from None
            time.sleep(0.1)
    with connection:
        connection.settimeout(max(deadline - time.monotonic(), 0) + _PATIENCE)
        connection.sendall(f"{number}\n".encode())
        verdict = _read(connection)
    if verdict != _GO:
        raise UserError(verdict or f"process 0 at {host}:{port} has ended; see what it says.")


def _read(connection: socket.socket) -> str:
    """Reads a line; returns "" if the other side is gone."""
    try:
        with connection.makefile(encoding="utf-8") as lines:
            return lines.readline().strip()
    except OSError:
        return ""
