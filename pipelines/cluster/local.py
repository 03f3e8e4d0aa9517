"""Start a separate Ray on this machine: it shares no port or file with another and ends with this process."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.cluster.address import short_tmpdir
from pipelines.cluster.cpus import usable_cpus
from pipelines.cluster.session import ROOT
from pipelines.shared.console import say
from pipelines.shared.proxies import bypass_proxies_on_loopback
from skipvision.errors import ResourceError, SkipVisionError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_START_SECONDS = 90
_STOP_SECONDS = 30
_JOB_STOP_SECONDS = 20
_POLL_SECONDS = 0.5
_AGENT_PORTS = (
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_ADDRESSES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
_UNREACHABLE = (OSError, RuntimeError)
"""Errors that Ray's client raises while there is no dashboard, no agent or no such job."""
_CHATTER = re.compile(
    r"(INFO|SUCC|WARNING) \w+\.py:\d+ -- |^Running entrypoint|core_worker\.cc:\d+: Actor with class name"
)
"""Ray's own lines in the output of a job, about twenty."""


class JobFailedError(SkipVisionError):
    """A submitted job failed; its output names the reason."""


@dataclass(frozen=True)
class LocalRay:
    """A running head node.

    Attributes:
        dashboard: the URL that takes jobs.
        token: every client's ``$RAY_AUTH_TOKEN``.
        client: submits jobs there.
    """

    dashboard: str
    token: str = field(repr=False)
    client: JobSubmissionClient

    def submit(self, entrypoint: Sequence[str], *, environment: Mapping[str, str]) -> None:
        """Run a job from the repository's root, as ``ray job submit`` does, and print its output.

        Raises:
            JobFailedError: the job did not succeed.
        """
        command, environment_json = shlex.join(entrypoint), json.dumps({"env_vars": dict(environment)})
        options = ["--address", self.dashboard, "--working-dir", str(ROOT)]
        options += ["--runtime-env-json", environment_json, "--"]
        say(f"$ {shlex.join(['ray', 'job', 'submit', *options])} {command}")
        name = f"job-{uuid.uuid4().hex[:12]}"
        try:
            with _quiet_client():
                self.client.submit_job(
                    entrypoint=command,
                    submission_id=name,
                    runtime_env={"working_dir": str(ROOT), "env_vars": dict(environment)},
                )
                asyncio.run(self._print_output(name))
            job = self.client.get_job_info(name)
        except BaseException:
            self._stop(name)
            raise
        if job.status != "SUCCEEDED":
            reason = (job.message or "").partition(", last available logs")[0]
            raise JobFailedError(f"the job `{command}` failed, its output is above. {reason}")

    async def _print_output(self, name: str) -> None:
        """Print the job's lines until it ends, without Ray's own."""
        rest = ""
        async for text in self.client.tail_job_logs(name):
            *lines, rest = (rest + text).split("\n")
            for line in lines:
                _print_line(line)
        _print_line(rest)

    def _stop(self, name: str) -> None:
        """Stop a job and wait until it has recorded that in MLflow, which needs its Ray."""
        end = time.monotonic() + _JOB_STOP_SECONDS + _POLL_SECONDS
        with suppress(*_UNREACHABLE):  # not submitted yet, or no Ray
            self.client.stop_job(name)
            while time.monotonic() < end and not self.client.get_job_status(name).is_terminal():
                time.sleep(_POLL_SECONDS)


@contextmanager
def _quiet_client() -> Iterator[None]:
    """Log only errors of Ray's client: it logs twenty lines for each upload."""
    logger = logging.getLogger("ray")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _print_line(line: str) -> None:
    if line.strip() and not _CHATTER.search(line):
        say(line)


@contextmanager
def local_ray() -> Iterator[LocalRay]:
    """Start a head node for the block. At its end, stop the node and every process that it started."""
    bypass_proxies_on_loopback()
    port, dashboard_port, client_port, *agents = _free_ports(7)
    # Ray's sockets are here; their paths may have at most 107 characters.
    files = Path(tempfile.mkdtemp(prefix="skipvision-ray-", dir="/tmp"))
    token = secrets.token_hex(32)
    binaries = str(Path(sys.executable).parent)
    with short_tmpdir():
        inherited = {name: value for name, value in os.environ.items() if name not in _ADDRESSES}
    environment = {
        **inherited,
        "PATH": os.pathsep.join([binaries, os.environ.get("PATH", "")]),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Some of the node's ports listen on every interface: no call without the token does anything.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_JOB_STOP_WAIT_TIME_S": str(_JOB_STOP_SECONDS),
    }
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start"),
        *("--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}"),
        *(f"--ray-client-server-port={client_port}", "--min-worker-port=0", "--max-worker-port=0"),
        # The agents' default ports are taken if another Ray runs.
        *(f"--{name}={free}" for name, free in zip(_AGENT_PORTS, agents, strict=True)),
        *(f"--num-cpus={usable_cpus()}", f"--object-store-memory={400 * 2**20}", f"--temp-dir={files}"),
    ]
    log = files / "start.log"
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, files, ignore_errors=True)
        with log.open("w") as output:
            head = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        stack.callback(_end, head)
        dashboard = f"http://127.0.0.1:{dashboard_port}"
        yield LocalRay(dashboard, token, _wait_for(dashboard, token, head, log))


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def _wait_for(dashboard: str, token: str, head: subprocess.Popen[bytes], log: Path) -> JobSubmissionClient:
    """Return a client once a job is accepted: the dashboard answers before an agent can run jobs."""
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and head.poll() is None:
        try:
            client = _client(dashboard, token)
            client.submit_job(entrypoint="true")
        except _UNREACHABLE:
            time.sleep(_POLL_SECONDS)
        else:
            return client
    raise ResourceError(
        f"a local Ray could not be started within {_START_SECONDS} s; the machine may be overloaded: try "
        f"again when it has less to do. The end of Ray's log:\n{_last_lines(log.read_text())}"
    )


def _last_lines(text: str) -> str:
    return "\n".join(_COLOUR.sub("", text).splitlines()[-15:])


def _client(dashboard: str, token: str) -> JobSubmissionClient:
    """Return a client of this dashboard. Variables that name another cluster would override the address."""
    hidden = {name: os.environ.pop(name) for name in _ADDRESSES if name in os.environ}
    try:
        from ray.job_submission import JobSubmissionClient

        # There is no TLS to verify. By default Ray passes ssl=None to aiohttp, which is deprecated.
        return JobSubmissionClient(dashboard, verify=False, headers={"Authorization": f"Bearer {token}"})
    finally:
        os.environ.update(hidden)


def _end(head: subprocess.Popen[bytes]) -> None:
    """Terminate the head node, which ends its children, and kill what remains of its session."""
    head.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        head.wait(_STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(head.pid, signal.SIGKILL)
    head.wait()
