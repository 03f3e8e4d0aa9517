"""Settings of images by URL."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from serve.media.addresses import normal_pattern


class MediaConfig(BaseModel):
    """Which images are fetched, from where, and within which limits."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    allowed_hosts: tuple[str, ...] = Field(
        (),
        description="hosts that images are fetched from: names, *.example.org for all subdomains, "
        "* for every host of the public internet; by default none, only data URLs",
    )
    allowed_ports: tuple[int, ...] = Field((80, 443), description="ports that images are fetched from")
    max_bytes: int = Field(20 * 2**20, ge=1, description="max size of one encoded image (bytes)")
    max_pixels: int = Field(25_000_000, ge=1, description="max width × height of one image (pixels)")
    formats: tuple[Literal["JPEG", "PNG", "WEBP", "GIF"], ...] = Field(
        ("JPEG", "PNG", "WEBP", "GIF"), min_length=1, description="formats that are decoded; first frame only"
    )
    connect_seconds: float = Field(5.0, gt=0, description="time for one connection, TLS included (s)")
    total_seconds: float = Field(
        20.0, gt=0, description="time for one image, waiting for a free connection and redirects included (s)"
    )
    max_redirects: int = Field(3, ge=0, description="max redirects followed for one image")
    max_connections: int = Field(32, ge=1, description="max concurrent downloads")
    max_connections_per_host: int = Field(
        8, ge=1, description="max concurrent downloads from one host and port"
    )

    @field_validator("allowed_hosts")
    @classmethod
    def _normal(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(normal_pattern(pattern) for pattern in patterns)
