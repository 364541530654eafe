"""Image classification sets of TensorFlow Datasets."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import logging

from recipes.config import check_names
from recipes.data.host import on_host, plain, tf
from recipes.data.image_data import ImageData
from recipes.data.pictures import cut, whole
from recipes.data.sources import (
    EncodedExamples,
    Examples,
    PixelExamples,
    StreamedExamples,
)


def load_tfds(
    name: str,
    image_size: int,
    *,
    data_dir: str | None,
    download: bool,
    cache_gb: float,
    shuffle_buffer: int,
) -> ImageData:
    """A set of TensorFlow Datasets, such as `"cifar10"` or `"imagenette/160px-v2"`.

    Splits `train`, and `test` if it has labels, else `validation`. What fits
    into `cache_gb` is kept in memory (as pixels if all images have one size,
    else encoded) and read in any order; else see `StreamedExamples`.

    Args:
        name: As `tfds.load` takes it. Sets that only lie in `data_dir`, without
            code that knows them, are found too.
        image_size: Height and width of the images in a batch.
        data_dir: Where TensorFlow Datasets looks and downloads to; `None` is
            its own default.
        download: Whether to download and prepare what is not there.
        cache_gb: GiB, of both splits together.
        shuffle_buffer: Examples in the shuffling buffer of what does not fit.

    Raises:
        ValueError: For an unknown name, a set that cannot be found or made, or
            one that is not for image classification. One line.
    """
    # It takes seconds to import.
    import tensorflow_datasets as tfds

    _check_name(tfds, name, data_dir)
    builder = _prepared(tfds, name, data_dir, download)
    image_key, label_key = _supervised_keys(tfds, name, builder.info)

    def read(split: Any) -> Any:
        """A dataset of (encoded image, label)."""
        return tfds.load(
            name,
            split=split,
            data_dir=data_dir,
            download=False,
            as_supervised=True,
            # Only these two, the image in the bytes of its file: it is decoded
            # when its window is known, and takes less memory until then.
            decoders=tfds.decode.PartialDecoding(
                {image_key: True, label_key: True},
                decoders={image_key: tfds.decode.SkipDecoding()},
            ),
            read_config=tfds.ReadConfig(
                try_autocache=False,
                # One file after another: the pieces are what is read in turns.
                interleave_cycle_length=1,
            ),
        )

    try:
        splits = ("train", _test_split(name, builder.info, read))
        infos = [builder.info.splits[split] for split in splits]
        logging.info("Reading %s from %s", name, builder.data_dir)
        shape = builder.info.features[image_key].shape
        with on_host():
            train, test = _sources(name, infos, shape, read, cache_gb, shuffle_buffer)
    except (tf.errors.OpError, NotImplementedError) as error:
        raise ValueError(
            f"Expected records that can be read in {builder.data_dir}. "
            f"Received: {type(error).__name__}: {_one_line(error)}"
        ) from error
    class_names = tuple(builder.info.features[label_key].names)
    return ImageData(name, train, test, class_names, image_size)


def _sources(
    name: str,
    infos: Sequence[Any],
    image_shape: tuple[int | None, ...],
    read: Callable[[Any], Any],
    cache_gb: float,
    shuffle_buffer: int,
) -> list[Examples]:
    """Each split in memory as far as `cache_gb` goes, in their order.

    Args:
        name: Of the set.
        infos: TFDS's `SplitInfo` of each split.
        image_shape: `None` where images differ.
        read: Gives the dataset of a split.
        cache_gb: GiB of all together.
        shuffle_buffer: Examples in the shuffling buffer of what is not in memory.
    """
    left = cache_gb * 2**30
    sources: list[Examples] = []
    for info in infos:
        count = info.num_examples
        pixel_bytes = _pixel_bytes(image_shape, count)
        if pixel_bytes is not None and pixel_bytes <= left:
            left -= pixel_bytes
            decoded = _decoded(read(info.name), image_shape)
            sources.append(PixelExamples(*_all(name, info.name, decoded, count)))
        elif info.num_bytes <= left:
            left -= info.num_bytes
            sources.append(EncodedExamples(*_all(name, info.name, read(info.name), count)))
        else:
            stream = _stream(info.name, read)
            sources.append(StreamedExamples(stream, count, info.num_shards, shuffle_buffer))
    return sources


def _stream(split: str, read: Callable[[Any], Any]) -> Callable[[int, int], Any]:
    """What `StreamedExamples` reads a split with."""
    from tensorflow_datasets.core import ReadInstruction

    # It takes some hundredths of a second, and a training has many pieces.
    @functools.cache
    def stream(start: int, stop: int) -> Any:
        return read(ReadInstruction(split, from_=start, to=stop, unit="abs"))

    return stream


def _check_name(tfds: Any, name: str, data_dir: str | None) -> None:
    """Raises a ValueError that lists near names, unless there is such a set."""
    # Not the community's: their list is on the network.
    known = tfds.list_builders(with_community_datasets=False)
    plain_name, _, config = name.partition(":")[0].partition("/")
    if plain_name not in known:
        if not plain_name or not (_root(data_dir) / plain_name).is_dir():
            check_names([plain_name], ["digits", "synthetic", *known], "dataset")
    # What is on the disk may be of another version than the code.
    elif config and "=" not in config and not (_root(data_dir) / plain_name / config).is_dir():
        configs = tfds.builder_cls(plain_name).builder_configs
        if not configs:
            raise ValueError(
                f"Expected {plain_name} alone: it has no configurations. Received: {name}"
            )
        check_names([config], configs, f"configuration of {plain_name}")


def _prepared(tfds: Any, name: str, data_dir: str | None, download: bool) -> Any:
    """The builder of a set whose records are on the disk."""
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        if download:
            builder.download_and_prepare()
        prepared = builder.is_prepared()
    except Exception as error:  # Any error of the network, the disk or TFDS itself.
        raise ValueError(
            f"Expected dataset {name} to be found or made in {_root(data_dir)} by TensorFlow "
            f"Datasets. Received: {type(error).__name__}: {_one_line(error)}"
        ) from error
    if not prepared:
        # Not `tfds build`: it needs Apache Beam for any set.
        how = "Add --download, or prepare it so where there is a network, and copy this folder."
        instructions = _one_line(getattr(builder, "MANUAL_DOWNLOAD_INSTRUCTIONS", None) or "")
        if instructions:
            folder = _root(data_dir) / "downloads" / "manual"
            how = (
                f"Its files must be put into {folder} by hand; then --download prepares it "
                f"({instructions})."
            )
        raise ValueError(
            f"Expected dataset {name} in {builder.data_dir}. {how} Received: no such folder"
        )
    return builder


def _supervised_keys(tfds: Any, name: str, info: Any) -> tuple[str, str]:
    """Names of the image and its label."""
    keys = info.supervised_keys
    if (
        not keys
        or len(keys) != 2
        or not all(isinstance(key, str) for key in keys)
        or not isinstance(info.features[keys[0]], tfds.features.Image)
        or not isinstance(info.features[keys[1]], tfds.features.ClassLabel)
        or info.features[keys[0]].np_dtype != np.uint8
    ):
        raise ValueError(
            "Expected a dataset for image classification (8-bit image, class label). "
            f"Received: {name} with {keys}"
        )
    return keys


def _test_split(name: str, info: Any, read: Callable[[Any], Any]) -> str:
    """The first of `test` and `validation` that has labels."""
    if "train" in info.splits:
        for split in ("test", "validation"):
            # ImageNet's test labels were never published: they are all -1.
            if split in info.splits and all(label >= 0 for _, label in read(split).take(1)):
                return split
    raise ValueError(
        "Expected a dataset with splits `train`, and `test` or `validation` with labels. "
        f"Received: {name} with {', '.join(info.splits) or 'no splits'}"
    )


def _pixel_bytes(image_shape: tuple[int | None, ...], count: int) -> int | None:
    """Bytes of the decoded images, `None` where they have not all one size."""
    height, width = image_shape[:2]
    return None if height is None or width is None else 3 * height * width * count


def _decoded(dataset: tf.data.Dataset, image_shape: tuple[int, ...]) -> tf.data.Dataset:
    def decode(encoded, label):
        return tf.ensure_shape(cut(encoded, whole), (*image_shape[:2], 3)), label

    return dataset.map(plain(decode), num_parallel_calls=tf.data.AUTOTUNE)


def _all(name: str, split: str, dataset: tf.data.Dataset, count: int) -> tuple[tf.Tensor, Any]:
    """All examples as one tensor of pictures, and labels as NumPy."""
    pictures, labels = dataset.batch(count).get_single_element()
    labels = labels.numpy()
    if labels.min() < 0:
        raise ValueError(
            f"Expected labels of all images. Received: {name}, whose split {split} has "
            f"{np.sum(labels < 0)} of {len(labels)} images without one"
        )
    return pictures, labels


def _root(data_dir: str | None) -> pathlib.Path:
    """Where TensorFlow Datasets looks."""
    default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    return pathlib.Path(data_dir or default).expanduser()


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
