"""MobileNetV2 of width 0.35 on handwritten digits that come with scikit-learn.

Source:    arXiv 1801.04381, table 2. The strides are those of the paper: with
           the CIFAR stem a step takes about ten times as long on a CPU.
Data:      1437 training and 360 test images, 8x8 scaled up to 32x32x3.
Hardware:  2 CPU cores.
Time:      stock, TensorFlow without XLA, an older CPU: 116 s of training; 193 s from
           start to SavedModel.
Accuracy:  of the test images, stock and diagonal:32, in percent: 99.44 and 99.72
           (seed 0), 98.06 and 98.61 (seed 1), 98.89 and 98.61 (seed 2).

    python -m recipes.train --config=digits_mobilenet_v2
"""

from recipes.config import Config


def get_config() -> Config:
    """The settings."""
    return Config(
        name="digits_mobilenet_v2",
        model="mobilenet_v2",
        stem="imagenet",
        width_multiplier=0.35,
        dataset="digits",
        augmentation="crop",
        batch_size=64,
        epochs=40,
        learning_rate=0.05,
        warmup_fraction=0.2,
        weight_decay=1e-3,
        log_every=1,
    )
