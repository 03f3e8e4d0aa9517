"""A Ray of one's own on this machine: its ports and files clash with no other, and it ends with us."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pipelines.cluster.cpus import usable_cpus
from pipelines.cluster.session import ROOT
from skipvision.errors import ResourceError, SkipVisionError

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
_CHATTER = re.compile(
    r"(INFO|SUCC|WARNING) \w+\.py:\d+ -- |^Running entrypoint|core_worker\.cc:\d+: Actor with class name"
)
"""What Ray says of itself, twenty lines a job; what the job says is shown."""


class JobFailedError(SkipVisionError):
    """A submitted job ended with an error, which its output has said."""


@dataclass(frozen=True)
class LocalRay:
    """A running head node and where its jobs are submitted to."""

    dashboard: str
    environment: Mapping[str, str]

    def submit(self, entrypoint: Sequence[str], *, environment: Mapping[str, str]) -> None:
        """``ray job submit`` from the repository's root; follows the job's output until it ends.

        Raises:
            JobFailedError: the job did not succeed.
        """
        name = f"job-{uuid.uuid4().hex[:12]}"
        options = ["--address", self.dashboard, "--submission-id", name, "--working-dir", str(ROOT)]
        options += ["--runtime-env-json", json.dumps({"env_vars": dict(environment)}), "--", *entrypoint]
        print(f"$ {shlex.join(['ray', 'job', 'submit', *options])}", flush=True)
        command = _ray("job", "submit", *options)
        with subprocess.Popen(
            command,
            env=dict(self.environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C is for us, who stop the job
        ) as job:
            try:
                for line in job.stdout or ():
                    if line.strip() and not _CHATTER.search(line):
                        print(line, end="", flush=True)
            except BaseException:
                self._stop(name)
                job.terminate()
                raise
        if job.returncode:
            raise JobFailedError(f"the job `{shlex.join(entrypoint)}` failed; its output is above")

    def _stop(self, name: str) -> None:
        """Tell a job to stop, and give it the time to say so in MLflow, before its Ray goes."""
        job = f"{self.dashboard}/api/jobs/{name}"
        end = time.monotonic() + _JOB_STOP_SECONDS + _POLL_SECONDS
        with suppress(urllib.error.URLError, TimeoutError, ConnectionError):  # not submitted yet, or no Ray
            urllib.request.urlopen(urllib.request.Request(f"{job}/stop", b""), timeout=10).close()  # noqa: S310
            while time.monotonic() < end:
                with urllib.request.urlopen(job, timeout=10) as answer:  # noqa: S310
                    if json.load(answer)["status"] not in ("PENDING", "RUNNING"):
                        return
                time.sleep(_POLL_SECONDS)


@contextmanager
def local_ray() -> Iterator[LocalRay]:
    """Start a head node, and stop it and all it started at the end of the block, whatever happened."""
    port, dashboard_port, client_port, *agents = _free_ports(7)
    # Ray's sockets live here, and their paths may have 107 characters at most.
    files = Path(tempfile.mkdtemp(prefix="skipvision-ray-", dir="/tmp"))
    binaries = str(Path(sys.executable).parent)
    environment = {
        **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        "PATH": os.pathsep.join([binaries, os.environ.get("PATH", "")]),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Only the loopback interface is bound; without a mode Ray may write a token for all clusters.
        "RAY_AUTH_MODE": "disabled",
        "RAY_JOB_STOP_WAIT_TIME_S": str(_JOB_STOP_SECONDS),
    }
    command = _ray(
        *("start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}"),
        *(f"--ray-client-server-port={client_port}", "--min-worker-port=0", "--max-worker-port=0"),
        # The agents' default ports belong to whichever Ray came first.
        *(f"--{name}={free}" for name, free in zip(_AGENT_PORTS, agents, strict=True)),
        *(f"--num-cpus={usable_cpus()}", f"--object-store-memory={400 * 2**20}", f"--temp-dir={files}"),
    )
    log = files / "start.log"
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, files, ignore_errors=True)
        with log.open("w") as output:
            head = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        stack.callback(_end, head)
        dashboard = f"http://127.0.0.1:{dashboard_port}"
        _wait_for(dashboard, head, log)
        yield LocalRay(dashboard, environment)


def _ray(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ray.scripts.scripts", *arguments]


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def _wait_for(dashboard: str, head: subprocess.Popen[bytes], log: Path) -> None:
    """Until jobs are taken: the dashboard answers some time before there is an agent to run one."""
    nothing = urllib.request.Request(  # noqa: S310
        f"{dashboard}/api/jobs/",
        json.dumps({"entrypoint": "true"}).encode(),
        {"Content-Type": "application/json"},
    )
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and head.poll() is None:
        try:
            with urllib.request.urlopen(nothing, timeout=10):  # noqa: S310
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(_POLL_SECONDS)
    raise ResourceError(
        f"a local Ray could not be started within {_START_SECONDS} s:\n{log.read_text()[-2000:]}"
    )


def _end(head: subprocess.Popen[bytes]) -> None:
    """``ray start --block`` ends its children when it is told to; what is left of its session is killed."""
    head.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        head.wait(_STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(head.pid, signal.SIGKILL)
    head.wait()
