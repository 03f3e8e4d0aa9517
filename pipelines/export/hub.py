"""Push an exported model to a repository on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.export.config import HubSection
from skipvision.errors import ConfigError, SkipVisionError

_SECONDS = 10


class HubError(SkipVisionError):
    """The hub did not answer, or refused a request."""


def check_hub(hub: HubSection, *, pushed: bool) -> None:
    """Check that the hub answers, knows the token, and that the repository may be written to.

    Args:
        hub: the settings.
        pushed: whether this job has pushed its model there before.

    Raises:
        ConfigError: there is no token, its owner may not write, or the repository holds a model already.
        HubError: the hub does not answer.
    """
    from huggingface_hub import HfApi, get_token

    field = f"hub.repository = {hub.repository}"
    if get_token() is None:
        raise ConfigError(f"{field}: there is no token for the hub: run `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    with _hub_errors(f"checking {hub.repository}", api.endpoint):
        who = api.whoami()
        user, owner = who["name"], hub.repository.partition("/")[0]
        allowed = [user, *(one["name"] for one in who.get("orgs", ()))]
        if owner not in allowed:
            raise ConfigError(
                f"{field}: the token belongs to {user!r}, who may write to {', '.join(allowed)}, not to "
                f"{owner!r}: correct the repository, or use another token"
            )
        # A repository that does not exist has no file either.
        if not (hub.overwrite or pushed) and api.file_exists(hub.repository, "config.json"):
            raise ConfigError(
                f"{field} holds a model already: choose another repository, or set hub.overwrite"
            )


def push(folder: Path, hub: HubSection) -> str:
    """Upload an exported model as one commit and return the repository's address.

    Raises:
        HubError: the hub does not answer, or refuses the upload.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _hub_errors(f"pushing {folder} to {hub.repository}", api.endpoint):
        address = api.create_repo(hub.repository, private=hub.private, exist_ok=True)
        api.upload_folder(
            repo_id=hub.repository, folder_path=folder, commit_message="Export with Skip-Vision"
        )
    return str(address)


@contextmanager
def _hub_errors(action: str, endpoint: str) -> Iterator[None]:
    try:
        yield
    except SkipVisionError:
        raise
    except Exception as error:  # the hub's library may use any HTTP client
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise HubError(f"the hub at {endpoint} failed at {action}: {first[:300]}") from error
