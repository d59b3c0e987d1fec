"""When the latest complete backup was made: a file beside the catalogue, which a backup cannot
write to while the hub runs."""

import json
from datetime import datetime
from pathlib import Path

from hub.blobs import durable
from hub.settings import Settings

NAME = "last_backup.json"


def last_backup(settings: Settings) -> datetime | None:
    """None when there is none, or when nobody can tell."""
    try:
        document = json.loads((settings.data_dir / NAME).read_text())
        return datetime.fromisoformat(document["at"])
    except (FileNotFoundError, ValueError, KeyError):
        return None


def remember(settings: Settings, at: datetime, folder: Path) -> None:
    """Note that a backup is complete."""
    path = settings.data_dir / NAME
    temporary = path.with_name(f"{NAME}.tmp")
    temporary.unlink(missing_ok=True)
    descriptor = durable.create_exclusive(temporary)
    with open(descriptor, "w", encoding="utf-8") as file:
        json.dump({"at": at.isoformat(), "folder": str(folder)}, file)
        file.flush()
        durable.sync_file(file.fileno())
    temporary.replace(path)
    durable.sync_folder(path.parent)
