"""The shipped configs: their settings are those of their sources, written down here from these."""

import contextlib
import dataclasses
import pathlib

import keras
import numpy as np
import PIL.Image
import pytest

from diagconv_tf import Plan
from recipes import config as config_module
from recipes import data, models, optimizers, train
from recipes.comparing import ComparedSteps
from recipes.config import Config, config_names, load_config
from recipes.distributing import Distribution
from tests.mocked_tfds import mocked_set

# These laws need no backend's own code: they are tested on one of them.
one_backend = pytest.mark.backends("tensorflow")

IMAGENET, CIFAR, IMAGENETTE, DIGITS = 1_281_167, 50_000, 9_469, 1_437

#: Config → what its source says, in the source's words, and what follows from its choice of task.
SETTINGS = {
    # Own settings: the accuracies in its docstring were measured with these.
    "digits_mobilenet_v1": {
        "compare": ("stock", "diagonal:32", "auto"),
        "width_multiplier": 0.25,
        "augmentation": "crop",
        "batch_size": 32,
        "epochs": 12,
        "learning_rate": 0.05,
        "warmup_fraction": 0.2,
        "weight_decay": 1e-3,
        "log_every": 1,
    },
    "digits_mobilenet_v2": {
        "model": "mobilenet_v2",
        "stem": "imagenet",
        "width_multiplier": 0.35,
        "augmentation": "crop",
        "batch_size": 64,
        "epochs": 40,
        "learning_rate": 0.05,
        "warmup_fraction": 0.2,
        "weight_decay": 1e-3,
        "log_every": 1,
    },
    # github.com/kuangliu/pytorch-cifar, main.py: "lr=0.1", "momentum=0.9, weight_decay=5e-4",
    # "CosineAnnealingLR(optimizer, T_max=200)", "RandomCrop(32, padding=4)" and flips. A gradient
    # passes on 1 / (1 - 0.9) of itself: 10 x 5e-4.
    "cifar10_mobilenet_v1": {
        "dataset": "cifar10",
        "augmentation": "crop_flip",
        "batch_size": 128,
        "epochs": 200,
        "warmup_fraction": 0.0,
        "weight_decay": 5e-3,
    },
    # github.com/weiaicunzai/pytorch-cifar100, README: "init lr = 0.1 divide by 5 at 60th, 120th,
    # 160th epochs, train for 200 epochs with batchsize 128 and weight decay 5e-4, Nesterov
    # momentum of 0.9".
    "cifar100_mobilenet_v1": {
        "dataset": "cifar100",
        "augmentation": "crop_flip",
        "batch_size": 128,
        "epochs": 200,
        "schedule": "step",
        "decay_rate": 1 / 5,
        "decay_epochs": (60.0, 120.0, 160.0),
        "warmup_fraction": 0.0,
        "weight_decay": 5e-3,
    },
    # github.com/fastai/imagenette, leaderboard: 128 pixels, 80 epochs. The others are our own.
    "imagenette_mobilenet_v2": {
        "model": "mobilenet_v2",
        "stem": "imagenet",
        "dataset": "imagenette/160px-v2",
        "image_size": 128,
        "augmentation": "inception",
        "dropout": 0.2,
        "epochs": 80,
        "warmup_fraction": 0.05,
        "weight_decay": 5e-4,
        "label_smoothing": 0.1,
    },
    # github.com/tensorflow/models, imagenet_mobilenetv1_tpu.yaml: "global_batch_size: 4096",
    # "initial_learning_rate: 0.256", "decay_steps: 780  # 2.5 * steps_per_epoch",
    # "decay_rate: 0.94", "warmup_steps: 1560", "train_steps: 156000  # 500 epochs",
    # "dropout_rate: 0.2", "label_smoothing: 0.1", "l2_weight_decay: 0.00001", "bfloat16"; and
    # mobilenet_imagenet: "'rho': 0.9, 'momentum': 0.9, 'epsilon': 0.002", "norm_momentum=0.997".
    "imagenet_mobilenet_v1": {
        "stem": "imagenet",
        "dataset": "imagenet2012",
        "image_size": 224,
        "augmentation": "inception",
        "dropout": 0.2,
        "batch_norm_momentum": 0.997,
        "batch_size": 512,
        "gradient_accumulation": 8,
        "epochs": 500,
        "optimizer": "rmsprop",
        "learning_rate": 0.256,
        "schedule": "step",
        "decay_rate": 0.94,
        "decay_epochs": (2.5,),
        "warmup_fraction": 5 / 500,
        "epsilon": 0.002,
        "weight_decay": 0.0022,
        "decay_depthwise": False,
        "label_smoothing": 0.1,
        "dtype_policy": "mixed_bfloat16",
    },
    # github.com/tensorflow/models, research/slim/nets/mobilenet/README.md: "learning_rate=0.045 *
    # NUM_GPUS", "batch_size= 96", "learning_rate_decay_factor=0.98", "num_epochs_per_decay = 2.5",
    # "label_smoothing=0.1", "moving_average_decay=0.9999", "5.5M steps"; train_image_classifier.py:
    # opt_epsilon 1.0, rmsprop_decay and rmsprop_momentum 0.9, weight_decay 0.00004;
    # mobilenet.py: "dropout_keep_prob=0.8, bn_decay=0.997", separable_conv2d without regularizer.
    "imagenet_mobilenet_v2": {
        "model": "mobilenet_v2",
        "stem": "imagenet",
        "dataset": "imagenet2012",
        "image_size": 224,
        "augmentation": "inception",
        "dropout": 0.2,
        "batch_norm_momentum": 0.997,
        "batch_size": 96,
        "epochs": 412,
        "optimizer": "rmsprop",
        "learning_rate": 0.045,
        "schedule": "step",
        "decay_rate": 0.98,
        "decay_epochs": (2.5,),
        "warmup_fraction": 0.0,
        "epsilon": 1.0,
        "weight_decay": 4e-4,
        "decay_depthwise": False,
        "label_smoothing": 0.1,
        "ema_momentum": 0.9999,
    },
    # tensorpack, examples/DoReFa-Net/svhn-digit-dorefa.py: "Resize((40, 40))", "image / 256.0",
    # "BatchData(data_train, 128)", "learning_rate=1e-3", "decay_steps=4721 * 100",
    # "decay_rate=0.5", "staircase=True", "AdamOptimizer(lr, epsilon=1e-5)", "max_epoch=200",
    # "dropout(0.5".
    "svhn_dorefa": {
        "model": "svhn_cnn",
        "lowering": "stock",
        "compare": ("stock", "dorefa:1,2,4", "dorefa:1,1,4"),
        "dataset": "svhn_cropped",
        "image_size": 40,
        "input_range": "unit",
        "dropout": 0.5,
        "batch_size": 128,
        "epochs": 200,
        "optimizer": "adam",
        "learning_rate": 1e-3,
        "schedule": "step",
        "decay_rate": 0.5,
        "decay_epochs": (100.0,),
        "warmup_fraction": 0.0,
        "epsilon": 1e-5,
    },
    # The same, alexnet-dorefa.py: Adam of rate 2e-4, 4e-5 from epoch 60 and 8e-6 from 75, 90
    # epochs, batch 256, "epsilon=1e-5", "image / 255.0".
    "imagenet_dorefa_alexnet": {
        "model": "alexnet",
        "lowering": "stock",
        "compare": ("stock", "dorefa:8,8,8", "dorefa:1,2,6"),
        "dataset": "imagenet2012",
        "image_size": 224,
        "input_range": "unit",
        "augmentation": "inception",
        "batch_size": 256,
        "epochs": 90,
        "optimizer": "adam",
        "learning_rate": 2e-4,
        "schedule": "step",
        "decay_rate": 4e-5 / 2e-4,
        "decay_epochs": (60.0, 75.0),
        "warmup_fraction": 0.0,
        "epsilon": 1e-5,
    },
    # Adam's epsilon as above. The others are our own.
    "digits_lowbit": {
        "model": "small_cnn",
        "lowering": "stock",
        "compare": (
            "stock",
            *("dorefa:8,8,8", "dorefa:4,4,8", "dorefa:2,2,6"),
            *("dorefa:1,2,32", "dorefa:1,2,6", "dorefa:1,2,4"),
            *("dorefa:1,1,32", "dorefa:1,1,4"),
        ),
        "image_size": 8,
        "input_range": "unit",
        "epochs": 30,
        "optimizer": "adam",
        "learning_rate": 3e-3,
        "warmup_fraction": 0.0,
        "epsilon": 1e-5,
    },
    # arXiv 1706.02379, section 6: Adam, rate 0.01, divided by 10 twice. The others are our own.
    "digits_binary": {
        "model": "small_cnn",
        "width_multiplier": 0.25,
        "lowering": "stock",
        "compare": ("stock", "bc", "bigsr", "sr", "r"),
        "image_size": 8,
        "input_range": "unit",
        "epochs": 40,
        "optimizer": "adam",
        "learning_rate": 0.01,
        "schedule": "step",
        "decay_rate": 1 / 10,
        "decay_epochs": (20.0, 30.0),
        "warmup_fraction": 0.0,
    },
    # Those of digits_mobilenet_v1.
    "digits_lowbit_mobilenet_v1": {
        "width_multiplier": 0.25,
        "lowering": "stock",
        "treatment": "dorefa:7,8,32:limit=6",
        "augmentation": "crop",
        "batch_size": 32,
        "epochs": 12,
        "learning_rate": 0.05,
        "warmup_fraction": 0.2,
        "weight_decay": 1e-3,
        "log_every": 1,
    },
    # lancopku/meProp, src/csharp/nnmnist/default.json: "HiddenSize": 500, "Layers": 3,
    # "LearningRate": 0.001, "MaxEpoch": 20, "MinibatchSize": 100, "OptType": "adam",
    # "TrainTop": 160; Adam.cs: "eps = 1e-8"; its README: k = 80 for MNIST.
    "mnist_meprop": {
        "model": "mlp",
        "lowering": "stock",
        "compare": ("stock", "meprop:k=80", "meprop:k=160", "random:k=80"),
        "dataset": "mnist",
        "image_size": 28,
        "input_range": "unit",
        "batch_size": 100,
        "epochs": 20,
        "optimizer": "adam",
        "learning_rate": 1e-3,
        "schedule": "constant",
        "warmup_fraction": 0.0,
        "epsilon": 1e-8,
    },
    # Network, epochs, optimizer and its rate as there. The others are our own.
    "digits_meprop": {
        "model": "mlp",
        "standardize": True,
        "lowering": "stock",
        "compare": (
            "stock",
            *("meprop:k=5", "meprop:k=10", "meprop:k=20"),
            *("meprop:k=40", "meprop:k=80", "meprop:k=160"),
            *("meprop:unified,k=10", "meprop:unified,k=40", "meprop:unified,k=160"),
            *("random:k=5", "random:k=10", "random:k=40", "random:k=160"),
        ),
        "image_size": 8,
        "input_range": "unit",
        "batch_size": 32,
        "epochs": 20,
        "optimizer": "adam",
        "learning_rate": 1e-3,
        "schedule": "constant",
        "warmup_fraction": 0.0,
    },
    # Own settings, for networks and images of the user.
    "finetune_folder": {
        "model": "model.keras",
        "dataset": "folder:images",
        "augmentation": "inception",
        "lowering": "tune",
        "compare": ("tune",),
        "batch_size": 32,
        "learning_rate": 0.01,
        "weight_decay": 1e-4,
    },
}

