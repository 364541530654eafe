"""MobileNetV2 of full width on Imagenette: ten easy classes of ImageNet.

Source:    data, 80 epochs and 128 pixels, the leaderboard of
           github.com/fastai/imagenette. All other settings are this recipe's own.
Data:      9469 training and 3925 test images with a shorter side of 160 pixels,
           downloaded by TensorFlow Datasets (99 MB).
Hardware:  one GPU.
Time:      not run.
Accuracy:  not run; none is published for this network (the leaderboard is of
           residual networks).

    python -m recipes.train --config=imagenette_mobilenet_v2 --download
"""

from recipes.config import Config


def get_config() -> Config:
    """The settings."""
    return Config(
        name="imagenette_mobilenet_v2",
        model="mobilenet_v2",
        stem="imagenet",
        dataset="imagenette/160px-v2",
        image_size=128,
        augmentation="inception",
        dropout=0.2,
        batch_size=64,
        epochs=80,
        learning_rate=0.1,
        warmup_fraction=0.05,
        weight_decay=0.0005,
        label_smoothing=0.1,
    )
