"""How far a command is, on stderr: a bar on a terminal, a few plain lines elsewhere."""

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn


class Bar:
    """A context, within which one stage of the work after another is shown.

    - `shown`: whether this process shows anything.
    - `lines`: plain lines of a stage at most, beside the one at its beginning.
    - `moved`: whether any stage has got anywhere.
    """

    def __init__(self, shown: bool = True, lines: int = 10):
        self.shown, self.lines = shown, lines
        self.moved = False
        console = Console(stderr=True)
        self.live = shown and sys.stderr.isatty() and console.is_interactive
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}"),
            console=console,
            disable=not self.live,
        )

    def __enter__(self) -> "Bar":
        if self.live:
            self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.live:
            self.progress.stop()

    def begin(self, name: str, total: int) -> None:
        """A stage of `total` steps, which begins with compiling."""
        self.name, self.total, self.said = name, total, 0
        self.task = self.progress.add_task(name, total=total, text="compiling")
        if not self.live:
            self.say(f"{name}: compiling")

    def move(self, done: int, text: str) -> None:
        """So many steps of the stage are done; `text` says how it goes."""
        self.moved = True
        self.progress.update(self.task, completed=done, text=text)
        part = self.lines * done // self.total
        if not self.live and part > self.said:
            self.said = part
            self.say(f"{self.name}: {done / self.total:4.0%} {text}")

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.live:
            self.progress.console.print(text, highlight=False, markup=False)
        elif self.shown:
            print(text, file=sys.stderr, flush=True)
