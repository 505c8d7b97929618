"""One replica of a service: a copy of the model and a view of the bank, which it follows. Needs no Ray."""

import logging

from fastapi import FastAPI

from pipeline.backbone.fingerprint import weights_setting
from pipeline.bank import PromptBank, Snapshot, WatchEvent
from pipeline.errors import BankError
from pipeline.serving.answering import Answering
from pipeline.serving.api import make_api
from pipeline.serving.authentication import require_tokens
from pipeline.serving.bank_tasks import public_sentence
from pipeline.serving.prompted_model import PromptedModel
from pipeline.serving.served_backbone import load_backbone
from pipeline.serving.service_metrics import ServiceMetrics
from pipeline.serving.service_settings import ServiceSettings

_log = logging.getLogger("ray.serve")


class Replica(Answering):
    """Requests wait on the event loop, and one thread runs the model (`model_loop`)."""

    def __init__(self, settings: ServiceSettings, name: str) -> None:
        """name: by which its metrics are told from those of others. Raises: PromptBankError."""
        self._tokens = require_tokens(settings)
        self.bank = PromptBank.open(settings.bank, settings.alias, trusted_keys=settings.trusted_keys)
        assert self.bank.current is not None, "a bank without a version is refused when opened"
        weights = weights_setting(self.bank.current.backbone)
        backbone = load_backbone(settings.model, weights, settings.device, settings.dtype, settings.products)
        model = PromptedModel(backbone, self.bank, settings.cache_mib * 2**20, settings.token_budget)
        metrics = ServiceMetrics(name, model.states)
        super().__init__(settings, model, metrics)
        try:
            self.snapshot()  # so that a bank of another backbone is refused before the first request
        except Exception:
            super().close()
            raise
        self.metrics.watched(self.bank.version, None)
        self._watch_error: str | None = None
        self._watcher = self.bank.watch(self._on_event, settings.watch_every)

    def close(self) -> None:
        """End the threads that run the model and follow the bank."""
        self._watcher.stop()
        super().close()

    def api(self) -> FastAPI:
        return make_api(self, self._tokens)

    def snapshot(self) -> Snapshot:
        """The version that is served. Raises: BankError when it belongs to another model than this replica's."""
        snapshot = self.bank.current
        if snapshot is None:
            raise BankError("the bank has no version")
        identity = self.model.backbone.identity
        if not snapshot.is_of(identity):
            raise BankError(
                f"version {snapshot.version} of the bank belongs to another model than {self.settings.model}: "
                f"they differ in {', '.join(snapshot.backbone.differing_parts(identity))}"
            )
        return snapshot

    def watch_error(self) -> str | None:
        return self._watch_error

    def _on_event(self, event: WatchEvent) -> None:
        """Called in the watcher's thread."""
        self._watch_error = public_sentence(event.error, self.bank) if event.error else None
        self.metrics.watched(event.version, self._watch_error)
        if event.error:
            _log.warning("serving version %d on: %s", event.version, event.error)
        else:
            _log.info("serving version %d of the bank", event.version)
