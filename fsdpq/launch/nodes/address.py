"""Where machines meet, and by which of its network interfaces a machine gets there."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from ipaddress import ip_address

import psutil

from fsdpq.errors import EnvironmentProblemError

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""What gloo and NCCL send through. gloo's own guess is the address of the host's name, which on
Debian is 127.0.1.1."""

NUM_PORTS = 64
"""Ports beyond the endpoint's that the ranks may meet at."""


@dataclass(frozen=True)
class Endpoint:
    """``launch.rdzv_endpoint``, looked up.

    Attributes:
        text: as the recipe has it.
        family: of the socket.
        address: as sockets take it; its first part is the IP address.
    """

    text: str
    family: socket.AddressFamily
    address: tuple[str, int]

    @property
    def port(self) -> int:
        """Port of the launchers."""
        return self.address[1]

    @property
    def own_host(self) -> str:
        """Where the first machine listens: at the address, or everywhere.

        Debian lets a machine's own name lead to 127.0.1.1: there no other machine comes.
        """
        return "" if ip_address(self.address[0]).is_loopback else self.address[0]


def find_endpoint(text: str) -> Endpoint:
    """Looks up ``host:port``.

    Raises:
        EnvironmentProblemError: nobody knows the host.
    """
    host, _, port = text.rpartition(":")
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except OSError:
        message = f"`launch.rdzv_endpoint`: the host `{host}` is not known"
        hint = "write the address of the first machine as all machines reach it, `10.0.0.1:29500`"
        raise EnvironmentProblemError(message, hint=hint) from None
    # One machine may have a name's addresses in another order: IPv4 comes first on all.
    family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    return Endpoint(text, family, (str(address[0]), int(port)))


def is_own(endpoint: Endpoint) -> bool:
    """Whether the endpoint is an address of this machine: then it can be listened on."""
    with socket.socket(endpoint.family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((endpoint.address[0], 0))
        except OSError:
            return False
    return True


def own_address(endpoint: Endpoint) -> str:
    """Returns the address by which this machine reaches the endpoint; nothing is sent.

    Raises:
        EnvironmentProblemError: there is no way there.
    """
    with socket.socket(endpoint.family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(endpoint.address)
            return str(probe.getsockname()[0])
        except OSError as error:
            message = f"`launch.rdzv_endpoint: {endpoint.text}` cannot be reached: {error.strerror}"
            hint = "check the network of this machine, and the address"
            raise EnvironmentProblemError(message, hint=hint) from None


def interface_of(address: str) -> str | None:
    """Returns the network interface that has ``address``, None where none has."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return name
    return None


def network_environment(address: str) -> dict[str, str]:
    """Returns the variables that keep gloo and NCCL on the interface with ``address``.

    What the user has set stays.
    """
    interface = interface_of(address)
    if interface is None:
        return {}
    return {name: interface for name in INTERFACE_VARIABLES if name not in os.environ}


def free_port(endpoint: Endpoint) -> int:
    """Returns the first free port beyond the endpoint's, for the ranks of one start.

    Raises:
        EnvironmentProblemError: none of `NUM_PORTS` is free.
    """
    first = endpoint.port + 1
    for port in range(first, min(first + NUM_PORTS, 2**16)):
        with socket.socket(endpoint.family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((endpoint.own_host, port))
            except OSError:
                continue
        return port
    message = f"no port from {first} on is free for the ranks"
    raise EnvironmentProblemError(message, hint="choose another port in `launch.rdzv_endpoint`")
