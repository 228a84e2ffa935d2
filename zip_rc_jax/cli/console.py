"""Where commands print their results; progress and errors go to standard error."""

from __future__ import annotations

from rich.console import Console

# Tables are wide; a pipe or a log file has no width of its own.
console = Console() if Console().is_terminal else Console(width=170)
