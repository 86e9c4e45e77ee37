"""Records of a study's finished cells, small enough to be kept: all but weights, pictures and pages.

    python -m benchmarks.cell_records pack=outputs/results-study/study.json into=benchmarks/records/default_study
    python -m benchmarks.cell_records unpack=benchmarks/records/default_study into=outputs

A file per cell, the same bytes each time. What lies below the working folder is named from there, so that no record
carries a path of the machine it was made on. Unpacked, a cell counts as finished: the study's own command goes on with
the others. A cell that is there already is left as it is.
"""

import io
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from kuavo_train.command_line import errors_in_one_line, option, parse
from kuavo_train.errors import ConfigError, require
from kuavo_train.runs.stored_run import finished_cells

LEFT_OUT = ("checkpoints", "report", "videos")
KINDS = (".json", ".jsonl", ".yaml")
ENDING = ".tar.xz"


@dataclass(frozen=True)
class Options:
    into: Path = option("a folder: of the records, or of the runs")
    pack: Path | None = option("a study's study.json, whose finished cells are packed", None)
    unpack: Path | None = option("a folder of records", None)

    def __post_init__(self) -> None:
        require(
            (self.pack is None) != (self.unpack is None), "pack, unpack", "be one of the two", [self.pack, self.unpack]
        )
        for key, path in (("pack", self.pack), ("unpack", self.unpack)):
            require(path is None or path.exists(), key, "exist", path)


def main(words: Sequence[str]) -> int:
    return errors_in_one_line(lambda: _run(parse(Options, words, help=__doc__)))


def _run(options: Options) -> int:
    done = _pack(options.pack, options.into) if options.pack else _unpack(options.unpack or Path(), options.into)
    for path in done:
        print(path)
    return 0


def _pack(study: Path, into: Path) -> Iterator[Path]:
    into.mkdir(parents=True, exist_ok=True)
    for run in finished_cells(study):
        yield pack(run, into)


def pack(run: Path, into: Path) -> Path:
    """The records of a run folder as a file in the folder `into`, which it replaces there."""
    target = into / (run.name + ENDING)
    partial = target.with_name(f".{target.name}")
    with tarfile.open(partial, "w:xz") as archive:
        for path in sorted(run.rglob("*")):
            within = path.relative_to(run)
            if path.suffix not in KINDS or set(LEFT_OUT) & set(within.parts):
                continue
            content = path.read_bytes().replace(f"{Path.cwd()}/".encode(), b"")
            entry = tarfile.TarInfo(f"{run.name}/{within.as_posix()}")  # of no owner, at no time
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    partial.rename(target)
    return target


def _unpack(records: Path, into: Path) -> Iterator[Path]:
    found = sorted(records.glob(f"*{ENDING}"))
    require(bool(found), "unpack", f"hold files of the name *{ENDING}", records)
    for record in found:
        run = into / record.name.removesuffix(ENDING)
        if run.exists():
            continue
        try:
            into.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=into, prefix=".unpack-") as partial, tarfile.open(record) as archive:
                archive.extractall(partial, filter="data")
                (Path(partial) / run.name).rename(run)  # whole, or not there
        except (tarfile.TarError, EOFError, OSError) as error:
            raise ConfigError(
                f"{record} must be a record of cell_records, got one that does not unpack: {error}"
            ) from error
        yield run


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
