"""The server's socket, taken before the model is loaded: a port in use is known at once, not after a minute."""

import contextlib
import socket
from collections.abc import Iterator

from lowbit.errors import InputError


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A bound socket. Raises InputError where that is not possible."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(found[0], found[1])
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(found[4])
    except (OSError, OverflowError) as error:
        raise InputError(
            f"cannot listen on {host} port {port}: {error}. Choose another with --port or --host."
        ) from error
    with bound:
        yield bound
