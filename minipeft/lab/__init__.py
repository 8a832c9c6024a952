"""The laboratory: models, data, training, memory, figures. It may use all packages."""
