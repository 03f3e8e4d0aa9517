"""``GET /metrics``: the Prometheus metrics of all nodes, this project's and Ray Serve's, as one page."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import aiohttp
import ray

_PREFIXES = ("ray_skipvision_", "ray_serve_")
_TIMEOUT_SECONDS = 5.0


async def metrics_page() -> str:
    """Return the Prometheus text of all nodes. A node that does not respond is left out."""
    urls = [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for node in await asyncio.to_thread(ray.nodes)
        if node["Alive"] and node.get("MetricsExportPort")
    ]
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        pages = await asyncio.gather(*(_fetch(session, url) for url in urls))
    return merge(pages)


def merge(pages: Iterable[str]) -> str:
    """Merge Prometheus pages: one description per metric, followed by the samples of all pages."""
    described: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for page in pages:
        name = ""
        for line in page.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                name = line.split(" ", 3)[2]
                lines = described.setdefault(name, [])
                if len(lines) < 2 and line not in lines:
                    lines.append(line)
            elif line and not line.startswith("#"):
                samples.setdefault(name, []).append(line)
    wanted = [name for name in described if name.startswith(_PREFIXES) and name in samples]
    return "".join(f"{line}\n" for name in wanted for line in (*described[name], *samples[name]))


async def _fetch(session: aiohttp.ClientSession, url: str) -> str:
    try:
        async with session.get(url) as response:
            return await response.text()
    except (aiohttp.ClientError, TimeoutError):
        return ""
