"""A user's environment tried once before training: what would fail in the rollouts at a stage's end fails now."""

from collections.abc import Iterator, Mapping

from lerobot.utils.constants import OBS_IMAGES

from kuavo_train.data.task import Task
from kuavo_train.errors import ConfigError, Problems
from kuavo_train.evaluation.environment import Environment, evaluation_seeds
from kuavo_train.evaluation.environment_pool import Act, Begin, Failure, Robots, Seen


def check_environment(environment: Environment, task: Task, cameras: Mapping[str, tuple[int, int]]) -> str | None:
    """Begin an episode and take a step, in a process of its own, as a rollout does.

    Args:
        cameras: camera of the policy → (height, width) of its pictures in training.

    Returns:
        What is worth a note: it does not say whether an episode succeeds.

    Raises:
        ConfigError: all that does not fit the task, or why the environment cannot be made, reset or stepped.
    """
    where = f"stage {task.index} ({task.name}): environment {environment.id}"
    problems = Problems()
    action = task.mean_action
    with Robots(environment, places=1, workers=1) as robots:
        seen = robots.advance({0: Begin(evaluation_seeds(1)[0])})[0]
        if isinstance(seen, Failure):
            raise ConfigError(
                f"{where} must begin an episode, got {seen.reason}; give module:id, where importing the module "
                "registers the id with gymnasium, and what it takes as stage.environment_settings"
            )
        problems += (f"{where} {problem}" for problem in _misfits(seen, task, cameras))
        acted = robots.advance({0: Act(action)})[0]
        if isinstance(acted, Failure):
            names = ", ".join(task.action_names)
            problems.append(f"{where} must take actions of {len(action)} dimensions ({names}), got {acted.reason}")
    problems.raise_all()
    assert isinstance(acted, Seen), "a failure is a problem"
    if "is_success" in seen.info or "is_success" in acted.info:
        return None
    return f"{task.name}: environment {environment.id} reports no is_success yet; episodes without it count as failed"


def _misfits(seen: Seen, task: Task, cameras: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    given = {f"{OBS_IMAGES}.{name}": picture.shape for name, picture in seen.pictures.items()}
    missing = [camera.removeprefix(f"{OBS_IMAGES}.") for camera in cameras if camera not in given]
    if missing:
        yield f"must show {', '.join(missing)}, got {', '.join(seen.pictures) or 'no pictures'}"
    for camera, trained in cameras.items():
        fitting = {(*size, 3) for size in (trained, task.camera_size(camera))}  # a dataset's are resized as in training
        if camera in given and given[camera] not in fitting:
            sizes = " or ".join(map(str, sorted(fitting)))
            yield f"must show {camera} as {sizes} (height, width, 3), got {given[camera]}"
    if seen.state.shape != (len(task.state_names),):
        names = ", ".join(task.state_names)
        yield f"must have a state of {len(task.state_names)} dimensions ({names}), got {list(seen.state.shape)}"
