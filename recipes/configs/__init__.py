"""One experiment a file: `get_config()` returns its `recipes.config.Config`."""
