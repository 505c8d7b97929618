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
from pipeline.errors import PromptBankError, SettingsError
from pipeline.serving.authentication import settle_authentication
from pipeline.serving.replica import Replica
from pipeline.serving.service_settings import ServiceSettings

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


class PromptService(Replica):
    """A replica as Serve makes it."""

    def __init__(self, settings: ServiceSettings) -> None:
        super().__init__(settings, serve.get_replica_context().replica_id.unique_id)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self.api()
