"""Images for training and test, from whatever place, behind one function.

`load` returns an `ImageData`: two `ImageSource`s of 8-bit RGB images with
integer labels. `TrainingBatches` and `EvaluationBatches` make batches of them
for `model.fit`, as `keras.utils.PyDataset`, so that all backends see the same
ones. Which images a training batch has, and how they are augmented, depends on
(seed, epoch, batch) alone.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import keras
import numpy as np
import PIL.Image
import PIL.ImageOps
from absl import logging

from recipes.config import check_names

# Of every split made here. Not the seed of the training: runs with different
# seeds are tested on the same images.
SPLIT_SEED = 0
TEST_FRACTION = 0.2

_MEMORY_LIMIT = 4 * 2**30
_SUFFIXES = (".jpg", ".jpeg", ".png")


class ImageSource(Protocol):
    """Images that can be read in any order."""

    @property
    def labels(self) -> np.ndarray:
        """int32, (count,)."""

    def images(self, indices: np.ndarray) -> np.ndarray:
        """The images at `indices`: uint8, (len(indices), size, size, 3)."""


@dataclass(frozen=True)
class ArraySource:
    """Images in memory.

    Args:
        pixels: uint8 array of shape (count, size, size, 3).
        labels: int32 array of shape (count,).
    """

    pixels: np.ndarray = field(repr=False)
    labels: np.ndarray = field(repr=False)

    def images(self, indices: np.ndarray) -> np.ndarray:
        """See `ImageSource`."""
        return self.pixels[indices]


@dataclass(frozen=True)
class FileSource:
    """JPEG and PNG files, decoded when they are asked for.

    Args:
        paths: One per image.
        labels: int32 array of shape (count,).
        image_size: Height and width that the centre of each is scaled to.
    """

    paths: tuple[pathlib.Path, ...] = field(repr=False)
    labels: np.ndarray = field(repr=False)
    image_size: int

    def images(self, indices: np.ndarray) -> np.ndarray:
        """See `ImageSource`. ValueError names a file that is no image."""
        return np.stack([_read(self.paths[index], self.image_size) for index in indices])


@dataclass(frozen=True)
class ImageData:
    """Training and test images of one data set.

    Args:
        name: As given to `load`.
        train: The images to train on.
        test: The images to test on; none of them is in `train`.
        class_names: One per class, in the order of the labels.
        image_size: Height and width in pixels.
    """

    name: str
    train: ImageSource
    test: ImageSource
    class_names: tuple[str, ...]
    image_size: int

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of one image in a batch, in Keras's image data format."""
        size = self.image_size
        return (3, size, size) if _channels_first() else (size, size, 3)


def load(
    name: str, *, image_size: int = 32, data_dir: str | None = None, download: bool = False
) -> ImageData:
    """Loads a data set.

    Args:
        name: One of

            - `"digits"`: 1797 handwritten digits, 8x8, part of scikit-learn
              (from the UCI data set 'Optical Recognition of Handwritten
              Digits'), scaled up; one fifth of each class is the test set.
            - `"synthetic"`: 512 + 128 images of ten random patterns in noise.
            - `"folder:DIR"`: JPEG and PNG files in one folder per class. Where
              DIR has `train` and `test` (or `val`, `validation`), the classes
              are in these; else one fifth of each class is the test set.
            - else, an image classification set of TensorFlow Datasets, such
              as `"cifar10"`: splits `train` and `test` (or `validation`), kept
              in memory.
        image_size: Height and width. Others are scaled, of images that are not
            square the centre.
        data_dir: Where TensorFlow Datasets looks and downloads to; `None` is
            its own default.
        download: Whether to download what is not there. Not asked for, it is
            an error: a download without a network fails after minutes only.

    Raises:
        ValueError: For an unknown name, a folder without the classes or the
            images, or a set that cannot be prepared or is too large.
        FileNotFoundError: If the folder does not exist.
    """
    if name == "digits":
        return _digits(image_size)
    if name == "synthetic":
        return _synthetic(image_size)
    if name.startswith("folder:"):
        return _folder(name, image_size)
    return _tfds(name, image_size, data_dir, download)


