"""``python -m regard``, as ``torchrun -m regard`` starts it."""

from regard.cli import app

app()
