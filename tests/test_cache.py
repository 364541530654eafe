"""The cache of contests: what is kept is found whole, whatever happens to the files."""

import json
import logging
import os
import pathlib
import subprocess
import sys

import pytest

from diagconv_tf.measurements import Measured
from diagconv_tf.tuning.cache import Cache, cache_folder

KEY = {"what": "workload", "spec": {"groups": 3}, "conditions": {"backend": "abacus"}}
OTHER = {**KEY, "spec": {"groups": 4}}
TIMES = {
    "a": Measured(1.0, 0.5, 1.5, 3, 0.25, samples=(0.5, 1.0, 1.5)),
    "b": Measured(error="no luck"),
}


def warnings(caplog):
    return [record for record in caplog.records if record.levelno >= logging.WARNING]


def files_of(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix == ".json")


def test_what_was_kept_is_read(tmp_path, caplog):
    cache = Cache(tmp_path / "new" / "folder")
    assert cache.read(KEY) == {}
    cache.write(KEY, TIMES)
    assert cache.read(KEY) == Cache(tmp_path / "new" / "folder").read(KEY) == TIMES
    assert cache.read(OTHER) == {}
    assert warnings(caplog) == []


def test_a_contest_replaces_another_whole(tmp_path):
    """Times of two contests are never mixed."""
    cache = Cache(tmp_path)
    cache.write(KEY, TIMES)
    cache.write(KEY, {"b": TIMES["a"], "c": TIMES["a"]})
    assert cache.read(KEY) == dict.fromkeys("bc", TIMES["a"])


def test_entries_and_clear(tmp_path):
    cache = Cache(tmp_path)
    (tmp_path / "notes.json").write_text("mine")
    assert list(cache.entries()) == []
    cache.write(KEY, TIMES)
    cache.write(OTHER, {})
    entries = {entry.key["spec"]["groups"]: entry for entry in cache.entries()}
    assert set(entries) == {3, 4}
    assert entries[3].measured == TIMES
    assert json.loads(json.dumps(entries[3].to_dict()))["measured"]["b"] == {"error": "no luck"}
    assert cache.clear() == 2
    assert cache.clear() == 0
    assert cache.read(KEY) == {}
    # Only its own files are removed.
    assert files_of(tmp_path) == ["notes.json"]


def test_where_it_is(tmp_path, monkeypatch):
    monkeypatch.delenv("DIAGCONV_CACHE_DIR", raising=False)
    assert "diagconv_tf" in str(cache_folder())
    monkeypatch.setenv("DIAGCONV_CACHE_DIR", str(tmp_path))
    assert cache_folder() == tmp_path
    assert cache_folder(tmp_path / "own") == tmp_path / "own"


BROKEN = {
    "empty": "",
    "half": '{"format": 2, "key": ',
    "list": "[1, 2]",
    "other format": '{"format": 99}',
    "no key": '{"format": 2, "measured": {}}',
    "wrong times": '{"format": 2, "key": {"what": "workload"}, "measured": {"a": {"median": "x"}}}',
    "binary": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_corrupt_file_is_one_warning_and_rebuilt(tmp_path, caplog, content):
    cache = Cache(tmp_path)
    cache.write(KEY, TIMES)
    cache.write(OTHER, TIMES)
    for path in tmp_path.glob("*.json"):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert cache.read(KEY) == {}
    assert cache.read(OTHER) == {}
    assert list(cache.entries()) == []
    (warning,) = warnings(caplog)
    assert "measured again" in warning.message
    assert "\n" not in warning.message
    cache.write(KEY, TIMES)
    assert Cache(tmp_path).read(KEY) == TIMES
    assert len(warnings(caplog)) == 1
    assert cache.clear() == 2


def test_content_under_another_name_is_not_believed(tmp_path, caplog):
    cache = Cache(tmp_path)
    cache.write(KEY, TIMES)
    (name,) = files_of(tmp_path)
    cache.write(OTHER, {})
    (other,) = set(files_of(tmp_path)) - {name}
    (tmp_path / name).rename(tmp_path / other)
    assert cache.read(OTHER) == {}
    assert len(warnings(caplog)) == 1


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    cache = Cache(tmp_path / "file")
    for _ in range(3):
        cache.write(KEY, TIMES)
        assert cache.read(KEY) == {}
    assert list(cache.entries()) == []
    (warning,) = warnings(caplog)
    assert "cannot be" in warning.message
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_full_disk_keeps_what_was_there(tmp_path, caplog, monkeypatch):
    cache = Cache(tmp_path)
    cache.write(KEY, TIMES)

    def write_text(path, text):
        with open(path, "w") as file:
            file.write("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_text", write_text)
    cache.write(KEY, {"c": TIMES["a"]})
    assert cache.read(KEY) == TIMES
    assert len(list(tmp_path.glob("*.json"))) == 1
    assert "No space left" in warnings(caplog)[0].message


WRITER = """
import sys
from diagconv_tf.tuning.cache import Cache
from diagconv_tf.measurements import Measured
cache = Cache(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for index in range(10):
    cache.write({"what": "own", "is": [sys.argv[2], index]}, {"a": Measured(1.0, 1.0, 1.0, 1)})
    shared = {"what": "shared"}
    cache.write(shared, {sys.argv[2] * n: Measured(1.0, 1.0, 1.0, 1) for n in range(1, 30)})
    assert len(cache.read(shared)) == 29
"""


@pytest.mark.backends("tensorflow")
def test_processes_at_once_lose_nothing(tmp_path):
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Nothing is computed, and this backend is the quickest to import.
            env={**os.environ, "KERAS_BACKEND": "numpy"},
        )
        for name in ("left", "right")
    ]
    for writer in writers:
        while writer.stdout.readline().strip() != "ready":
            assert writer.poll() is None, writer.stderr.read()
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        _, err = writer.communicate(timeout=60)
        assert writer.returncode == 0, err
        # Not even a warning: nobody ever read half a file.
        assert "measured again" not in err
    cache = Cache(tmp_path)
    for name in ("left", "right"):
        for index in range(10):
            assert cache.read({"what": "own", "is": [name, index]})
    assert len(cache.read({"what": "shared"})) == 29
