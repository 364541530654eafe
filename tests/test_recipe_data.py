"""The recipes' images: orders, augmentations, and all the places they come from.

In most of these the label of an example is its number, so that labels tell
which pictures a batch has.
"""

import dataclasses
import inspect
import io
import itertools
import math
import pathlib
import shutil
from types import MappingProxyType

import keras
import numpy as np
import PIL.Image
import pytest
import tensorflow as tf

from diagconv_tf.distribution import Replicas
from recipes import data
from recipes.data import augmentation as augmenting
from recipes.data import folder, pictures, tfds_source
from recipes.data.image_data import ImageData
from recipes.data.shares import Share
from recipes.data.sources import (
    EncodedExamples,
    FileExamples,
    PixelExamples,
    StreamedExamples,
)
from tests.mocked_tfds import mocked_set

# Most of this is the same on every backend.
pytestmark = pytest.mark.backends("tensorflow")
every_backend = pytest.mark.backends("tensorflow", "jax", "torch")

SIZE = 32
COUNT = 23


def smooth_picture(number, height, width):
    """uint8, (height, width, 3): waves of low frequency, of a colour of their own."""
    rng = np.random.default_rng(number)
    rows, columns = np.mgrid[:height, :width] / max(height, width)
    waves = [
        np.sin(2 * np.pi * (a * rows + b * columns + c)) for a, b, c in rng.uniform(size=(3, 3))
    ]
    return np.round(127.5 + 100 * np.stack(waves, axis=-1)).astype("uint8")


def encode(pixels, file_format, subsampling=0):
    """The bytes of a file; `subsampling=2` is that of most photographs."""
    options = {"quality": 95, "subsampling": subsampling} if file_format == "JPEG" else {}
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, file_format, **options)
    return buffer.getvalue()


def varied_pictures():
    return [smooth_picture(n, 34 + 3 * (n % 5), 50 - 4 * (n % 7)) for n in range(COUNT)]


def varied_bytes():
    return [encode(p, ("JPEG", "PNG")[n % 2]) for n, p in enumerate(varied_pictures())]


def streamed(encoded, shuffle_buffer, files=12, seen=None):
    """A stream; the numbers of the examples that are read from it are added to `seen`."""

    def stream(start, stop):
        assert start < stop
        labels = np.arange(start, stop, dtype="int64")
        part = tf.data.Dataset.from_tensor_slices((encoded[start:stop], labels))
        return part if seen is None else part.map(see)

    def see(picture, label):
        def add(label):
            seen.append(int(label))
            return label

        return picture, tf.ensure_shape(tf.numpy_function(add, [label], tf.int64), [])

    return StreamedExamples(stream, len(encoded), files, shuffle_buffer)


def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    paths = []
    for number, content in enumerate(varied_bytes()):
        path = root / f"{number}.jpg"
        path.write_bytes(content)
        paths.append(str(path))
    return FileExamples(paths, np.arange(COUNT))


SOURCES = {
    "pixels": lambda _: PixelExamples(
        np.stack([smooth_picture(n, SIZE, SIZE) for n in range(COUNT)]), np.arange(COUNT)
    ),
    "pixels of another size": lambda _: PixelExamples(
        np.stack([smooth_picture(n, 40, 30) for n in range(COUNT)]), np.arange(COUNT)
    ),
    "encoded": lambda _: EncodedExamples(tf.constant(varied_bytes()), np.arange(COUNT)),
    "files": files,
    # 12 pieces of 1 or 2: more than are read at a time.
    "streamed": lambda _: streamed(varied_bytes(), 7),
}


@pytest.fixture(scope="module", params=SOURCES)
def images(request, tmp_path_factory):
    """`ImageData` of each kind of source."""
    return image_data(SOURCES[request.param](tmp_path_factory))


def image_data(source, image_size=SIZE):
    names = tuple(str(number) for number in range(source.count))
    return ImageData("test", source, source, names, image_size)


def pixel_data(count=COUNT, size=SIZE):
    pixels = np.stack([smooth_picture(n, size, size) for n in range(count)])
    return image_data(PixelExamples(pixels, np.arange(count)), size)


def batches(images, batch_size=4, **options):
    options = {"seed": 0, "epochs": 2, "augmentation": "none"} | options
    return list(data.training_dataset(images, batch_size, **options).as_numpy_iterator())


def labels_by_epoch(images, batch_size=4, epochs=2, **options):
    found = np.concatenate([y for _, y in batches(images, batch_size, epochs=epochs, **options)])
    return found.reshape(epochs, -1)


def as_pixels(inputs):
    return (inputs + 1) * 127.5


def assert_same_batches(found, expected):
    assert len(found) == len(expected)
    for (x, y), (expected_x, expected_y) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(y, expected_y)
        np.testing.assert_array_equal(x, expected_x)


# Orders


def test_an_epoch_has_each_image_at_most_once(images):
    epochs = labels_by_epoch(images, epochs=4)
    assert epochs.shape == (4, 20)  # 3 images do not fill a batch.
    for epoch in epochs:
        assert len(set(epoch)) == 20
        assert set(epoch) <= set(range(COUNT))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    # What is left out is not always the same.
    assert len({frozenset(epoch) for epoch in epochs}) > 1


def test_the_stream_is_a_function_of_the_seed_alone(images):
    expected = batches(images, augmentation="inception")
    # Not of the global seed, and not of what was drawn before.
    keras.utils.set_random_seed(0)
    dataset = data.training_dataset(images, 4, seed=0, epochs=2, augmentation="inception")
    for _ in range(2):
        assert_same_batches(list(dataset.as_numpy_iterator()), expected)
    other = batches(images, augmentation="inception", seed=1)
    assert not np.array_equal(other[0][1], expected[0][1])


@pytest.mark.parametrize("augmentation", ["crop_flip", "inception"])
def test_a_stream_goes_on_where_it_was_left(images, augmentation):
    unbroken = batches(images, epochs=3, augmentation=augmentation)
    assert len(unbroken) == 15
    # At the end of an epoch, and within one.
    for step in (5, 13):
        found = batches(images, epochs=3, augmentation=augmentation, first_step=step)
        assert_same_batches(found, unbroken[step:])


