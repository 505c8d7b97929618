"""The adaptation job, from settings to model folders."""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from pipeline.backbone.files import absolute_if_local, find_model, save_config_and_tokenizer, short_embedding_table
from pipeline.backbone.fingerprint import identify
from pipeline.backbone.loading import build_skeleton
from pipeline.backbone.weights import open_weights
from pipeline.corpus.encoding import TokenizerSpec
from pipeline.corpus.plain_text import TextCorpus, TextPlan, check_text, prepare_text
from pipeline.errors import SettingsError, StorageError, TuningError
from pipeline.lab.adapt.rank_job import AdaptationJob, AdaptationResult, read_adaptation
from pipeline.lab.adapt.start import StartModel, open_start_model
from pipeline.lab.full_weights.rank_setup import TrainingPlace
from pipeline.reporting.events import EventLog, telling_why
from pipeline.reporting.progress import follow
from pipeline.run.checks import check_storage
from pipeline.run.lease import run_lease
from pipeline.run.stages import make_folder_of, retry_while_unreachable
from pipeline.sealed_files import DamagedError, open_json, sealed_json
from pipeline.settings import AdaptationSettings
from pipeline.tuning.connection import Connect, ray_on_demand
from pipeline.tuning.launch import launch
from pipeline.whole_files import write_atomically

_ORIGIN = "adapted_from.json"


@dataclass(frozen=True)
class CheckedAdaptation:
    """Settings that passed all checks that need no training."""

    settings: AdaptationSettings
    start: StartModel
    plan: TextPlan


def check_adaptation(settings: AdaptationSettings) -> CheckedAdaptation:
    """Check the model and the corpus; nothing is written. Raises: the PromptBankError that stops the run."""
    check_storage(settings.run)
    return CheckedAdaptation(settings, open_start_model(settings, None), check_text(settings.corpus))


def run_adaptation(checked: CheckedAdaptation, console: Console) -> AdaptationResult:
    """Tokenise the corpus, train, and leave the models; resumes a run of the same name.

    Raises: PromptBankError for everything that a user can fix.
    """
    settings = checked.settings
    folder = make_folder_of(settings.run)
    events = folder / "events.jsonl"
    with (
        run_lease(folder, settings.run.name) as lease,
        EventLog(events) as log,
        telling_why(log),
        ray_on_demand(settings.cluster) as connect,
        follow(events, console),
    ):
        log.write("begin", tasks=1)
        start = open_start_model(settings, folder)
        rank_job = _rank_job(settings, start, folder, log, connect)
        log.write(
            "launch",
            trials=[{"trial": settings.run.name, "task": settings.objective.name, "max_steps": settings.steps}],
        )
        adapted = read_adaptation(rank_job)
        if adapted is None:
            connect()
            launch(rank_job.carry_out, folder, settings.cluster, settings.run, log)
            adapted = read_adaptation(rank_job)
        if adapted is None:
            raise TuningError(
                f"run '{settings.run.name}' was told to stop, and stopped with a checkpoint; start it again to resume"
            )
        lease.check()
        log.write("end", version=None, exit=0)
        return adapted


def _rank_job(
    settings: AdaptationSettings, start: StartModel, folder: Path, log: EventLog, connect: Connect
) -> AdaptationJob:
    weights = open_weights(find_model(start.path), build_skeleton(start.config, int8=False))
    identity = identify(start.path, start.config, start.tokenizer, weights, "full")
    description = folder / "model"
    try:
        save_config_and_tokenizer(start.config, start.tokenizer, description)
    except Exception as error:  # tokenizers has no class of its own for a full disk
        raise StorageError(f"cannot write {description}: {error}; make room and start the run again") from error
    short = short_embedding_table(start.config, start.tokenizer)
    spec = TokenizerSpec(str(description), identity.tokenizer, "encoder-decoder", short)
    storage = Path(settings.run.storage).expanduser().resolve()
    corpus: TextCorpus = retry_while_unreachable(
        partial(prepare_text, settings.corpus, spec, storage, connect), "corpus", log
    )
    log.write("stage", name="corpus", text=f"{corpus.counts['ok']} documents ({corpus.left_out} left out)")
    run, cluster = settings.run, settings.cluster
    place = TrainingPlace(
        run_folder=str(folder),
        name=run.name,
        model=absolute_if_local(start.path),
        description=str(description),
        dtype=settings.model.dtype,
        cpus_per_worker=cluster.cpus_per_worker,
        tokens_per_microbatch=cluster.tokens_per_microbatch,
        checkpoint_every=run.checkpoint_every,
        hang_timeout=run.hang_timeout,
    )
    rank_job = AdaptationJob(place, settings.model_dump(mode="json"), asdict(corpus), identity.fingerprint)
    _claim(folder, rank_job.digest, run.name)
    return rank_job


def _claim(folder: Path, digest: str, name: str) -> None:
    """Claim the folder for one adaptation. Raises: SettingsError if it holds models of another one."""
    path = folder / _ORIGIN
    if not path.exists():
        write_atomically(path, sealed_json({"digest": digest}))
        return
    try:
        origin = open_json(path.read_bytes(), ("digest",))
    except DamagedError as error:
        raise SettingsError(
            f"{path} is damaged ({error}), so nothing tells which adaptation made the models in its folder; give this "
            "run another name, or remove the folder"
        ) from error
    if origin.get("digest") != digest:
        raise SettingsError(
            f"run.name {name}: its folder {folder} holds models of another model, corpus, objective or optimizer; give "
            "this run another name, or remove the folder"
        )
