"""What a process that a test starts needs in order to find the helpers of these tests."""

import multiprocessing
import os
import socket
from pathlib import Path

TESTS = str(Path(__file__).parent)
PYTHONPATH = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), TESTS]))


def processes():
    """Children of a server that has torch imported: a kill costs a fraction of a second."""
    # Python 3.11's server looks for what it preloads on its own path, not on ours.
    os.environ["PYTHONPATH"] = PYTHONPATH
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["micro"])
    return context


def free_port() -> int:
    """One that nobody listens on now, of those that the system gives away."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]
