"""Trackers: the run's metrics as CSV, TensorBoard and Weights & Biases, for those who want them there too.

`metrics.jsonl` is the run's own record; a tracker is a copy. A tracker's library is imported only when a
config asks for it, and only rank 0 builds trackers.
"""

import contextlib
import csv
import importlib
import inspect
import io
import math
import netrc
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO
from urllib.parse import urlsplit

from trainer.console import notice
from trainer.errors import ConfigError, UserError
from trainer.metrics_file import TEXT_FIELDS, plain_number


class TrackerSpec(Protocol):
    """A tracker that a config asks for, as in `name: wandb` with `project: atlas`."""

    @property
    def name(self) -> str:
        """Return which tracker it is."""
        ...

    @property
    def args(self) -> Mapping[str, Any]:
        """Return its own arguments."""
        ...


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker knows of the run."""

    folder: Path
    name: str
    config: Mapping[str, Any]
    """The resolved config."""
    resume_step: int | None
    """Global step of the checkpoint that the run goes on from; None for a new run."""
    redone: Mapping[str, Any] = field(default_factory=dict)
    """Fields of a record at that step that the run writes again; empty: none."""
    timeout_seconds: float = math.inf
    """How long the other ranks wait for this one; starting a tracker and ending one both take far less."""


class Tracker(Protocol):
    """Take the records of a run."""

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Take one record of `metrics.jsonl`."""
        ...

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on with the same record, as JSON can hold it."""
        ...

    def finish(self, exit_code: int) -> None:
        """Write what is left and close."""
        ...


class Trackers:
    """Hand each record to every tracker; without any, do nothing (as on all ranks but rank 0)."""

    def __init__(self, trackers: Mapping[str, Tracker] | None = None, step: int = 0) -> None:
        """Take the trackers by name, and the global step that the run stands at."""
        self._trackers = dict(trackers or {})
        self._step = step

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Take one record of `metrics.jsonl` at a global step.

        One that belongs to an earlier step (a benchmark, scored meanwhile) is logged at the latest one: W&B takes no
        earlier.
        """
        self._step = max(self._step, step)
        for tracker in self._trackers.values():
            tracker.log(record, self._step)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps for `build_trackers`: the last step, and each tracker's own state.

        Call it when all records up to the checkpoint's step are logged.
        """
        states = {name: tracker.state() for name, tracker in self._trackers.items()}
        return {"step": self._step, "trackers": states}

    def finish(self, exit_code: int) -> None:
        """Close all trackers; `exit_code` is the run's, 0 when it is done."""
        with contextlib.ExitStack() as each:  # what one raises does not keep the others from closing
            for tracker in self._trackers.values():
                each.callback(tracker.finish, exit_code)


