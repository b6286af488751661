"""An export uploaded to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from tvit_cli.errors import RunError

LOGIN = "Log in with a token that may write (https://huggingface.co/settings/tokens): hf auth login"


def check_login() -> None:
    """Raise RunError where nobody is logged in, or the hub cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        HfApi().whoami()
    except (LocalTokenNotFoundError, HfHubHTTPError) as error:
        raise RunError(f"--push-to-hub: not logged in to the Hugging Face hub. {LOGIN}") from error
    except Exception as error:  # the hub's HTTP client, and so its errors, differ between hub versions
        raise RunError(
            f"--push-to-hub: the Hugging Face hub cannot be reached ({error}). Try later."
        ) from error


def publish(folder: Path, repository: str, *, private: bool) -> str:
    """Upload a folder and return the address of its repository, which is made if it is new.

    Raises RunError where the hub refuses or breaks off.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload a tvit export")
    except HfHubHTTPError as error:
        raise RunError(
            f"--push-to-hub {repository}: the hub refuses ({error}). The export is whole in {folder}. {LOGIN}"
        ) from error
    except Exception as error:  # as above
        raise RunError(
            f"--push-to-hub {repository}: the upload broke off ({error}). The export is whole in {folder}; go on "
            f"with: hf upload {repository} {folder}"
        ) from error
    return str(url)
