"""A copied process is what a new one would be."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests import forked

# A law of the tests' own means, which knows no backend.
pytestmark = pytest.mark.backends("tensorflow")


def test_it_is_told_what_a_new_process_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("GIVEN_LATER", "yes")
    process = forked.start("tests.forked_probe", "a", "b c", cwd=tmp_path, AND_THIS="too")
    output, errors = process.communicate()
    command = [sys.executable, "-m", "tests.forked_probe", "a", "b c"]
    environment = {**os.environ, "PYTHONPATH": str(forked.ROOT), "AND_THIS": "too"}
    new = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert process.returncode == new.returncode == 3
    assert json.loads(output) == json.loads(new.stdout)
    assert errors == new.stderr == "to standard error\n"


def test_it_can_be_ended():
    process = forked.start("tests.forked_probe", "wait")
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == -signal.SIGTERM
    process.kill()  # It has gone.


def test_two_run_at_once():
    first, second = (forked.start("tests.forked_probe", "wait") for _ in range(2))
    assert first.poll() is second.poll() is None
    second.kill()
    second.communicate()
    assert first.poll() is None
    first.kill()
    first.communicate()
    assert first.returncode == second.returncode == -signal.SIGKILL
