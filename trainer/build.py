"""From a configuration to a finished run, in reading order: the spine.

config -> data -> facts from the data -> model -> optimizer -> prepare -> resume -> phases loop.
"""

import contextlib
import secrets
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from data.errors import DataError
from data.loader import StepLoader
from models.errors import ModelError
from trainer import control, distributed, journal, preemption, runfolder, watch
from trainer.account import build_account
from trainer.agreement import check_agreement, check_same_data
from trainer.atomicfile import replace_text
from trainer.averaging import keep_average
from trainer.benchmarking import check_benchmarks
from trainer.checkpoint import CheckpointWriter
from trainer.checkpoint_folder import SavedCheckpoint, open_checkpoint
from trainer.config.load import dump_yaml
from trainer.config.schema import RunConfig
from trainer.console import notice
from trainer.console import startup_account as print_account
from trainer.distributed import Ranks
from trainer.dotted import check_dotted_paths
from trainer.early_stopping import check_early_stopping
from trainer.errors import ConfigError, UserError
from trainer.exits import PREEMPTED
from trainer.freezing import split_groups
from trainer.loop import train
from trainer.losses import LossModule, build_loss
from trainer.model_building import build_model
from trainer.objective import check_objective_options
from trainer.optim import UserScheduler, build_optimizer, mark_trainable
from trainer.phases import DataFacts, Phase, open_phases
from trainer.prediction_scoring import check_scoring
from trainer.preemption import Preempted
from trainer.progress import Progress
from trainer.random_state import seed_dropout, seed_everything
from trainer.recorder import Recorder
from trainer.rehearsal import rehearse
from trainer.report import report_at_end
from trainer.retention import Retention
from trainer.rollback import open_records, roll_back
from trainer.run import Run, TrainingStopped
from trainer.run_state import Saver, restore
from trainer.same_job import what_differs
from trainer.saved_run import check_destination, write_result
from trainer.schedule import base_learning_rates, check_momentum
from trainer.scoring_queue import finish_scoring, start_scoring
from trainer.trackers import check_trackers
from trainer.watch import Watch
from trainer.weights import initialise_weights, restore_reference_checkpoint
from trainer.zero_config import is_stage_3


@dataclass(frozen=True)
class Resume:
    """What rank 0 decided about resuming, known to every rank."""

    kind: str
    """`fresh`, `run` (go on in a run folder) or `weights_file` (a `.pt` file of the original phases trainer)."""
    run_folder: Path | None = None
    checkpoint: Path | None = None
    notices: tuple[str, ...] = ()
    lease: runfolder.RunLease | None = None
    """Rank 0's hold of `run_folder`: no other process has written there since the checkpoint was chosen."""


