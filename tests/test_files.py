"""Files are replaced as a whole, and links stay links."""

import os
import pathlib

import keras
import pytest
from keras import layers

from diagconv_tf import Conditions, Plan, files, model_files, save_weights

pytestmark = pytest.mark.backends("tensorflow")


def _model():
    return keras.Sequential([keras.Input((8, 8, 4)), layers.DepthwiseConv2D(3)])


def _write_folder(path):
    def write(aside):
        os.mkdir(aside)
        (pathlib.Path(aside) / "content").write_text("new")

    files.write_aside(path, write)


#: name: (suffix, writer)
WRITERS = {
    "text": (".txt", lambda path: files.write_text(path, "new")),
    "line": (".txt", lambda path: files.append_line(path, "new")),
    "folder": ("", _write_folder),
    "plan": (".json", lambda path: Plan(Conditions.current()).save(path, overwrite=True)),
    "model": (".keras", lambda path: model_files.save_model(_model(), path, overwrite=True)),
    "weights": (".weights.h5", lambda path: save_weights(_model(), path, overwrite=True)),
}


@pytest.mark.parametrize("state", ["a file", "dangling"])
@pytest.mark.parametrize("name", WRITERS)
def test_writers_write_to_what_a_link_points_to(tmp_path, name, state):
    suffix, write = WRITERS[name]
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / f"target{suffix}"
    if state == "a file":
        if name == "folder":
            target.mkdir()
            (target / "content").write_text("old")
        else:
            target.write_text("old")
    link = tmp_path / f"link{suffix}"
    link.symlink_to(target)
    write(link)
    assert link.is_symlink()
    assert link.resolve() == target
    if name == "folder":
        assert (target / "content").read_text() == "new"
    elif name == "line":
        assert target.read_text() == ("old\nnew\n" if state == "a file" else "new\n")
    else:
        assert not target.read_bytes().startswith(b"old")
    assert os.listdir(tmp_path / "elsewhere") == [target.name]
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", link.name]


def test_a_link_into_a_missing_folder_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "none" / "file")
    with pytest.raises(ValueError, match="an existing folder"):
        files.check_output(tmp_path / "link", overwrite=True)


def test_a_link_to_a_file_is_not_overwritten_unasked(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with pytest.raises(FileExistsError, match="overwrite"):
        files.check_output(tmp_path / "link", overwrite=False)


@pytest.mark.parametrize(
    ("before", "after"),
    [(None, "b\n"), ("", "b\n"), ("a\n", "a\nb\n"), ("a", "a\nb\n")],
)
def test_a_line_is_appended_as_a_line(tmp_path, before, after):
    path = tmp_path / "log"
    if before is not None:
        path.write_text(before)
    files.append_line(path, "b")
    assert path.read_text() == after
    assert os.listdir(tmp_path) == ["log"]
