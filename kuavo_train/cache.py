"""Caches of images: filled ahead of a stage, on as many machines as there are, and removed when nothing uses them.

    python -m kuavo_train.cache task=tasks/task2_weighing              # all that the stage will read
    python -m kuavo_train.cache task=tasks/task2_weighing shard=2/8    # every eighth episode of it, from the second on
    python -m kuavo_train.cache prune=list                             # what nothing uses, and how many bytes it takes
    python -m kuavo_train.cache prune=true                             # the same, and remove it

Give the words that the run will be given: they decide what is computed. A shard writes a part of its own below
data.cache_root, which may be copied from one machine to another. A stage reads all parts that are there and computes
what is missing. What is there already is not computed again, so the same command goes on where it was cut off.

Pruning takes caches of datasets that are gone or changed. It also takes those of encoders that neither a run below
`outputs` nor a stage of the configuration reads. Nothing else below data.cache_root is touched.
"""

import sys
from collections.abc import Sequence

from omegaconf import DictConfig

from kuavo_train.command_line import hydra_entry
from kuavo_train.compose import check_overrides, compose_run, compose_stage_of_run
from kuavo_train.config import RunConfig
from kuavo_train.errors import Problems, one_of, require

OWN = ("shard", "prune")
"""Keys beside those of the configuration."""


def main(composed: DictConfig, overrides: list[str], *, shard: str | None = None, prune: str = "false") -> int:
    one_of("prune", prune, ("false", "list", "true"))
    if prune != "false":
        require(shard is None, "shard", "be left out where caches are removed", shard)
        return _prune(overrides, only_list=prune == "list")
    return _fill(composed, overrides, shard or "1/1")


def _fill(composed: DictConfig, overrides: list[str], shard_text: str) -> int:
    from kuavo_train.data.images.part import WHOLE, Shard

    shard = Shard.parse(shard_text)
    config, configs = compose_stage_of_run(composed, overrides)
    require(config.processes == 1, "processes", "be 1; give each process a shard=i/n of its own", config.processes)
    # The heavy imports come after the configuration has been found good.
    from kuavo_train.stage.caches import plan_caches
    from kuavo_train.stage.setup import record_missing_data

    record_missing_data(config, [each.stage for each in configs])
    images = plan_caches(config, configs, shard)
    Problems(images.problems).raise_all()
    require(bool(images.caches), "data.frame_cache", "be true for anything to be kept", config.data.frame_cache)
    which = "" if shard == WHOLE else f", shard {shard}"
    print(f"stage {config.stage.index} ({config.stage.name}){which}\n{images.description}", flush=True)
    images.fill()
    print("all of it is there")
    return 0


def _prune(overrides: list[str], *, only_list: bool) -> int:
    check_overrides(overrides)
    configs = compose_run(overrides)
    from kuavo_train.data.images.plan import size_text
    from kuavo_train.data.images.stored import leftovers, remove
    from kuavo_train.stage.caches import has_dataset, unused_caches

    present = [config for config in configs if has_dataset(config)]
    folder = configs[0].data.cache_folder
    require(bool(present), "data.root", "hold a dataset, or all caches would seem unused", configs[0].data.root)
    if len(present) < len(configs):
        present = _of_tasks(overrides, present)
    unused, broken = unused_caches(present), list(leftovers(folder))
    for each in unused:
        print(f"  {each.cache.path.relative_to(folder)}: {size_text(each.cache.bytes)}; {each.why}")
    for path in broken:
        print(f"  {path.relative_to(folder)}: half made or half removed when its process was killed")
    total = size_text(sum(each.cache.bytes for each in unused))
    if not unused and not broken:
        print(f"nothing below {folder} is unused")
    elif only_list:
        print(f"unused below {folder}: {total}; prune=true removes them")
    else:
        print(f"removing {total} below {folder}", flush=True)
        for path in [*(each.cache.path for each in unused), *broken]:
            remove(path)
    return 0


def _of_tasks(overrides: list[str], configs: Sequence[RunConfig]) -> list[RunConfig]:
    """The run that learns these tasks alone, so that a dataset that is gone hinders nothing."""
    names = ",".join(config.stage.name for config in configs)
    return compose_run([*(word for word in overrides if not word.lstrip("+").startswith("learn=")), f"learn=[{names}]"])


def command() -> None:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        return
    given = [word.partition("=") for word in sys.argv if word.startswith(tuple(f"{key}=" for key in OWN))]
    own = {key: value for key, _, value in given}
    sys.argv = [word for word in sys.argv if word.partition("=")[0] not in OWN]  # Hydra would refuse them
    hydra_entry(lambda composed, overrides: main(composed, overrides, **own))()


if __name__ == "__main__":
    command()