def run(config: RunConfig, *, dry_run: bool = False) -> int:
    """Carry out a run, or with `dry_run` only rehearse its first step, and return the exit code.

    Raises:
        UserError, DataError: a mistake of the user's; raised on every rank.
    """
    accelerator, ranks = distributed.start(config)
    with contextlib.ExitStack() as at_end:
        at_end.callback(distributed.shut_down)
        check_dotted_paths(config)
        check_agreement(config, ranks)
        check_trackers(config.trackers)
        resume = decide_resume(config, ranks, hold=not dry_run)
        if resume.lease is not None:
            at_end.callback(resume.lease.release)
        check_result(config, ranks, resume)
        seed_everything(config.seed)
        phases, facts = open_phases(config, ranks, pin_memory=accelerator.device.type == "cuda")
        # A stream of a rank's own has other data on each, and says itself what it is.
        addressed = [phase for phase in phases if isinstance(phase.loader, StepLoader)]
        check_same_data({phase.name: phase.loader.fingerprint() for phase in addressed}, ranks)
        seed_everything(config.seed)
        with distributed.building_model(accelerator, config, [phase.plan for phase in phases]):
            model = build_model(config, facts)
            loss = build_loss(config.loss)
        module = LossModule(model, loss)
        check_layouts(phases, module)
        check_objective_options(module, config.datasets)
        mark_trainable(config, module)
        notes = list(resume.notices)
        if resume.kind == "fresh":
            notes += initialise_weights(config, model, phases, facts)
        notes += compile_layers(config, model, accelerator)
        optimizer = build_optimizer(config, model, module, accelerator.device.type)
        split_groups(optimizer, module, config.datasets)  # first: strategy and scheduler count the groups
        keep_average(optimizer, config.ema)
        check_rates(phases, optimizer)
        strategy = distributed.prepare(accelerator, module, optimizer, config.max_grad_norm)
        scheduler = (
            None if config.optimizer.scheduler_class is None else UserScheduler(config.optimizer, optimizer)
        )
        seed_dropout(config.seed, ranks.index, 0)
        state = Run(config, ranks, strategy, module, phases, Progress(), Recorder(), None, scheduler)
        check_early_stopping(state)
        check_benchmarks(state)
        check_scoring(state, facts.technical_batches)
        if dry_run:
            account = build_account(state, facts, run_folder="none (dry run)", resumed_from=None, notes=notes)
            print_account(account)
            rehearse(state)
            return 0
        return carry_out(state, facts, resume, notes)


def carry_out(run: Run, facts: DataFacts, resume: Resume, notes: list[str]) -> int:
    """Open the run folder, put the run back to its checkpoint if it has one, and train."""
    config, ranks = run.config, run.ranks
    if resume.kind != "run":
        leave_early(config, ranks, "before its run folder was made; a restart begins anew")
    folder, lease = open_run_folder(config, ranks, resume)
    control.note_run_folder(folder)
    watcher = start_watch(run, folder)
    exit_code, reason, is_consequence = 1, "stopped by an error", False
    try:
        if resume.kind == "run":
            leave_early(config, ranks, f"before it went on; {resume.checkpoint} is its checkpoint")
        is_resumed = begin(run, facts, resume, folder, notes)
        with build_writer(config, ranks, folder) as writer:
            run.saver = Saver(writer, config, facts, run.progress if is_resumed else None)
            train_with_fallback(run, writer, folder, facts)
        save_result(run, folder)
        notice(f"done at step {run.progress.global_step}: {folder} (python -m trainer report {folder})")
        exit_code, reason = 0, "done"
        return 0
    except (UserError, DataError, ModelError) as error:
        exit_code, reason = 2, str(error)
        raise
    except Preempted as stop:
        exit_code, reason = PREEMPTED, str(stop)
        raise
    except KeyboardInterrupt:
        exit_code, reason = 130, "interrupted"
        raise
    except Exception as error:
        lost = watcher.explain(error)
        is_consequence = lost is not None
        reason = f"{type(error).__name__}: {error}" if lost is None else str(lost)
        if lost is None:
            raise
        raise lost from error
    finally:
        is_wanted = exit_code in (0, PREEMPTED)
        with contextlib.ExitStack() as close:  # from the last to the first, whatever one of them raises
            if exit_code == PREEMPTED:
                close.callback(leave_together, ranks)
            if lease is not None:
                close.callback(lease.release)
            close.callback(end_run, run, watcher, folder, exit_code, reason)
            watcher.close(exit_code, reason, is_consequence=is_consequence, is_wanted=is_wanted)


def end_run(run: Run, watcher: Watch, folder: Path, exit_code: int, reason: str) -> None:
    """Close a run's scoring and its records, and write how it ended."""
    try:
        finish_scoring(run, wait=exit_code == 0)
    except BaseException as error:  # the disk has no room for what was scored last, for example
        if exit_code == 0:
            codes = {UserError: 2, Preempted: PREEMPTED, KeyboardInterrupt: 130}
            exit_code = next((code for kind, code in codes.items() if isinstance(error, kind)), 1)
            reason = str(error) or type(error).__name__
        raise
    finally:
        writes_the_end = watcher.writes_the_end()
        if writes_the_end:  # first: a tracker may wait for its server until the process is killed
            write_end(folder, exit_code, reason)
        with contextlib.ExitStack() as close:
            if writes_the_end:
                close.callback(report_at_end, folder)
            run.recorder.close(exit_code)


