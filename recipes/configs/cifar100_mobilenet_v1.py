"""MobileNetV1 of full width on CIFAR-100.

Source:    README of github.com/weiaicunzai/pytorch-cifar100: SGD with Nesterov's
           momentum of 0.9, learning rate 0.1, divided by 5 after epochs 60, 120
           and 160 of 200, batch 128, weight decay 5e-4. V1, because the network
           in its `models/mobilenet.py` is this one but for the limit of ReLU6;
           its V2 has a stem of 1x1 and other strides.
           Otherwise than there: biases and batch norms do not decay; pixels are
           scaled to [-1, 1]; images are not rotated by up to 15 degrees.
Data:      50 000 training and 10 000 test images, downloaded by TensorFlow
           Datasets (161 MB).
Hardware:  one GPU.
Time:      not run.
Accuracy:  not run. Published there: 65.98 %.

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
        augmentation="crop_flip",
        batch_size=128,
        epochs=200,
        learning_rate=0.1,
        schedule="step",
        decay_rate=0.2,
        decay_epochs=(60, 120, 160),
        warmup_fraction=0.0,
        # 5e-4 there: as a part of the gradient it passes the momentum of 0.9, which
        # makes ten times as much of it; that of Keras does not.
        weight_decay=0.005,
    )
