"""Write files so that a crash leaves the old or the new file whole; read files with errors that say what to do."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Format", "file_to_write", "made_folder", "read_json", "replace_file"]


def made_folder(path: str | os.PathLike[str]) -> Path:
    """Make a folder where there is none; return its path.

    Args:
        path: The folder.

    Raises:
        OSError: If it cannot be made, for example because there is a file of this name.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        there = "a file has this name" if folder.is_file() else error.strerror
        raise type(error)(f"the folder {str(folder)!r} cannot be made ({there}); pass another folder") from error
    return folder


def file_to_write(path: str | os.PathLike[str]) -> Path:
    """Make the folder of a file that is written later; return the file's path.

    Args:
        path: The file.

    Raises:
        OSError: If its folder cannot be made.
        ValueError: If the path is a folder.
    """
    file = Path(path)
    if file.is_dir():
        raise ValueError(f"{str(file)!r} is a folder, and a file is to be written; add the name of a file")
    made_folder(file.parent)
    return file


def replace_file(path: Path, *data: bytes | memoryview) -> None:
    """Replace a file in one step, so that a crash leaves either the old or the new file, never half of one.

    The new contents are written to a temporary file in the same folder, which is then renamed.

    Args:
        path: The file.
        data: New contents of the file, in pieces.
    """
    # tempfile would make the file readable only for its owner, but these files are to be shared.
    # Cut, because the name itself may be as long as the file system allows.
    draft = path.with_name(f".{path.name[:40]}.{secrets.token_hex(6)}.tmp")
    try:
        with draft.open("xb") as file:
            for some in data:
                file.write(some)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def read_json(path: Path, error: type[ValueError], remedy: str) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        error: Class of the errors.
        remedy: End of the errors: what the user can do.

    Raises:
        ValueError: Of the given class, if the file is missing, cannot be read, or is not JSON.

    Example:
        >>> read_json(Path("nowhere/store.json"), ValueError, "collect the activations first")
        Traceback (most recent call last):
        ...
        ValueError: 'nowhere' has no store.json; collect the activations first
    """
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))  # editors on Windows may put a mark in front
    except (FileNotFoundError, NotADirectoryError) as missing:
        raise error(f"{str(path.parent)!r} has no {path.name}; {remedy}") from missing
    except OSError as unread:
        raise error(f"{str(path)!r} cannot be read ({unread.strerror}); {remedy}") from unread
    except (ValueError, RecursionError) as damaged:
        raise error(f"{str(path)!r} is cut short, or is not JSON ({damaged}); {remedy}") from damaged


class Format(NamedTuple):
    """A format of JSON files, with the entries by which a file is recognised.

    Example:
        >>> import tempfile
        >>> names = Format("names", {"captum_xnn": "names"}, ("version", 1), ("layer",), ValueError, "export anew")
        >>> path = Path(tempfile.mkdtemp(), "names.json")
        >>> _ = path.write_text('{"captum_xnn": "names", "version": 1, "layer": "fc"}')
        >>> names.read(path)["layer"]
        'fc'
    """

    describes: str
    """What files of this format describe, in the plural."""
    marks: Mapping[str, Any]
    """Entries with the same value in every file."""
    version: tuple[str, int]
    """Name and value of the entry that holds the version."""
    entries: Sequence[str]
    """Other entries that every file has."""
    error: type[ValueError]
    """Class of the errors."""
    remedy: str
    """End of the errors: what the user can do."""

    def read(self, path: Path) -> dict[str, Any]:
        """Read a file of this format, with all its entries.

        Args:
            path: The file.

        Raises:
            ValueError: Of the format's class, if the file is missing, damaged, or of another format or version.
        """
        found = read_json(path, self.error, self.remedy)
        own = isinstance(found, dict) and all(found.get(name) == value for name, value in self.marks.items())
        name, version = self.version
        if not own or name not in found:
            entries = " and ".join(f"{mark!r}: {value!r}" for mark, value in {**self.marks, name: version}.items())
            raise self.error(
                f"{str(path)!r} is JSON, but does not describe {self.describes}, which have {entries}; {self.remedy}"
            )
        if type(found[name]) is not int or found[name] != version:
            raise self.error(
                f"{str(path)!r} has {name} {found[name]!r} instead of {version}, as another version of captum_xnn "
                f"wrote it; use that version. Otherwise {self.remedy}"
            )
        if missing := [entry for entry in self.entries if entry not in found]:
            raise self.error(f"{str(path)!r} lacks {', '.join(missing)}; {self.remedy}")
        return dict(found)
