"""The search's memory: Optuna's journal in the sweep's folder, or a database; and how a journal outlives its machine."""

from __future__ import annotations

from pathlib import Path

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

from zsr.config import ConfigError
from zsr.config.base import without_password
from zsr.launch.store import Store


def open_study_storage(store: Store, database: str | None = None) -> BaseStorage:
    """Optuna's storage: ``database``, or a journal in the sweep's folder (with a bucket: on this machine, see Journal).

    Raises:
        ConfigError: the database cannot be opened.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if not database:
        return JournalStorage(JournalFileBackend(str(Journal(store).path)))
    try:
        # A server that was restarted has dropped its connections; each is tried before it is used.
        return RDBStorage(database, engine_kwargs={"pool_pre_ping": True})
    except ImportError as error:
        raise ConfigError(f"launch.search={database}: {_first_line(error)}; pip install 'zsr[postgres]'") from None
    except Exception as error:  # SQLAlchemy, the driver and Optuna each have their own
        raise ConfigError(
            f"launch.search={database}: {_first_line(error)}; the address is like postgresql://user@host/database, the "
            "password comes from PGPASSWORD or ~/.pgpass"
        ) from None


class Journal:
    """The file that the search writes to, which lies on one machine alone when the sweep's folder is a bucket.

    So it travels inside the search's saved state, which Tune keeps in the sweep's storage: a head that comes in place of a
    lost one finds there what the lost one knew when its state was saved last.

    Args:
        store: the sweep's folder.
    """

    def __init__(self, store: Store) -> None:
        self.path: Path = store.folder("search") / "optuna.journal"

    def read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""

    def bring_back(self, content: bytes) -> None:
        """Lay a saved journal down here, unless the one that is here knows as much. Journals only grow."""
        if len(self.read()) < len(content):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_suffix(".saved")
            temporary.write_bytes(content)
            temporary.replace(self.path)


def close_study(storage: BaseStorage, sweep_id: str) -> optuna.Study:
    """The study, with no trial left running: one that a crash cut off would else count as running for ever."""
    study = optuna.load_study(study_name=sweep_id, storage=storage)
    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return study


def _first_line(error: Exception) -> str:
    text = str(error.__cause__ or error).strip()
    return without_password(text.splitlines()[0][:200] if text else type(error).__name__)
