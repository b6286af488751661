"""An export uploaded to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tvit_cli.errors import RunError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

LOGIN = "Log in with a token that may write (https://huggingface.co/settings/tokens): hf auth login"


REFUSED = (401, 403)  # HTTP: who are you; you may not


def check_login() -> None:
    """Raise RunError where nobody is logged in, or the hub does not answer."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        HfApi().whoami()
    except LocalTokenNotFoundError as error:
        raise RunError(f"--push-to-hub: not logged in to the Hugging Face hub. {LOGIN}") from error
    except HfHubHTTPError as error:
        if _is_refused(error):
            raise RunError(
                f"--push-to-hub: the Hugging Face hub does not take this login. {LOGIN}"
            ) from error
        raise RunError(
            f"--push-to-hub: the Hugging Face hub answers with an error ({_said(error)}). Try later."
        ) from error
    except Exception as error:  # the hub's HTTP client, and so its errors, differ between hub versions
        raise RunError(
            f"--push-to-hub: the Hugging Face hub cannot be reached ({_said(error)}). Try later."
        ) from error


def publish(folder: Path, repository: str, *, private: bool) -> str:
    """Upload a folder and return the address of its repository, which is made if it is new.

    Raises RunError where the hub refuses or breaks off, and where a private repository is asked for and a public
    one is there: the hub leaves it public.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        is_open = private and not api.repo_info(repository).private
        if not is_open:
            api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload a tvit export")
    except Exception as error:  # as above
        if isinstance(error, HfHubHTTPError) and _is_refused(error):
            raise RunError(
                f"--push-to-hub {repository}: this login may not write there ({_said(error)}). The export is whole "
                f"in {folder}. {LOGIN}"
            ) from error
        again = f"hf upload {'--private ' if private else ''}{repository} {folder}"  # it makes the repository, too
        raise RunError(
            f"--push-to-hub {repository}: the upload broke off ({_said(error)}). The export is whole in {folder}; "
            f"go on with: {again}"
        ) from error
    if is_open:
        raise RunError(
            f"--private: {repository} is there and public, so nothing was uploaded. The export is whole in "
            f"{folder}. Make the repository private on its page (Settings), name another, or leave out --private."
        )
    return str(url)


def _is_refused(error: HfHubHTTPError) -> bool:
    return error.response is not None and error.response.status_code in REFUSED


def _said(error: Exception) -> str:
    """An error's text in one line: the hub's have several."""
    return " ".join(str(error).split())
