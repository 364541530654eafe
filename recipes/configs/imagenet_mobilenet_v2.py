"""MobileNetV2 of full width on ImageNet, 224 pixels, nearly as published.

Source:    optimizer, batch 96 on each of 16 devices, learning rate 0.045 times
           0.98 every epoch, and weight decay 4e-5, Sandler et al., arXiv
           1801.04381, section 6.1. Epsilon, dropout and label smoothing, which
           it does not tell: `mobilenet_imagenet` of github.com/tensorflow/models.
           Ours: one device, so that the batch is that of one of theirs; weight
           decay is decoupled, because Keras's is. Theirs is a part of the loss,
           which RMSprop divides by the size of the gradients: no factor makes
           one of the other, and the number is kept. Ours as well: averages of
           weights with 0.9999, as in TF-slim's training of Inception.
Data:      as `imagenet_mobilenet_v1`.
Hardware:  one GPU of 16 GB or more.
Time:      not run.
Accuracy:  not run. Published: 72.0 % (arXiv 1801.04381, table 4), 71.3 %
           (keras.applications), 71.0 % (github.com/tensorflow/models, 500 epochs).

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
        epochs=300,
        optimizer="rmsprop",
        learning_rate=0.045,
        schedule="step",
        decay_rate=0.98,
        decay_epochs=1.0,
        warmup_fraction=0.01,
        momentum=0.9,
        rho=0.9,
        epsilon=0.002,
        weight_decay=4e-05,
        label_smoothing=0.1,
        ema_momentum=0.9999,
        dtype_policy="mixed_bfloat16",
    )
