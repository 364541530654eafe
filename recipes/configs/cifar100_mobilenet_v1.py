"""MobileNetV1 of full width on CIFAR-100, by the customs of 32x32 images.

Source:    strides, epochs, batch and weight decay, github.com/weiaicunzai/
           pytorch-cifar100, which takes steps of the learning rate; here it is
           a cosine. Padded crops and flips, He et al., arXiv 1512.03385,
           section 4.2.
Data:      50 000 training and 10 000 test images, downloaded by TensorFlow
           Datasets (161 MB).
Hardware:  one GPU.
Time:      not run.
Accuracy:  not run. Published there: 65.98 % (its table of top-1 errors).

    python -m recipes.train --config=cifar100_mobilenet_v1 --download
"""

from recipes.config import Config


def get_config() -> Config:
    """The settings."""
    return Config(
        name="cifar100_mobilenet_v1",
        model="mobilenet_v1",
        stem="cifar",
        dataset="cifar100",
        width_multiplier=1.0,
        augmentation="crop_flip",
        batch_size=128,
        epochs=200,
        learning_rate=0.1,
        warmup_fraction=0.025,
        # 5e-4 there: as a part of the gradient it passes the momentum of 0.9, which
        # makes ten times as much of it; that of Keras does not.
        weight_decay=0.005,
    )
