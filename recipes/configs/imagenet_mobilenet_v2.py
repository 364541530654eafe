"""MobileNetV2 of full width on ImageNet, 224 pixels, as its authors trained it on one GPU.

Source:    `research/slim/nets/mobilenet/README.md` of github.com/tensorflow/models:
           batch 96, learning rate 0.045 times 0.98 every 2.5 epochs, 5.5 million
           steps, label smoothing 0.1, averages of the weights with 0.9999. What
           it leaves to `train_image_classifier.py`: RMSprop (rho 0.9, momentum
           0.9, epsilon 1), no warm-up, L2 of 4e-5; and to `mobilenet.py`: no L2 of
           depthwise kernels, dropout 0.2, batch norms with 0.997.
           Otherwise than there: the smallest windows are of 8 % and not 5 %, no
           change of brightness and saturation, other initial weights.
Data:      as `imagenet_mobilenet_v1`.
Hardware:  one GPU of 16 GB or more. `--dtype_policy=mixed_bfloat16` is faster on most.
Time:      not run.
Accuracy:  not run. Published there: 72.0 % for these settings; 71.8 % for the
           weights that it offers.

    python -m recipes.train --config=imagenet_mobilenet_v2 --data_dir=DIR --download
"""

from recipes.config import Config


def get_config() -> Config:
    """The settings."""
    return Config(
        name="imagenet_mobilenet_v2",
        model="mobilenet_v2",
        stem="imagenet",
        dataset="imagenet2012",
        image_size=224,
        augmentation="inception",
        dropout=0.2,
        batch_norm_momentum=0.997,
        batch_size=96,
        epochs=412,
        optimizer="rmsprop",
        learning_rate=0.045,
        schedule="step",
        decay_rate=0.98,
        decay_epochs=(2.5,),
        warmup_fraction=0.0,
        momentum=0.9,
        rho=0.9,
        epsilon=1.0,
        # 4e-5 there, as a part of the gradient: it passes the momentum of 0.9, which
        # makes ten times as much of it. With this epsilon RMSprop divides it by 1.
        weight_decay=0.0004,
        decay_depthwise=False,
        label_smoothing=0.1,
        ema_momentum=0.9999,
    )
