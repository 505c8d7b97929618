"""The adaptation job, from settings to model folders."""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from pipeline.backbone.files import find_model, from_anywhere, save_description, short_table
from pipeline.backbone.fingerprint import identify
from pipeline.backbone.loading import build_skeleton
from pipeline.backbone.weights import open_weights
from pipeline.bank import BackboneId
from pipeline.corpus.encoding import TokenizerSpec
from pipeline.corpus.plain_text import TextCorpus, TextPlan, check_text, prepare_text
from pipeline.errors import SettingsError, StorageError, TuningError
from pipeline.lab.adapt.rank_job import AdaptationJob, Adapted, read_adapted
from pipeline.lab.adapt.start import Start, open_start
from pipeline.lab.full_weights.on_rank import TrainingPlace
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
    """Settings that can be carried out, as far as looking tells."""

    settings: AdaptationSettings
    start: Start
    plan: TextPlan


def check_adaptation(settings: AdaptationSettings) -> CheckedAdaptation:
    """Look at the model and the corpus; nothing is written. Raises: the PromptBankError that stops the run."""
    check_storage(settings.run)
    return CheckedAdaptation(settings, open_start(settings, None), check_text(settings.corpus))


def run_adaptation(checked: CheckedAdaptation, console: Console) -> Adapted:
    """Tokenise the corpus, train, and leave the models; resumes a run of the same name.

    Raises: PromptBankError for everything that a user can mend.
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
        start = open_start(settings, folder)
        order = _order(settings, start, folder, log, connect)
        log.write(
            "launch",
            trials=[{"trial": settings.run.name, "task": settings.objective.name, "max_steps": settings.steps}],
        )
        adapted = read_adapted(order)
        if adapted is None:
            connect()
            launch(order.carry_out, folder, settings.cluster, settings.run, log)
            adapted = read_adapted(order)
        if adapted is None:
            raise TuningError(
                f"run '{settings.run.name}' was told to stop and did, with a checkpoint; start it again to go on from "
                "there"
            )
        lease.check()
        log.write("end", version=None, exit=0)
        return adapted


def _order(settings: AdaptationSettings, start: Start, folder: Path, log: EventLog, connect: Connect) -> AdaptationJob:
    identity = _identify(start)
    description = folder / "model"
    try:
        save_description(start.config, start.tokenizer, description)
    except Exception as error:  # tokenizers raises nothing more special on a full disk
        raise StorageError(f"cannot write {description}: {error}; make room and start the run again") from error
    short = short_table(start.config, start.tokenizer)
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
        model=from_anywhere(start.path),
        description=str(description),
        dtype=settings.model.dtype,
        cpus_per_worker=cluster.cpus_per_worker,
        tokens_per_microbatch=cluster.tokens_per_microbatch,
        checkpoint_every=run.checkpoint_every,
        hang_timeout=run.hang_timeout,
    )
    order = AdaptationJob(place, settings.model_dump(mode="json"), asdict(corpus), identity.fingerprint)
    _claim(folder, order.digest, run.name)
    return order


def _identify(start: Start) -> BackboneId:
    weights = open_weights(find_model(start.path), build_skeleton(start.config, int8=False))
    return identify(start.path, start.config, start.tokenizer, weights, "full")


def _claim(folder: Path, digest: str, name: str) -> None:
    """A folder's models are all of one adaptation. Raises: SettingsError where they would not be."""
    path = folder / _ORIGIN
    if not path.exists():
        write_atomically(path, sealed_json({"digest": digest}))
        return
    try:
        origin = open_json(path.read_bytes(), ("digest",))
    except DamagedError as error:
        raise SettingsError(
            f"{path} is damaged ({error}): of what adaptation the models in its folder are is not known; give this run "
            "another name, or remove the folder"
        ) from error
    if origin.get("digest") != digest:
        raise SettingsError(
            f"run.name {name}: its folder {folder} holds models of another model, corpus, objective or optimizer; give "
            "this run another name, or remove the folder"
        )