#: Config → training images, and learning rates at steps, in the source's numbers.
RATES = {
    "digits_mobilenet_v1": (DIGITS, {105: 0.05, 527: 0.0}),
    "cifar10_mobilenet_v1": (CIFAR, {0: 0.1, 100 * 390: 0.05, 200 * 390: 0.0}),
    # The README's table: "epoch(lr = 0.1) 60, (0.02) 60, (0.004) 40, (0.0008) 40".
    "cifar100_mobilenet_v1": (
        CIFAR,
        {60 * 390 - 1: 0.1, 60 * 390: 0.02, 120 * 390: 0.004, 160 * 390 - 1: 0.004}
        | {160 * 390: 0.0008, 200 * 390 - 1: 0.0008},
    ),
    "imagenette_mobilenet_v2": (IMAGENETTE, {588: 0.1, 80 * 147: 0.0}),
    # 2502 batches an epoch, of which eight make an update.
    "imagenet_mobilenet_v1": (
        IMAGENET,
        {0: 0.256 / 12_510, 12_509: 0.256, 12_510 + 6_250: 0.256, 12_510 + 6_260: 0.256 * 0.94},
    ),
    # 5004 batches an epoch.
    "imagenet_dorefa_alexnet": (
        IMAGENET,
        {0: 2e-4, 60 * 5004 - 1: 2e-4, 60 * 5004: 4e-5, 75 * 5004 - 1: 4e-5, 75 * 5004: 8e-6},
    ),
    # int(1281167 / 96 * 2.5) = 33363 steps.
    "imagenet_mobilenet_v2": (
        IMAGENET,
        {0: 0.045, 33_360: 0.045, 33_370: 0.0441, 5_490_000: 0.045 * 0.98**164},
    ),
}


