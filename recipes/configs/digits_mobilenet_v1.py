"""MobileNetV1 of width 0.25 on handwritten digits that come with scikit-learn.

Source:    arXiv 1704.04861, table 1, with stride 1 in the first convolution.
Data:      1437 training and 360 test images, 8x8 scaled up to 32x32x3.
Hardware:  2 CPU cores.
Time:      both variants together 194 to 218 s of CPU time over three seeds; 4.4
           minutes by the clock for all of `scripts/run`, on cores that other
           work shares.
Accuracy:  on the test images, stock and diagonal:32, in percent: 98.06 and 97.78
           (seed 0), 97.78 and 98.06 (seed 1), 98.61 and 98.89 (seed 2). Both were
           measured with an earlier order of the images, and not again since.

The loss curves part after two or three steps, by rounding alone: at the start
this network multiplies a difference by roughly 100 a step. In float64 they are
equal to seven digits for seven steps (`--dtype_policy=float64 --max_steps=20`).

    python -m recipes.train --config=digits_mobilenet_v1
"""

from recipes.config import Config


def get_config() -> Config:
    """The settings."""
    return Config(
        name="digits_mobilenet_v1",
        model="mobilenet_v1",
        stem="cifar",
        width_multiplier=0.25,
        dataset="digits",
        augmentation="crop",
        batch_size=32,
        epochs=12,
        learning_rate=0.05,
        warmup_fraction=0.2,
        weight_decay=1e-3,
    )
