"""`Seeds` by the path that it had; for one release."""

from cairn.training.context import Seeds as Seeds
