"""The caches that a stage reads, planned without training it: to fill them ahead, and to know which nothing uses."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lerobot.datasets.utils import INFO_PATH

from kuavo_train.compose import stages_to_run
from kuavo_train.config import RunConfig
from kuavo_train.data.images.part import WHOLE, Shard
from kuavo_train.data.images.plan import Images
from kuavo_train.data.images.stored import StoredCache, stored_caches
from kuavo_train.data.recordings.content_hash import content_hash
from kuavo_train.errors import require
from kuavo_train.runs.run_folder import StageFolder, stage_folder
from kuavo_train.stage.findings import Findings
from kuavo_train.stage.lineage import Start, result_before, stages_before
from kuavo_train.stage.opened_data import open_data
from kuavo_train.stage.setup import Opening, accelerator_for
from kuavo_train.training.frozen_encoder import ENCODER_GROUPS


def plan_caches(config: RunConfig, configs: Sequence[RunConfig], shard: Shard = WHOLE) -> Images:
    """The images of a stage as it will plan them. What concerns training alone is not looked at.

    Args:
        configs: of all tasks, in the order of learning.

    Raises:
        ConfigError: data or policy cannot be opened, or the encoder's weights are still to be learnt.
    """
    # Ahead of a stage, nothing is left for its steps.
    config = replace(config, data=replace(config.data, feature_fill="before"))
    findings, curriculum = Findings(), [each.stage for each in configs]
    start = Start() if encoder_is_the_bases(config, configs) else Start(before=result_before(config, curriculum))
    opening = Opening(config, curriculum, start, accelerator_for(config), findings)
    strategy, data = findings.need(opening.strategy()), open_data(config, curriculum, findings)
    findings.raise_problems()
    built = opening.policy(data)
    data = opening.with_validated(data, built)
    order = opening.order(data, built, strategy, findings.need(opening.kept(data)))
    return opening.images(data, built, order, shard)


def encoder_is_the_bases(config: RunConfig, configs: Sequence[RunConfig]) -> bool:
    """Whether no stage before trains the image encoder, so that it can be had before they are finished."""
    earlier = stages_before(config, [each.stage for each in configs])
    trainings = [each.training for each in configs[: len(earlier)]]
    frozen = [each.freeze if place else each.freeze_first_stage for place, each in enumerate(trainings)]
    return all(set(ENCODER_GROUPS) <= set(groups) for groups in frozen)


@dataclass(frozen=True)
class Unused:
    """A cache that nothing needs, and why."""

    cache: StoredCache
    why: str


def unused_caches(configs: Sequence[RunConfig]) -> list[Unused]:
    """Those below `data.cache_root` of datasets that are gone or changed, and of encoders that neither a run below
    `outputs` nor a stage of `configs` reads.

    Args:
        configs: of the tasks whose datasets are there.

    Raises:
        ConfigError: a stage is running, or one of `configs` cannot be opened.
    """
    config = configs[0]
    stages = [StageFolder(path.parent) for path in sorted(Path(config.outputs).glob("*/stage*_*/stage.json"))]
    running = [str(stage.path) for stage in stages if stage.status == "running"]
    require(not running, "prune", "wait until no stage is running, which may read a cache", ", ".join(running))
    stored = stored_caches(config.data.cache_folder)
    present = _present_hashes(configs, stored)
    of_present = [cache for cache in stored if cache.dataset in present]
    read = {name for stage in stages for name in stage.about.get("caches", ())}
    if any(cache.encoded and cache.name not in read for cache in of_present):  # else there is nothing to find out
        read |= set(_planned(configs))
    gone = [Unused(cache, _why_gone(cache)) for cache in stored if cache.dataset not in present]
    idle = "no run below outputs and no stage of this configuration has the encoder"
    return gone + [Unused(cache, idle) for cache in of_present if cache.encoded and cache.name not in read]


def has_dataset(config: RunConfig) -> bool:
    return (Path(config.stage.root) / INFO_PATH).is_file()


def _present_hashes(configs: Sequence[RunConfig], stored: Sequence[StoredCache]) -> set[str]:
    """Of the datasets of the configuration, of others below `data.root`, and where those of caches were."""
    roots = {Path(config.stage.root) for config in configs}
    roots |= {path.parents[1] for path in Path(configs[0].data.root).glob(f"*/{INFO_PATH}")}
    roots |= {cache.root for cache in stored if cache.root is not None}
    resolved = {root.resolve() for root in roots if (root / INFO_PATH).is_file()}
    return {content_hash(root) for root in resolved}


def _planned(configs: Sequence[RunConfig]) -> Iterator[str]:
    """Names of the caches that the stages of a run read. One whose encoder is still to be learnt has none."""
    for config in stages_to_run(configs):
        curriculum = [each.stage for each in configs]
        earlier = stages_before(config, curriculum)
        finished = not earlier or stage_folder(config, earlier[-1]).status == "finished"
        if finished or encoder_is_the_bases(config, configs):
            yield from (cache.name for cache in plan_caches(config, configs).caches)


def _why_gone(cache: StoredCache) -> str:
    if cache.root is None:
        return "its dataset is gone or changed"
    return f"its dataset {cache.root} is {'changed' if (cache.root / INFO_PATH).is_file() else 'gone'}"
