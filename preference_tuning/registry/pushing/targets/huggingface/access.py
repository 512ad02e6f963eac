"""Whether a token may write to a repository, read from what ``whoami-v2`` says of it."""

from collections.abc import Mapping
from typing import Any

MAY_WRITE = ("admin", "write", "contributor")
"""Roles in an organisation that may make repositories and write to their own."""
PERMISSION = "repo.write"


def problem(whoami: Mapping[str, Any], repo_id: str, exists: bool) -> str | None:
    """Return why the token of ``whoami`` cannot push to a repository, or None if it can, as far as it says.

    Args:
        whoami: the hub's answer.
        repo_id: where to.
        exists: whether the repository is there; else it has to be made.
    """
    auth = whoami.get("auth") or {}
    token = auth.get("accessToken") or {}
    if (role := token.get("role")) == "fineGrained":
        return _of_scopes(token.get("fineGrained") or {}, repo_id, exists)
    if role == "read":
        return "the token may only read; make one with the role write, or a fine-grained one that may write there"
    return _of_namespace(whoami, repo_id)


def _of_scopes(scopes: Mapping[str, Any], repo_id: str, exists: bool) -> str | None:
    """A fine-grained token names the users, organisations and repositories that it is for."""
    owner = repo_id.split("/")[0].lower()
    named = {
        str((scope.get("entity") or {}).get("name", "")).lower()
        for scope in scopes.get("scoped") or []
        if PERMISSION in (scope.get("permissions") or [])
    }
    if owner in named:
        return None
    if repo_id.lower() in named:
        return None if exists else f"the fine-grained token is for {repo_id} alone, which does not exist: make it first"
    return f"the fine-grained token lacks write access ({PERMISSION}) to {owner} or {repo_id}"


def _of_namespace(whoami: Mapping[str, Any], repo_id: str) -> str | None:
    """A token with the role write may what its user may."""
    owner = repo_id.split("/")[0]
    if owner.lower() == str(whoami.get("name", "")).lower():
        return None
    orgs = {str(org.get("name", "")).lower(): org for org in whoami.get("orgs") or []}
    if owner.lower() not in orgs:
        return f"{owner} is neither {whoami.get('name')} nor an organisation that {whoami.get('name')} belongs to"
    role = orgs[owner.lower()].get("roleInOrg")
    if role is not None and role not in MAY_WRITE:
        return f"{whoami.get('name')} has the role {role} in {owner}, which may not write"
    return None
