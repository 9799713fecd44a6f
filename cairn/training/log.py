"""`Log` by the path that it had; for one release."""

from cairn.training.context import Event as Event
from cairn.training.context import Log as Log
