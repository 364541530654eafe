"""Marks and settings that all tests share."""

import os

import hypothesis
import keras
import pytest

# The same examples on every run: CI must not fail by luck. `thorough` draws
# new ones, many more of them; it is run by hand before a release.
hypothesis.settings.register_profile("default", derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("thorough", deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_modifyitems(items):
    # The slow ones first: what starts last decides how long two workers take.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    backend = keras.backend.backend()
    for item in items:
        marker = item.get_closest_marker("backends")
        if marker and backend not in marker.args:
            reason = f"needs Keras's backend to be one of {marker.args}; it is {backend}"
            item.add_marker(pytest.mark.skip(reason=reason))
