"""How far a sweep is, on stderr: a bar on a terminal, a few plain lines elsewhere."""

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from rodjax.sweeps import Status


class Bar:
    """Called with every `Status`; a context, within which it is shown.

    - `total`: optimizer steps of all lanes; `out`: the directory of the sweep.
    - `shown`: whether this process shows anything.
    """

    def __init__(self, total: int, out: str, shown: bool = True):
        self.total, self.out, self.shown = total, out, shown
        self.status: Status | None = None
        self.tenths = 0
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
        self.progress.start()
        self.task = self.progress.add_task("compiling", total=self.total, text="")
        if not self.live:
            self._say("compiling")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.status is None:
            self.progress.update(self.task, visible=False)
            if error is None:
                self.going_on(self.total)
        self.progress.stop()

    def __call__(self, status: Status) -> None:
        """Show it."""
        if self.status is None and status.resumed:
            self.going_on(status.resumed)
        self.status, text = status, describe(status)
        self.progress.update(
            self.task, description="sweeping", completed=status.done, text=text
        )
        tenths = 10 * status.done // status.total
        if not self.live and tenths > self.tenths:
            self.tenths = tenths
            self._say(f"{status.done / status.total:4.0%} {text}")

    def going_on(self, done: int) -> None:
        """Say what an earlier call has done already."""
        text = f"going on from {done} of {self.total} steps in {self.out}"
        if self.live:
            self.progress.console.print(text, highlight=False, markup=False)
        else:
            self._say(text)

    def _say(self, text: str) -> None:
        if self.shown:
            print(text, file=sys.stderr, flush=True)


def describe(status: Status) -> str:
    """Lanes, speed and time left, of a `Status`."""
    alive = status.lanes - status.diverged
    # What an earlier call has done says nothing of this one's speed.
    rate = (status.done - status.resumed) / max(status.seconds, 1e-9)
    left = round((status.total - status.done) / rate)
    clock = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
    return (
        f"{alive} alive, {status.diverged} diverged, {rate:.4g} steps/s, {clock} left"
    )
