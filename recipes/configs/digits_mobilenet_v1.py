"""MobileNetV1 of width 0.25 on handwritten digits that come with scikit-learn.

Source:    arXiv 1704.04861, table 1, with stride 1 in the first convolution.
Data:      1437 training and 360 test images, 8x8 scaled up to 32x32x3.
Hardware:  2 CPU cores.
Time:      TensorFlow without XLA, an older CPU with other work on it: 110 s for stock, 155 s
           for diagonal:32. "auto" chooses stock there, which is not trained twice.
Accuracy:  on the test images, stock and diagonal:32, in percent: 98.33 and 98.33
           (seed 0), 98.33 and 97.78 (seed 1), 98.33 and 98.06 (seed 2); on another
           CPU 97.50 and 98.06, 98.06 and 98.61, 97.50 and 97.50.

The loss curves part after three steps, by rounding alone: at the start this
network multiplies a difference by 100 to 1000 a step. In float64 they are equal
to seven digits for six steps (`--dtype_policy=float64 --max_steps=20`).

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
        compare=("stock", "diagonal:32", "auto"),
        batch_size=32,
        epochs=12,
        learning_rate=0.05,
        warmup_fraction=0.2,
        weight_decay=1e-3,
        log_every=1,
    )
