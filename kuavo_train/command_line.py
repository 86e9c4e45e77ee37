"""What every command line does alike: its words, Hydra around it, errors in one line, libraries kept quiet."""

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from kuavo_train.compose import register_task_aliases, resolve
from kuavo_train.config import CONFIG_FOLDER, RunConfig
from kuavo_train.errors import ConfigError, RunError, require
from kuavo_train.interruption import end_on_signals
from kuavo_train.keys import words_for_hydra


def key_values(words: Iterable[str], keys: Sequence[str]) -> dict[str, str]:
    """A command's `key=value` arguments. Raises `ConfigError` for another key, and for one given twice."""
    given: dict[str, str] = {}
    for word in words:
        key, equals, text = word.partition("=")
        require(bool(equals) and key in keys, "arguments", f"be key=value with a key of {', '.join(keys)}", word)
        require(key not in given, key, "be given once", word)
        given[key] = text
    return given


def hydra_entry(function: Callable[[DictConfig, list[str]], int]) -> Callable[[], None]:
    """A command line around `function(composed config, overrides) -> exit status`, with errors in one line."""

    end_on_signals()

    @hydra.main(config_path=str(CONFIG_FOLDER), config_name="train", version_base="1.3")
    def entry(composed: DictConfig) -> None:
        def run() -> int:
            quieten_libraries()
            set_hub(resolve(composed))
            return function(composed, list(HydraConfig.get().overrides.task))

        status = errors_in_one_line(run)
        if status:
            sys.exit(status)

    return lambda: sys.exit(errors_in_one_line(lambda: _run_under_hydra(entry)))


def _run_under_hydra(entry: Callable[[], None]) -> int:
    """Call Hydra with this process's command line; raises `ConfigError` for what Hydra refuses."""
    parser = get_args_parser()
    parser.error = _refuse_arguments  # type: ignore[method-assign]
    arguments = parser.parse_args(sys.argv[1:])
    only_one = [name for name in ("run", "multirun", "cfg", "info", "shell_completion") if getattr(arguments, name)]
    require(len(only_one) < 2, "arguments", "hold one of --cfg, --multirun and the like", only_one)
    register_task_aliases()
    overrides = arguments.overrides
    words = {word: words_for_hydra([word]) for word in overrides}
    sys.argv[1:] = [each for word in sys.argv[1:] for each in words.get(word, [word])]
    try:
        with _hydra_raises():
            entry()
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    return 0


def _refuse_arguments(message: str) -> NoReturn:
    raise ConfigError(f"arguments must be key=value or options of --help, got {message}")


@contextmanager
def _hydra_raises() -> Iterator[None]:
    """Hydra prints what is wrong in its own words, and ends the process, unless this variable is set."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        os.environ.pop("HYDRA_FULL_ERROR") if before is None else os.environ.update(HYDRA_FULL_ERROR=before)


def errors_in_one_line(function: Callable[[], int]) -> int:
    """The exit status of `function`; what the user can correct is told in a line instead of a traceback."""
    try:
        return function()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def quieten_libraries() -> None:
    """A line on stdout for every request to the hub, and for every video file that is opened to be written."""
    for name in ("httpx", "lerobot"):
        logging.getLogger(name).setLevel(logging.WARNING)


def set_hub(config: RunConfig) -> None:
    """Where the hub is asked, and whether. The hub's library reads both once, when it is imported, which is later."""
    if config.hf_endpoint is not None:
        os.environ["HF_ENDPOINT"] = config.hf_endpoint
    if config.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
