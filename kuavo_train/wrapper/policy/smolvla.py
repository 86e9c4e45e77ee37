"""A trained policy as a robot process uses it: pictures, joint positions and an instruction in, joint commands out.

    policy = SmolVLAPolicyWrapper.from_pretrained("outputs/robot/stage4_sorting/checkpoints/best", seed=0)
    policy.reset()                                      # an episode begins
    action = policy.select_action(                      # at the dataset's rate, 10 Hz
        {
            "observation.images.head_cam_h": picture,   # [480, 640, 3] uint8, or [3, 480, 640] float in [0, 1]
            "observation.images.wrist_cam_l": …,
            "observation.images.wrist_cam_r": …,
            "observation.state": joints,                # [16] rad, claws in [0, 1]
            "task": "Pick up the package from …",       # or the task's name
        }
    )                                                   # [16] rad; the sorting task has its 20 dimensions

The wrapper needs nothing but the checkpoint's folder, wherever it was copied, and no network. With a leading batch
dimension on every observation and a list of instructions it drives several robots, each with its own memory. It takes
every policy that kuavo_train trains: of ACT and Diffusion, which read no instruction, `task` decides the dimensions.

Threads: one call at a time; a lock holds the others back. The memory is that of the robots in the batch, in their
order, so processes or threads that drive different robots each need a wrapper of their own.
"""

import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_STATE

from kuavo_train.data.batch import Prepared
from kuavo_train.data.checkpoint_tasks import KnownTask, KnownTasks
from kuavo_train.data.policy_traits import PolicyTraits
from kuavo_train.wrapper.policy.episode import RobotEpisode
from kuavo_train.wrapper.policy.loading import folder_of, open_policy, stored_config
from kuavo_train.wrapper.policy.observation import array_of, in_policy_order, pictures_of, states_of
from kuavo_train.wrapper.policy.robot_by_robot import RobotByRobot
from kuavo_train.wrapper.policy.robot_io import Actions, Observation
from lerobot_policy_smolvla_memory import SmolVLAMemoryConfig, SmolVLAMemoryPolicy
from lerobot_policy_smolvla_memory.graphed_query import use_cuda_graphs
from lerobot_policy_smolvla_memory.memory import MemoryState

LIKE_A_TRAINED_ONE = 0.6
"""Instructions whose words match one the policy was trained with to at least this ratio are taken without a warning."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Group = tuple[int, int] | None
"""Queries that are computed as one batch: (delay, steps left of the plan) with a hand-over, None without."""

READ_INSTEAD = "instruction"
"""Key of an observation: what the policy reads in place of the task's instruction; `task` still decides the rest."""


@dataclass(frozen=True)
class Look:
    """What one robot sees, checked: what `SmolVLAPolicyWrapper.look` returns.

    Attributes:
        rows: what the policy's preprocessor takes, of F frames.
    """

    task: KnownTask
    instruction: str
    rows: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Query:
    """A look of a robot in an episode.

    Attributes:
        episode: with the steps that were carried out up to this look (`RobotEpisode.moved`).
        executed: how many of them since the last look; where its plan is at now.
        delay: steps of the last plan that are carried out before this query is answered: the new plan begins with
            them, and stays close to what follows (real-time chunking, arXiv 2506.07339). None plans freely.
    """

    look: Look
    episode: RobotEpisode
    executed: int = 0
    delay: int | None = None


@dataclass(frozen=True)
class Plan:
    """The answer to a query: T actions [T, A] in robot units from the step of the look on, and the episode after it."""

    actions: np.ndarray
    episode: RobotEpisode


