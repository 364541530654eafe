"""Rewrites, trains, saves and loads a model with an installed diagconv_tf."""

import pathlib

import keras
import numpy as np

import diagconv_tf

package = pathlib.Path(diagconv_tf.__file__).parent
assert "site-packages" in package.parts, f"Expected an installed package. Received: {package}"
assert (package / "py.typed").is_file(), "Expected py.typed in the wheel. Received: none"

images = np.random.default_rng(0).uniform(size=(8, 8, 8, 3)).astype("float32")
model = keras.Sequential(
    [
        keras.Input((8, 8, 3)),
        keras.layers.DepthwiseConv2D(3, activation="relu"),
        keras.layers.Flatten(),
        keras.layers.Dense(2),
    ]
)
model.compile("sgd", "mse")
fast = diagconv_tf.rewrite(model, "shifted")
np.testing.assert_allclose(fast.predict(images, verbose=0), model.predict(images, verbose=0), 1e-4)
fast.fit(images, np.zeros((8, 2)), verbose=0)
fast.save("fast.keras")
loaded = keras.saving.load_model("fast.keras")
np.testing.assert_array_equal(loaded.get_weights()[0], fast.get_weights()[0])