def leave_together(ranks: Ranks) -> None:
    """Wait for the other ranks when all is written: a launcher ends all ranks when the first one has ended."""
    with contextlib.suppress(RuntimeError):
        ranks.barrier()


def begin(run: Run, facts: DataFacts, resume: Resume, folder: Path, notes: list[str]) -> bool:
    """Put the run back to its checkpoint if it has one, say what it is, and open its records.

    Returns:
        Whether it goes on from a checkpoint of its own.
    """
    config, ranks = run.config, run.ranks
    saved = None
    if resume.kind == "run" and resume.checkpoint is not None:
        # Rank 0 verified it when it was chosen.
        saved = open_checkpoint(resume.checkpoint, verify=False)
        notes += restore(run, saved, config, facts)
        ranks.barrier()  # the next save may delete an older checkpoint, which a slower rank could still read
        has_ended = run.progress.phase_index >= len(run.phases)
        take_over(config, ranks, folder, resume.checkpoint, trains=not has_ended)
        notes += note_of_what_is_not_trained(config, resume.checkpoint) if has_ended else []
    elif resume.kind == "weights_file":
        assert resume.checkpoint is not None
        notes += restore_reference_checkpoint(resume.checkpoint, run)
    step = None if saved is None else saved.step
    start_recording(run, folder, saved)
    resumed_from = (
        None if resume.checkpoint is None else f"{resume.checkpoint} (step {run.progress.global_step})"
    )
    account = build_account(run, facts, run_folder=str(folder), resumed_from=resumed_from, notes=notes)
    print_account(account)
    if ranks.is_main:
        journal.note_start(
            folder, account, world_size=ranks.count, strategy=run.strategy.name, resumed_step=step
        )
    return saved is not None


def start_recording(run: Run, folder: Path, saved: SavedCheckpoint | None) -> None:
    """Let rank 0 open what it records into, trackers too; the others wait, and end as it does if it refuses."""
    names = ", ".join(tracker.name for tracker in run.config.trackers)
    run.activity.begin(f"starting the trackers ({names or 'none'})", run.progress.global_step)
    error: UserError | None = None
    if run.ranks.is_main:
        try:
            run.recorder = open_records(run, folder, saved)
            start_scoring(run, folder)
        except UserError as failure:
            error = failure
    run.activity.begin("waiting for rank 0's trackers", run.progress.global_step, is_collective=True)
    run.ranks.agree_on_error(error)


def train_with_fallback(run: Run, writer: CheckpointWriter, folder: Path, facts: DataFacts) -> None:
    """Train to the end; where FP8 fails and the run says so, from the last checkpoint on in bf16 for a while.

    Raises:
        TrainingStopped: too many steps in a row were not finite, and bf16 does not help or was not asked for.
    """
    if run.progress.phase_index >= len(run.phases):
        step = run.progress.global_step
        notice(
            f"this run is finished: all its phases ended at step {step}, and nothing is left to do. To train this job "
            "anew, set resume_from: null; to train on from its weights, start a new run with init_from"
        )
    while True:
        try:
            return train(run)
        except TrainingStopped as stop:
            roll_back(run, writer, folder, facts, stop)


def check_result(config: RunConfig, ranks: Ranks, resume: Resume) -> None:
    """Let rank 0 find out before any training whether the trained model can go where `export_to` says."""
    error: Exception | None = None
    if ranks.is_main and config.export_to is not None:
        try:
            check_destination(config, resume.run_folder)
        except (UserError, OSError) as failure:
            error = failure
    ranks.agree_on_error(error)