class SmolVLAPolicyWrapper:
    """SmolVLA, with or without memory, or another LeRobot policy, between robot units and robot units.

    Attributes:
        known: the tasks the policy has learnt, with their instructions and dimensions.
        cameras: what every observation must hold, camera → (height, width).
        frames: F, consecutive frames that the policy looks at.
    """

    def __init__(
        self,
        policy: PreTrainedPolicy,
        processors: tuple[PolicyProcessorPipeline, PolicyProcessorPipeline],
        known: KnownTasks,
        *,
        seed: int | None = None,
    ):
        """
        Args:
            processors: LeRobot's pre- and post-processor, as stored with the policy.
            seed: of what the policy draws at random, as the noise that actions are denoised from; None draws one.
        """
        policy.eval()
        self._policy: SmolVLAMemoryPolicy | RobotByRobot = (
            policy if isinstance(policy, SmolVLAMemoryPolicy) else RobotByRobot(policy)
        )
        self._traits = PolicyTraits.of(self._policy.config)
        self.frames = self._policy.frames if isinstance(self._policy, RobotByRobot) else 1
        (self._preprocess, self._postprocess), self.known = processors, known
        self.cameras = {camera: tuple(f.shape[1:]) for camera, f in policy.config.image_features.items()}
        self._seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
        self._lock = threading.Lock()
        self.reset()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str | None = None,
        dtype: str | None = None,
        cuda_graphs: bool = False,
        seed: int | None = None,
    ) -> "SmolVLAPolicyWrapper":
        """
        Args:
            path: a run (for the best of its last stage), a stage, a checkpoint (`checkpoints/best`), its
                `pretrained_model`, or a hub id.
            device: cpu, cuda or mps; None takes a GPU where there is one.
            dtype: of SmolVLA's vision-language model and action expert, float32 or bfloat16; None leaves them as they
                are stored. bfloat16 takes half the room and, where the processor has it, time; what it changes of the
                actions is in docs/experiments/speed.md. Memory, state, actions and their denoising stay float32.
            cuda_graphs: compute each query of SmolVLA as one CUDA graph, with the same answers: see
                docs/explanation/performance.md. A plan then cannot go on from the one before (`hands_over`).

        Raises:
            FileNotFoundError: nothing there, or a checkpoint that kuavo_train has not written.
            ValueError: weights that do not fit the policy, a dtype that it does not compute in, or graphs where it
                has none.
        """
        if dtype not in (None, *DTYPES):
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, or None, got {dtype!r}")
        folder = folder_of(path)
        known = KnownTasks.load(folder)
        config = stored_config(folder, device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if isinstance(config, SmolVLAConfig) and not isinstance(config, SmolVLAMemoryConfig):
            config = SmolVLAMemoryConfig.from_smolvla(config, num_mem_tokens=0)
        if dtype == "bfloat16" and not isinstance(config, SmolVLAConfig):
            raise ValueError(f"dtype of policy {config.type} must be float32, got {dtype}")
        if cuda_graphs and not isinstance(config, SmolVLAConfig):
            raise ValueError(f"cuda_graphs of policy {config.type} must be false, got true")
        policy, processors = open_policy(folder, config)
        if dtype is not None and isinstance(policy, SmolVLAMemoryPolicy):
            policy.compute_in(DTYPES[dtype])
        if cuda_graphs:
            use_cuda_graphs(policy)
        return cls(policy, processors, known, seed=seed)

    @property
    def n_action_steps(self) -> int:
        """Actions carried out per query of the policy. Setting it ends all episodes, as `reset` does.

        A policy with memory was trained to be queried, and so to remember, as often as its checkpoint says.
        """
        return self._policy.config.n_action_steps

    @n_action_steps.setter
    def n_action_steps(self, steps: int) -> None:
        longest = planned_steps(self._policy.config)
        if not 1 <= steps <= longest:
            raise ValueError(f"n_action_steps must be in [1, {longest}], got {steps}")
        self._policy.config.n_action_steps = steps
        self.reset()

    @property
    def sampling_temperature(self) -> float:
        """Standard deviation of the noise that SmolVLA's actions are denoised from, in [0, 1]; with 0, no noise."""
        return self._policy.config.sampling_temperature if self._traits.has_temperature else 1.0

    @sampling_temperature.setter
    def sampling_temperature(self, temperature: float) -> None:
        if not 0 <= temperature <= 1:
            raise ValueError(f"sampling_temperature must be in [0, 1], got {temperature}")
        if temperature != self.sampling_temperature:
            if not self._traits.has_temperature:
                raise ValueError(f"sampling_temperature of {self._policy.config.type} must be 1, got {temperature}")
            self._policy.config.sampling_temperature = temperature

    @property
    def chunk_size(self) -> int:
        """T, actions that are planned from the frame of a look on."""
        return planned_steps(self._policy.config)

    @property
    def policy_type(self) -> str:
        """LeRobot's name of it."""
        return self._policy.config.type

    @property
    def has_memory(self) -> bool:
        return self._traits.has_memory

    def reset(self, indices: Sequence[int] | None = None, *, seeds: Sequence[int] | None = None) -> None:
        """An episode begins, for all robots of the batch or for some: nothing remembered, nothing planned.

        After `reset()` the next batch may have another size. With a seed, the actions of an episode are a function
        of its observations alone.

        Args:
            seeds: an episode's own part of the seed of its noise, for each of those that begin; by default a robot's
                place in the batch.

        Raises:
            ValueError: an index outside the batch, or another number of seeds than of those that begin.
        """
        with self._lock:
            if indices is None:
                self._policy.reset()
                self._instructions: list[str] = []
                self._calls = [0] * len(seeds or ())  # of each robot, since its reset; empty: any batch may come
                self._episodes = list(seeds or ())
                return
            if seeds is not None and len(seeds) != len(indices):
                raise ValueError(f"seeds must be one for each of the {len(indices)} that begin, got {len(seeds)}")
            self._reset(list(indices))
            for index, seed in zip(indices, seeds or indices, strict=True):
                self._episodes[index] = seed

    def forget(self) -> None:
        """The memory begins anew for all robots of the batch; what is planned is still carried out."""
        with self._lock:
            self._policy.forget()

    def memory_norms(self) -> np.ndarray | None:
        """Norms [B, vectors] of what each robot remembers now; None without memory, and before the first query."""
        memory = self._policy.get_memory()
        return None if memory is None else memory.vectors.norm(dim=-1).cpu().numpy()

    def _reset(self, indices: list[int]) -> None:
        size = len(self._calls)
        for index in indices:
            if not 0 <= index < size:
                raise ValueError(f"indices must be in [0, {size}), the size of the last batch, got {index}")
        if indices:
            self._policy.reset(indices)
        for index in indices:
            self._calls[index] = 0

    def select_action(self, observation: Observation) -> Actions:
        """The next action, from a new query of the policy every `n_action_steps` calls.

        Another instruction than at the last call begins a new task: what was planned and remembered of the old one
        is dropped, for that robot.

        Args:
            observation: of every camera [H, W, 3] uint8 or [3, H, W] float in [0, 1], `observation.state` [S], and
                `task`, an instruction or the name of a learnt task, which stands for the first of its instructions.
                For B robots, all with a leading B, and B tasks or one for all. S are the dimensions of the task's
                dataset. An `instruction`, where there is one, is read in place of the task's by all robots; an empty
                one is no input to the policy.

        Returns:
            [A] float32 in robot units, A the dimensions of the task. For B robots [B, A], or a list of B such arrays
            where their tasks have different dimensions.

        Raises:
            ValueError: a camera or the state missing, of another shape or type or not finite, an instruction too
                long for the policy, or another batch size than since the last reset.
        """
        with self._lock:
            return self._query(self._policy.select_action, observation)

    def due(self) -> list[int]:
        """Robots of the batch, as of the last call, whose next `select_action` looks at its pictures and its state."""
        with self._lock:
            return self._policy.due()

    def predict_chunk(self, observation: Observation) -> Actions:
        """All that the policy plans in one query: T actions, of which `select_action` carries out `n_action_steps`.

        Every call is a query, and the memory advances by it. An episode is walked with this or with
        `select_action`, not with both.

        Args and errors as `select_action`.

        Returns:
            [T, A] float32 in robot units; for B robots [B, T, A], or a list where their tasks differ in dimensions.
        """
        with self._lock:
            return self._query(self._policy.predict_action_chunk, observation)

    # -------------------------------------------------------- many robots, each at its own pace, without hidden state

    @property
    def hands_over(self) -> bool:
        """Whether a plan can go on from the one before (`Query.delay`)."""
        return isinstance(self._policy, SmolVLAMemoryPolicy) and self._policy.graphed is None

    def look(self, observation: Observation) -> Look:
        """Check what one robot sees, before it is planned for together with others'.

        Args:
            observation: as for `select_action`, of one robot. For a policy that looks at F frames, pictures and state
                with a leading F, the oldest first; a single frame stands for all.

        Raises:
            ValueError: as `select_action`, and a task that is not like any that the policy has learnt.
        """
        states = states_of(observation)
        batched = array_of(observation[OBS_STATE]).ndim == 2
        if batched and len(states) != self.frames:
            raise ValueError(f"{OBS_STATE} must be of shape [S], or [{self.frames}, S], got {list(states.shape)}")
        task = observation.get("task")
        if not isinstance(task, str) or not task.strip():
            raise ValueError(f"task must be an instruction, or a task's name, got {task!r}")
        instruction = self._instruction_named(task)
        closest = self.known.closest(instruction)
        if closest.ratio < LIKE_A_TRAINED_ONE:
            names = ", ".join(task.name for task in self.known.tasks)
            raise ValueError(f"task must be one of {names}, or an instruction like one of theirs, got {task!r}")
        rows = self._rows(observation, states, [closest.task] * len(states), batched=batched)
        if len(states) < self.frames:
            rows = {key: value.repeat(self.frames, *[1] * (value.dim() - 1)) for key, value in rows.items()}
        self._check_fits(instruction)
        return Look(closest.task, instruction, rows)

    def plan(self, queries: Sequence[Query]) -> list[Plan]:
        """Answer queries of several robots, in their order; those alike as one batch.

        A robot's answer is a function of its own query, up to the rounding of batched arithmetic. Nothing is kept.
        """
        groups: dict[Group, list[int]] = {}
        for number, query in enumerate(queries):
            groups.setdefault(_group_of(query), []).append(number)
        answers: dict[int, Plan] = {}
        with self._lock:
            for group, numbers in groups.items():
                plans = self._plan_alike([queries[number] for number in numbers], group)
                answers |= dict(zip(numbers, plans, strict=True))
        return [answers[number] for number in range(len(queries))]

    def _plan_alike(self, queries: Sequence[Query], group: Group) -> list[Plan]:
        looks, episodes = [query.look for query in queries], [query.episode for query in queries]
        # One look stays as it is laid out in memory, which decides how it is rounded.
        rows = looks[0].rows if len(looks) == 1 else _joined([look.rows for look in looks])
        ready = self._preprocess({**rows, "task": [look.instruction for look in looks for _ in range(self.frames)]})
        keys = [[self._seed, episode.seed, episode.steps] for episode in episodes]
        draws = self._policy.draw_noise([np.random.default_rng(key) for key in keys])
        handover: dict[str, Any] = {}
        if group is not None:
            delay, left = group
            plans = [query.episode.plan for query in queries]
            left_over = torch.stack([plan[len(plan) - left :] for plan in plans if plan is not None])
            handover = {"prev_chunk_left_over": left_over, "inference_delay": delay, "execution_horizon": left}
        sample: Callable[..., tuple[torch.Tensor, MemoryState | None]] = self._policy.sample_actions_with
        actions, memory = sample(ready, self._joined_memory(episodes), draws, **handover)
        every = self.n_action_steps
        after = [
            episode.looked(actions[row], memory and memory.select([row]), every=every)
            for row, episode in enumerate(episodes)
        ]
        robot_units = self._postprocess(actions)
        chosen = [row[..., self._columns(look.task)].numpy() for row, look in zip(robot_units, looks, strict=True)]
        return [Plan(each.astype(np.float32), episode) for each, episode in zip(chosen, after, strict=True)]

    def _joined_memory(self, episodes: Sequence[RobotEpisode]) -> MemoryState | None:
        if not isinstance(self._policy, SmolVLAMemoryPolicy) or self._policy.model.memory is None:
            return None
        initial = self._policy.model.memory.initial(1).detach()
        return MemoryState.joined([episode.memory or initial for episode in episodes])

    # ------------------------------------------------------------------------------------- one batch, step by step

    def _query(self, policy: Callable[..., torch.Tensor], observation: Observation) -> Actions:
        """What `policy`, one of the policy's own methods, answers, in robot units and the dimensions of each task."""
        ready, columns, batched = self._prepare(observation)
        actions = self._postprocess(policy(ready, self._randomness()))
        self._calls = [calls + 1 for calls in self._calls]
        chosen = [row[..., own].numpy().astype(np.float32) for row, own in zip(actions, columns, strict=True)]
        if not batched:
            return chosen[0]
        return np.stack(chosen) if len({action.shape for action in chosen}) == 1 else chosen

    def _prepare(self, observation: Observation) -> tuple[Prepared, list[list[int]], bool]:
        """What the policy reads, the columns of its actions that each robot's task has, and whether it was a batch."""
        states = states_of(observation)
        batched, size = array_of(observation[OBS_STATE]).ndim == 2, len(states)
        instructions = self._instructions_of(observation, size)
        tasks = [self._task_like(instruction) for instruction in instructions]
        read = observation.get(READ_INSTEAD)
        texts = instructions if read is None else [read] * size
        ready = self._preprocess({**self._rows(observation, states, tasks, batched=batched), "task": texts})
        if OBS_LANGUAGE_ATTENTION_MASK in ready:
            self._check_length(ready[OBS_LANGUAGE_ATTENTION_MASK], texts)
        self._begin_new_tasks(instructions)
        return ready, [self._columns(task) for task in tasks], batched

    def _rows(
        self, observation: Observation, states: np.ndarray, tasks: Sequence[KnownTask], *, batched: bool
    ) -> dict[str, torch.Tensor]:
        """What the preprocessor takes beside the texts: cameras, state, and which dimensions a row's task lacks."""
        size = len(states)
        sizes = {"trained": self.cameras, "recorded": self.known.camera_sizes}
        rows = {camera: pictures_of(observation, camera, size, **sizes, batched=batched) for camera in self.cameras}
        rows[OBS_STATE] = torch.stack(
            [in_policy_order(state, task, self.known) for state, task in zip(states, tasks, strict=True)]
        )
        absent = torch.ones(size, len(self.known.action_names), dtype=torch.bool)
        for row, task in enumerate(tasks):
            absent[row, self._columns(task)] = False
        return {**rows, "action_dim_is_pad": absent}

    def _columns(self, task: KnownTask) -> list[int]:
        """Places of a task's own dimensions among the policy's actions."""
        return [self.known.action_names.index(name) for name in task.action_names]

    # ------------------------------------------------------------------------------------- what an observation holds

    def _instructions_of(self, observation: Observation, size: int) -> list[str]:
        given = observation.get("task")
        given = [given] * size if isinstance(given, str) else given
        if not isinstance(given, list | tuple) or not all(isinstance(each, str) and each.strip() for each in given):
            raise ValueError(f"task must be an instruction, or a list of them, got {observation.get('task')!r}")
        if len(given) != size:
            raise ValueError(f"task must be one instruction, or {size} for as many states, got {len(given)}")
        if self._calls and len(self._calls) != size:
            raise ValueError(
                f"the batch must stay at {len(self._calls)} robots until reset(), got {size}; each has its own memory"
            )
        return [self._instruction_named(each) for each in given]

    def _instruction_named(self, given: str) -> str:
        by_name = {task.name: task.instruction for task in self.known.tasks}
        return by_name.get(given, " ".join(given.split()))

    def _task_like(self, instruction: str) -> KnownTask:
        """The learnt task one of whose instructions is closest, which decides the dimensions."""
        closest = self.known.closest(instruction)
        if closest.ratio < LIKE_A_TRAINED_ONE and instruction not in self._instructions:
            warnings.warn(
                f"the policy was never trained with an instruction like {instruction!r}: what it will do is unknown. "
                f"Its dimensions are taken to be those of {closest.task.name}, the closest ({closest.instruction!r})",
                stacklevel=4,
            )
        return closest.task

    def _check_length(self, mask: torch.Tensor, instructions: Sequence[str]) -> None:
        """LeRobot cuts what is too long without a word: a row filled to its end may have been cut."""
        for row, instruction in zip(mask, instructions, strict=True):
            if int(row.sum()) == self._traits.token_limit:
                self._check_fits(instruction)

    def _check_fits(self, instruction: str) -> None:
        limit = self._traits.token_limit
        tokenizers = [step.input_tokenizer for step in self._preprocess.steps if hasattr(step, "input_tokenizer")]
        if tokenizers and limit is not None and len(tokenizers[0](instruction + "\n").input_ids) > limit:
            raise ValueError(f"task must fit the policy's {limit} tokens, got a longer one: {instruction!r}")

    def _begin_new_tasks(self, instructions: list[str]) -> None:
        if not self._instructions:
            self._calls = [0] * len(instructions)
            self._episodes = self._episodes or list(range(len(instructions)))  # whose noise each robot draws
        else:
            pairs = zip(self._instructions, instructions, strict=True)
            self._reset([index for index, (before, now) in enumerate(pairs) if before != now])
        self._instructions = instructions

    def _randomness(self) -> torch.Tensor | list[int]:
        """What each robot draws, a function of the seed, its episode and its calls since reset.

        [B, C, max_action_dim] SmolVLA's noise; of another policy, B seeds.
        """
        keys = zip(self._episodes, self._calls, strict=True)
        return self._policy.draw_noise([np.random.default_rng([self._seed, *key]) for key in keys])


def _group_of(query: Query) -> Group:
    plan = query.episode.plan
    if query.delay is None or plan is None or query.executed >= len(plan):
        return None
    return query.delay, len(plan) - query.executed


def _joined(rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.cat([each[key] for each in rows]) for key in rows[0]}


def planned_steps(config: PreTrainedConfig) -> int:
    """How many actions a policy plans, from the frame of the query on."""
    return sum(offset >= 0 for offset in config.action_delta_indices)
