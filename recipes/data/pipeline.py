"""Batches for `model.fit` and `model.evaluate`, as tf.data datasets.

What a training step sees is a function of (data set, batch size, seed, step),
and of the number of processes where they share a stream: the order of an epoch
and what is done to the image at each position in it come from stateless
functions of (seed, epoch, position). So a training that was interrupted goes on
with the very batches that it would have had.
"""

from __future__ import annotations

from typing import Any

from diagconv_tf.distribution import Replicas
from recipes.data import augmentation as augmenting
from recipes.data.augmentation import (
    EVALUATION_FRACTION,
    TRIES,
    random_window,
    shift_and_flip,
)
from recipes.data.host import on_host, plain, tf
from recipes.data.image_data import ImageData, channels_first
from recipes.data.pictures import centre_square, cut, mirror, scale
from recipes.data.seeds import fold_in
from recipes.data.shares import Share
from recipes.data.sources import SyntheticExamples
from recipes.data.synthetic import repeated_batch

#: Name → what pixels from 0 to 255 are multiplied with, and what is added.
#: `"symmetric"`, [-1, 1], is that of keras.applications' MobileNets.
INPUT_RANGES = {"symmetric": (1 / 127.5, -1.0), "unit": (1 / 255, 0.0), "bytes": (1.0, 0.0)}

# Each use of random numbers has a seed of its own.
_ORDER, _MOVES, _WINDOWS = range(3)


def steps_per_epoch(images: ImageData, batch_size: int) -> int:
    """Training steps that an epoch has: images that do not fill a batch are left out.

    Raises:
        ValueError: If there are fewer images than `batch_size`.
    """
    if not 1 <= batch_size <= images.train.count:
        raise ValueError(
            f"Expected `batch_size` of at least 1 and at most {images.train.count}, the number "
            f"of training images. Received: batch_size={batch_size}"
        )
    return images.train.count // batch_size


