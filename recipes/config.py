"""The settings of an experiment, where they are checked, and their flags.

Each field of `Config` is declared once, with its default, its help and its
limits; the flags of `recipes.train` and all error messages follow from that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import json
import pathlib
import re
import runpy
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absl import flags

from diagconv_cli.quiet import silence_tensorflow_log

CONFIGS = pathlib.Path(__file__).parent / "configs"

#: Networks that the recipes build; another `model` is a file.
BUILT_IN = ("mobilenet_v1", "mobilenet_v2", "small_cnn", "svhn_cnn", "alexnet", "mlp")
MODEL_FILES = (".keras", ".h5")

#: Settings of these networks; a model from a file has its own.
_OF_BUILT_IN = (
    *("stem", "width_multiplier", "dropout", "batch_norm_momentum", "dtype_policy"),
    "standardize",
)


def _setting(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A field of `Config`: its default, its help and the values it may have."""
    limits = {"least": least, "above": above, "below": below, "choices": choices}
    return dataclasses.field(default=default, metadata={"help": help, **limits})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """An experiment. Every value is checked when it is made.

    `dataclasses.replace(config, epochs=2)` gives a changed copy.

    Raises:
        ValueError: For a key that is no field (the message lists the near
            ones) and for a value of the wrong type or outside its limits.
    """

    name: str = _setting("experiment", "names the folder of the results")
    model: str = _setting(
        "mobilenet_v1",
        "the network: 'mobilenet_v1', 'mobilenet_v2', 'small_cnn' (four convolutions), 'svhn_cnn' "
        "and 'alexnet' (DoReFa-Net's), 'mlp' (two dense layers of 500 units, on gray pixels), or "
        "the path of a .keras or .h5 file to train further; its classifier is replaced where the "
        "number of classes is another",
    )
    freeze: str = _setting(
        "none",
        "of a model from a file: 'backbone' trains its classifier alone; frozen batch norms keep "
        "their statistics and use them",
        choices=("none", "backbone"),
    )
    unfreeze_after: int | None = _setting(
        None,
        "epochs after which all but the batch norms is trained; without it --freeze lasts to the "
        "end",
        least=1,
    )
    stem: str = _setting(
        "cifar",
        "of MobileNets: strides for small images or for large ones",
        choices=("cifar", "imagenet"),
    )
    width_multiplier: float = _setting(1.0, "factor of the number of filters", above=0)
    dropout: float = _setting(
        0.0, "rate before the classifier; of 'mlp', after each hidden layer", least=0, below=1
    )
    standardize: bool = _setting(
        False,
        "of 'mlp': a first layer subtracts from each pixel its mean over the training images, and "
        "divides by the standard deviation of all pixels",
    )
    batch_norm_momentum: float = _setting(
        0.9,
        "of the moving averages; short trainings need a lower one",
        least=0,
        below=1,
    )
    input_range: str = _setting(
        "auto",
        "of the pixels that the model takes: 'symmetric' is [-1, 1], 'unit' [0, 1], 'bytes' "
        "[0, 255]; 'auto' is what a file's own preprocessing wants, such as a Rescaling, and "
        "without any 'symmetric'",
        choices=("auto", "symmetric", "unit", "bytes"),
    )
    lowering: str = _setting(
        "diagonal:32",
        "how the depthwise layers compute: 'stock' (Keras's own layers), 'diagonal:32', 'shifted', "
        "…; 'tune' measures which is the fastest here; the path of a plan as JSON file; or as JSON "
        'one per pass: \'{"forward": …, "input_gradient": …, "kernel_gradient": …}\'',
    )
    treatment: str = _setting(
        "",
        "of the training, which changes what is computed: 'dorefa:W,A,G' has as many bits of "
        "weights, activations and gradients (32 is float), 'dorefa:7,8,32:limit=6' clips "
        "activations at 6; 'bc', 'sr', 'bigsr' and 'r' have weights of -1 and 1, "
        "'sr:delta=0.125' multiples of 0.125; 'meprop:k=30' or 'meprop:unified,k=30' has the 30 "
        "largest elements of output gradients, 'random:k=30' random ones. It is compared with the "
        "same lowering without it",
    )
    simplify: float = _setting(
        0.0,
        "of trainings with 'meprop': remove hidden units that are among the largest for a smaller "
        "share of the examples (meSimp); the model that is saved is without them; 0 removes none. "
        "With a constant learning rate the optimizer starts anew every 5 epochs, as the authors' "
        "does",
        least=0,
        below=1,
    )
    compare: tuple[str, ...] = _setting(
        (),
        "lowerings and treatments to train one after another from the same start, in place of "
        "--lowering, --treatment and stock: 'stock,shifted', 'stock,dorefa:8,8,8,dorefa:1,2,6', "
        "'shifted,shifted+dorefa:1,2,6'. A number, or NAME=VALUE, after a comma belongs to what "
        "is before it. The last one's model is saved",
    )

    dataset: str = _setting(
        "digits", "'digits', 'synthetic', 'folder:DIR' or a name in TensorFlow Datasets"
    )
    data_dir: str | None = _setting(None, "where TensorFlow Datasets keeps its data")
    download: bool = _setting(False, "let TensorFlow Datasets download what is not there")
    image_size: int | None = _setting(
        None,
        "height and width in pixels; by default that of a model from a file, 224 where it takes "
        "any, and 32 for the networks of the recipes, of which MobileNets take no fewer",
        least=8,
    )
    augmentation: str = _setting(
        "none",
        "of training images: 'crop' shifts by up to 1/8 of the size, 'crop_flip' mirrors as well, "
        "'inception' takes a random part of random shape, and mirrors; 'auto' is 'crop_flip' "
        "below 64 pixels, else 'inception'",
        choices=("none", "crop", "crop_flip", "inception", "auto"),
    )
    corrupt_images: str = _setting(
        "skip",
        "files in folders that cannot be decoded: found before the training and left out, found "
        "and an error, or not looked for",
        choices=("skip", "fail", "unchecked"),
    )
    cache_gb: float = _setting(
        4.0, "datasets of no more than this, as files, are kept in memory", least=0
    )
    shuffle_buffer: int = _setting(
        16384, "images to draw from, of a dataset that is not kept in memory", least=1
    )

    batch_size: int = _setting(64, "images in a step", least=1)
    epochs: int = _setting(10, "passes over the training images", least=1)
    max_steps: int | None = _setting(None, "end after so many steps, for a trial", least=1)
    optimizer: str = _setting(
        "sgd",
        "'sgd' has Nesterov momentum, the others have not",
        choices=("sgd", "rmsprop", "adam"),
    )
    learning_rate: float = _setting(0.1, "the highest, at the end of the warm-up", above=0)
    schedule: str = _setting(
        "cosine",
        "of the learning rate after the warm-up: 'cosine' to 0, or 'step': times --decay_rate "
        "at --decay_epochs",
        choices=("cosine", "step", "constant"),
    )
    decay_rate: float = _setting(0.1, "of the schedule 'step'", above=0)
    decay_epochs: tuple[float, ...] = _setting(
        (30.0,),
        "of the schedule 'step', from the end of the warm-up: one number for every so many epochs, "
        "or several, rising, for decays at these epochs",
        above=0,
    )
    warmup_fraction: float = _setting(
        0.1, "of all steps, in which the learning rate rises", least=0, below=1
    )
    momentum: float = _setting(0.9, "of the optimizer; Adam's beta_1", least=0, below=1)
    rho: float = _setting(0.9, "of RMSprop: decay of the mean of squares", least=0, below=1)
    epsilon: float = _setting(1e-7, "of RMSprop, under the root; of Adam, beside it", above=0)
    weight_decay: float = _setting(
        0.0, "decoupled, times the learning rate; not on biases and batch norms", least=0
    )
    decay_depthwise: bool = _setting(True, "weight decay on depthwise kernels as well")
    label_smoothing: float = _setting(
        0.0, "share of each label that goes to all classes", least=0, below=1
    )
    ema_momentum: float = _setting(
        0.0,
        "of moving averages, over the updates, of the weights and of batch norms' statistics; they "
        "are tested and saved in place of the last; 0 for none",
        least=0,
        below=1,
    )
    gradient_accumulation: int = _setting(
        1, "steps whose gradients are averaged for one update of the weights", least=1
    )
    dtype_policy: str = _setting(
        "float32",
        "of the layers; mixed_float16 scales the loss; in float64 the variants stay together for "
        "longer",
        choices=("float32", "float64", "mixed_bfloat16", "mixed_float16"),
    )
    jit_compile: str = _setting(
        "auto", "compile with XLA; 'auto' is Keras's choice", choices=("auto", "true", "false")
    )
    distribution: str = _setting(
        "none",
        "'data_parallel' shares each batch among all devices: those of this machine (TensorFlow, "
        "JAX), or of all processes that --job_addresses names (JAX)",
        choices=("none", "data_parallel"),
    )
    sync_batch_norm: bool = _setting(
        True,
        "under TensorFlow's MirroredStrategy: batch norms take the statistics of the whole batch, "
        "as on one device, and not of each device's part. (JAX always does.)",
    )
    cpu_devices: int = _setting(
        1, "devices to make of the CPU, for a trial of --distribution without GPUs", least=1
    )
    seed: int = _setting(0, "of initial weights, order of the images, and dropout", least=0)

    output_dir: str = _setting("runs", "folder of all results")
    overwrite: bool = _setting(False, "replace results of the same name")
    resume: bool = _setting(False, "go on with the run of the same name where there is one")
    checkpoint_epochs: int = _setting(1, "save a checkpoint every so many epochs", least=1)
    log_every: int = _setting(
        50,
        "steps between two lines of metrics.jsonl, which have the mean loss of these steps, and "
        "between two looks for a loss that is NaN; in between nothing waits for the device. Each "
        "of the first 20 steps has a line",
        least=1,
    )
    profile: bool = _setting(False, "trace 20 steps of each variant, for TensorBoard or Perfetto")

    def __new__(cls, **values: Any) -> Config:
        # Here and not in `__init__`, which is the dataclass's own.
        check_names(values, (field.name for field in dataclasses.fields(cls)), "config key")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = _checked(field, hints[field.name], getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        object.__setattr__(self, "compare", _entries(self.compare))
        if "/" in self.name or self.name in ("", ".", ".."):
            raise ValueError(
                "Expected config key `name` to be a plain folder name. "
                f"Received: name={self.name!r}"
            )
        if self.resume and self.overwrite:
            raise ValueError("Expected one of `resume` and `overwrite`. Received: both")
        if self.model not in BUILT_IN and not self.model.endswith(MODEL_FILES):
            raise ValueError(
                f"Expected config key `model` to be one of {', '.join(BUILT_IN)}, or the path of "
                f"a file named *.keras or *.h5. Received: model={self.model!r}"
            )
        changed = [
            field.name
            for field in dataclasses.fields(self)
            if field.name in _OF_BUILT_IN and getattr(self, field.name) != field.default
        ]
        if self.model not in BUILT_IN and changed:
            raise ValueError(
                f"Expected the defaults of {', '.join(changed)}: they are of models that the "
                f"recipes build, and do not change one from a file. Received: model={self.model!r} "
                f"with {', '.join(f'{name}={getattr(self, name)!r}' for name in changed)}"
            )
        if self.model in BUILT_IN and "mobilenet" not in self.model and self.stem != "cifar":
            raise ValueError(
                f"Expected `stem` with a MobileNet only. Received: model={self.model!r} with "
                f"stem={self.stem!r}"
            )
        if self.standardize and self.model != "mlp":
            raise ValueError(
                f"Expected `standardize` with model='mlp' only. Received: model={self.model!r}"
            )
        if self.simplify and self.freeze != "none":
            raise ValueError(
                "Expected `simplify` without `freeze`: frozen layers have no gradients. Received: "
                f"simplify={self.simplify:g} with freeze={self.freeze!r}"
            )
        if self.freeze != "none" and self.model in BUILT_IN:
            raise ValueError(
                f"Expected `freeze` with a model from a file: in {self.model} all weights are new. "
                f"Received: freeze={self.freeze!r}"
            )
        if self.unfreeze_after is not None and self.freeze == "none":
            raise ValueError(
                "Expected `unfreeze_after` with freeze='backbone'. Received: "
                f"unfreeze_after={self.unfreeze_after} with freeze='none'"
            )
        if self.unfreeze_after is not None and self.unfreeze_after >= self.epochs:
            raise ValueError(
                f"Expected `unfreeze_after` to be less than `epochs`, {self.epochs}. Received: "
                f"unfreeze_after={self.unfreeze_after}"
            )
        if not self.decay_epochs or list(self.decay_epochs) != sorted(set(self.decay_epochs)):
            raise ValueError(
                "Expected config key `decay_epochs` to be one number, or several that rise. "
                f"Received: decay_epochs={self.decay_epochs}"
            )
        repeated = {name for name in self.variants if self.variants.count(name) > 1}
        if repeated:
            raise ValueError(
                f"Expected different variants in `compare`. Received: {', '.join(self.variants)}"
            )

    @property
    def variants(self) -> tuple[str, ...]:
        """What to train, in order; `"stock"` for Keras's own layers."""
        if self.compare:
            return self.compare
        if self.treatment:
            is_stock = self.lowering == "stock"
            treated = self.treatment if is_stock else f"{self.lowering}+{self.treatment}"
            return (self.lowering, treated)
        return tuple(dict.fromkeys(("stock", self.lowering)))

    def to_json(self) -> str:
        """The settings as an indented JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=2)


def config_names() -> list[str]:
    """The files in `recipes/configs`, without `.py`."""
    return sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem != "__init__")


def _entries(pieces: Sequence[str]) -> tuple[str, ...]:
    """What a list that was split at its commas had: treatments have commas, too.

    A piece that is a number, or `NAME=VALUE`, belongs to the one before.
    """
    entries: list[str] = []
    for piece in pieces:
        if entries and re.fullmatch(r"\d+(:.*)?|\w+=.*", piece):
            entries[-1] += f",{piece}"
        else:
            entries.append(piece)
    return tuple(entries)


def load_config(name_or_path: str) -> Config:
    """The `Config` that a file's `get_config()` returns.

    Args:
        name_or_path: A file in `recipes/configs` without `.py`, or the path of
            a file.

    Raises:
        ValueError: If there is no such file (the message lists near names), it
            has no `get_config`, or a setting in it is wrong.
    """
    path = pathlib.Path(name_or_path)
    if path.suffix != ".py":
        check_names([name_or_path], config_names(), "config")
        path = CONFIGS / f"{name_or_path}.py"
    if not path.is_file():
        raise ValueError(f"Expected --config to be an existing file. Received: {name_or_path}")
    namespace = runpy.run_path(str(path))
    if "get_config" not in namespace:
        raise ValueError(f"Expected a function `get_config` in the config. Received: {path}")
    return namespace["get_config"]()


def define_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """One flag for each field of `Config`; `None` leaves the config file's value."""
    hints = typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        kind = _plain_type(hints[field.name])
        define = {
            bool: flags.DEFINE_boolean,
            int: flags.DEFINE_integer,
            float: flags.DEFINE_float,
            tuple: flags.DEFINE_list,
            str: flags.DEFINE_string,
        }[kind]
        define(field.name, None, _flag_help(field), flag_values=flag_values)


def _flag_help(field: dataclasses.Field) -> str:
    choices, default = field.metadata["choices"], field.default
    help = field.metadata["help"] + (f"; one of {', '.join(choices)}" if choices else "")
    if default is None or default == ():
        return help
    values = default if isinstance(default, tuple) else (default,)
    text = ",".join(str(v).lower() if isinstance(v, bool) else str(v) for v in values)
    return f"{help} (default: {text})"


def config_from_flags(config: Config, flag_values: flags.FlagValues = flags.FLAGS) -> Config:
    """`config` with what was given on the command line in place of its own.

    A lowering or a treatment that was given replaces what the config compares.
    """
    names = (field.name for field in dataclasses.fields(Config))
    given = {name: flag_values[name].value for name in names if flag_values[name].present}
    if {"lowering", "treatment"} & given.keys():
        # It says what to train, as `compare` of a file does, which would hide it.
        given = {"compare": (), **given}
    return dataclasses.replace(config, **given)


def check_names(received: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raises a ValueError that lists the near names, unless all are known."""
    known = sorted(known)
    for name in received:
        if name not in known:
            near = difflib.get_close_matches(name, known)
            expected = f"{' or '.join(near)}" if near else f"one of {', '.join(known)}"
            raise ValueError(f"Unknown {what}. Expected: {expected}. Received: {name}")


def parse_flags(argv: list[str]) -> list[str]:
    """Like absl's own parser, but an error is one line and exit code 2, and `--help` is none."""
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        exit_with_line(str(error), code=2)
    except SystemExit:
        sys.exit(0)  # absl has shown the help, and calls that code 1.
    if len(rest) > 1:
        exit_with_line(f"Expected flags only. Received: {' '.join(rest[1:])}", code=2)
    return rest


def import_quietly() -> None:
    """Imports Keras for a command: one line where it fails, and none of TensorFlow's log."""
    silence_tensorflow_log()
    try:
        importlib.import_module("keras")
    # What Keras says of a missing or misspelt backend.
    except (ImportError, ValueError) as error:
        exit_with_line(str(error), code=1)


def exit_with_line(message: str, code: int) -> typing.NoReturn:
    """Ends the program with `message` on one line of stderr."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _checked(field: dataclasses.Field, hint: Any, value: Any) -> Any:
    """`value` as the field's type; ValueError where it does not fit."""
    kind = _plain_type(hint)
    if value is None and type(None) in typing.get_args(hint):
        return value
    is_list = kind is tuple
    if is_list:
        kind = typing.get_args(hint)[0]
    items = list(value) if is_list and isinstance(value, list | tuple) else [value]
    if kind is float:
        # On the command line the items of lists are texts.
        items = [_as_number(item, is_text_allowed=is_list) for item in items]
    limits = field.metadata
    fits = isinstance(value, list | tuple) == is_list and all(
        type(item) is kind
        and (not is_list or item != "")
        and (limits["least"] is None or item >= limits["least"])
        and (limits["above"] is None or item > limits["above"])
        and (limits["below"] is None or item < limits["below"])
        and (not limits["choices"] or item in limits["choices"])
        and (kind is not float or item < float("inf"))
        for item in items
    )
    if not fits:
        raise ValueError(
            f"Expected config key `{field.name}` to be {_expected(kind, is_list, limits)}. "
            f"Received: {field.name}={value!r}"
        )
    return tuple(items) if is_list else items[0]


def _as_number(value: Any, is_text_allowed: bool) -> Any:
    """A float, where `value` is a whole number or, if that is allowed, the text of a number."""
    if type(value) is int:
        return float(value)
    if isinstance(value, str) and is_text_allowed:
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def _expected(kind: type, is_list: bool, limits: Mapping[str, Any]) -> str:
    if limits["choices"]:
        return f"one of {', '.join(limits['choices'])}"
    name = {bool: "bool", int: "int", float: "float", str: "string"}[kind]
    article = "an" if kind is int else "a"
    bounds = ((" of at least", "least"), (" above", "above"), (" below", "below"))
    return (f"a list of {name}s" if is_list else f"{article} {name}") + "".join(
        f"{text} {limits[key]:g}" for text, key in bounds if limits[key] is not None
    )


def _plain_type(hint: Any) -> type:
    """`int` for `int | None`, `tuple` for `tuple[str, ...]`."""
    if isinstance(hint, types.UnionType):
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return typing.get_origin(hint) or hint
