"""What a run continues from: the newest of its checkpoints that can be read, if its flags are those of this run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from engine import processes
from engine.recipe import Recipe, same_rates
from models import Checkpoint
from utils import UserError, counted, say

#: flags that may differ from those of the run that is continued
MAY_CHANGE = frozenset(
    {
        "save",
        "resume",
        "dataset_path",
        "visible_device",
        "parallel",
        "workers",
        "checkpoint_steps",
        "compile",
        "cuda_graph",
        "fast",
        "cache",
        "tensorboard",
    }
)
#: flags of the schedule, which may change as long as the rates of the finished part stay the same
SCHEDULE = frozenset({"epochs", "lr_steps"})


class Candidates:
    """The checkpoints that a run may continue from, newest first; none for a run that starts afresh.

    Args:
        folder, flags, resume, defaults: as for `engine.Run`.
        unusable: gets the checkpoints that cannot be read or loaded.

    Raises:
        UserError: the folder holds a run that `resume` does not continue.
    """

    def __init__(
        self, folder: Path, flags: dict, resume: str | None, defaults: Mapping[str, object], unusable: set[Path]
    ):
        self.flags, self.defaults, self.unusable = flags, defaults, unusable
        self.left = self._find(folder, resume)

    def _find(self, folder: Path, resume: str | None) -> list[Path]:
        written = saved_in(folder)
        for path in filter(Path.is_dir, written):  # which saving could not replace
            raise UserError(f"{path} is a folder, where a run keeps a file: move it, or name another with --save")
        if processes.restarted() and written:
            return written
        if resume is None and written:
            raise UserError(
                f"{folder} holds a run already; add --resume=auto to continue it, or name another with --save"
            )
        if resume in (None, "auto"):
            return written
        self._check_folder(written)
        return [Path(resume)]

    def _check_folder(self, files: Iterable[Path]) -> None:
        """Refuse a folder that holds a different run."""
        for path in files:
            try:
                checkpoint = _read(path)
            except UserError as error:
                raise UserError(f"{path} is no file of a training run: move it, or name another with --save") from error
            except ValueError:  # an unreadable file holds nothing to lose
                self.unusable.add(path)
            else:
                self._compare_flags(checkpoint)

    def next(self) -> Checkpoint | None:
        """Return the newest one left that can be read; None if there never was one.

        Raises:
            UserError: none of them can be read, or this one is from a run with other flags.
        """
        error = None
        while self.left:
            path = self.left.pop(0)
            if error is not None:
                say(f"{error}; using {path} instead")
            try:
                checkpoint = _read(path)
            except ValueError as failure:
                error = failure
                self.unusable.add(path)
                continue
            self._compare_flags(checkpoint)
            return checkpoint
        if error is not None:
            raise UserError(str(error)) from error
        return None

    def after(self, checkpoint: Checkpoint, error: Exception) -> Checkpoint | None:
        """Return the next one after a checkpoint that could be read but not loaded, because of an error.

        Raises:
            UserError: as for `next`, or there is none.
        """
        path = checkpoint.path
        self.unusable.add(path)
        message = f"{path} cannot be continued from ({str(error).strip().partition(chr(10))[0].rstrip(':')})"
        if not self.left:
            raise UserError(f"{message}; start from its weights with --pretrained, or afresh, and another --save")
        say(f"{message}; using {self.left[0]} instead")
        return self.next()

    def _compare_flags(self, checkpoint: Checkpoint) -> None:
        """Raise UserError if the flags of a checkpoint differ from this run's."""
        saved = {key: value for key, value in self.defaults.items() if key in self.flags} | checkpoint.training["flags"]
        differing = {
            name: f"--{name} was {saved.get(name)} and is {self.flags.get(name, 'unknown to this version')}"
            for name in sorted(saved.keys() | self.flags.keys())
            if name not in MAY_CHANGE
            and saved.get(name) != self.flags.get(name)
            # a flag that no longer exists and was not used
            and (name in self.flags or saved[name])
        }
        done = checkpoint.training["epoch"] + (checkpoint.training["step"] > 0)
        reason = f"is from a run with other flags ({'; '.join([*differing.values()][:4])})"
        if differing and differing.keys() <= SCHEDULE:
            if self.flags["epochs"] < done:
                reason = f"has {counted(done, 'epoch')} already, more than --epochs={self.flags['epochs']}"
            elif same_rates(Recipe.of(saved), Recipe.of(saved | self.flags), done):
                return
            else:
                reason += ", which would have changed the learning rate of the epochs that are done"
        if differing:
            raise UserError(
                f"{checkpoint.path} {reason}: give the same, or start from its weights with --pretrained and --save"
            )


def saved_in(folder: Path) -> list[Path]:
    """The checkpoints of the run in a folder, newest first, then the best ones."""
    # new.pth is whole: it exists if a kill came before it was renamed; best files may be all that was kept of a run
    names = [folder / f"{name}.pth" for name in ("new", "last", "previous")]
    return [path for path in (*names, *sorted(folder.glob("best*.pth"), reverse=True)) if path.exists()]


def _read(path: Path) -> Checkpoint:
    """Open a training checkpoint of this project. Raises ValueError if the file is of another kind or damaged."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; name the file in it, such as {path / 'last.pth'}")
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path} to resume from")
    checkpoint = Checkpoint.open(path)
    if not checkpoint.training:
        raise UserError(f"{path} was not written by this project's training; start from it with --pretrained")
    return checkpoint
