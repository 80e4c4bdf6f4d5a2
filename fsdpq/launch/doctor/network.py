"""Whether ranks of this machine find each other: its own name, and ports that can be reached.

The launcher lets ranks meet on 127.0.0.1; gloo and NCCL look for the address of the machine's name.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence

from fsdpq.launch.doctor.finding import FAIL, OK, WARN, Finding
from fsdpq.launch.machine.gpus import GpuFacts

TIMEOUT_S = 2.0


def find_network(_gpus: Sequence[GpuFacts] = ()) -> Iterator[Finding]:
    """Tries a port of the machine, by its loopback address and by its name."""
    problem = connect_problem("127.0.0.1")
    if problem:
        value = f"a port of 127.0.0.1 cannot be reached: {problem}"
        remedy = (
            "bring the loopback interface up (`ip link set lo up`), and allow it in the firewall"
        )
        yield Finding("network", "ports", FAIL, value, remedy)
    else:
        yield Finding("network", "ports", OK, "ranks of this machine reach each other")
    name = socket.gethostname()
    problem = connect_problem(name)
    if problem:
        value = f"the machine's own name `{name}` cannot be reached: {problem}"
        remedy = (
            f"add `127.0.1.1 {name}` to /etc/hosts, or set GLOO_SOCKET_IFNAME and "
            "NCCL_SOCKET_IFNAME to the interface that ranks use"
        )
        yield Finding("network", "name", WARN, value, remedy)


def connect_problem(host: str) -> str:
    """Returns why a listener of this machine cannot be reached as ``host``, empty where it can."""
    try:
        address = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
        with socket.create_server(("0.0.0.0", 0)) as server:  # noqa: S104  closed again at once
            server.settimeout(TIMEOUT_S)
            port = server.getsockname()[1]
            with socket.create_connection((str(address), port), timeout=TIMEOUT_S):
                server.accept()[0].close()
    except OSError as error:
        return error.strerror or str(error)
    return ""
