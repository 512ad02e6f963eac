"""Where rows come from: a file, a directory saved by datasets, a hub dataset, or the address of a file.

``fingerprint_of`` says what is there, ``open_source`` reads it. Each failure is one DataError.
"""

import logging
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from preference_tuning import fingerprint, hub
from preference_tuning.config import Origin, SourceConfig
from preference_tuning.config.place import ENVIRONMENT, SCHEME, address_alone
from preference_tuning.data.pair import Row
from preference_tuning.data.sources import files, json_rows, tabular
from preference_tuning.data.sources.files import Reading, first_line
from preference_tuning.errors import ConfigError, DataError

ROOTS = "PREFERENCE_TUNING_DATA_ROOTS"
"""Environment variable: the folders that local sources must lie in, where a config is not to be trusted with more."""
READERS: dict[str, files.Reader] = {
    ".csv": tabular.csv_rows,
    ".json": json_rows.json_rows,
    ".jsonl": files.json_line_rows,
    ".ndjson": files.json_line_rows,
}
OWN_FILES = ("dataset_dict.json", "dataset_info.json", "state.json")
"""What datasets saves beside the data."""
KNOWN = f"known: {', '.join(files.KINDS)}; all but .parquet also with .gz or .zst behind it"


def fingerprint_of(config: Origin, allow_urls: bool = False) -> str:
    """Return the hash of the source's bytes, or the commit of a hub dataset.

    Raises:
        DataError: there is no such source, or it cannot be read or is not allowed.
        ConfigError: the hub has no such dataset or revision, or a local path has a revision.
    """
    config = _resolved(config)
    path = _located(config, allow_urls)
    if path is None:
        return hub.resolve_commit(config.source, config.revision, "dataset")
    if config.revision:
        what = f"{address_alone(config.source)} is a {'web address' if SCHEME.match(config.source) else 'local path'}"
        raise ConfigError(f"data.revision: {what}, which has no revision; remove it")
    try:
        return fingerprint.of_path(path)
    except OSError as error:
        raise DataError(f"data.source: cannot read {path}: {error.strerror}") from None


def open_source(config: Origin, commit: str | None, max_row_bytes: int, allow_urls: bool = False) -> Reading:
    """Open a source to be read in flat memory; rows above ``max_row_bytes`` come without values and with a flaw.

    Raises:
        DataError: with the name and place of what cannot be read.
    """
    config = _resolved(config)
    path = _located(config, allow_urls)
    if path is None:
        return _from_hub(config, commit, max_row_bytes)
    if path.is_dir():
        return _from_directory(config, path, max_row_bytes)
    if getattr(config, "test_split", "none") not in ("auto", "none"):
        raise DataError(f"data.test_split: {address_alone(config.source)} is a file, which has no splits; remove it")
    name = address_alone(config.source)
    kind, _ = files.kind_of(path)
    try:
        if kind == ".parquet":
            return tabular.ParquetFile(path, name, max_row_bytes)
        return files.File(path, name, READERS[kind], config.records, max_row_bytes)
    except OSError as error:
        raise DataError(f"data.source: cannot read {path}: {error.strerror}") from None


def _resolved(config: Origin) -> Origin:
    """Return the origin with what its environment variable holds, if it names one."""
    if not config.source.startswith(ENVIRONMENT):
        return config
    name = config.source.removeprefix(ENVIRONMENT)
    if not (source := os.environ.get(name, "").strip()):
        raise DataError(f"data.source: the environment variable {name} is not set; it holds the address to read")
    return config.model_copy(update={"source": source})


def _located(config: Origin, allow_urls: bool) -> Path | None:
    """Return the local path of a source, downloading an address; None: a hub id."""
    try:
        if SCHEME.match(config.source):
            return _downloaded(config.source, allow_urls)
        path = Path(config.source).expanduser()
        if not path.exists():
            if hub.REPO_ID.match(config.source) and not files.kind_of(path)[0]:
                return None
            raise DataError(f"data.source: no such file: {path.absolute()} (and it is not a hub id)")
        _inside_roots(path)
        if not path.is_dir():
            _check_file(path)
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, ~ of nobody, a malformed address
        reason = getattr(error, "strerror", None) or first_line(error)
        raise DataError(f"data.source: cannot read {address_alone(config.source)[:200]}: {reason}") from None
    return path


def _check_file(path: Path) -> None:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"data.source: {path} is neither a file nor a directory (a pipe or a device?)")
    if not files.kind_of(path)[0]:
        raise DataError(f"data.source: {path}: unknown kind of file; {KNOWN}")
    if not status.st_size:
        raise DataError(f"data.source: {path} is empty")
    with path.open("rb"):
        pass


def _inside_roots(path: Path) -> None:
    if not (allowed := os.environ.get(ROOTS)):
        return
    roots = [Path(root).resolve() for root in allowed.split(os.pathsep) if root]
    # The files of a directory count too: a link among them is followed when it is read.
    for item in [path, *(path.rglob("*") if path.is_dir() else ())]:
        if not any(item.resolve().is_relative_to(root) for root in roots):
            raise DataError(f"data.source: {item} lies outside the allowed data roots ({ROOTS}: {allowed})")


class Downloads:
    """Files fetched by this process: each address once, deleted when the process ends."""

    def __init__(self) -> None:
        self.folder: tempfile.TemporaryDirectory[str] | None = None
        self.paths: dict[str, Path] = {}

    def get(self, url: str, name: str) -> Path:
        """Return the local copy of an address, with the end of its name, which tells its kind."""
        if url not in self.paths:
            self.folder = self.folder or tempfile.TemporaryDirectory(prefix="preference-tuning-")
            path = Path(self.folder.name) / f"{len(self.paths)}-{name}"
            _fetch(url, path)
            self.paths[url] = path
        return self.paths[url]


