"""Ports for servers of tests."""

import random
import socket


def free_port():
    """A port that nothing listens on, below those that the system gives to clients: one of these could take it away."""
    while True:
        port = random.SystemRandom().randint(10_000, 30_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
