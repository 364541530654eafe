"""Addresses of this machine that no other program takes while tests run."""

import socket

_HELD = []


def held_address():
    """`HOST:PORT` where nobody listens, until gRPC does.

    A port that was found free and given back may be another's a moment later. This one stays
    bound; gRPC, by which JAX's processes meet, binds ports that are shared (`SO_REUSEPORT`).
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind(("127.0.0.1", 0))
    _HELD.append(held)  # To the end of this process.
    return f"127.0.0.1:{held.getsockname()[1]}"
