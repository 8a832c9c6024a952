"""The laboratory: models, data, training, memory, figures. Uses every other room."""
