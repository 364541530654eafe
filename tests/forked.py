"""Processes of their own for tests, without the seconds that importing a framework takes.

`start("recipes.train", "--epochs=1")` is `python -m recipes.train --epochs=1`, but a copy
(fork) of a process that has imported Keras and TensorFlow and done nothing else: no device is
known, no thread runs, no flag of XLA is read. So each copy chooses its devices itself.
"""

import atexit
import contextlib
import functools
import json
import os
import pathlib
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent


class Process:
    """A started copy, with the part of `subprocess.Popen` that tests use."""

    def __init__(self, pid, folder):
        self.pid = pid
        self.returncode = None
        self._folder = folder

    def poll(self):
        if self.returncode is None:
            self.returncode = _ask({"poll": self.pid})
        return self.returncode

    def send_signal(self, number):
        # Its number is not given to another one before `poll` has seen its end.
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=600):
        """`(standard output, standard error)`, when it has ended.

        Raises:
            subprocess.TimeoutExpired: if it runs for `timeout` seconds more.
        """
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.02)
        return tuple((self._folder / name).read_text() for name in ("out", "err"))


def start(module, *arguments, cwd=ROOT, **environment):
    """Starts `python -m module *arguments`.

    Args:
        module: name of a module, which runs as `__main__`.
        arguments: of the command line.
        cwd: folder that it runs in.
        environment: what it has besides this process's variables.
    """
    folder = pathlib.Path(tempfile.mkdtemp(dir=_folder()))
    for name in ("out", "err"):  # It may be ended before it opens them.
        (folder / name).touch()
    command = {
        "module": module,
        "arguments": list(map(str, arguments)),
        "cwd": str(cwd),
        "environment": {**os.environ, "PYTHONPATH": str(ROOT), **environment},
        "folder": str(folder),
    }
    return Process(_ask(command), folder)


@contextlib.contextmanager
def reserved_address():
    """`HOST:PORT` where JAX's coordinator can listen, and nobody else meanwhile."""
    # Of JAX's kind, on all addresses. Both sockets allow the other, but this one never listens.
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.socket(family) as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            reserved.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        reserved.bind(("", 0))
        yield f"127.0.0.1:{reserved.getsockname()[1]}"


@functools.cache
def _folder():
    folder = tempfile.mkdtemp(prefix="forked_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def _original():
    original = subprocess.Popen(
        [sys.executable, "-m", "tests.forked"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        # Linear algebra of NumPy would start threads when it is imported.
        env={**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
    )

    def end():
        original.stdin.close()  # It ends where its input does.
        original.wait()
        original.stdout.close()

    atexit.register(end)
    return original


def _ask(request):
    original = _original()
    original.stdin.write(json.dumps(request) + "\n")
    original.stdin.flush()
    return json.loads(original.stdout.readline())


def _serve():
    """Answers requests; returns in each copy, with its command."""
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            threads = pathlib.Path("/proc/self/task")
            if threads.exists() and len(list(threads.iterdir())) > 1:
                sys.exit("Expected no threads in a process that is copied.")
            answer = os.fork()
            if not answer:
                return request
        print(json.dumps(answer), flush=True)
    return None


def _become(command):
    """Makes this copy what a new process would be."""
    folder = pathlib.Path(command["folder"])
    for number, (name, mode) in enumerate(
        ((os.devnull, os.O_RDONLY), ("out", os.O_WRONLY), ("err", os.O_WRONLY))
    ):
        file = os.open(folder / name, mode | (os.O_CREAT if number else 0))
        os.dup2(file, number)
        os.close(file)
    os.chdir(command["cwd"])
    os.environ.clear()
    os.environ.update(command["environment"])
    sys.argv = [command["module"], *command["arguments"]]
    runpy.run_module(command["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    import keras  # noqa: F401
    import numpy as np  # noqa: F401
    import tensorflow as tf  # noqa: F401 - With JAX the recipes' data need it.

    import diagconv_tf  # noqa: F401

    ours = _serve()
    if ours is not None:
        _become(ours)