class TrainingBatches(keras.utils.PyDataset):
    """Shuffled, augmented batches; the images that do not fill one are left out.

    Give `shuffle=False` to `fit`, or Keras shuffles the batches once more, and
    `FollowEpochs(batches)` among its callbacks.

    A batch is (images, labels): float32 in [-1, 1], (batch_size, *image_shape),
    and int32, (batch_size,).

    Args:
        source: The images.
        batch_size: Images in a batch.
        seed: Of order and augmentation.
        augmentation: `"none"`; `"crop"`: a window of the image padded with
            zeros (black) by an eighth of its size on every side, as He et al.
            (arXiv 1512.03385, section 4.2) do for CIFAR; `"crop_flip"`: half of
            them mirrored as well.
        epoch: The epoch that the batches are of; `FollowEpochs` changes it.

    Raises:
        ValueError: If there are fewer images than `batch_size`.
    """

    def __init__(
        self,
        source: ImageSource,
        batch_size: int,
        *,
        seed: int,
        augmentation: str = "none",
        epoch: int = 0,
    ):
        super().__init__()
        if len(source.labels) < batch_size:
            raise ValueError(
                f"Expected `batch_size` of at most {len(source.labels)}, the number of "
                f"training images. Received: batch_size={batch_size}"
            )
        self.source = source
        self.batch_size = batch_size
        self.seed = seed
        self.augmentation = augmentation
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.source.labels) // self.batch_size

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        # Keras may ask for a batch twice, or from several threads: nothing is
        # remembered, and each batch has its own generator.
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.source.labels))
        chosen = order[index * self.batch_size : (index + 1) * self.batch_size]
        rng = np.random.default_rng((self.seed, self.epoch, index))
        images = self.source.images(chosen)
        if self.augmentation != "none":
            images = _random_crop(images, rng)
        if self.augmentation == "crop_flip":
            mirrored = rng.random(len(images)) < 0.5
            images[mirrored] = images[mirrored, :, ::-1]
        return _as_input(images), self.source.labels[chosen]


class FollowEpochs(keras.callbacks.Callback):
    """Tells `TrainingBatches` which epoch it is, also after `initial_epoch`.

    `PyDataset.on_epoch_end` cannot: Keras calls it before the first epoch too,
    and how often depends on the backend.

    Args:
        batches: What is given to `fit`.
    """

    def __init__(self, batches: TrainingBatches):
        super().__init__()
        self.batches = batches

    def on_epoch_begin(self, epoch, logs=None):
        self.batches.epoch = epoch


class EvaluationBatches(keras.utils.PyDataset):
    """All images in their order; the last batch may be smaller.

    Args:
        source: The images.
        batch_size: Images in a batch.
    """

    def __init__(self, source: ImageSource, batch_size: int):
        super().__init__()
        self.source = source
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.source.labels) // self.batch_size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        count = len(self.source.labels)
        start = index * self.batch_size
        chosen = np.arange(start, min(start + self.batch_size, count))
        return _as_input(self.source.images(chosen)), self.source.labels[chosen]


def _digits(image_size: int) -> ImageData:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # The 8x8 images hold counts from 0 to 16.
    pixels = np.stack(
        [
            _scaled(PIL.Image.fromarray((image * (255 / 16)).astype("uint8")), image_size)
            for image in digits.images
        ]
    )
    labels = digits.target.astype("int32")
    train, test = _stratified_split(labels)
    return ImageData(
        name="digits",
        train=ArraySource(pixels[train], labels[train]),
        test=ArraySource(pixels[test], labels[test]),
        class_names=tuple(str(name) for name in digits.target_names),
        image_size=image_size,
    )


def _synthetic(image_size: int, classes: int = 10) -> ImageData:
    rng = np.random.default_rng(SPLIT_SEED)
    patterns = rng.uniform(64, 192, size=(classes, image_size, image_size, 3))

    def make(count: int) -> ArraySource:
        labels = (np.arange(count) % classes).astype("int32")
        noise = rng.normal(scale=32, size=(count, *patterns.shape[1:]))
        pixels = np.clip(patterns[labels] + noise, 0, 255).astype("uint8")
        return ArraySource(pixels, labels)

    names = tuple(f"pattern {number}" for number in range(classes))
    return ImageData("synthetic", make(512), make(128), names, image_size)


def _folder(name: str, image_size: int) -> ImageData:
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
        train = _files(train_root, class_names, image_size)
        test = _files(test_root, class_names, image_size)
    else:
        class_names = _class_folders(root)
        both = _files(root, class_names, image_size)
        train, test = (
            FileSource(tuple(both.paths[i] for i in part), both.labels[part], image_size)
            for part in _stratified_split(both.labels)
        )
    return ImageData(name, train, test, class_names, image_size)


def _first_folder(root: pathlib.Path, names: Sequence[str]) -> pathlib.Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _class_folders(root: pathlib.Path) -> tuple[str, ...]:
    names = tuple(sorted(path.name for path in root.iterdir() if path.is_dir()))
    if len(names) < 2:
        raise ValueError(
            f"Expected a folder for each of two or more classes in {root}. "
            f"Received: {', '.join(names) or 'no folder'}"
        )
    return names


def _files(root: pathlib.Path, class_names: tuple[str, ...], image_size: int) -> FileSource:
    paths, labels = [], []
    for label, class_name in enumerate(class_names):
        folder = root / class_name
        found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES)
        if not found and folder.is_dir():
            raise ValueError(
                f"Expected images ({', '.join(_SUFFIXES)}) in every class. "
                f"Received: none in {folder}"
            )
        paths += found
        labels += [label] * len(found)
    return FileSource(tuple(paths), np.array(labels, "int32"), image_size)