def test_what_was_seen_is_not_read_again(tmp_path):
    source = FileExamples([str(tmp_path / str(n)) for n in range(COUNT)], np.arange(COUNT))
    images = image_data(source)
    order = labels_by_epoch(pixel_data())  # Another source with the same labels.
    for label in order[0, 16:]:
        pathlib.Path(source.paths[label]).write_bytes(varied_bytes()[0])
    [(_, labels)] = batches(images, first_step=4, epochs=1)
    np.testing.assert_array_equal(labels, order[0, 16:])
    with pytest.raises(tf.errors.NotFoundError):
        batches(images, first_step=3, epochs=1)


@pytest.mark.parametrize("augmentation", ["crop_flip", "inception"])
def test_augmentation_is_a_function_of_seed_epoch_and_position(augmentation):
    # 24 pictures, all the same: what differs is augmentation.
    pixels = np.repeat(smooth_picture(0, SIZE, SIZE)[None], 24, axis=0)
    images = image_data(PixelExamples(pixels, np.arange(24)))

    def stream(batch_size, **options):
        found = batches(images, batch_size, augmentation=augmentation, **options)
        return np.concatenate([x for x, _ in found]).reshape(2, 24, SIZE, SIZE, 3)

    expected = stream(4)
    np.testing.assert_array_equal(stream(8), expected)
    drawn = [x.tobytes() for x in expected.reshape(48, -1)]
    # 162 moves, among which some may be drawn twice; no two windows are the same.
    assert len(set(drawn)) >= {"crop_flip": 35, "inception": 48}[augmentation]
    assert not np.array_equal(expected[0], expected[1])
    assert not np.array_equal(stream(4, seed=1), expected)


def shuffled_labels(source, share):
    """Of two epochs."""
    seeds = [tf.constant([0, epoch], tf.int64) for epoch in range(2)]
    return [
        np.array([y for _, y in source.shuffled(seed, share).as_numpy_iterator()]) for seed in seeds
    ]


