"""Pure mathematics on tensors: no model, no configuration, no file."""
