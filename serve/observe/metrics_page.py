"""``GET /metrics``: what the nodes of the cluster measure of this project and of Ray Serve, as one page."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import aiohttp
import ray

_OURS = ("ray_skipvision_", "ray_serve_")
_SECONDS = 5.0


async def exposition() -> str:
    """Prometheus text of all nodes; a node that does not answer is left out."""
    urls = [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for node in await asyncio.to_thread(ray.nodes)
        if node["Alive"] and node.get("MetricsExportPort")
    ]
    timeout = aiohttp.ClientTimeout(total=_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        pages = await asyncio.gather(*(_page(session, url) for url in urls))
    return merged(pages)


def merged(pages: Iterable[str]) -> str:
    """Metrics of this project and of Ray Serve, each described once, the samples of all pages behind."""
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
    wanted = [name for name in described if name.startswith(_OURS) and name in samples]
    return "".join(f"{line}\n" for name in wanted for line in (*described[name], *samples[name]))


async def _page(session: aiohttp.ClientSession, url: str) -> str:
    try:
        async with session.get(url) as response:
            return await response.text()
    except (aiohttp.ClientError, TimeoutError):
        return ""
