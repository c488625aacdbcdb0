"""Ray: joins the cluster that RAY_ADDRESS names, or starts a private one that leaves nothing behind."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import psutil
import ray
from ray._private import services, utils
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

from eureka_megatron.errors import UserError
from eureka_megatron.session import rearm, shielded, silence_of, socket_folder, temporary_folder

END_SECONDS = 10.0  # that ended processes are waited for


def start_ray(stack: ExitStack) -> None:
    """Join the cluster of RAY_ADDRESS, or start a private one on this machine that ends with the stack.

    Its object store may take Ray's usual share of the memory and of /dev/shm; RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION and
    RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES say otherwise.

    Raises:
        UserError: nobody answers at RAY_ADDRESS, or Ray cannot start here.
    """
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    if address:
        require_cluster(address)
        # `ray start` makes a token; ray.init does not send it to the address of an environment variable unless told.
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        options: dict[str, Any] = {}
    else:
        # Ray lowers its workers' priority by 15 to keep a shared node's daemons responsive; here the workers are the job.
        os.environ.setdefault("RAY_worker_niceness", "0")
        folder = stack.enter_context(temporary_folder())
        sockets = stack.enter_context(socket_folder(folder))
        options = {"_temp_dir": str(sockets), "include_dashboard": False, "log_to_driver": False}
        if sockets != folder:
            options["object_spilling_directory"] = str(folder)  # what is large goes where the user has said
    started: list[psutil.Process] = []
    stack.callback(_end, started)
    try:
        with _apart(started):
            ray.init(logging_level=logging.ERROR, **options)
    except Exception as error:
        where = (
            f"RAY_ADDRESS={address}: the cluster cannot be joined" if address else "Ray cannot start on this machine"
        )
        raise UserError(f"{where}: {' '.join(str(error).split())[:300]}") from error
    if address:
        wait_for_nodes(int(os.environ.get("EUREKA_RAY_NODES", "1")), float(os.environ.get("EUREKA_RAY_SECONDS", "300")))


def wait_for_nodes(wanted: int, seconds: float) -> None:
    """Until so many nodes have joined: a batch job starts them all at once. Raises UserError."""
    deadline = time.monotonic() + seconds
    while len(nodes := sorted(node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"])) < wanted:
        if time.monotonic() > deadline:
            raise UserError(
                f"{len(nodes)} of EUREKA_RAY_NODES={wanted} nodes have joined Ray within EUREKA_RAY_SECONDS={seconds:g}: "
                f"{', '.join(nodes)}; the others' node_NAME.log says why"
            )
        time.sleep(0.2)


def require_cluster(address: str) -> None:
    """Raises UserError when no cluster can be behind RAY_ADDRESS."""
    if address == "auto":
        reason = "" if services.find_gcs_addresses() else "no cluster runs on this machine"
    else:
        reason = "" if address == "local" else silence_of(address)
    if reason:
        raise UserError(f"RAY_ADDRESS={address}: {reason}; start one there, or unset RAY_ADDRESS for a private one")


@contextmanager
def _apart(started: list[psutil.Process]) -> Iterator[None]:
    """Ray's processes, which are added to the list, leave signals to the driver, which ends them in order; and Ray leaves the driver's handlers.

    Without it scancel, a time limit or Ctrl-C would end all of them at once, and the driver, when its raylet is gone, without a word.
    """

    class Apart(services.ConsolePopen):
        def __init__(self, *args: Any, **options: Any) -> None:
            with shielded():
                super().__init__(*args, process_group=0, **options)
            started.append(psutil.Process(self.pid))

    usual = services.ConsolePopen, utils.set_sigterm_handler
    vars(services)["ConsolePopen"], vars(utils)["set_sigterm_handler"] = Apart, lambda _: rearm()
    try:
        yield
    finally:
        vars(services)["ConsolePopen"], vars(utils)["set_sigterm_handler"] = usual
        rearm()


def _end(started: list[psutil.Process]) -> None:
    """Ray's end, and that of every process it started here: only then can their files go."""
    everything = list(started)
    for process in started:
        with suppress(psutil.NoSuchProcess):
            everything += process.children(recursive=True)
    ray.shutdown()
    _, alive = psutil.wait_procs(everything, timeout=END_SECONDS / 2)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=END_SECONDS / 2)
