"""Imagewoof for TensorFlow Datasets, which has only Imagenette, its sibling.

Ten breeds of dogs from ImageNet (github.com/fastai/imagenette), hard to tell
apart. Importing this module makes `tfds.load("imagewoof/160px-v2")` work.
"""

from __future__ import annotations

import pathlib

import tensorflow_datasets as tfds

_URL = "https://s3.amazonaws.com/fast-ai-imageclas"
# The archive, and the folder in it, of each configuration; named as Imagenette's are.
_ARCHIVES = {
    "full-size-v2": "imagewoof2",
    "320px-v2": "imagewoof2-320",
    "160px-v2": "imagewoof2-160",
}
# WordNet's numbers of the breeds, as in ImageNet and in the names of the folders.
_CLASSES = (
    "n02086240",  # Shih-Tzu
    "n02087394",  # Rhodesian ridgeback
    "n02088364",  # beagle
    "n02089973",  # English foxhound
    "n02093754",  # Border terrier
    "n02096294",  # Australian terrier
    "n02099601",  # golden retriever
    "n02105641",  # Old English sheepdog
    "n02111889",  # Samoyed
    "n02115641",  # dingo
)


class Imagewoof(tfds.core.GeneratorBasedBuilder):
    """Splits `train` and `validation`, 70 and 30 % of the images of each breed."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in _ARCHIVES]  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=_CLASSES),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            homepage="https://github.com/fastai/imagenette",
        )

    def _split_generators(self, dl_manager):
        archive = _ARCHIVES[self.builder_config.name]
        root = pathlib.Path(dl_manager.download_and_extract(f"{_URL}/{archive}.tgz"), archive)
        return {
            "train": self._generate_examples(root / "train"),
            "validation": self._generate_examples(root / "val"),
        }

    def _generate_examples(self, folder: pathlib.Path):
        for path in sorted(folder.glob("*/*.JPEG")):
            yield path.name, {"image": path, "label": path.parent.name}
