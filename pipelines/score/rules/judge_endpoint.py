"""The endpoint of a judge: any server with OpenAI's chat completions."""

from __future__ import annotations

import os
import time
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from openai import (
    APIConnectionError,
    APIResponseValidationError,
    APIStatusError,
    DefaultHttpxClient,
    OpenAI,
    omit,
)
from openai.types.chat import ChatCompletion
from pydantic import BaseModel, ConfigDict, Field

from pipelines.shared.proxies import bypass_proxies_on_loopback
from skipvision.errors import ConfigError, SkipVisionError

_PAUSES = (1.0, 4.0, 15.0)
_LONGEST_PAUSE = 120.0
_RETRIED = frozenset({408, 409, 429, 500, 502, 503, 504})
_REFUSED = frozenset({400, 413, 422})
"""Statuses that concern a single prompt: it is too long, or against the endpoint's rules."""


class JudgeError(SkipVisionError):
    """The judge cannot be reached. The same job, run again, continues."""


class NoVerdictError(SkipVisionError):
    """The judge has no verdict on one answer; it may have one on others."""


class RefusedPrompt(NoVerdictError):
    """The judge's endpoint rejects the prompt."""


class JudgeConfig(BaseModel):
    """The language model that reads answers which no rule can read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_url: str = Field(
        "https://api.openai.com/v1",
        pattern="^https?://",
        description="endpoint with OpenAI's API; /chat/completions is added",
    )
    model: str = Field(
        description="the model's name at the judge's endpoint; scores of different judges cannot be compared"
    )
    api_key_env: str | None = Field(
        "OPENAI_API_KEY", description="environment variable that holds the API key; null = none is sent"
    )
    temperature: float | None = Field(
        0.0,
        ge=0,
        description="sampling temperature of the judge's replies; null = not sent, for models that refuse it",
    )
    parallel: int = Field(8, ge=1, description="concurrent requests")
    timeout: float = Field(60.0, gt=0, description="seconds that a reply may take")


class JudgeEndpoint:
    """A client with retries. Several threads may share it."""

    def __init__(self, config: JudgeConfig) -> None:
        """Read the API key. Raise `ConfigError` if its variable is not set or a proxy cannot be used."""
        self._config = config
        bypass_proxies_on_loopback()
        key = _api_key(config) or "unused"  # the client insists on a key
        try:
            self._client = OpenAI(
                api_key=key,
                base_url=config.base_url,
                timeout=config.timeout,
                max_retries=0,  # the client's own retries are shorter, and ignore long Retry-After headers
                http_client=DefaultHttpxClient(trust_env=not _on_loopback(config.base_url)),
            )
        except (ImportError, ValueError) as error:  # a SOCKS proxy without its library, or an odd proxy
            raise ConfigError(
                f"the judge's client cannot use the proxy of the environment (http_proxy, https_proxy or "
                f"ALL_PROXY): {error}; correct or unset it, or name the judge's host in no_proxy"
            ) from None

    def reply(self, prompt: str, warmer: float = 0.0) -> str:
        """Return the judge's reply to a prompt.

        Args:
            prompt: the only message of the conversation.
            warmer: is added to the temperature, if one is sent.

        Raises:
            JudgeError: the endpoint cannot be reached, or keeps failing.
            RefusedPrompt: the endpoint rejects this prompt.
        """
        name = f"the judge {self._config.model} at {self._config.base_url.rstrip('/')}/chat/completions"
        for pause in (*_PAUSES, None):
            wait = 0.0
            try:
                return self._request(prompt, warmer)
            except APIStatusError as error:
                problem = f"HTTP {error.status_code}: {error.response.text[:300]}"
                if error.status_code in _REFUSED:
                    raise RefusedPrompt(f"{name} does not take the prompt: {problem}") from None
                if error.status_code not in _RETRIED:
                    break
                wait = _retry_after(error.response.headers.get("Retry-After"))
            except APIConnectionError as error:
                problem = f"{type(error).__name__}: {error.__cause__ or error}"
            except (APIResponseValidationError, ValueError) as error:
                problem = f"{type(error).__name__}: {error}"
            if pause is not None:
                time.sleep(max(pause, min(wait, _LONGEST_PAUSE)))
        raise JudgeError(
            f"{name} does not answer: {problem}\n"
            "Its earlier replies are kept; run the same job again to continue"
        )

    def _request(self, prompt: str, warmer: float) -> str:
        temperature = self._config.temperature
        completion: Any = self._client.chat.completions.create(
            model=self._config.model,
            messages=[{"role": "user", "content": prompt}],
            temperature=omit if temperature is None else temperature + warmer,
            extra_headers={"Authorization": omit} if self._config.api_key_env is None else None,
        )
        if not isinstance(completion, ChatCompletion) or not completion.choices:
            text = completion.to_json(indent=None) if isinstance(completion, ChatCompletion) else completion
            raise ValueError(f"no chat completion: {str(text)[:300]}")
        return (completion.choices[0].message.content or "").strip()


def _api_key(config: JudgeConfig) -> str | None:
    if config.api_key_env is None:
        return None
    key = os.environ.get(config.api_key_env)
    if not key:
        raise ConfigError(
            f"judge.api_key_env = {config.api_key_env}: this environment variable is not set; set it to the "
            "API key, or set judge.api_key_env to null if the endpoint needs none"
        )
    return key


def _on_loopback(url: str) -> bool:
    """Return whether a URL is of this machine. Even an unused SOCKS proxy would demand its library."""
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _retry_after(header: str | None) -> float:
    """Return the seconds that an endpoint requests to wait, given as a number or a date; else 0."""
    if header is None:
        return 0.0
    try:
        return float(header)
    except ValueError:
        pass
    try:
        return parsedate_to_datetime(header).timestamp() - time.time()
    except ValueError:
        return 0.0