def save_result(run: Run, folder: Path) -> None:
    """Let rank 0 write the trained model where `export_to` says, from the run's last checkpoint; the others wait."""
    config, ranks = run.config, run.ranks
    if config.export_to is None:
        return
    run.activity.begin("writing the trained model", run.progress.global_step)
    error: Exception | None = None
    if ranks.is_main:
        try:
            for line in write_result(config, folder, run.strategy.device.type):
                notice(line)
        except (UserError, DataError, ModelError, OSError) as failure:
            error = failure
    ranks.agree_on_error(error)


def write_end(folder: Path, exit_code: int, reason: str) -> None:
    """Write how the run ended into its folder; a full disk must not hide what stopped it."""
    with contextlib.suppress(OSError):
        journal.note_end(folder, runfolder.write_exit_status(folder, exit_code, reason))


def leave_early(config: RunConfig, ranks: Ranks, where: str) -> None:
    """End before training has begun where any rank is asked to: all of them agree here."""
    request = preemption.request(config.max_wall_seconds if ranks.is_main else None)
    agreed = preemption.agreed_request(ranks, request)
    if agreed:
        raise Preempted(f"{agreed} {where}")


def start_watch(run: Run, folder: Path) -> Watch:
    """Begin to watch the ranks of a run."""

    def say_why(reason: str) -> None:
        control.leave_exit(1, reason)
        if watcher.writes_the_end():
            write_end(folder, 1, reason)

    run.module.register_forward_pre_hook(lambda *_: run.activity.move_on())
    watcher = Watch(
        folder,
        run.ranks,
        run.activity,
        attempt=run.ranks.broadcast(secrets.token_hex(4)),
        timeout_seconds=run.config.distributed_timeout_seconds,
        on_end=say_why,
    )
    return watcher


def build_writer(config: RunConfig, ranks: Ranks, folder: Path) -> CheckpointWriter:
    """Build what writes the run's checkpoints; every rank has one."""
    settings = config.checkpoint
    return CheckpointWriter(
        folder,
        rank=ranks.index,
        world_size=ranks.count,
        retention=Retention(settings.keep_last, settings.keep_every_steps, settings.keep_best),
        attempt=ranks.broadcast(secrets.token_hex(4)),
        asynchronous=settings.asynchronous,
        timeout_seconds=config.distributed_timeout_seconds,
    )


def open_run_folder(
    config: RunConfig, ranks: Ranks, resume: Resume
) -> tuple[Path, runfolder.RunLease | None]:
    """Let rank 0 make the run folder, unless the run goes on in one, and hold its lease before any rank writes."""
    lease, error, folder = resume.lease, None, resume.run_folder
    if ranks.is_main:
        try:
            if folder is None:
                folder = runfolder.create_run_folder(config.output_dir, config.run_name)
                lease = runfolder.RunLease(folder)
                replace_text(folder / "config.yaml", dump_yaml(config))
            if ranks.count > 1:
                watch.clear(folder)
        except UserError as failure:
            error = failure
        except OSError as failure:
            error = cannot_write(folder, failure)
    ranks.agree_on_error(error)
    folder = Path(ranks.broadcast(str(folder)))
    try:
        runfolder.check_same_folder(ranks, folder)
    except UserError:
        if lease is not None:
            lease.release()
        raise
    return folder, lease


def take_over(config: RunConfig, ranks: Ranks, folder: Path, checkpoint: Path, *, trains: bool) -> None:
    """Let rank 0 make the checkpoint the newest of its run, once nothing speaks against going on from it.

    The configuration becomes the run's if it `trains`: that of a run which has ended says how it was trained.
    """
    error: Exception | None = None
    if ranks.is_main:
        try:
            runfolder.adopt(folder, checkpoint)
            if trains:
                replace_text(folder / "config.yaml", dump_yaml(config))
        except OSError as failure:
            error = cannot_write(folder, failure)
    ranks.agree_on_error(error)