@one_backend
def test_all_configs_have_a_source_here():
    assert sorted(SETTINGS) == config_names()


@one_backend
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_those_of_the_source(name):
    found = dataclasses.asdict(load_config(name))
    expected = dataclasses.asdict(Config()) | {"name": name} | SETTINGS[name]
    assert {k: v for k, v in found.items() if v != expected[k]} == {}


@one_backend
@pytest.mark.parametrize("name", RATES)
def test_learning_rates_are_those_of_the_source(name):
    images, rates = RATES[name]
    config = load_config(name)
    schedule = optimizers.learning_rate(config, images // config.batch_size)
    found = {update: float(schedule(keras.ops.convert_to_tensor(update))) for update in rates}
    assert found == pytest.approx(rates, rel=1e-4, abs=1e-6)


@one_backend
@pytest.mark.parametrize("name", config_names())
def test_config_files_are_named_and_documented(name):
    assert load_config(name).name == name
    path = config_module.CONFIGS / f"{name}.py"
    assert load_config(str(path)) == load_config(name)
    text = path.read_text()
    for word in ("Source:", "Data:", "Hardware:", "Time:", "Accuracy:", f"--config={name}"):
        assert word in text


def small_networks(monkeypatch):
    """One block: what is traced is most of the time of two steps."""
    monkeypatch.setattr(models, "_V1_BLOCKS", models._V1_BLOCKS[:1])
    monkeypatch.setattr(models, "_V2_STAGES", models._V2_STAGES[:1])


@pytest.mark.backends("torch")
@pytest.mark.parametrize("name", config_names())
def test_every_config_makes_a_model_that_can_be_trained(name, monkeypatch):
    small_networks(monkeypatch)
    config = load_config(name)
    if config.model not in config_module.BUILT_IN:
        return  # A file of the user's.
    size = min(config.image_size or 32, 64)
    images = data.load("synthetic", image_size=size)
    model = train.build_model(config, images, Distribution())
    optimizers.compile_model(model, config, 10)
    labels = np.arange(2)
    if config.label_smoothing:
        labels = np.eye(images.classes)[labels]
    inputs = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype("float32")
    assert np.isfinite(model.train_on_batch(inputs, labels)).all()


@one_backend
@pytest.mark.parametrize("name", ["imagenet_mobilenet_v2", "finetune_folder"])
def test_configs_train(name, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "export_model", lambda *_: "")
    draw_nothing = lambda title, variants, path: pathlib.Path(path).touch()  # noqa: E731
    monkeypatch.setattr("recipes.report.draw_curves", draw_nothing)
    monkeypatch.setattr(train, "compare_steps", lambda *_: ComparedSteps())
    small_networks(monkeypatch)
    # Tuning has tests of its own; here it would measure for a minute.
    monkeypatch.setattr("recipes.variants.tune", lambda model, _: Plan.of_model(model))
    config = dataclasses.replace(
        load_config(name),
        image_size=32,
        batch_size=6,
        max_steps=2,
        compare=("tune",),
        data_dir=str(tmp_path),
        output_dir=str(tmp_path / "runs"),
    )
    with contextlib.ExitStack() as stack:
        if config.dataset == "folder:images":
            for number in range(12):
                path = tmp_path / "images" / f"class {number % 2}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                PIL.Image.new("RGB", (40, 40), (20 * number, 0, 0)).save(path)
            inputs = keras.Input((32, 32, 3))
            x = keras.layers.GlobalAveragePooling2D()(keras.layers.DepthwiseConv2D(3)(inputs))
            keras.Model(inputs, keras.layers.Dense(7)(x)).save(tmp_path / "model.keras")
            config = dataclasses.replace(
                config, model=f"{tmp_path}/model.keras", dataset=f"folder:{tmp_path}/images"
            )
        elif config.dataset != "digits":
            stack.enter_context(mocked_set(config.dataset, tmp_path))
        if config.model in config_module.BUILT_IN:
            config = dataclasses.replace(config, width_multiplier=0.25)
        found = train.run_recipe(config, verbose=0)
    (result,) = found.variants
    assert len(result.losses) == 2
    assert np.isfinite(result.losses).all()
    assert found.restored_accuracy is not None
