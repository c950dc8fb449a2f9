"""Whether an artefact of the Hugging Face hub can be had, before anything expensive runs."""

import functools
from typing import Literal


@functools.cache
def reachable(repository: str, revision: str | None, kind: Literal["model", "dataset"]) -> str | None:
    """Why a hub repository can be neither reached nor found in the local cache; None when it can. Asked once a process.

    Args:
        repository: `owner/name`.
        revision: a commit, branch or tag; None: the default branch.
        kind: of the repository.
    """
    import httpx
    from huggingface_hub import HfApi, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound, HfHubHTTPError, OfflineModeIsEnabled

    try:
        for repo in scan_cache_dir().repos:
            known = {name for one in repo.revisions for name in (one.commit_hash, *one.refs)}
            if repo.repo_id == repository and repo.repo_type == kind and (revision is None or revision in known):
                return None
    except CacheNotFound:
        pass
    try:
        HfApi().repo_info(repository, revision=revision, repo_type=kind, timeout=10)
    except HfHubHTTPError as error:
        return f"{kind} {repository} on the hub: {str(error).strip().splitlines()[0]}"
    except (OSError, httpx.TransportError, OfflineModeIsEnabled) as error:
        return f"{kind} {repository} is not in the hub's cache, and the hub cannot be reached: {type(error).__name__}"
    return None
