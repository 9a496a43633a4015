"""Models: one file per architecture; `model` makes pure functions of their parameters."""
