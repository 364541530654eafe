"""MobileNetV1 of full width on ImageNet, 224 pixels.

Source:    `official/vision/configs/experiments/image_classification/
           imagenet_mobilenetv1_tpu.yaml` of github.com/tensorflow/models (Model
           Garden), and what it inherits of `mobilenet_imagenet`: batch 4096,
           RMSprop (rho 0.9, momentum 0.9, epsilon 0.002), learning rate 0.256
           times 0.94 every 2.5 epochs, 5 epochs of warm-up, 500 epochs, L2 of
           1e-5, not on depthwise kernels (recalled), label smoothing 0.1, dropout
           0.2, batch norms with 0.997, windows of 8 to 100 % and flips, bfloat16.
           Otherwise than there: an update is of 8 batches of 512; decays are
           counted from the end of the warm-up; pixels are scaled to [-1, 1].
Data:      1 281 167 training and 50 000 test images. TensorFlow Datasets makes
           them of the archives that one gets from image-net.org with a licence:
           put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into
           DIR/downloads/manual. A tenth of them, as a trial:
           --dataset=imagenet2012_subset/10pct
Hardware:  one GPU of 40 GB or more.
Time:      not run.
Accuracy:  not run. Published there: 72.33 %.

    python -m recipes.train --config=imagenet_mobilenet_v1 --data_dir=DIR --download
"""

from recipes.config import Config


def get_config() -> Config:
    """The settings."""
    return Config(
        name="imagenet_mobilenet_v1",
        model="mobilenet_v1",
        stem="imagenet",
        dataset="imagenet2012",
        image_size=224,
        augmentation="inception",
        dropout=0.2,
        batch_norm_momentum=0.997,
        batch_size=512,
        gradient_accumulation=8,
        epochs=500,
        optimizer="rmsprop",
        learning_rate=0.256,
        schedule="step",
        decay_rate=0.94,
        decay_epochs=(2.5,),
        warmup_fraction=0.01,
        momentum=0.9,
        rho=0.9,
        epsilon=0.002,
        # 1e-5 there, as a part of the gradient. That is divided by the root of epsilon,
        # as long as gradients are small against it, and passes the momentum:
        # 1e-5 / 0.002**0.5 * 10.
        weight_decay=0.0022,
        decay_depthwise=False,
        label_smoothing=0.1,
        dtype_policy="mixed_bfloat16",
    )