def _tfds(name: str, image_size: int, data_dir: str | None, download: bool) -> ImageData:
    # It takes seconds to import, and brings TensorFlow under every backend.
    import tensorflow_datasets as tfds

    # Not the community's: their list is on the network.
    known = tfds.list_builders(with_community_datasets=False)
    plain_name = name.partition("/")[0].partition(":")[0]
    check_names([plain_name], ["digits", "synthetic", *known], "dataset")
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        if not (download or builder.is_prepared()):
            raise ValueError(
                f"Expected dataset {name} in {builder.data_dir}. Add --download, or prepare it "
                f"with `tfds build {name}`. Received: no such folder"
            )
        if download:
            builder.download_and_prepare()
    except ValueError:
        raise
    except Exception as error:  # Any error of the network, the disk or TFDS itself.
        raise ValueError(
            f"Expected dataset {name} to be found or made in {data_dir or 'the default folder'} "
            f"of TensorFlow Datasets. Received: {type(error).__name__}: {error}"
        ) from error
    split_names = _tfds_splits(name, builder.info, image_size)
    logging.info("Loading %s from %s", name, builder.data_dir)
    splits = tfds.load(
        name, split=split_names, as_supervised=True, data_dir=data_dir, download=False
    )
    train, test = (_in_memory(tfds.as_numpy(split), image_size) for split in splits)
    return ImageData(name, train, test, tuple(builder.info.features["label"].names), image_size)


def _tfds_splits(name: str, info, image_size: int) -> list[str]:
    """Names of the training and the test split; ValueError for a set that does not fit."""
    if not info.supervised_keys or info.supervised_keys[:2] != ("image", "label"):
        raise ValueError(
            "Expected a dataset for image classification (image, label). "
            f"Received: {name} with {info.supervised_keys}"
        )
    names = ["train", "test" if "test" in info.splits else "validation"]
    if not all(split in info.splits for split in names):
        raise ValueError(
            "Expected a dataset with splits `train`, and `test` or `validation`. "
            f"Received: {name} with {', '.join(info.splits)}"
        )
    count = sum(info.splits[split].num_examples for split in names)
    size = count * image_size**2 * 3
    if size > _MEMORY_LIMIT:
        raise ValueError(
            f"Expected a dataset of at most {_MEMORY_LIMIT / 2**30:g} GiB in memory. "
            f"Received: {name} with {count} images of {image_size}x{image_size}, "
            f"{size / 2**30:.1f} GiB"
        )
    return names


def _in_memory(examples, image_size: int) -> ArraySource:
    pixels, labels = [], []
    for image, label in examples:
        if image.shape != (image_size, image_size, 3):
            image = _scaled(PIL.Image.fromarray(image.squeeze()), image_size)
        pixels.append(image)
        labels.append(label)
    return ArraySource(np.stack(pixels), np.array(labels, "int32"))


def _stratified_split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of training and test images, in the classes' own proportions."""
    from sklearn.model_selection import train_test_split

    return train_test_split(
        np.arange(len(labels)),
        test_size=TEST_FRACTION,
        random_state=SPLIT_SEED,
        stratify=labels,
    )


def _read(path: pathlib.Path, image_size: int) -> np.ndarray:
    try:
        with PIL.Image.open(path) as image:
            return _scaled(PIL.ImageOps.exif_transpose(image), image_size)
    except OSError as error:  # Pillow's UnidentifiedImageError is one.
        raise ValueError(f"Expected a JPEG or PNG image. Received: {path} ({error})") from error


def _scaled(image: PIL.Image.Image, image_size: int) -> np.ndarray:
    """The centre square as uint8, (image_size, image_size, 3)."""
    size = (image_size, image_size)
    return np.asarray(PIL.ImageOps.fit(image.convert("RGB"), size, PIL.Image.Resampling.BILINEAR))


def _random_crop(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each image shifted by up to an eighth of its size, filled with zeros."""
    count, size = images.shape[:2]
    margin = size // 8
    padded = np.pad(images, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(1, 2))
    top, left = rng.integers(2 * margin + 1, size=(2, count))
    # The view puts the window's axes last.
    return windows[np.arange(count), top, left].transpose(0, 2, 3, 1)


def _as_input(images: np.ndarray) -> np.ndarray:
    """To [-1, 1], the range of keras.applications' MobileNets."""
    scaled = images.astype("float32") / 127.5 - 1.0
    return scaled.transpose(0, 3, 1, 2) if _channels_first() else scaled


def _channels_first() -> bool:
    return keras.config.image_data_format() == "channels_first"
