"""Pure functions on tensors and arrays, shapes in their docstrings; none needs a compiler to be imported."""
