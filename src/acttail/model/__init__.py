"""The one way a model is opened: its name, config, weights and projections."""
