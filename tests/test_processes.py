"""`processes=N` in the configuration: what is refused, and how a batch is cut."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from stages import changed, run

from kuavo_train.config import RunConfig
from kuavo_train.errors import ConfigError
from kuavo_train.stage import lineage, setup


@pytest.mark.parametrize(
    ("processes", "batch_size", "depth", "message"),
    [
        (0, 8, 0, r"processes must be at least 1, got 0"),
        (3, 8, 0, r"training.batch_size must be divisible by processes=3, got 8"),
        (2, 4, 4, r"training.batch_size must be so many clips of policy.mem_backprop_depth=4 .* processes=2 .*, got 4"),
    ],
)
def test_a_batch_that_processes_cannot_share_is_refused(
    configs: list[RunConfig], processes: int, batch_size: int, depth: int, message: str
) -> None:
    policy = {"num_mem_tokens": 4, "mem_backprop_depth": depth}
    with pytest.raises(ConfigError, match=message):
        changed(configs[0], processes=processes, training={"batch_size": batch_size}, policy=policy)


def test_a_batch_is_that_of_all_processes_of_the_command_and_of_each_of_an_outer_launcher(
    configs: list[RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(configs[0], training={"batch_size": 32})
    assert (config.batch_of_process, lineage.samples_of_batch(config)) == (32, 32)
    two = replace(config, processes=2)
    assert (two.batch_of_process, lineage.samples_of_batch(two)) == (16, 32)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (config.batch_of_process, lineage.samples_of_batch(config)) == (32, 64)
    assert lineage.samples_of_batch(two) == 32


def test_fewer_gpus_than_processes_are_refused(configs: list[RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "choose_device", lambda _: setup.torch.device("cuda"))
    monkeypatch.setattr(setup.torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="processes must not exceed the 1 GPUs that are there, got 2"):
        setup.accelerator_for(replace(configs[0], processes=2))


def test_a_process_that_is_alone_does_not_train_a_part_of_a_batch(
    small_configs: Callable[..., list[RunConfig]],
) -> None:
    with pytest.raises(ConfigError, match="processes must be the 1 that train together, got 2"):
        run(small_configs(processes=2, training={"batch_size": 8}))