def check_trackers(specs: Sequence[TrackerSpec]) -> None:
    """Refuse trackers that could not be built: unknown, given twice, not installed, or with wrong arguments.

    Raises:
        ConfigError: with all mistakes.
    """
    names = [spec.name for spec in specs]
    mistakes = [
        f"trackers: {name} is given {names.count(name)} times; give it once"
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    for spec in specs:
        if spec.name not in _KINDS:
            mistakes.append(
                f"trackers: there is no tracker {spec.name!r}; allowed: {', '.join(sorted(_KINDS))}"
            )
        else:
            mistakes += _KINDS[spec.name].mistakes(spec.name, spec.args)
    if mistakes:
        raise ConfigError("\n".join(mistakes))


def build_trackers(
    specs: Sequence[TrackerSpec],
    run_folder: Path | str,
    run_name: str,
    config: Mapping[str, Any],
    resume_state: Mapping[str, Any] | None = None,
    redone: Mapping[str, Any] | None = None,
    timeout_seconds: float = math.inf,
) -> Trackers:
    """Build the trackers; call on rank 0 only.

    Args:
        specs: Name and arguments of each, as the config has them.
        run_folder: Where all their files go.
        run_name: The run's name.
        config: The resolved config as plain data.
        resume_state: What `Trackers.state` returned for the checkpoint that the run goes on from; None or
            empty for a new run. What came after its step is dropped from CSV, hidden by TensorBoard, and sent
            to W&B again, which keeps what it got first. A tracker that is new since then starts there.
        redone: Fields of a record at that step itself that is dropped from CSV too, because it comes again.
        timeout_seconds: How long the other ranks wait for this one.

    Raises:
        ConfigError: a tracker cannot be built as asked.
        UserError: a tracker's service refuses.
    """
    check_trackers(specs)
    resume_step = resume_state["step"] if resume_state else None
    states = resume_state["trackers"] if resume_state else {}
    run = TrackedRun(Path(run_folder), run_name, config, resume_step, redone or {}, timeout_seconds)
    trackers = {
        spec.name: _KINDS[spec.name].build(run, spec.args, states.get(spec.name, {})) for spec in specs
    }
    return Trackers(trackers, resume_step or 0)


def namespaced_scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Return a record's numbers, but the step that they are logged at, as `train/...` or `validation/...`."""
    kind = record.get("kind", "train")
    return {
        f"{kind}/{name}": number
        for name, value in record.items()
        if name not in TEXT_FIELDS and name != "global_step" and (number := plain_number(value)) is not None
    }


class CsvTracker:
    """Write `metrics.csv`: a row for each record, a column for each field.

    Fields may appear later in the run; the file is then written anew with the further columns, the earlier
    rows empty there.
    """

    def __init__(self, run: TrackedRun) -> None:
        """Open the file, without the rows after the step that the run goes on from."""
        self.path = run.folder / "metrics.csv"
        self._columns: list[str] = []
        columns, rows = _read_csv(self.path) if self.path.exists() else ([], [])
        self._file = self._rewritten(columns, _rows_up_to(run, self.path, columns, rows))

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Append a row."""
        row = {"global_step": step, **record}
        missing = [name for name in row if name not in self._columns]
        if missing:
            self._file.close()
            self._file = self._rewritten(self._columns + missing, _read_csv(self.path)[1])
        _write_rows(self._file, [[_csv_cell(row.get(name)) for name in self._columns]])
        self._file.flush()

    def state(self) -> dict[str, Any]:
        """Return nothing: the file says it all."""
        return {}

    def finish(self, exit_code: int) -> None:
        """Close the file."""
        self._file.close()

    def _rewritten(self, columns: list[str], rows: Iterable[Sequence[str]]) -> TextIO:
        """Write the file anew, visible when it is whole, and return it open for appending."""
        temporary = self.path.with_suffix(".csv.tmp")
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            if columns:
                _write_rows(file, [columns])
            _write_rows(file, ([*row, *[""] * (len(columns) - len(row))] for row in rows))
        os.replace(temporary, self.path)
        self._columns = columns
        return open(self.path, "a", newline="", encoding="utf-8")


class TensorBoardTracker:
    """Write event files into the run folder's `tensorboard/`."""

    def __init__(self, run: TrackedRun, arguments: Mapping[str, Any]) -> None:
        """Open a new event file; after a resume it hides the events after the checkpoint."""
        from torch.utils.tensorboard import SummaryWriter

        purge_step = None if run.resume_step is None else run.resume_step + 1
        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=purge_step, **arguments)

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Write a record's numbers."""
        for name, value in namespaced_scalars(record).items():
            self._writer.add_scalar(name, value, step)

    def state(self) -> dict[str, Any]:
        """Return nothing; write what is buffered, which a kill after the checkpoint would lose for good."""
        self._writer.flush()
        return {}

    def finish(self, exit_code: int) -> None:
        """Write what is buffered and close."""
        self._writer.close()


