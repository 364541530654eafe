"""Training recipes: models, data, configurations and one flat training script."""
