"""What a run was started with beside its recipe: the model and the text behind the names in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mobiq_lightning.errors import FileError, RunFolderError
from mobiq_lightning.files import write_json
from mobiq_lightning.input_files import read_mapping
from mobiq_lightning.runs.file_names import IDENTITY
from mobiq_lightning.runs.run_folder import RunFolder


def check_identity(
    folder: Path, identity: dict[str, str], former: Callable[[], dict[str, str]] = dict[str, str]
) -> None:
    """Compares model and data with those that the run in `folder` was started with.

    Args:
        folder: The run folder.
        identity: Hashes of model and data.
        former: What earlier versions took for some of them, which runs that they started have.

    Raises:
        RunFolderError: Naming what has changed.
    """
    path = folder / IDENTITY
    if not path.is_file() or not RunFolder(folder).finished_work:
        write_json(path, identity)
        return
    try:
        stored = read_mapping(path)
        if missing := [key for key in identity if not isinstance(stored.get(key), str)]:
            raise FileError(f"{path} does not say of {', '.join(missing)}")
    except FileError as error:
        raise RunFolderError(
            f"{error}, so whether model and text are those of the run cannot be told. Put a copy of it back; or, if you know "
            "that they are, remove it: the run goes on"
        ) from error
    changed = [f"{k}: {stored.get(k)} then, {v} now" for k, v in identity.items() if stored.get(k) != v]
    if changed and all(stored.get(k) == former().get(k, v) for k, v in identity.items()):
        return
    if changed:
        raise RunFolderError(
            f"{folder} holds a run of this recipe on something else:\n  " + "\n  ".join(changed) + "\n"
            "Files behind model.pretrained or data.source have changed. Give another trainer.default_root_dir, or "
            "--overwrite"
        )
