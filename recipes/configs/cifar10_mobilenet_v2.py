"""MobileNetV2 of full width on CIFAR-10, by the customs of 32x32 images.

Source:    network and strides, github.com/kuangliu/pytorch-cifar; padded crops
           and flips, He et al., arXiv 1512.03385, section 4.2; SGD with a
           cosine, learning rate 0.1 and batch 128, as is usual there.
Data:      50 000 training and 10 000 test images, downloaded by TensorFlow
           Datasets (163 MB).
Hardware:  one GPU.
Time:      not run.
Accuracy:  not run. Published for such networks, with another schedule (70
           epochs): 93.69 % (github.com/WeihaoZhuang/cifar10-100-fast-training).

    python -m recipes.train --config=cifar10_mobilenet_v2 --download
"""

from recipes.config import Config


def get_config() -> Config:
    """The settings."""
    return Config(
        name="cifar10_mobilenet_v2",
        model="mobilenet_v2",
        stem="cifar",
        dataset="cifar10",
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