class WandbTracker:
    """Log to Weights & Biases; its files go into `wandb/` of the run.

    Where there is no API key, or the server cannot be reached, the run is recorded offline. What W&B then fails in
    does not end the run: W&B's own process sends what it is given, and goes on trying.
    """

    def __init__(self, run: TrackedRun, arguments: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Start a run there, or go on with the one that the checkpoint names."""
        import wandb

        from_environment = wandb.setup().settings
        server = from_environment.base_url
        mode = _wandb_mode(arguments, server)
        share = run.timeout_seconds * _WANDB_SHARE
        self._finish_seconds = min(from_environment.finish_timeout or _WANDB_FINISH_SECONDS, share)
        init_seconds = min(from_environment.init_timeout, share)
        settings = {
            "project": "cellphase",
            "name": run.name,
            **arguments,
            "mode": mode,
            "dir": str(run.folder),
            "config": dict(run.config),
            "id": state.get("run_id"),
            "resume": "allow",
            "settings": wandb.Settings(
                # The terminal is the trainer's; W&B's copy of it garbles progress bars.
                console="off",
                silent=True,
                init_timeout=init_seconds,
                finish_timeout=self._finish_seconds,
                finish_timeout_raises=True,
            ),
        }
        if mode in (None, "online", "shared"):
            notice(f"W&B: starting a run at {server}; waiting {init_seconds:.0f} s at most")
        try:
            self._run = _start_wandb(settings, server)
        except (wandb.Error, OSError, ValueError, TypeError) as error:
            raise UserError(
                f"trackers: wandb could not start a run: {error}; check the API key, project and entity, or let "
                "mode: offline record it in the run folder"
            ) from error
        self._is_lost = False
        self._sync = f"`wandb sync {Path(self._run.dir).parent}`"
        if self._run.offline:
            notice(f"W&B: {self._sync} uploads it")
        elif self._run.url:
            notice(f"W&B: {self._run.url}")

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Log a record's numbers and its phase."""
        values: dict[str, Any] = dict(namespaced_scalars(record))
        if "phase" in record:
            values[f"{record.get('kind', 'train')}/phase"] = record["phase"]
        self._send(lambda: self._run.log(values, step=step))

    def state(self) -> dict[str, Any]:
        """Return the id of the run at W&B."""
        return {"run_id": self._run.id}

    def finish(self, exit_code: int) -> None:
        """Tell W&B how the run ended, and wait for a while until everything is written."""
        self._send(lambda: self._run.finish(exit_code=exit_code))

    def _send(self, what: Callable[[], None]) -> None:
        """Give W&B something; where it fails, say so once and go on without it: metrics.jsonl has everything."""
        if self._is_lost:
            return
        try:
            what()
        except TimeoutError:
            notice(
                f"W&B: not everything was uploaded within {self._finish_seconds:.0f} s of the end; {self._sync} "
                "uploads the rest, and metrics.jsonl has everything"
            )
        except Exception as error:  # its process may be gone, for which its errors have no class in common
            self._is_lost = True
            notice(
                f"W&B: lost ({type(error).__name__}: {error}); the run goes on without it. {self._sync} uploads what "
                "it was given until now, and metrics.jsonl has everything"
            )


@dataclass(frozen=True)
class _Kind:
    """How a tracker is checked and built."""

    build: Callable[[TrackedRun, Mapping[str, Any], Mapping[str, Any]], Tracker]
    takes_arguments_of: tuple[str, str] | None
    """Module and callable that its arguments go to; None where it takes none."""
    filled_in: frozenset[str] = frozenset()
    """Arguments that the trainer gives."""

    def mistakes(self, name: str, arguments: Mapping[str, Any]) -> list[str]:
        """Say why the tracker could not be built with these arguments."""
        allowed: list[str] = []
        if self.takes_arguments_of is not None:
            module, function = self.takes_arguments_of
            try:
                signature = inspect.signature(getattr(importlib.import_module(module), function))
            except ImportError as error:
                return [f"trackers: {name} cannot be imported ({error}); install it or leave it out"]
            allowed = sorted(set(signature.parameters) - self.filled_in)
        return [
            f"trackers: {name} takes no argument {key!r}; allowed: {', '.join(allowed) or 'none'}"
            for key in arguments
            if key not in allowed
        ]


_WANDB_FINISH_SECONDS = 60.0
"""How long the end of a run waits for W&B's server."""
_WANDB_SHARE = 0.25
"""Share of the time for which other ranks wait that starting a run at W&B may take, and ending one too."""

_KINDS = {
    "csv": _Kind(lambda run, arguments, state: CsvTracker(run), None),
    "tensorboard": _Kind(
        lambda run, arguments, state: TensorBoardTracker(run, arguments),
        ("torch.utils.tensorboard", "SummaryWriter"),
        frozenset({"log_dir", "purge_step", "comment"}),
    ),
    "wandb": _Kind(
        WandbTracker,
        ("wandb", "init"),
        frozenset(
            {
                "dir",
                "id",
                "config",
                "resume",
                "resume_from",
                "fork_from",
                "settings",
                "reinit",
                "anonymous",
                "force",
            }
        ),
    ),
}


def _read_csv(path: Path) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows, without a last row that was being written."""
    text = path.read_text(encoding="utf-8")
    rows = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))
    return (rows[0], rows[1:]) if rows else ([], [])


def _write_rows(file: TextIO, rows: Iterable[Sequence[str]]) -> None:
    csv.writer(file, lineterminator="\n").writerows(rows)


def _rows_up_to(run: TrackedRun, path: Path, columns: list[str], rows: list[list[str]]) -> list[list[str]]:
    step = run.resume_step
    if step is None or not rows:
        return rows
    if "global_step" not in columns:
        raise UserError(f"{path}: has no column global_step; move the file away to go on with a new one")
    column = columns.index("global_step")
    redone = {columns.index(name): _csv_cell(value) for name, value in run.redone.items() if name in columns}

    def stays(row: list[str]) -> bool:
        if int(row[column]) < step or not redone:
            return int(row[column]) <= step
        return int(row[column]) == step and any(row[index] != value for index, value in redone.items())

    return [row for row in rows if stays(row)]


def _csv_cell(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return repr(plain_number(value))


def _wandb_mode(arguments: Mapping[str, Any], server: str) -> str | None:
    """Return the mode that is asked for; where none is and there is no key, offline."""
    mode = arguments.get("mode") or os.environ.get("WANDB_MODE")
    if mode is None and not _has_wandb_key(server):
        notice("W&B: no API key (WANDB_API_KEY or `wandb login`), so the run is recorded offline")
        return "offline"
    return mode


def _start_wandb(settings: Mapping[str, Any], server: str) -> Any:
    """Return a new run of W&B's, recorded offline where its server does not answer; one that refuses is an error."""
    import wandb
    from wandb.errors import CommError

    began = time.monotonic()
    try:
        return wandb.init(**settings)
    except (CommError, TimeoutError) as error:
        # A refusal comes at once. Where there is no answer, or one as `503`, W&B asks again until its time is over.
        if time.monotonic() - began < settings["settings"].init_timeout:
            raise
        notice(
            f"W&B: {server} CANNOT BE REACHED ({' '.join(str(error).split())}), so the run is recorded offline. Check "
            "the network, WANDB_BASE_URL and HTTPS_PROXY; a restart tries again"
        )
        return wandb.init(**{**settings, "mode": "offline"})


def _has_wandb_key(base_url: str) -> bool:
    """Tell whether W&B would find credentials, without asking its server or the person at the terminal."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    hosts = {urlsplit(base_url).netloc, "api.wandb.ai"}
    for path in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        if path and Path(path).expanduser().is_file():
            try:
                credentials = netrc.netrc(Path(path).expanduser())
            except netrc.NetrcParseError:
                return False
            return any(credentials.authenticators(host) for host in hosts)
    return False
