"""Image files in one folder per class."""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Sequence

import numpy as np
from absl import logging

from recipes.data.host import on_host, plain, tf
from recipes.data.image_data import ImageData, stratified_split
from recipes.data.pictures import cut, whole
from recipes.data.sources import FileExamples

#: Of files that `tf.io.decode_image` decodes. It takes a palette in a BMP file for grey values.
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")
CORRUPT_IMAGES = ("skip", "fail", "unchecked")
# How many of the files that cannot be decoded a message names.
_NAMED = 5


def load_folder(name: str, image_size: int, corrupt_images: str = "skip") -> ImageData:
    """The JPEG, PNG, BMP, GIF (first frame) and WebP files in one folder per class.

    Args:
        name: `"folder:DIR"`. Where DIR has `train` and `test` (or `val`,
            `validation`), the classes are in these; else one fifth of each
            class is the test set.
        image_size: Height and width of the images in a batch.
        corrupt_images: What to do about files that cannot be decoded. `"skip"`:
            they are left out, logged and in `skipped_files`; `"fail"`: it is an
            error; `"unchecked"`: not looked for, so that one ends the training
            when it is read, without its name. Looking for them decodes every
            file once.

    Raises:
        ValueError: If there are no two classes, a class is without images, the
            test has classes that the training has not, or, with `"fail"`, a
            file cannot be decoded.
        FileNotFoundError: If the folder does not exist.
    """
    root = pathlib.Path(name.removeprefix("folder:")).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(
            f"Expected `folder:DIR` to name an existing folder. Received: {name} "
            f"(looked for {root.absolute()})"
        )
    train_root, test_root = root / "train", _first_folder(root, ("test", "val", "validation"))
    if train_root.is_dir() and test_root is not None:
        class_names = _class_folders(train_root)
        unknown = set(_class_folders(test_root)) - set(class_names)
        if unknown:
            raise ValueError(
                f"Expected the classes of {train_root} in {test_root}. "
                f"Received: {', '.join(sorted(unknown))}"
            )
        parts = [_find(train_root, class_names), _find(test_root, class_names)]
    else:
        class_names = _class_folders(root)
        parts = [_find(root, class_names)]
    skipped: tuple[str, ...] = ()
    if corrupt_images != "unchecked":
        parts, skipped = _without_corrupt(root, class_names, parts, fail=corrupt_images == "fail")
    if len(parts) == 1:
        [(paths, labels)] = parts
        parts = [([paths[i] for i in part], labels[part]) for part in stratified_split(labels)]
    train, test = (FileExamples(paths, labels) for paths, labels in parts)
    return ImageData(name, train, test, class_names, image_size, skipped)


def corrupt_files(paths: Sequence[str]) -> tuple[str, ...]:
    """Those of `paths` that cannot be read and decoded, in their order."""
    examples = FileExamples(paths, np.zeros(len(paths)))

    def check(index):
        # With the ops that read it later, and all of it.
        pixels = cut(examples.read(index), whole)
        with tf.control_dependencies([tf.debugging.assert_positive(tf.size(pixels))]):
            return tf.identity(index)

    with on_host():
        indices = tf.data.Dataset.range(examples.count)
        checked = indices.map(plain(check), num_parallel_calls=tf.data.AUTOTUNE)
        good = {int(i) for i in checked.ignore_errors().batch(1024).unbatch().as_numpy_iterator()}
    return tuple(path for index, path in enumerate(paths) if index not in good)


def _without_corrupt(root, class_names, parts, *, fail):
    """`parts` without the files that cannot be decoded, and these."""
    every = [path for paths, _ in parts for path in paths]
    logging.info("Checking %d image files in %s", len(every), root)
    corrupt = corrupt_files(every)
    if not corrupt:
        return parts, ()
    named = ", ".join(corrupt[:_NAMED]) + (", …" if len(corrupt) > _NAMED else "")
    if fail:
        raise ValueError(
            f"Expected images that can be decoded in {root}. "
            f"Received: {len(corrupt)} of {len(every)} files that cannot be decoded: {named}"
        )
    logging.warning(
        "Left out %d of %d files, which cannot be decoded: %s", len(corrupt), len(every), named
    )
    kept_parts, left_out = [], set(corrupt)
    for paths, labels in parts:
        kept = [index for index, path in enumerate(paths) if path not in left_out]
        empty = sorted(set(labels) - set(labels[kept]))
        if empty:
            raise ValueError(
                f"Expected images that can be decoded in every class of {root}. "
                f"Received: none of {', '.join(class_names[label] for label in empty)}"
            )
        kept_parts.append(([paths[index] for index in kept], labels[kept]))
    return kept_parts, corrupt


def _first_folder(root: pathlib.Path, names: Sequence[str]) -> pathlib.Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _class_folders(root: pathlib.Path) -> tuple[str, ...]:
    names = tuple(
        sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    )
    if len(names) < 2:
        raise ValueError(
            f"Expected a folder for each of two or more classes in {root}. "
            f"Received: {', '.join(names) or 'no folder'}"
        )
    return names


def _find(root: pathlib.Path, class_names: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Paths and labels (int32) of all images."""
    paths, labels = [], []
    for label, class_name in enumerate(class_names):
        folder = root / class_name
        there = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")]
        found = sorted(str(p) for p in there if p.suffix.lower() in SUFFIXES)
        others = collections.Counter(p.suffix.lower() for p in there)
        kinds = ", ".join(
            f"{count} {suffix or 'without suffix'}"
            for suffix, count in sorted(others.items())
            if suffix not in SUFFIXES
        )
        if not found and folder.is_dir():
            raise ValueError(
                f"Expected images ({', '.join(SUFFIXES)}) in every class. "
                f"Received: none in {folder}" + (f", but {kinds}" if kinds else "")
            )
        if kinds:
            logging.warning("Left out files in %s that are no %s: %s", folder, SUFFIXES, kinds)
        paths += found
        labels += [label] * len(found)
    return paths, np.array(labels, "int32")
