"""MobileNetV1 of width 0.25 on handwritten digits with integers of 7 and 8 bits.

Source:    settings of `digits_mobilenet_v1`; quantizers, arXiv 1606.06160. Activations are
           clipped at 6, as the network's ReLU6 does; the paper's clip at 1 ruins MobileNets.
           Weights of 7 bits, because those of 8 (odd integers up to 255) are no 8-bit integers.
Data:      as `digits_mobilenet_v1`.
Hardware:  2 CPU cores.
Time:      JAX, `shifted`, both variants: 2 minutes.
Accuracy:  on the test images in percent, JAX, seeds 0, 1 and 2: float 98.06, 98.06, 97.50;
           (7,8,32) 99.72, 97.78, 98.61.

On JAX add `--compare=shifted,shifted+dorefa:7,8,32:limit=6`: without, depthwise layers are slow.

    python -m recipes.train --config=digits_lowbit_mobilenet_v1
"""

from recipes.config import Config


def get_config() -> Config:
    """The settings."""
    return Config(
        name="digits_lowbit_mobilenet_v1",
        model="mobilenet_v1",
        stem="cifar",
        width_multiplier=0.25,
        lowering="stock",
        treatment="dorefa:7,8,32:limit=6",
        dataset="digits",
        augmentation="crop",
        batch_size=32,
        epochs=12,
        learning_rate=0.05,
        warmup_fraction=0.2,
        weight_decay=1e-3,
        log_every=1,
    )
