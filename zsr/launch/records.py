"""A run's records, where its next machine finds them: beside the checkpoints, also when these lie in a bucket.

A copy goes up with every checkpoint, ahead of it. So a run that goes on from that checkpoint elsewhere knows what was
recorded before, delivered or not, and records the rest once.
"""

from __future__ import annotations

from pyarrow.fs import FileSelector, FileSystem, copy_files

from zsr.launch.store import Store

FOLDER = "tracking"


def keep_records(store: Store) -> None:
    """Copy the records of the run in ``store`` to where ``store`` lies; nothing to do on a shared disk.

    Raises:
        OSError: the storage does not answer.
    """
    if store.is_local:
        return
    filesystem, root = FileSystem.from_uri(store.at(FOLDER))
    for file in sorted(store.folder(FOLDER).glob("*.jsonl")):
        copy_files(str(file), f"{root}/{file.name}", destination_filesystem=filesystem, use_threads=False)


def bring_records(store: Store) -> None:
    """Fetch what ``keep_records`` kept, over whatever an earlier attempt left on this machine.

    Raises:
        OSError: the storage does not answer.
    """
    if store.is_local:
        return
    filesystem, root = FileSystem.from_uri(store.at(FOLDER))
    folder = store.folder(FOLDER)
    for info in filesystem.get_file_info(FileSelector(root, allow_not_found=True)):
        if info.base_name.endswith(".jsonl"):
            local = folder / info.base_name
            copy_files(info.path, str(local), source_filesystem=filesystem, use_threads=False)
            # How far another file was delivered says nothing about this one. What is sent again, the server knows.
            local.with_suffix(".delivered").unlink(missing_ok=True)
