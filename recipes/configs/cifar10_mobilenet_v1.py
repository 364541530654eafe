"""MobileNetV1 of full width on CIFAR-10.

Source:    `main.py` and `models/mobilenet.py` of github.com/kuangliu/pytorch-cifar:
           strides, SGD, learning rate 0.1 with a cosine to 0 in 200 epochs,
           momentum 0.9, weight decay 5e-4, padded crops and flips; batch 128
           (recalled). V1, because its network is this one but for the limit of
           ReLU6; its V2 has other shortcuts.
           Otherwise than there: Nesterov's momentum; biases and batch norms do
           not decay; pixels are scaled to [-1, 1].
Data:      50 000 training and 10 000 test images, downloaded by TensorFlow
           Datasets (163 MB).
Hardware:  one GPU.
Time:      not run.
Accuracy:  not run; the source has none of this network.

    python -m recipes.train --config=cifar10_mobilenet_v1 --download
"""

from recipes.config import Config


def get_config() -> Config:
    """The settings."""
    return Config(
        name="cifar10_mobilenet_v1",
        model="mobilenet_v1",
        stem="cifar",
        dataset="cifar10",
        augmentation="crop_flip",
        batch_size=128,
        epochs=200,
        learning_rate=0.1,
        warmup_fraction=0.0,
        # 5e-4 there: as a part of the gradient it passes the momentum of 0.9, which
        # makes ten times as much of it; that of Keras does not.
        weight_decay=0.005,
    )