def test_large_sets_are_mixed_beyond_neighbours():
    count = 960
    orders = shuffled_labels(streamed([b""] * count, 100, files=16), Share(1))
    for order in orders:
        assert sorted(order) == list(range(count))
        # A window of 64 has examples of 8 pieces or more, most from far away.
        assert len(set(order[:64] // 60)) == 8
        assert np.mean(np.abs(np.diff(order)) > 60) > 0.7
    # Those that began an epoch come anywhere in the next.
    places = np.argsort(orders[1])[orders[0][:64]]
    assert np.ptp(places) > count / 2


# What one process sees of batch 3 on, in two epochs: recorded, so that it stays.
RECORDED_LABELS = {
    "pixels": "16 20 9 1 7 2 19 12 15 7 0 21 10 2 9 12 18 11 14 8 5 13 1 19 6 3 22 20",
    "streamed": "3 6 7 20 1 13 11 10 2 0 22 15 14 18 13 11 19 1 12 4 10 16 6 20 17 21 5 8",
}
# Of the first pictures and the last, 0 to 255.
RECORDED_MEANS = {
    ("pixels", "crop_flip"): [115.3, 116.3, 105.3, 104.7, 104.9, 100.5, 122.0, 117.5],
    ("pixels", "inception"): [126.0, 136.7, 132.3, 137.7, 120.1, 128.0, 117.9, 120.3],
    ("streamed", "crop_flip"): [91.6, 106.0, 134.9, 118.9, 101.5, 168.8, 126.6, 121.5],
    ("streamed", "inception"): [96.0, 114.9, 166.5, 151.5, 114.6, 168.5, 91.2, 129.9],
}


@pytest.mark.parametrize(("kind", "augmentation"), RECORDED_MEANS)
def test_trainings_of_earlier_versions_go_on_with_the_same_batches(kind, augmentation):
    images = image_data(SOURCES[kind](None))
    found = batches(images, augmentation=augmentation, first_step=3, input_range="bytes")
    assert " ".join(str(label) for _, y in found for label in y) == RECORDED_LABELS[kind]
    means = np.concatenate([x.mean(axis=(1, 2, 3)) for x in (found[0][0], found[-1][0])])
    np.testing.assert_allclose(means, RECORDED_MEANS[kind, augmentation], atol=0.3, rtol=0)


# Several processes


def of_processes(processes, make, devices=1):
    """What `make` makes for each of them, of its replicas."""
    return [make(Replicas(processes * devices, processes, process)) for process in range(processes)]


def labels_of_processes(images, processes, batch_size=6, **options):
    """By process, epoch and place."""
    found = of_processes(
        processes, lambda r: labels_by_epoch(images, batch_size, replicas=r, **options)
    )
    return np.stack(found)


def in_the_places_of_one(parts):
    """Arrays of the batches of one process, of those of several."""
    return [
        tuple(np.concatenate(arrays) for arrays in zip(*batches, strict=True))
        for batches in zip(*parts, strict=True)
    ]


@pytest.mark.parametrize(
    ("kind", "augmentation"),
    [
        ("pixels", "crop_flip"),
        ("pixels of another size", "inception"),
        ("encoded", "crop_flip"),
        ("files", "inception"),
    ],
)
def test_processes_share_the_batches_of_one(kind, augmentation, tmp_path_factory):
    images = image_data(SOURCES[kind](tmp_path_factory))
    options = {"augmentation": augmentation, "first_step": 2}
    parts = of_processes(3, lambda r: batches(images, 6, replicas=r, **options))
    assert_same_batches(in_the_places_of_one(parts), batches(images, 6, **options))
    parts = of_processes(3, lambda r: evaluated(images, 6, r))
    found, expected = in_the_places_of_one(parts), evaluated(images, 6, Replicas(3))
    for arrays, expected_arrays in zip(found, expected, strict=True):
        for array, expected_array in zip(arrays, expected_arrays, strict=True):
            np.testing.assert_array_equal(array, expected_array)


def evaluated(images, batch_size, replicas, **options):
    dataset = data.evaluation_dataset(images, batch_size, replicas=replicas, **options)
    return list(dataset.as_numpy_iterator())


@pytest.mark.parametrize(("processes", "files"), [(2, 1), (3, 12)])
def test_a_process_reads_its_share_of_a_stream_alone(processes, files):
    shares = [set(part) for part in np.array_split(np.arange(COUNT), processes)]
    in_epochs = []
    for process, share in enumerate(shares):
        seen = []
        images = image_data(streamed(varied_bytes(), 3, files, seen))
        replicas = Replicas(processes, processes, process)
        in_epochs.append(labels_by_epoch(images, 6, epochs=4, replicas=replicas))
        assert set(seen) == share
        # All of it or, because what the last epoch leaves out may not be read, nearly all.
        assert 3 * len(share) < len(seen) <= 4 * len(share)
    for epoch in np.stack(in_epochs, axis=1):
        assert epoch.shape == (processes, 18 // processes)
        assert len(set(epoch.ravel())) == 18
    for own in in_epochs:
        assert len({tuple(epoch) for epoch in own}) == 4


def test_shares_of_a_stream_are_in_an_order_of_seed_and_epoch():
    images = image_data(streamed(varied_bytes(), 3))
    expected = labels_of_processes(images, 2)
    keras.utils.set_random_seed(0)
    np.testing.assert_array_equal(labels_of_processes(images, 2), expected)
    other = labels_of_processes(images, 2, seed=1)
    assert (expected != other).any(axis=-1).all()


def test_shares_of_a_stream_are_mixed_and_each_in_its_own_order():
    length, processes = 240, 4
    source = streamed([b""] * (length * processes), 30, files=32)
    orders = of_processes(processes, lambda r: shuffled_labels(source, Share(8, r)))
    orders = np.array(orders) - length * np.arange(processes)[:, None, None]
    for order in orders.reshape(-1, length):
        assert sorted(order) == list(range(length))
        # The pieces have 30.
        assert len(set(order[:40] // 30)) == 8
        assert np.mean(np.abs(np.diff(order)) > 30) > 0.7
    # Those that meet in an epoch do not meet again.
    pairs = [set(zip(*orders[:2, epoch], strict=True)) for epoch in range(2)]
    assert len(pairs[0] & pairs[1]) < 10
    assert np.mean(orders[0, 0] == orders[1, 0]) < 0.05


@pytest.mark.parametrize("process", [0, 2])
def test_a_share_of_a_stream_goes_on_where_it_was_left(process):
    images = image_data(streamed(varied_bytes(), 3))
    options = {"augmentation": "crop_flip", "replicas": Replicas(3, 3, process)}
    unbroken = batches(images, 6, **options)
    assert [len(y) for _, y in unbroken] == [2] * 6
    # At the end of an epoch, and within one.
    for step in (3, 5):
        assert_same_batches(batches(images, 6, first_step=step, **options), unbroken[step:])


@pytest.mark.parametrize("augmentation", ["crop_flip", "inception"])
def test_augmentation_of_a_share_of_a_stream_is_by_its_place_in_the_batch(augmentation):
    # 24 pictures, all the same: what differs is augmentation.
    images = image_data(streamed([encode(smooth_picture(0, SIZE, SIZE), "PNG")] * 24, 3))
    options = {"augmentation": augmentation, "first_step": 2}
    parts = of_processes(3, lambda r: batches(images, 6, replicas=r, **options))
    expected = [x for x, _ in batches(images, 6, **options)]
    assert len({x.tobytes() for x in np.concatenate(expected)}) > 12
    np.testing.assert_array_equal([x for x, _ in in_the_places_of_one(parts)], expected)


@pytest.mark.parametrize(
    ("processes", "devices", "count"),
    [(2, 1, 23), (2, 2, 23), (2, 3, 16), (3, 1, 23), (3, 2, 23), (3, 2, 1), (1, 4, 23)],
)
def test_a_process_evaluates_its_share_of_a_stream(processes, devices, count):
    shares = np.array_split(np.arange(count), processes)
    sizes, labels_of_weight = [], {0: [], 1: []}
    for process, share in enumerate(shares):
        seen = []
        images = image_data(streamed(varied_bytes()[:count], 3, seen=seen))
        replicas = Replicas(processes * devices, processes, process)
        found = evaluated(images, 12, replicas, augmentation="crop_flip")
        sizes.append([len(y) for _, y, _ in found])
        for inputs, labels, weights in found:
            assert inputs.shape == (len(labels), SIZE, SIZE, 3)
            for label, weight in zip(labels, weights, strict=True):
                labels_of_weight[weight].append(label)
        if len(share):
            assert set(seen) == set(share)
        # Once, and one more for each that fills up.
        assert len(seen) == sum(sizes[-1])
    assert labels_of_weight[1] == list(range(count))
    assert len(labels_of_weight[0]) < processes * devices
    for own in sizes:
        assert own == sizes[0]
        assert all(size % devices == 0 for size in own)
        assert own[:-1] == [12 // processes] * (len(own) - 1)


# Pictures and batches


def pillow_square(pixels, size, fraction=1.0):
    """The centre, scaled by Pillow, whose bilinear filter smooths where it shrinks."""
    height, width = pixels.shape[:2]
    side = round(fraction * min(height, width))
    top, left = (height - side) // 2, (width - side) // 2
    image = PIL.Image.fromarray(pixels[top : top + side, left : left + side])
    return np.asarray(image.resize((size, size), PIL.Image.Resampling.BILINEAR), "float32")


@pytest.mark.parametrize(
    ("size", "augmentation", "fraction"), [(16, "crop_flip", 1.0), (48, "inception", 0.875)]
)
def test_evaluation_has_the_centres_of_all_images_in_order(images, size, augmentation, fraction):
    images = dataclasses.replace(images, image_size=size)
    found = list(data.evaluation_dataset(images, 10, augmentation=augmentation).as_numpy_iterator())
    assert [len(y) for _, y in found] == [10, 10, 3]
    np.testing.assert_array_equal(np.concatenate([y for _, y in found]), np.arange(COUNT))
    inputs = np.concatenate([x for x, _ in found])
    assert inputs.dtype == np.float32
    assert inputs.shape == (COUNT, size, size, 3)
    if isinstance(images.test, PixelExamples):
        originals = [images.test.read(n).numpy() for n in range(COUNT)]
    else:
        originals = [np.asarray(PIL.Image.open(io.BytesIO(x))) for x in varied_bytes()]
    for found_pixels, original in zip(as_pixels(inputs), originals, strict=True):
        # Pillow rounds to integers, twice.
        expected = pillow_square(original, size, fraction)
        np.testing.assert_allclose(found_pixels, expected, atol=1.5, rtol=0)


@every_backend
def test_pixels_of_the_right_size_stay_as_they_are():
    images = pixel_data()
    [(inputs, labels)] = data.evaluation_dataset(images, COUNT).as_numpy_iterator()
    original = np.stack([smooth_picture(n, SIZE, SIZE) for n in range(COUNT)])
    np.testing.assert_allclose(inputs, original.astype("float32") / 127.5 - 1, atol=2e-7)
    for inputs, labels in batches(images):
        np.testing.assert_allclose(as_pixels(inputs), original[labels], atol=1e-4)
    assert labels.dtype == np.int32


@pytest.mark.parametrize(
    ("input_range", "expected"), [("symmetric", (-1, 1)), ("unit", (0, 1)), ("bytes", (0, 255))]
)
@pytest.mark.parametrize("name", ["pixels", "synthetic"])
def test_ranges_of_pixels_and_rows_of_labels(name, input_range, expected):
    images = data.load("synthetic", image_size=SIZE) if name == "synthetic" else pixel_data()
    form = {"augmentation": "none", "one_hot": True, "input_range": input_range}
    low, high = expected
    for plain, formed in (
        (
            data.training_dataset(images, 16, seed=0, epochs=1, augmentation="none"),
            data.training_dataset(images, 16, seed=0, epochs=1, **form),
        ),
        (data.evaluation_dataset(images, 16), data.evaluation_dataset(images, 16, **form)),
    ):
        (inputs, labels), (found, rows) = next(iter(plain)), next(iter(formed))
        bytes_ = as_pixels(keras.ops.convert_to_numpy(inputs))
        found, rows = keras.ops.convert_to_numpy(found), keras.ops.convert_to_numpy(rows)
        np.testing.assert_allclose(found, low + (high - low) * bytes_ / 255, atol=1e-4)
        assert (found.dtype, rows.dtype) == (np.float32, np.float32)
        np.testing.assert_array_equal(rows, np.eye(images.classes)[labels])


@every_backend
def test_channels_first(images):
    last = batches(images, augmentation="crop_flip")
    keras.config.set_image_data_format("channels_first")
    try:
        assert images.image_shape == (3, SIZE, SIZE)
        first = batches(images, augmentation="crop_flip")
    finally:
        keras.config.set_image_data_format("channels_last")
    assert images.image_shape == (SIZE, SIZE, 3)
    assert_same_batches([(x.transpose(0, 2, 3, 1), y) for x, y in first], last)


@pytest.mark.parametrize("batch_size", [0, COUNT + 1])
def test_batches_that_cannot_be_filled_are_refused(images, batch_size):
    with pytest.raises(ValueError, match=f"at most {COUNT}.*batch_size={batch_size}"):
        batches(images, batch_size)


def test_unknown_augmentations_are_refused(images):
    for make in (
        lambda: batches(images, augmentation="mixup"),
        lambda: data.evaluation_dataset(images, 4, augmentation="mixup"),
    ):
        with pytest.raises(ValueError, match="one of auto, none, .*augmentation='mixup'"):
            make()


@pytest.mark.parametrize(
    ("size", "kind"), [(32, "crop_flip"), (63, "crop_flip"), (64, "inception"), (224, "inception")]
)
def test_auto_is_by_size(size, kind):
    assert augmenting.resolve("auto", size) == kind


# Crops and flips


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("margin", [0, 2])
def test_shift_and_flip_against_numpy(margin, flip):
    rng = np.random.default_rng(0)
    pixels = rng.integers(256, size=(50, 8, 8, 3), dtype="uint8")
    draws = rng.uniform(size=(50, 3)).astype("float32")
    expected = []
    for image, (row, column, mirror) in zip(pixels, draws, strict=True):
        padded = np.pad(image, [(margin, margin), (margin, margin), (0, 0)])
        top, left = (math.floor(x * (2 * margin + 1)) for x in (row, column))
        image = padded[top : top + 8, left : left + 8]
        expected.append(image[:, ::-1] if flip and mirror < 0.5 else image)
    found = augmenting.shift_and_flip(pixels, tf.constant(draws), margin=margin, flip=flip)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("augmentation", ["crop", "crop_flip"])
def test_crops_shift_by_up_to_an_eighth_and_flips_mirror_half(augmentation):
    # Every pixel tells where it was.
    rows, columns = np.mgrid[1:33, 1:33].astype("uint8")
    image = np.stack([rows, columns, np.full_like(rows, 7)], axis=-1)
    images = image_data(PixelExamples(np.repeat(image[None], 256, axis=0), np.arange(256)))
    [(inputs, _)] = batches(images, 256, epochs=1, augmentation=augmentation)
    shifts, mirrored = set(), 0
    for picture in np.round(as_pixels(inputs)).astype(int):
        inside = picture[..., 2] == 7
        assert (picture[~inside] == 0).all()
        across = picture[16, :, 1][inside[16]]
        if across[0] > across[-1]:
            mirrored += 1
            picture = picture[:, ::-1]
        top, left = picture[16, 16, :2] - 17
        shifts.add((top, left))
        assert inside.sum() == (32 - abs(top)) * (32 - abs(left))
    assert {shift for pair in shifts for shift in pair} == set(range(-4, 5))
    assert (90 < mirrored < 166) if augmentation == "crop_flip" else mirrored == 0


def reference_window(height, width, draws):
    """Tries one window after another."""
    for area, ratio, row, column in draws.astype("float64"):
        area = height * width * (0.08 + 0.92 * area)
        ratio = 0.75 * (16 / 9) ** ratio
        tall, wide = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 1 <= tall <= height and 1 <= wide <= width:
            corner = math.floor(row * (height - tall + 1)), math.floor(column * (width - wide + 1))
            return (*corner, tall, wide)
    wide, tall = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (height - tall) // 2, (width - wide) // 2, tall, wide


@pytest.mark.parametrize(
    "sides", [(375, 500), (500, 333), (160, 160), (40, 31), (300, 20), (8, 90)]
)
def test_random_windows_against_a_loop(sides):
    draws = np.random.default_rng(0).uniform(size=(100, augmenting.TRIES, 4)).astype("float32")
    window = tf.function(lambda draws: augmenting.random_window(draws)(*map(tf.constant, sides)))
    found = np.array([window(x) for x in draws])
    expected = np.array([reference_window(*sides, x) for x in draws])
    # float32 may round a half to the other side.
    assert np.mean(np.any(found != expected, axis=1)) <= 0.02
    assert np.abs(found - expected).max() <= 1


def test_random_windows_fill_their_ranges():
    height, width = 400, 500
    draws = np.random.default_rng(1).uniform(size=(2000, augmenting.TRIES, 4)).astype("float32")
    windows = tf.vectorized_map(
        lambda x: augmenting.random_window(x)(tf.constant(height), tf.constant(width)), draws
    )
    top, left, tall, wide = windows.numpy().astype("float64").T
    assert top.min() == left.min() == 0
    assert (top + tall).max() == height
    assert (left + wide).max() == width
    area, ratio = tall * wide / (height * width), wide / tall
    assert 0.078 < area.min() < 0.09
    assert 0.97 < area.max() <= 1
    assert 0.74 < ratio.min() < 0.77
    assert 1.3 < ratio.max() < 1.345
    # Uniform where all windows fit: below the area of the largest square and its kin.
    small = area[area < 0.5]
    assert np.mean(small) == pytest.approx((0.08 + 0.5) / 2, abs=0.015)
    assert np.mean(np.log(ratio[area < 0.5])) == pytest.approx(0, abs=0.02)


def test_inception_shows_windows_of_the_picture(tmp_path):
    # Red tells the row and green the column, in a picture of 200 rows and 250 columns.
    rows, columns = np.mgrid[:200, :250]
    ramp = np.stack([rows, columns, np.zeros_like(rows)], axis=-1).astype("uint8")
    images = image_data(EncodedExamples(tf.fill([64], encode(ramp, "PNG")), np.arange(64)), 40)
    [(inputs, _)] = batches(images, 64, epochs=1, augmentation="inception")
    red, green, _ = np.moveaxis(as_pixels(inputs), -1, 0)
    # Away from the edges, where the smoothing is one-sided.
    down = (red[:, 30, 20] - red[:, 10, 20]) / 20 * 40
    across = (green[:, 20, 30] - green[:, 20, 10]) / 20 * 40
    assert 16 < np.sum(across < 0) < 48
    areas, ratios = down * np.abs(across) / (200 * 250), np.abs(across) / down
    assert areas.min() > 0.07
    assert 0.7 < areas.max() < 1.01
    assert ratios.min() > 0.73
    assert ratios.max() < 1.37
    middle = np.stack([red[:, 20, 20] / 200, green[:, 20, 20] / 250])
    assert middle.std(axis=1).min() > 0.05


@pytest.mark.parametrize("window", [(0, 0, 70, 90), (3, 5, 20, 31), (69, 89, 1, 1)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "pixels"])
def test_a_cut_is_a_part_of_the_whole(kind, window):
    pixels = smooth_picture(0, 70, 90)
    picture = tf.constant(pixels if kind == "pixels" else encode(pixels, kind, subsampling=2))
    whole = pictures.cut(picture, pictures.whole).numpy()
    assert np.abs(whole.astype(int) - pixels).mean() < (2 if kind == "JPEG" else 1e-9)
    found = pictures.cut(picture, lambda height, width: tf.constant(window))
    top, left, tall, wide = window
    expected = whole[top : top + tall, left : left + wide]
    # Where the window ends, JPEG's half-resolution colour has no neighbours.
    np.testing.assert_allclose(
        found.numpy().astype(int), expected, atol=4 if kind == "JPEG" else 0, rtol=0
    )
    np.testing.assert_array_equal(found[:-1, :-1], expected[:-1, :-1])


# Digits


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", image_size=SIZE)


def test_digits_are_split_into_disjoint_balanced_parts(digits):
    assert (digits.train.count, digits.test.count) == (1437, 360)
    assert digits.classes == 10
    parts = [
        {image.tobytes() for image in part.read(tf.range(part.count)).numpy()}
        for part in (digits.train, digits.test)
    ]
    assert not parts[0] & parts[1]
    for label in range(10):
        counts = [int(np.sum(part.labels == label)) for part in (digits.train, digits.test)]
        assert counts[1] / sum(counts) == pytest.approx(0.2, abs=0.005)


def test_digits_are_the_pictures_of_scikit_learn(digits):
    from sklearn.datasets import load_digits

    # Averaged back to 8x8, each picture is closest to one of its own label.
    pixels = digits.test.read(tf.range(50)).numpy()
    assert pixels.shape == (50, 32, 32, 3)
    small = pixels.mean(axis=-1).reshape(50, 8, 4, 8, 4).mean(axis=(2, 4)).reshape(50, 64)
    original = load_digits()
    distances = np.linalg.norm(small[:, None] - original.data * (255 / 16), axis=-1)
    assert np.array_equal(original.target[distances.argmin(axis=1)], digits.test.labels[:50])


# Folders


COLORS = {"cat": (255, 0, 0), "dog": (0, 0, 255)}


def write_images(root, count=5, parts=("",)):
    """`count` files of a class, of several formats and suffixes."""
    suffixes = (".jpg", ".png", ".JPEG", ".webp", ".bmp", ".gif")
    for part, (class_name, color), number in itertools.product(parts, COLORS.items(), range(count)):
        path = root / part / class_name / f"{number}{suffixes[number % len(suffixes)]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (40, 50), color).save(path)


@pytest.mark.parametrize("parts", [("",), ("train", "test"), ("train", "val")], ids=str)
def test_folder_of_images(tmp_path, parts):
    write_images(tmp_path, count=6, parts=parts)
    (tmp_path / ".cache").mkdir()
    images = data.load(f"folder:{tmp_path}", image_size=48)
    assert images.class_names == ("cat", "dog")
    assert images.image_shape == (48, 48, 3)
    assert images.skipped_files == ()
    assert (images.train.count, images.test.count) == ((9, 3) if parts == ("",) else (12, 12))
    assert not set(images.train.paths) & set(images.test.paths)
    streams = batches(images, 4), data.evaluation_dataset(images, 4).as_numpy_iterator()
    for inputs, labels in itertools.chain(*streams):
        assert inputs.shape[1:] == (48, 48, 3)
        expected = np.array(list(COLORS.values()))[labels]
        np.testing.assert_allclose(as_pixels(inputs).mean(axis=(1, 2)), expected, atol=3)


def break_files(root):
    """Four files that are no images, each for another reason: a class of 5, two of them."""
    whole_jpeg = (root / "cat" / "0.jpg").read_bytes()
    whole_png = (root / "cat" / "1.png").read_bytes()
    broken = {
        root / "cat" / "0.jpg": b"no image",
        root / "cat" / "1.png": whole_png[: len(whole_png) // 2],
        root / "dog" / "0.jpg": b"",
        root / "dog" / "2.JPEG": whole_jpeg[: len(whole_jpeg) // 2],
    }
    for path, content in broken.items():
        path.write_bytes(content)
    return tuple(sorted(str(path) for path in broken))


@every_backend
def test_corrupt_files_are_left_out_and_named(tmp_path, caplog):
    write_images(tmp_path, parts=("train", "test"))
    broken = break_files(tmp_path / "train")
    with caplog.at_level("WARNING"):
        images = data.load(f"folder:{tmp_path}", image_size=SIZE)
    assert images.skipped_files == broken
    assert f"Left out 4 of 20 files, which cannot be decoded: {', '.join(broken)}" in caplog.text
    assert (images.train.count, images.test.count) == (6, 10)
    assert len(batches(images, 2, epochs=3, augmentation="inception")) == 9


def test_corrupt_files_are_an_error_if_wanted(tmp_path):
    write_images(tmp_path)
    broken = break_files(tmp_path)
    with pytest.raises(
        ValueError, match="^Expected images that can be decoded in .* 4 of 10 files"
    ) as error:
        data.load(f"folder:{tmp_path}", image_size=SIZE, corrupt_images="fail")
    assert all(path in str(error.value) for path in broken)


def test_unchecked_corrupt_files_end_the_training(tmp_path):
    write_images(tmp_path)
    break_files(tmp_path)
    images = data.load(f"folder:{tmp_path}", image_size=SIZE, corrupt_images="unchecked")
    assert images.train.count + images.test.count == 10
    with pytest.raises(tf.errors.InvalidArgumentError):
        batches(images, 8), list(data.evaluation_dataset(images, 2))


def test_many_corrupt_files_are_not_all_named(tmp_path):
    write_images(tmp_path, count=12)
    for number in range(0, 10, 1):
        for path in (tmp_path / "cat").glob(f"{number}.*"):
            path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"10 of 24 files.*, …$") as error:
        data.load(f"folder:{tmp_path}", image_size=SIZE, corrupt_images="fail")
    assert str(error.value).count("/cat/") == folder._NAMED


def empty_folder(root):
    write_images(root)
    for path in (root / "cat").iterdir():
        path.unlink()


def other_files(root):
    empty_folder(root)
    (root / "cat" / "notes.txt").touch()


def corrupt_class(root):
    write_images(root)
    for path in (root / "cat").iterdir():
        path.write_bytes(b"")


def one_image_of_a_class(root):
    write_images(root)
    for path in sorted((root / "cat").iterdir())[1:]:
        path.unlink()


def unknown_class_in_test(root):
    write_images(root, parts=("train", "test"))
    (root / "test" / "cat").rename(root / "test" / "cow")


BAD_FOLDERS = {
    "no class": (lambda root: None, "two or more classes.*Received: no folder"),
    "one class": (lambda root: (root / "cat").mkdir(), "two or more classes.*Received: cat"),
    "empty class": (
        empty_folder,
        r"\.jpg, \.jpeg, \.png, \.bmp, \.gif, \.webp\) in every class. Received: none in .*cat$",
    ),
    "other files": (other_files, "Received: none in .*cat, but 1 .txt$"),
    "corrupt class": (corrupt_class, "decoded in every class.*Received: none of cat"),
    "one image": (one_image_of_a_class, r"20% aside for the test. Received: \[1, 5\] images"),
    "unknown class": (unknown_class_in_test, "Expected the classes of .*train.*Received: cow"),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_bad_folders_are_refused_in_one_line(tmp_path, name):
    prepare, message = BAD_FOLDERS[name]
    prepare(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        data.load(f"folder:{tmp_path}", image_size=SIZE)
    assert "\n" not in str(error.value)


def test_unknown_settings_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"existing folder.*{tmp_path}/none"):
        data.load(f"folder:{tmp_path}/none", image_size=SIZE)
    with pytest.raises(ValueError, match="one of skip, fail, unchecked.*corrupt_images='delete'"):
        data.load("digits", image_size=SIZE, corrupt_images="delete")


# Synthetic


@every_backend
def test_synthetic_images_are_one_batch_on_the_device():
    images = data.load("synthetic:20", image_size=SIZE)
    stream = data.training_dataset(images, 4, seed=0, epochs=2, first_step=3)
    first, second = itertools.islice(stream, 2)
    # Nothing is made, copied or moved between the steps.
    assert all(a is b for a, b in zip(first, second, strict=True))
    assert all(keras.ops.is_tensor(x) for x in first)
    inputs, labels = (keras.ops.convert_to_numpy(x) for x in first)
    assert inputs.shape == (4, *images.image_shape)
    assert (inputs.dtype, labels.dtype) == (np.float32, np.int32)
    assert -1 <= inputs.min() < -0.5 < 0.5 < inputs.max() <= 1
    assert data.steps_per_epoch(images, 4) == 5


@every_backend
def test_synthetic_test_images_have_the_patterns_of_the_training():
    images = data.load("synthetic", image_size=SIZE)
    assert (images.train.count, images.test.count) == (512, 128)
    inputs, labels = next(iter(data.training_dataset(images, 100, seed=0, epochs=1)))
    means = keras.ops.convert_to_numpy(inputs).reshape(10, 10, -1).mean(axis=0)
    [(test_inputs, test_labels)] = data.evaluation_dataset(images, 128).as_numpy_iterator()
    distances = np.linalg.norm(test_inputs.reshape(128, 1, -1) - means, axis=-1)
    np.testing.assert_array_equal(distances.argmin(axis=1), test_labels)
    with pytest.raises(ValueError, match="at most 512"):
        data.training_dataset(images, 513, seed=0, epochs=1)


@pytest.mark.parametrize("name", ["synthetic:", "synthetic:0", "synthetic:-5", "synthetic:many"])
def test_synthetic_counts_are_checked(name):
    with pytest.raises(ValueError, match=f"positive number of images. Received: {name}"):
        data.load(name, image_size=SIZE)


# In `fit`


def tiny_model():
    model = keras.Sequential(
        [keras.layers.Input((SIZE, SIZE, 3)), keras.layers.Flatten(), keras.layers.Dense(COUNT)]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, metrics=["accuracy"])
    return model


@every_backend
def test_fit_takes_one_stream_for_all_epochs():
    images, taken = pixel_data(), []
    expected = [y.tolist() for _, y in batches(images, epochs=4, first_step=5)]
    dataset = data.training_dataset(images, 4, seed=0, epochs=4, augmentation="none", first_step=5)

    def record(labels):
        taken.append(labels.tolist())
        return labels

    def recorded(inputs, labels):
        return inputs, tf.ensure_shape(tf.numpy_function(record, [labels], tf.int32), labels.shape)

    tiny_model().fit(
        dataset.map(recorded),
        shuffle=False,  # It would warn that it does not.
        steps_per_epoch=5,
        initial_epoch=1,
        epochs=4,
        validation_data=data.evaluation_dataset(images, 4),
        verbose=0,
    )
    # Before it begins, Keras may look at a batch, with an iterator of its own.
    assert taken[-15:] == expected
    assert len(taken) <= 17


@every_backend
def test_fit_takes_synthetic_images():
    images = data.load("synthetic:20", image_size=SIZE)
    history = tiny_model().fit(
        data.training_dataset(images, 4, seed=0, epochs=3),
        steps_per_epoch=data.steps_per_epoch(images, 4),
        epochs=3,
        validation_data=data.evaluation_dataset(images, 64),
        verbose=0,
    )
    losses = history.history["loss"]
    assert len(losses) == 3
    assert losses[2] < losses[0]


# TensorFlow Datasets


tfds = pytest.importorskip("tensorflow_datasets")


class Tiny(tfds.core.GeneratorBasedBuilder):
    """Labels are numbers of examples, -1 in the test split. The pixels tell the number."""

    VERSION = tfds.core.Version("1.0.0")
    SHAPE = (None, None, 3)
    SPLITS = MappingProxyType({"train": range(20), "test": [-1] * 4, "validation": range(7)})
    NAMES = tuple(f"class {n}" for n in range(20))

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=self.SHAPE, encoding_format="png"),
            "label": tfds.features.ClassLabel(names=self.NAMES),
            "extra": tfds.features.Text(),
        }
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
        )

    def _split_generators(self, dl_manager):
        return {name: self._examples(labels) for name, labels in self.SPLITS.items()}

    def _examples(self, labels):
        for number, label in enumerate(labels):
            height, width, channels = self.SHAPE
            shape = (height or 30 + number, width or 40, channels)
            example = {"image": np.full(shape, 10 * number, "uint8"), "label": label, "extra": ""}
            yield number, example

    def _generate_examples(self):
        raise NotImplementedError


class TinyGrey(Tiny):
    SHAPE = (SIZE, SIZE, 1)
    SPLITS = MappingProxyType({"train": range(20), "test": range(7)})


class TinyUnlabelled(Tiny):
    SPLITS = MappingProxyType({"train": range(20), "test": [-1] * 4})


class TinyUnlisted(Tiny, skip_registration=True):
    """Known to nobody, as one that somebody else prepared."""


# As `tfds.load` takes it, for the labels in the order of the files.
IN_ORDER = MappingProxyType(
    {
        "as_supervised": True,
        "read_config": tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
    }
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with records of the sets above, in four files a split."""
    root = tmp_path_factory.mktemp("tfds")
    config = tfds.download.DownloadConfig(num_shards=4)
    for builder in (Tiny, TinyGrey, TinyUnlabelled, TinyUnlisted):
        builder(data_dir=root).download_and_prepare(download_config=config)
    return root


@pytest.mark.parametrize(
    ("name", "cache_gb", "kinds"),
    [
        ("tiny", 1, (EncodedExamples, EncodedExamples)),
        ("tiny", 0, (StreamedExamples, StreamedExamples)),
        ("tiny_grey", 1, (PixelExamples, PixelExamples)),
        ("tiny_grey", 10 * SIZE**2 * 3 / 2**30, (EncodedExamples, PixelExamples)),
        ("tiny_unlisted", 1, (EncodedExamples, EncodedExamples)),
    ],
)
def test_prepared_records(prepared, name, cache_gb, kinds):
    images = data.load(
        name, image_size=SIZE, data_dir=str(prepared), cache_gb=cache_gb, shuffle_buffer=3
    )
    assert (type(images.train), type(images.test)) == kinds
    assert images.class_names == Tiny.NAMES
    found = batches(images, 5, epochs=3)
    assert len(found) == 12
    for epoch in range(3):
        labels = np.concatenate([y for _, y in found[4 * epoch : 4 * epoch + 4]])
        assert sorted(labels) == list(range(20))
    evaluated = list(data.evaluation_dataset(images, 4).as_numpy_iterator())
    assert sorted(np.concatenate([y for _, y in evaluated])) == list(range(7))
    for inputs, labels in found + evaluated:
        assert inputs.shape[1:] == (SIZE, SIZE, 3)
        expected = np.broadcast_to(10 * labels[:, None, None, None], inputs.shape)
        np.testing.assert_allclose(as_pixels(inputs), expected, atol=1e-3)
    assert_same_batches(batches(images, 5, epochs=3, first_step=6), found[6:])


@pytest.mark.parametrize(("processes", "process"), [(2, 0), (2, 1), (3, 1)])
def test_a_process_opens_the_files_of_its_share_alone(prepared, tmp_path, processes, process):
    shutil.copytree(prepared / "tiny", tmp_path / "tiny")
    images = data.load(
        "tiny", image_size=SIZE, data_dir=str(tmp_path), cache_gb=0, shuffle_buffer=3
    )
    info = tfds.builder("tiny", data_dir=tmp_path).info
    replicas = Replicas(processes, processes, process)
    shares, lost = {}, 0
    for split in ("train", "validation"):
        numbers = [int(y) for _, y in tfds.load("tiny", split=split, data_dir=tmp_path, **IN_ORDER)]
        start, stop = Share(6, replicas).own_part(len(numbers))
        shares[split] = numbers[start:stop]
        ends = np.cumsum(info.splits[split].shard_lengths)
        for path, first, end in zip(info.splits[split].filepaths, [0, *ends], ends, strict=False):
            if end <= start or first >= stop:
                pathlib.Path(path).unlink()
                lost += 1
    assert lost >= 3
    found = batches(images, 6, replicas=replicas)
    assert [len(y) for _, y in found] == [6 // processes] * 6
    for epoch in range(2):
        own = np.concatenate([y for _, y in found[3 * epoch : 3 * epoch + 3]])
        assert len(set(own)) == len(own)
        assert set(own) <= set(shares["train"])
    tested = evaluated(images, 6, replicas)
    assert sum(len(y) for _, y, _ in tested) == -(-7 // processes)
    weighted = np.concatenate([y[weights == 1] for _, y, weights in tested])
    assert weighted.tolist() == shares["validation"]
    for inputs, labels, *_ in found + tested:
        expected = np.broadcast_to(10 * labels[:, None, None, None], inputs.shape)
        np.testing.assert_allclose(as_pixels(inputs), expected, atol=1e-3)
    assert_same_batches(batches(images, 6, first_step=4, replicas=replicas), found[4:])


@every_backend
def test_download_prepares(tmp_path):
    def load(**options):
        return data.load("tiny", image_size=SIZE, data_dir=str(tmp_path), **options)

    with pytest.raises(ValueError, match=f"tiny in {tmp_path}.* Add --download, or prepare"):
        load()
    assert load(download=True).train.count == 20
    assert load().train.count == 20


@pytest.mark.parametrize("cache_gb", [0, 1])
def test_records_that_are_lost_are_named(prepared, tmp_path, cache_gb):
    shutil.copytree(prepared / "tiny", tmp_path / "tiny")
    for path in (tmp_path / "tiny").rglob("*-validation.tfrecord*"):
        path.unlink()
    with pytest.raises(ValueError, match=f"records .* in {tmp_path}/tiny/.*NotFound") as error:
        data.load("tiny", image_size=SIZE, data_dir=str(tmp_path), cache_gb=cache_gb)
    assert "\n" not in str(error.value)


# As they are named in the recipes, with the number of their classes.
KNOWN_SETS = {
    "cifar10": 10,
    "cifar100": 100,
    "imagenette/160px-v2": 10,
    "imagenet_resized/32x32": 1000,
    "imagenet2012_subset/1pct": 1000,
    "imagenet2012": 1000,
    "mnist": 10,
}


@pytest.mark.parametrize("name", KNOWN_SETS)
def test_known_sets_through_mocked_records(name, tmp_path):
    with mocked_set(name, tmp_path):
        images = data.load(name, image_size=SIZE, data_dir=str(tmp_path))
    assert images.classes == KNOWN_SETS[name]
    assert (images.train.count, images.test.count) == (12, 12)
    found = batches(images, 6, augmentation="inception")
    assert [x.shape for x, _ in found] == [(6, SIZE, SIZE, 3)] * 4
    labels = [sorted(np.concatenate([y for _, y in pair])) for pair in (found[:2], found[2:])]
    assert labels[0] == labels[1] == sorted(images.train.labels)
    assert all(np.isfinite(x).all() for x, _ in found)
    assert len(list(data.evaluation_dataset(images, 5))) == 3


BAD_SETS = {
    "digit": "Unknown dataset. Expected: digits.* Received: digit$",
    "cifar10": r"cifar10 in .*/cifar10/\S+ Add --download, or .* Received: no such folder$",
    "cifar10/unknown": "Expected cifar10 alone: .* Received: cifar10/unknown",
    "imagenette/160": "configuration of imagenette. Expected: 160px. Received: 160$",
    "imagenet2012": "put into .*/downloads/manual by hand; then .*ILSVRC2012_img_train.tar",
    "coco/2017": "Expected dataset coco/2017 in ",
    "tiny_unlabelled": "`test` or `validation` with labels. Received: .* train, test$",
}


@pytest.mark.parametrize("name", BAD_SETS)
def test_sets_that_are_not_there_are_refused_in_one_line(prepared, name):
    with pytest.raises(ValueError, match=BAD_SETS[name]) as error:
        data.load(name, image_size=SIZE, data_dir=str(prepared))
    assert "\n" not in str(error.value)
    if "Expected dataset" in str(error.value) and name != "tiny_unlabelled":
        assert str(prepared) in str(error.value)  # Where it was looked for.


def test_sets_without_one_image_and_one_label_are_refused(tmp_path):
    info = tfds.builder("coco/2017", data_dir=tmp_path).info
    with pytest.raises(ValueError, match="8-bit image, class label.*Received: coco"):
        tfds_source._supervised_keys(tfds, "coco/2017", info)


def test_every_source_has_the_names_of_the_protocol():
    from recipes.data.sources import Examples

    names = {name for name in vars(Examples) if not name.startswith("_")}
    for kind in (PixelExamples, EncodedExamples, FileExamples, StreamedExamples):
        have = {name for name, _ in inspect.getmembers(kind)} | set(
            kind.__dataclass_fields__ if dataclasses.is_dataclass(kind) else ()
        )
        assert names <= have