def training_dataset(
    images: ImageData,
    batch_size: int,
    *,
    seed: int,
    epochs: int,
    augmentation: str = "auto",
    first_step: int = 0,
    input_range: str = "symmetric",
    one_hot: bool = False,
    replicas: Replicas = Replicas(),  # noqa: B008 - frozen.
) -> Any:
    """The batches of a whole training, one epoch after another.

    Give `steps_per_epoch` to `fit`, or the first epoch of `fit` would be all of
    them. Then Keras takes one iterator for all its epochs, on every backend
    (`EpochIterator` in its `trainers/epoch_iterator.py`), as long as the
    dataset does not tell its length, which this one does not: reading goes on
    across the ends of epochs and during evaluation.

    Each epoch has its images in another order, `steps_per_epoch` batches of
    them; which ones are left out changes with the epoch.

    Args:
        images: From `load`.
        batch_size: Images in a batch.
        seed: Of order and augmentation.
        epochs: Of the whole training, from its first step on.
        augmentation: See `recipes.data.augmentation.resolve`.
        first_step: The number of steps that the training has behind it, at any
            place in an epoch. The images of these are not read, but for those
            of a stream, which are not decoded.
        input_range: Of the pixels, a key of `INPUT_RANGES`.
        one_hot: Whether labels are rows of zeros with a one, as smoothing of
            labels needs them, and not class numbers.
        replicas: Who shares a batch. Of several processes each reads and
            decodes its own part of every batch, and no other image. Together
            they have the batches of one process; only a stream of encoded
            images, where each has a share of its own that is the same in all
            epochs, has other batches for another number of processes.

    Returns:
        A tf.data dataset of (images, labels): float32 in `input_range`,
        (batch_size, *image_shape), and int32, (batch_size,), or float32,
        (batch_size, classes); with several processes, batch_size / processes
        of them. For synthetic images on one device, a `RepeatedBatch`.

    Raises:
        ValueError: If there are fewer images than `batch_size`, if the
            replicas do not divide it, or for an unknown augmentation.
    """
    kind = augmenting.resolve(augmentation, images.image_size)
    steps = steps_per_epoch(images, batch_size)
    share = Share(batch_size, replicas)
    form = (input_range, one_hot)
    source, size = images.train, images.image_size
    if isinstance(source, SyntheticExamples):
        with on_host():
            own = slice(*share.own_part(batch_size))
            batch = _prepared(images, *(part[own] for part in source.draw(batch_size)), *form)
            if replicas.num_replicas == 1:
                return repeated_batch(batch)
            # Keras shares out batches of tf.data only.
            return tf.data.Dataset.from_tensors(batch).repeat()
    first_epoch, steps_done = divmod(first_step, steps)

    def examples_of(epoch):
        epoch_seed = tf.stack([tf.constant(seed, tf.int64), epoch])
        moves = tf.random.stateless_uniform([steps * batch_size, 3], fold_in(epoch_seed, _MOVES))
        seen = tf.constant(steps_done * batch_size, tf.int64)
        first = tf.where(epoch == first_epoch, seen, 0)
        positions = share.positions(steps * batch_size, first)
        return tf.data.Dataset.zip(
            source.shuffled(fold_in(epoch_seed, _ORDER), share, first),
            tf.data.Dataset.from_tensor_slices(tf.gather(moves, positions)),
            tf.data.Dataset.from_tensor_slices(positions),
            tf.data.Dataset.from_tensors(fold_in(epoch_seed, _WINDOWS)).repeat(),
        )

    def read(example, moves, position, window_seed):
        record, label = example
        if kind == "inception":
            draws = tf.random.stateless_uniform([TRIES, 4], fold_in(window_seed, position))
            pixels = scale(cut(source.read(record), random_window(draws)), size)
            # Here and not with the others: for large images this is faster.
            pixels = tf.cond(moves[2] < 0.5, lambda: mirror(pixels), lambda: pixels)
        else:
            pixels = scale(cut(source.read(record), centre_square()), size)
        return pixels, label, moves

    def read_together(example, moves, position, window_seed):
        del position, window_seed
        records, labels = example
        return source.read(records), labels, moves

    def augment(pictures, labels, moves):
        if kind in ("crop", "crop_flip"):
            pictures = shift_and_flip(pictures, moves, margin=size // 8, flip=kind == "crop_flip")
        return _prepared(images, pictures, labels, *form)

    with on_host():
        # Only what is cheap is done per epoch: reading does not stop at its end.
        examples = tf.data.Dataset.range(first_epoch, epochs).flat_map(plain(examples_of))
        if source.size == (size, size) and kind != "inception":
            batches = _map(examples.batch(share.own_size, drop_remainder=True), read_together)
        else:
            batches = _batch(_map(examples, read), share.own_size, drop_remainder=True)
        return _finish(_map(batches, augment))


def evaluation_dataset(
    images: ImageData,
    batch_size: int,
    *,
    augmentation: str = "auto",
    input_range: str = "symmetric",
    one_hot: bool = False,
    replicas: Replicas = Replicas(),  # noqa: B008 - frozen.
) -> tf.data.Dataset:
    """All test images in their order; the last batch may be smaller.

    It is the centre of each picture, scaled; after training with `"inception"`
    a little less of it (`EVALUATION_FRACTION`), because that shows objects
    larger than they are.

    Several replicas need batches that they divide. So the last one is filled up
    with images of weight 0: weighted metrics leave them out; Keras's mean loss
    counts them as images without loss (at most `replicas - 1` of all).

    Of several processes each reads its own part only: of every batch, or, of a
    stream of encoded images, an even part of all images, in their order.

    Args:
        images: From `load`.
        batch_size: Images in a batch.
        augmentation: Of the training.
        input_range: As of `training_dataset`.
        one_hot: As of `training_dataset`.
        replicas: As of `training_dataset`.

    Returns:
        Of (images, labels), as of `training_dataset`; for several replicas of
        (images, labels, weights), with float32 weights, (batch size,).

    Raises:
        ValueError: For an unknown augmentation, or if the replicas do not
            divide `batch_size`.
    """
    kind = augmenting.resolve(augmentation, images.image_size)
    share = Share(batch_size, replicas)
    source, size = images.test, images.image_size
    window = centre_square(EVALUATION_FRACTION if kind == "inception" else 1.0)

    def prepare(pictures, labels, weights):
        batch = _prepared(images, pictures, labels, input_range, one_hot)
        return (*batch, weights) if replicas.num_replicas > 1 else batch

    with on_host():
        examples = source.in_order(share)
        if source.size == (size, size) and kind != "inception":
            batches = _map(
                examples.batch(share.own_size),
                lambda records, *rest: (source.read(records), *rest),
            )
        else:
            pictures = _map(
                examples,
                lambda record, *rest: (scale(cut(source.read(record), window), size), *rest),
            )
            batches = _batch(pictures, share.own_size)
        return _finish(_map(batches, prepare))


def _map(dataset, function):
    return dataset.map(plain(function), num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


def _batch(dataset, batch_size, drop_remainder=False):
    return dataset.batch(
        batch_size, drop_remainder, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
    )


def _finish(dataset):
    return dataset.prefetch(tf.data.AUTOTUNE)


def _prepared(images: ImageData, pictures: Any, labels: Any, input_range: str, one_hot: bool):
    """Pixels from 0 to 255 and class numbers as the model takes them."""
    scale, offset = INPUT_RANGES[input_range]
    pictures = tf.cast(pictures, tf.float32) * scale + offset
    if channels_first():
        pictures = tf.transpose(pictures, (0, 3, 1, 2))
    return pictures, tf.one_hot(labels, images.classes) if one_hot else labels