DOWNLOADS = Downloads()


def _downloaded(url: str, allow_urls: bool) -> Path:
    shown, scheme = address_alone(url), urlsplit(url).scheme.lower()
    if scheme not in ("http", "https"):
        raise DataError(f"data.source: {shown}: {scheme} addresses are not read; use a path, a hub id or https")
    if not allow_urls:
        raise DataError(f"data.source: {shown} is an address on the web; set data.allow_urls: true to download it")
    if allowed := os.environ.get(ROOTS):
        raise DataError(f"data.source: {shown} lies outside the allowed data roots ({ROOTS}: {allowed})")
    name = Path(urlsplit(url).path).name
    if not files.kind_of(Path(name))[0]:
        raise DataError(f"data.source: {shown}: unknown kind of file; {KNOWN}")
    path = DOWNLOADS.get(url, name[-100:])
    if not path.stat().st_size:
        raise DataError(f"data.source: {shown} is empty")
    return path


def _fetch(url: str, path: Path) -> None:
    import httpx

    # It logs every address whole, with what may be a key in it.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    packed = files.kind_of(path)[1]
    # The bytes are wanted as they lie on the server: a .gz must not be unpacked on the way.
    as_it_lies = {"Accept-Encoding": "identity"}
    try:
        client = httpx.Client(follow_redirects=True, max_redirects=3, timeout=30, headers=as_it_lies)
        with client, client.stream("GET", url) as response:
            if not response.is_success:
                raise DataError(f"data.source: {address_alone(url)}: the server answers {response.status_code}")
            with path.open("wb") as stream:
                for piece in response.iter_raw() if packed else response.iter_bytes():
                    stream.write(piece)
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, ImportError) as error:
        raise DataError(f"data.source: cannot download {address_alone(url)}: {first_line(error)}") from None


class Saved(Reading):
    """An opened dataset of the datasets library: one split, or two of which the second is held out."""

    def __init__(self, name: str, split: Any, test: Any | None, test_split: str | None, max_row_bytes: int) -> None:
        super().__init__(name)
        self.parts = [(split, None)] if test is None else [(split, False), (test, True)]
        self.test_split, self.max_row_bytes = test_split, max_row_bytes
        self.total = sum(len(part) for part, _ in self.parts)

    def rows(self) -> Iterator[Row]:
        """Yield the rows, numbered from 1 in each split."""
        for part, held_out in self.parts:
            number = 0
            try:
                # A format saved with the dataset would give tensors, and hide columns.
                for columns in part.with_format(None).iter(500):
                    for values in zip(*columns.values(), strict=True):
                        number, self.position_in_rows = number + 1, self.position_in_rows + 1
                        row = dict(zip(columns, values, strict=True))
                        yield tabular.checked(number, row, self.max_row_bytes, held_out)
            except Exception as error:  # Arrow's kinds, and those of the features that decode images and sounds
                where = f"after row {number}" if number else ""
                raise self.broken(f"cannot be read: {first_line(error)}", where) from None


def _test_split(config: Origin, names: list[str]) -> str | None:
    """Return the split that the config says is held out; ``names`` are those that the source has."""
    wanted = config.test_split if isinstance(config, SourceConfig) else "none"
    if wanted == "none":
        return None
    if wanted == "auto":
        related = ("test", "validation") if config.split == "train" else (config.split.replace("train", "test"),)
        return next((name for name in related if name in names and name != config.split), None)
    if wanted not in names:
        raise DataError(f"data.test_split: {config.source} has no split {wanted!r}; it has {', '.join(names)}")
    if wanted == config.split:
        raise DataError(f"data.test_split: {config.source}: {wanted!r} is the split that is trained on (data.split)")
    return wanted


def _from_directory(config: Origin, path: Path, max_row_bytes: int) -> Reading:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except IndexError:  # what datasets makes of a table without rows that it saved itself
        raise DataError(f"{config.source}: there are no rows, or a split has none") from None
    except Exception as error:  # every field missing from its JSON files has a kind of its own
        lying = sorted(item.name for item in path.iterdir() if files.kind_of(item)[0] and item.name not in OWN_FILES)
        hint = f"it holds {', '.join(lying[:10])}; name one of them, or list them under data.sources"
        reason = hint if lying else first_line(error)
        raise DataError(f"data.source: {path} is not a directory saved by datasets: {reason}") from None
    splits = loaded if isinstance(loaded, datasets.DatasetDict) else {config.split: loaded}
    if config.split not in splits:
        raise DataError(f"data.split: {path} has no split {config.split!r}; it has {', '.join(splits)}")
    test = _test_split(config, list(splits))
    return Saved(config.source, splits[config.split], splits[test] if test else None, test, max_row_bytes)


def _from_hub(config: Origin, commit: str | None, max_row_bytes: int) -> Reading:
    import datasets

    revision = commit or config.revision
    load: Callable[..., Any] = partial(datasets.load_dataset, config.source, revision=revision)
    try:
        split = load(split=config.split)
        wanted = getattr(config, "test_split", "none") != "none"
        names = datasets.get_dataset_split_names(config.source, revision=revision) if wanted else []
        test = _test_split(config, names)
        return Saved(config.source, split, load(split=test) if test else None, test, max_row_bytes)
    except DataError:
        raise
    except Exception as error:  # datasets raises dozens of kinds here; each ends as one line
        raise DataError(f"data.source: cannot load {config.source!r} from the hub: {first_line(error)}") from None