def note_of_what_is_not_trained(config: RunConfig, checkpoint: Path) -> list[str]:
    """Say what of the configuration a run that has ended was not trained with."""
    differences = what_differs(config, checkpoint)
    kept = "its config.yaml stays as it was"
    return [f"the run has ended and was trained otherwise ({differences}); {kept}"] if differences else []


def cannot_write(folder: Path | None, failure: OSError) -> UserError:
    """Say that the run folder takes no files: a full disk, or one that is read-only."""
    return UserError(f"{folder}: the run folder cannot be written ({failure.strerror}); nothing was trained")


def decide_resume(config: RunConfig, ranks: Ranks, *, hold: bool) -> Resume:
    """Let rank 0 look for what `resume_from` names, and tell every rank what it found; `hold`: no other may write."""
    found: dict[str, Any] = {}
    error: Exception | None = None
    lease: runfolder.RunLease | None = None
    if ranks.is_main:
        try:
            plan = runfolder.resolve_resume(
                config.resume_from, config.output_dir, config.run_name, hold=hold, job=config
            )
            lease = plan.lease
            found = {
                "kind": plan.kind,
                "run_folder": None if plan.run_folder is None else str(plan.run_folder),
                "checkpoint": None if plan.checkpoint is None else str(plan.checkpoint),
                "notices": list(plan.skipped),
            }
        except (UserError, OSError) as failure:
            error = failure
    ranks.agree_on_error(error)
    found = ranks.broadcast(found)
    paths = {key: None if found[key] is None else Path(found[key]) for key in ("run_folder", "checkpoint")}
    return Resume(kind=found["kind"], notices=tuple(found["notices"]), lease=lease, **paths)


def check_layouts(phases: list[Phase], module: LossModule) -> None:
    """Refuse packed batches for a model, or a way to its loss, that reads rows of `tokens` as cells."""
    for phase in phases:
        loaders = [loader for loader in (phase.loader, phase.validation) if loader is not None]
        if all(getattr(getattr(loader, "source", None), "layout", "") != "packed" for loader in loaders):
            continue
        refusal = module.refuses_packed_batches()
        if refusal is not None:
            raise ConfigError(
                f"datasets.{phase.index}: phase '{phase.name}' has layout: packed, whose batches hold all cells in one "
                f"row of tokens, and {refusal}; use layout: bucketed, which saves padding for any model, or padded"
            )


def compile_layers(config: RunConfig, model: nn.Module, accelerator: Accelerator) -> list[str]:
    """Compile what the model names in `compiled_modules()`, else its whole forward pass, where the run asks for it.

    Returns:
        What was compiled, for the start-up account.

    Raises:
        ConfigError: the layers are of a kind that a compiler cannot see through.
    """
    if not config.compile:
        return []
    if is_stage_3(accelerator):
        raise ConfigError(
            "compile: true does not work under ZeRO-3, which gathers weights between layers; use ZeRO-2"
        )
    if config.precision == "fp8" and config.fp8 is not None and config.fp8.backend == "te":
        raise ConfigError(
            "compile: true does not work with fp8.backend: te, whose layers a compiler cannot see; leave one of the "
            "two out"
        )
    named = getattr(model, "compiled_modules", None)
    modules: list[nn.Module] = [model] if named is None else named()
    for module in modules:
        module.compile()
    kinds = Counter(type(module).__name__ for module in modules)
    return [f"compiled: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}"]


def check_rates(phases: list[Phase], optimizer: torch.optim.Optimizer) -> None:
    """Find what is wrong with any phase's learning rates before the first one starts."""
    for phase in phases:
        base_learning_rates(phase.config, optimizer.param_groups)
        phase.learning_rate_factor(phase.config.warmup_steps)
        check_momentum(phase.config, optimizer.param_groups)
