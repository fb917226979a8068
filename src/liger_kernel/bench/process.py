"""A contender in a process of its own, and the sources of another commit for it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

REPOSITORY = Path(__file__).parents[3]


class Asked(ValueError):
    """What the caller can put right."""


class Worker:
    """`python LAUNCHER -m MODULE JOB`. Prints READY when it could start, ROW and an object for each row it measured.

    launcher: what starts several such processes, as torch.distributed.run does.
    """

    def __init__(self, module: str, job: Any, launcher: Sequence[str] = ()):
        self.job, self.stopped = job, False
        self.errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed by stop()
        self.process = subprocess.Popen(
            [sys.executable, *launcher, "-m", module, json.dumps(asdict(job))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, start_new_session=True,
        )  # fmt: skip
        assert self.process.stdin and self.process.stdout
        self.stdin, self.stdout = self.process.stdin, self.process.stdout

    def ready(self) -> None:
        """Return when the worker is ready, or has ended."""
        for line in self.stdout:
            if line == "READY\n":
                return

    def rows(self) -> Iterator[dict]:
        """Let it go and yield what it measures; then, where it failed, a row with the reason under "failed"."""
        with contextlib.suppress(BrokenPipeError):
            self.stdin.write("go\n")
            self.stdin.flush()
        for line in self.stdout:
            if line.startswith("ROW "):
                yield json.loads(line[4:])
            elif line.startswith("TEXT "):
                print(line[5:], end="", flush=True)
        if self.process.wait() and not self.stopped:
            self.errors.seek(0)
            said = [line.strip() for line in self.errors if line.strip()]
            yield {"failed": said[-1] if said else f"exit code {self.process.returncode}"}

    def stop(self) -> None:
        self.stopped = True
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # with what it launched
        self.process.wait()

    def close(self) -> None:
        self.stop()
        for file in (self.stdout, self.errors):
            file.close()


def stop_after(seconds: float | None, workers: list[Worker]) -> Callable[[], None]:
    """Stop the workers when time is up; what is returned cancels that."""
    if seconds is None:
        return lambda: None

    def stop() -> None:
        for worker in workers:
            worker.stop()

    timer = threading.Timer(max(seconds, 0), stop)
    timer.daemon = True
    timer.start()
    return timer.cancel


@contextlib.contextmanager
def base_folder(ref: str | None) -> Iterator[str]:
    """The sources of this repository at `ref`, in a worktree that is removed afterwards; "" where ref is None."""
    if ref is None:
        yield ""
        return
    git = ["git", "-C", str(REPOSITORY)]
    with tempfile.TemporaryDirectory(prefix="liger-base-") as scratch:
        folder = Path(scratch) / "base"
        made = subprocess.run([*git, "worktree", "add", "--detach", str(folder), ref], capture_output=True, text=True)
        if made.returncode:
            raise Asked(f"--base {ref}: {made.stderr.strip()}")
        try:
            yield str(folder / "src")
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(folder)], capture_output=True)
