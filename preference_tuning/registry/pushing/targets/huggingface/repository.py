"""A repository of a hub, brought to hold a version: candidate branch, one commit, tag, and for a champion main.

What is done is looked up in the repository and not remembered, so a push that was stopped anywhere goes on where it
was, an answer that was lost does no harm, and one that is complete sends nothing.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from preference_tuning.errors import ConfigError, PreferenceTuningError
from preference_tuning.registry.pushing.patience import Patience
from preference_tuning.registry.pushing.targets.huggingface import files as contents
from preference_tuning.registry.pushing.targets.huggingface.client import status_of
from preference_tuning.registry.pushing.targets.huggingface.files import INDEX, File, Tree

MAIN = "main"
MOVES = 4
"""How often a branch may move under a push before it gives up."""
CONFLICT = (409, 412)

Answer = TypeVar("Answer")


class Repository:
    """A model repository, with all that is asked of it tried again as long as there is patience."""

    def __init__(self, api: Any, repo_id: str, patience: Patience) -> None:
        """Take the ``HfApi`` that knows endpoint and token."""
        self._api, self.id, self._patience = api, repo_id, patience

    @property
    def url(self) -> str:
        """Its page."""
        return f"{self._api.endpoint}/{self.id}"

    def private(self) -> bool | None:
        """Return whether it is private, or None if there is none that the token can see."""
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            return bool(self._call(lambda: self._api.repo_info(self.id)).private)
        except RepositoryNotFoundError:
            return None

    def writable(self) -> bool | None:
        """Return whether the token may write to it, or None if the hub does not tell."""
        from huggingface_hub.errors import HfHubHTTPError

        try:
            self._call(lambda: self._api.auth_check(self.id, write=True))
        except HfHubHTTPError as error:
            return False if status_of(error) == 403 else None
        return True

    def check_visibility(self, found: bool, wanted: bool) -> None:
        """Refuse a repository that is not as private as the config says; it is never changed from here.

        Raises:
            ConfigError: it is not.
        """
        if found != wanted:
            word = {True: "private", False: "public"}
            raise ConfigError(
                f"{self.id} is {word[found]} and the config says private: {str(wanted).lower()}; make it "
                f"{word[wanted]} on the hub, or say private: {str(found).lower()}"
            )

    def make(self, private: bool) -> None:
        """Make sure that it is there.

        Raises:
            ConfigError: it is there and its visibility is another one.
        """
        if self.private() is None:
            # Not by exist_ok, which trusts that the answer to a conflict has the address.
            with _unless_there():
                self._call(lambda: self._api.create_repo(self.id, private=private))
        found = self.private()
        if found is None:
            raise PreferenceTuningError(f"{self.id}: the hub made the repository and does not show it")
        self.check_visibility(found, private)

    def hold(
        self,
        files: Mapping[str, File],
        version: str,
        promoted: Callable[[], bool],
        note: Callable[[dict[str, str]], None],
    ) -> dict[str, str]:
        """Make it hold a version under a tag, and as main while it is promoted; return where it is.

        Raises:
            PreferenceTuningError: somebody else's work is in the way.
        """
        tag, branch = f"v-{version}", f"candidate-{version}"
        facts = {"url": self.url, "tag": tag, "commit": self._tagged(tag, branch, files, note)}
        note(facts)
        if main := self._bring(MAIN, files, f"Version {version}", promoted):
            facts[MAIN] = main
            note(facts)
        if branch in self._branches():
            self._remove(branch)
        size = sum(file.size for file in files.values())
        return {**facts, "compared": f"{len(files)} files, {size} bytes: the hub has what is here"}

    def _tagged(self, tag: str, branch: str, files: Mapping[str, File], note: Callable[[dict[str, str]], None]) -> str:
        """Return the commit of the version's tag, made on a branch of its own that readers of main never see."""
        from huggingface_hub.errors import RevisionNotFoundError

        for _ in range(MOVES):
            if commit := self._tags().get(tag):
                if problems := contents.differences(self._tree(commit), files):
                    raise PreferenceTuningError(
                        f"{self.id}: the tag {tag} is there and is not this version ({'; '.join(problems[:3])}); "
                        "delete it on the hub to push the version again"
                    )
                return commit
            with contextlib.suppress(RevisionNotFoundError):  # another push of the same version was done with it
                self._branch(branch)
                commit = self._bring(branch, files, f"Version {tag.removeprefix('v-')}", lambda: True)
                assert commit is not None
                note({"commit": commit})
                self._tag(tag, commit)
        raise PreferenceTuningError(f"{self.id}: the branch {branch} or the tag {tag} is removed again and again")

    def _bring(self, branch: str, files: Mapping[str, File], message: str, wanted: Callable[[], bool]) -> str | None:
        """Make a branch hold the files, in one commit on top of what was looked at, and return that commit.

        Files of ours that are no longer part go; files of others stay. None if it is not wanted, or no longer: that is
        asked after the branch was looked at, so whoever is wanted instead comes later, or this commit is refused.
        """
        from huggingface_hub.errors import HfHubHTTPError

        before: Tree | None = None
        for _ in range(MOVES):
            head = self._call(lambda: self._api.repo_info(self.id, revision=branch)).sha
            if not wanted():
                return None
            tree = self._tree(head)
            stale = (self._listed(head) if INDEX in tree else set()) & set(tree) - set(files)
            if not stale and not contents.differences(tree, files):
                return str(head)
            if before is not None and (touched := contents.changed(before, tree, {*files, *stale})):
                raise PreferenceTuningError(
                    f"{self.id}: somebody else changed {', '.join(touched[:3])} in {branch} during the push"
                )
            try:
                return self._commit(branch, files, sorted(stale), head, message)
            except HfHubHTTPError as error:
                if status_of(error) not in CONFLICT:
                    raise
                before = tree
        raise PreferenceTuningError(f"{self.id}: {branch} moved {MOVES} times during the push")

    def _commit(self, branch: str, files: Mapping[str, File], stale: list[str], parent: str, message: str) -> str:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        def commit() -> Any:
            with contextlib.ExitStack() as opened:
                streams = {name: opened.enter_context(file.opened(name)) for name, file in files.items()}
                return self._api.create_commit(
                    self.id,
                    operations=[
                        *(CommitOperationDelete(name) for name in stale),
                        *(CommitOperationAdd(name, stream) for name, stream in streams.items()),
                    ],
                    commit_message=message,
                    revision=branch,
                    parent_commit=parent,
                )

        made = str(self._call(commit).oid)
        if problems := contents.differences(self._tree(made), files):
            raise PreferenceTuningError(f"{self.id}: the hub does not hold what it was sent: {'; '.join(problems[:3])}")
        return made

    def _branch(self, name: str) -> None:
        if name not in self._branches():
            with _unless_there():
                self._call(lambda: self._api.create_branch(self.id, branch=name))

    def _remove(self, branch: str) -> None:
        from huggingface_hub.errors import HfHubHTTPError

        try:
            self._call(lambda: self._api.delete_branch(self.id, branch=branch))
        except HfHubHTTPError:
            if branch in self._branches():
                raise

    def _tag(self, name: str, commit: str) -> None:
        # Without a message: a tag with one is an object of its own, with another name than its commit.
        with _unless_there():
            self._call(lambda: self._api.create_tag(self.id, tag=name, revision=commit))
        if (found := self._tags().get(name)) != commit:
            raise PreferenceTuningError(f"{self.id}: the tag {name} is at {found} and not at {commit}")

    def _listed(self, commit: str) -> set[str]:
        """Return which files are ours at a commit."""
        with tempfile.TemporaryDirectory() as folder:
            path = self._call(
                lambda: self._api.hf_hub_download(
                    self.id, INDEX, revision=commit, local_dir=folder, force_download=True
                )
            )
            return contents.listed(Path(path).read_text(encoding="utf-8"))

    def _tree(self, commit: str) -> Tree:
        from huggingface_hub.hf_api import RepoFile

        entries = self._call(lambda: list(self._api.list_repo_tree(self.id, recursive=True, revision=commit)))
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def _branches(self) -> dict[str, str]:
        return {ref.name: ref.target_commit for ref in self._call(lambda: self._api.list_repo_refs(self.id)).branches}

    def _tags(self) -> dict[str, str]:
        return {ref.name: ref.target_commit for ref in self._call(lambda: self._api.list_repo_refs(self.id)).tags}

    def _call(self, do: Callable[[], Answer]) -> Answer:
        return self._patience.call(do)


@contextlib.contextmanager
def _unless_there() -> Iterator[None]:
    """Take the answer that something is there for success; whether it is what it should be is looked at after."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        if status_of(error) != 409:
            raise
