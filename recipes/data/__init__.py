"""Images for training and test, from whatever place, behind one function.

`load` returns an `ImageData`; `training_dataset` and `evaluation_dataset` make
tf.data datasets of it for `fit` and `evaluate`, the same under every Keras
backend.

    pipeline.py      the two functions          image_data.py    ImageData
    digits.py  folder.py  tfds_source.py  synthetic.py    what `load` can load
    sources.py       the kinds of places: pixels, encoded images, files, streams; their orders
    pictures.py      decode, cut, scale         augmentation.py  what is random about it
    seeds.py         randomness as a function of numbers
    shares.py        which images are whose, of several processes
    host.py          TensorFlow, kept off the GPU where another backend has it
"""

from __future__ import annotations

from recipes.data.augmentation import AUGMENTATIONS
from recipes.data.digits import load_digits
from recipes.data.folder import CORRUPT_IMAGES, load_folder
from recipes.data.image_data import ImageData
from recipes.data.pipeline import evaluation_dataset, steps_per_epoch, training_dataset
from recipes.data.synthetic import load_synthetic
from recipes.data.tfds_source import load_tfds

__all__ = [
    "AUGMENTATIONS",
    "CORRUPT_IMAGES",
    "ImageData",
    "evaluation_dataset",
    "load",
    "steps_per_epoch",
    "training_dataset",
]


def load(
    name: str,
    *,
    image_size: int,
    data_dir: str | None = None,
    download: bool = False,
    corrupt_images: str = "skip",
    cache_gb: float = 4.0,
    shuffle_buffer: int = 16384,
) -> ImageData:
    """Loads a data set.

    Args:
        name: One of

            - `"digits"`: 1797 handwritten digits, 8x8, part of scikit-learn
              (from the UCI data set 'Optical Recognition of Handwritten
              Digits'), scaled up; one fifth of each class is the test set.
            - `"synthetic"`, `"synthetic:COUNT"`: ten random patterns in noise,
              on the device, to time training steps alone: an epoch is nominally
              512, or COUNT, images, but it is the same batch at every step.
            - `"folder:DIR"`: image files in one folder per class. Where
              DIR has `train` and `test` (or `val`, `validation`), the classes
              are in these; else one fifth of each class is the test set.
            - else, an image classification set of TensorFlow Datasets, such as
              `"cifar10"`, `"imagenette/160px-v2"` or `"imagenet2012"`.
        image_size: Height and width of the images in a batch.
        data_dir: Where TensorFlow Datasets looks and downloads to; `None` is
            its own default.
        download: Whether to download what is not there. Not asked for, it is
            an error: a download without a network fails after minutes only.
        corrupt_images: Of a folder: `"skip"` leaves files out that cannot be
            decoded, and says which; with `"fail"` they are an error; with
            `"unchecked"` they are not looked for.
        cache_gb: GiB of a set of TensorFlow Datasets that may be kept in
            memory. (The files of a folder are in the system's own cache.)
        shuffle_buffer: Encoded images in the shuffling buffer of what is larger.

    Raises:
        ValueError: For an unknown name, a folder without the classes or the
            images, or a set that cannot be prepared.
        FileNotFoundError: If the folder does not exist.
    """
    if corrupt_images not in CORRUPT_IMAGES:
        raise ValueError(
            f"Expected `corrupt_images` to be one of {', '.join(CORRUPT_IMAGES)}. "
            f"Received: corrupt_images={corrupt_images!r}"
        )
    if name == "digits":
        return load_digits(name, image_size)
    if name.partition(":")[0] == "synthetic":
        return load_synthetic(name, image_size)
    if name.startswith("folder:"):
        return load_folder(name, image_size, corrupt_images)
    return load_tfds(
        name,
        image_size,
        data_dir=data_dir,
        download=download,
        cache_gb=cache_gb,
        shuffle_buffer=shuffle_buffer,
    )
