"""The service on Ray Serve: rows of many requests and tasks in one batch, behind HTTP.

`serve run pipeline.serving.app:build bank=BANK model=MODEL`, or `jobs/serve_prompts.py`.
"""

import logging
import math
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve

from pipeline import proxy
from pipeline.backbone.files import absolute_if_local
from pipeline.backbone.fingerprint import weights_setting
from pipeline.bank import PromptBank, Snapshot, WatchEvent
from pipeline.errors import BankError, PromptBankError, SettingsError
from pipeline.serving.answering import Answering
from pipeline.serving.api import make_api
from pipeline.serving.authentication import require_tokens, settle_authentication
from pipeline.serving.bank_tasks import public_sentence
from pipeline.serving.prompted_model import PromptedModel
from pipeline.serving.served_backbone import load_backbone
from pipeline.serving.service_metrics import ServiceMetrics
from pipeline.serving.service_settings import ServiceSettings

_log = logging.getLogger("ray.serve")
_NAME = "prompts"
_SPARE_REQUESTS = 64
"""Room for /healthz and other views while `max_waiting` requests wait."""


def build(settings: ServiceSettings) -> serve.Application:
    """The application, for `serve.run` and `serve run`."""
    # A replica has another working directory than this process.
    places = {"bank": absolute_if_local(settings.bank), "model": absolute_if_local(settings.model)}
    files: dict[str, str | tuple[str, ...]] = {"trusted_keys": tuple(map(absolute_if_local, settings.trusted_keys))}
    if settings.token_file is not None:
        files["token_file"] = absolute_if_local(settings.token_file)
    settings = settings.model_copy(update=places | files)
    deployment = serve.deployment(
        serve.ingress()(PromptService),
        name=_NAME,
        num_replicas=settings.replicas,
        ray_actor_options={"num_cpus": settings.cpus_per_replica, "num_gpus": int(settings.device == "cuda")},
        max_ongoing_requests=settings.max_waiting + _SPARE_REQUESTS,
        max_constructor_retry_count=2,
        graceful_shutdown_timeout_s=settings.shutdown_s,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config={"enable_access_log": False},
    )
    return deployment.bind(settings)


@contextmanager
def serving(settings: ServiceSettings, host: str, port: int) -> Iterator[None]:
    """Run the application at `http://host:port`; when the block ends, finish its requests and stop it.

    Runs on the Ray cluster at RAY_ADDRESS, else on a local Ray, which it stops too.
    Raises: SettingsError when the port is taken, no cluster answers, or callers beyond this machine would need no
    token; PromptBankError with the reason why a replica could not start.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        settings = settle_authentication(settings, host)
        try:
            socket.create_server((host, port)).close()
        except OSError as error:
            raise SettingsError(f"cannot listen on {host}:{port}: {error.strerror}; choose another port") from error
    with ExitStack() as afterwards:
        token = secrets.token_urlsafe()
        _start_ray(settings, address, token)
        afterwards.callback(ray.shutdown)
        serve.start(http_options={"host": host, "port": port}, proxy_location="HeadOnly")
        afterwards.callback(serve.delete, _NAME)  # waits for the requests under way
        if not address:  # a cluster's proxy also serves other applications, and goes on
            afterwards.callback(proxy.drain, host, port, token, settings.shutdown_s)
        try:
            serve.run(build(settings), name=_NAME)
        except RuntimeError as error:
            raise _reason(error) from error
        yield


def _start_ray(settings: ServiceSettings, address: str | None, token: str) -> None:
    # Replicas must find this code also when it runs from a checkout without being installed.
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {"PYTHONPATH": path}
    if not address:  # a cluster's proxy also serves other applications, which must get neither middleware nor token
        variables |= proxy.environment(token, settings.request_s)
    options: dict[str, Any] = {"runtime_env": {"env_vars": variables}, "logging_level": logging.ERROR}
    if not address:
        cpus = max(os.cpu_count() or 1, math.ceil(settings.replicas * settings.cpus_per_replica))
        options |= {"num_cpus": cpus, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    try:
        ray.init(address=address or "local", log_to_driver=False, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise SettingsError(f"RAY_ADDRESS: no Ray cluster answers at {address}; fix or unset it") from error
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


def _reason(error: RuntimeError) -> Exception:
    """The user's error in Serve's report on a replica that could not start, else Serve's own."""
    told = [d.message for app in serve.status().applications.values() for d in app.deployments.values()]
    for line in reversed("\n".join(told).splitlines()):
        name, _, sentence = line.strip().partition("Error: ")
        if name.startswith("pipeline.errors."):
            return PromptBankError(sentence)
    return error


class PromptService(Answering):
    """One replica: a copy of the model and a view of the bank.

    Requests wait on the event loop, and one thread runs the model (`model_loop`).
    """

    def __init__(self, settings: ServiceSettings) -> None:
        self._tokens = require_tokens(settings)
        self.bank = PromptBank.open(settings.bank, settings.alias, trusted_keys=settings.trusted_keys)
        assert self.bank.current is not None, "a bank without a version is refused when opened"
        weights = weights_setting(self.bank.current.backbone)
        backbone = load_backbone(settings.model, weights, settings.device, settings.dtype, settings.products)
        model = PromptedModel(backbone, self.bank, settings.cache_mib * 2**20, settings.token_budget)
        metrics = ServiceMetrics(serve.get_replica_context().replica_id.unique_id, model.states)
        super().__init__(settings, model, metrics)
        self.snapshot()  # so that a bank of another backbone is refused before the first request
        self.metrics.watched(self.bank.version, None)
        self._watch_error: str | None = None
        self._watcher = self.bank.watch(self._on_event, settings.watch_every)

    def __serve_build_asgi_app__(self) -> FastAPI:
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
