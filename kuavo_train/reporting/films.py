"""The films that a run's page opens with: where they lie, whether they are of the policy it reports, and their size."""

from pathlib import Path

from kuavo_train.reading import Json, read_json
from kuavo_train.runs.stored_run import StoredRun

FILMS = Path("report") / "films"
"""Below the folder of a run; evaluation/films.py writes it."""

INLINED_BYTES = 4_000_000
"""What all films may take in the page, as base64."""


def films_of(run: StoredRun) -> Json | None:
    """The content of films.json; None where there is none, or it is of another policy than the run's last one.

    Raises:
        RunFolderError: a damaged file.
    """
    path = run.folder / FILMS / "films.json"
    if not path.is_file() or not run.finished:
        return None
    content = read_json(path, keys=("stage", "films", "left_out"))
    last = run.finished[-1]
    is_of_last = (content["stage"], content.get("checkpoint_hash")) == (last.index, last.record.checkpoint_hash)
    are_there = all((path.parent / film["file"]).is_file() for film in content["films"])
    return content if is_of_last and are_there else None


def inlined(path: Path) -> int:
    """Bytes of a file in the page: base64 makes four of three."""
    return 4 * -(-path.stat().st_size // 3)
