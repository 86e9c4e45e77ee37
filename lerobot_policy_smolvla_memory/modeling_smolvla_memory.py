"""SmolVLA with a recurrent memory, as LeRobot's policy: loss, actions, loading. It carries the memory on a robot.

How a query is computed is flow_model.py's. Letters as in prefix.py.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from lerobot.configs import PreTrainedConfig
from lerobot.policies.common.flow_matching import euler_integrate
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.policies.rtc.modeling_rtc import RTCProcessor
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from lerobot.utils.device_utils import resolve_safetensors_device
from safetensors.torch import load_file
from torch import Tensor

from lerobot_policy_smolvla_memory.adapters import TaskAdapters
from lerobot_policy_smolvla_memory.backbone import FastForward
from lerobot_policy_smolvla_memory.configuration_smolvla_memory import (
    ACTION_DIM_IS_PAD,
    ENCODED_CONTEXT,
    MEMORY_RESET,
    QUERY_IS_PAD,
    SmolVLAMemoryConfig,
    image_features_key,
)
from lerobot_policy_smolvla_memory.flow import Count, Flow, TrainingDraws, at_least_one, integrate, mean_of_valid
from lerobot_policy_smolvla_memory.flow_model import EncodedPrefix, MemoryFlowMatching
from lerobot_policy_smolvla_memory.memory import MemoryState
from lerobot_policy_smolvla_memory.parameter_groups import PARAMETER_GROUPS, VLM_GROUPS, group_of
from lerobot_policy_smolvla_memory.precision import StoredNarrower, make_room, settle, stored_dtypes
from lerobot_policy_smolvla_memory.prefix import Prefix
from lerobot_policy_smolvla_memory.pretrained_weights import check_policy_weights, widened_weights
from lerobot_policy_smolvla_memory.query_schedule import QuerySchedule
from lerobot_policy_smolvla_memory.vlm_description import save_vlm_description, vlm_described_in

OLDER_MEMORY = {"model.memory.key_bias": 0, "model.memory.first_position": 0}
"""What a memory that was stored without these had in their place."""
MEMORY_HEAD = "model.memory.head."
"""Of use in training alone: where it is lacking, or of other actions, it begins anew."""
HUB_ARGUMENTS = ("force_download", "token", "cache_dir", "local_files_only", "revision")


class StepOutputs(TypedDict):
    """What `SmolVLAMemoryPolicy.forward` gives beside the loss, detached but for the flow."""

    loss: Tensor
    memory: MemoryState | None
    memory_loss: NotRequired[Tensor]
    flow: NotRequired[Flow]


class RealTimeChunking(TypedDict, total=False):
    """What LeRobot's real-time chunking says of the chunk in execution, under LeRobot's names; times in steps."""

    inference_delay: int | None
    prev_chunk_left_over: Tensor | None
    execution_horizon: int | None


class SmolVLAMemoryPolicy(SmolVLAPolicy):
    """SmolVLA that remembers. See flow_model.py for how a query is computed.

    Training hands the memory in and out (`forward`), validation as well (`sample_actions_with`). On the robot
    the policy carries it: `select_action` and `predict_action_chunk` advance it once per query, `reset`
    starts an episode.
    """

    config_class = SmolVLAMemoryConfig
    name = "smolvla_memory"
    config: SmolVLAMemoryConfig

    def __init__(self, config: SmolVLAMemoryConfig, **_of_the_dataset: object):
        if not isinstance(config, SmolVLAMemoryConfig):
            config = SmolVLAMemoryConfig.from_smolvla(config)
        # Past SmolVLAPolicy.__init__, which would build LeRobot's network only for us to throw it away.
        PreTrainedPolicy.__init__(self, config)
        config.validate_features()
        self.init_rtc_processor()
        self.model = MemoryFlowMatching(config, rtc_processor=self.rtc_processor)
        instructions = config.adapter_instructions or []
        if len(instructions) > 1:
            self.model.adapters = TaskAdapters(self.model.adapted_layers(), instructions, config.adapter_rank)
        self.widened: dict[str, tuple[int, int]] = {}  # projection → dimensions it was stored for, and has
        self._stored = {name: parameter.dtype for name, parameter in self.named_parameters()}
        self.settle_precision()
        self.graphed: Callable[..., tuple[Tensor, MemoryState | None]] | None = None  # see graphed_query.py
        self.reset()

    # ---------------------------------------------------------------- training

    def forward(
        self,
        batch: dict[str, Tensor],
        noise: Tensor | None = None,
        time: Tensor | None = None,
        reduction: str = "mean",
        *,
        memory: MemoryState | None = None,
        queries: int = 1,
        clean: Tensor | None = None,
        everywhere: Count = at_least_one,
    ) -> tuple[Tensor, StepOutputs]:
        """Flow-matching loss of K consecutive queries per clip, with gradients through the memory.

        Args:
            batch: B = clips × K rows, clip-major. Beside SmolVLA's keys it may hold
                `action_is_pad` [B, T]: steps beyond the episode, out of the loss;
                `action_dim_is_pad` [B, A]: dimensions the task lacks, zero in the input and out of the loss;
                `query_is_pad` [B]: rows that only fill up a clip, out of the loss and not remembered;
                `observation.memory_reset` [B]: rows before whose query the memory starts anew;
                `observation.image_features.*` [B, N, H]: of `embed_camera`, in place of a camera's pictures;
                `observation.encoded_context`: of `encode_context`, beside either.
            noise: [B × D, T, max_action_dim], time: [B × D] in (0, 1], D draws of a row next to each other. When
                None, `flow_draws` per row are drawn from the global generator.
            reduction: "mean" over all valid entries, or "none": [B], the mean over each row's valid entries.
            memory: of the clips, before their first query. None begins with the initial one.
            queries: K.
            clean: [B × D] steps that a draw is given clean, with `rtc_training_delay`; drawn like noise when None.
            everywhere: number of valid entries here → that by which their sum is divided. Where several processes
                share a batch and average their gradients, it is the mean over the processes, which makes the average
                that of all valid entries.

        Returns:
            The loss: in training mode that of the flow and, weighted, the memory's own; else the flow's. And a dict of
            what is detached, not moved to the CPU: `loss` of the flow, `memory_loss` where there is one, and `memory`,
            the clips' memory after their last query (None without memory). In it with its gradients is `flow`, but
            where the step is LeRobot's own.

        Raises:
            ValueError: rows that do not divide into clips, or a memory of another number of clips.
        """
        self._let_memory_grow()
        self._choose_adapters(batch)
        batch = self._prepare_batch(batch)
        if self.config.adapt_to_pi_aloha:
            batch[ACTION] = self._pi_aloha_encode_actions_inv(batch[ACTION])
        if noise is None:
            rows = len(batch[ACTION]) * self.config.flow_draws
            shape = (rows, self.config.chunk_size, self.config.max_action_dim)
            noise = self.model.sample_noise(shape, batch[ACTION].device)
        if time is None:
            time = self.model.sample_time(len(noise), batch[ACTION].device)
        plain = not self.config.fast_forward and self.config.flow_draws == 1 and not self.config.rtc_training_delay
        if self.model.memory is None and plain:
            # Bit for bit LeRobot's training step: prefix and actions in one pass.
            observation = *self._images(batch), *self._language(batch), self.prepare_state(batch)
            losses = self.model.forward(*observation, *self._actions_and_noise(batch, noise), time)
            loss = mean_of_valid(
                losses[:, :, : self.config.action_feature.shape[0]], batch, reduction, everywhere=everywhere
            )
            return loss, {"loss": loss.detach().mean(), "memory": None}
        prefix = self._prefix(batch)
        encoded, memory, tokens = self._encode(batch, prefix, memory, queries)
        flow = self._flow(encoded, batch, noise, time, reduction, clean=clean, everywhere=everywhere)
        loss = flow.loss(flow.target)
        outputs: StepOutputs = {"loss": loss.detach().mean(), "memory": memory and memory.detach(), "flow": flow}
        if self.training and self.model.memory is not None and self.model.memory.head is not None:
            assert tokens is not None
            memory_loss = self._memory_loss(tokens, prefix, batch, reduction, everywhere)
            loss = loss + self.config.mem_action_loss * memory_loss
            outputs["memory_loss"] = memory_loss.detach().mean()
        return loss, outputs

    def encode(
        self, batch: dict[str, Tensor], memory: MemoryState | None = None, *, queries: int = 1
    ) -> tuple[EncodedPrefix, MemoryState | None]:
        """The first half of a query: what `flow_loss` and `denoise` need of the observations, computed once.

        Args:
            batch: as in `forward`, without actions.
            memory: of the clips, before their first query. None begins with the initial one.
            queries: K.

        Returns:
            The encoded rows, and the clips' memory after their last query; None without memory.

        Raises:
            ValueError: rows that do not divide into clips, a memory of another number of clips or on another
                device, or cameras of which some come as pictures and some as features.
        """
        encoded, memory, _ = self._encode(batch, self._prefix(batch), memory, queries)
        return encoded, memory

    def _choose_adapters(self, batch: dict[str, Tensor]) -> None:
        """By the instruction of each row: those that the layers compute it with from here on."""
        if self.model.adapters is None:
            return
        ids, mask = (each.cpu() for each in self._language(batch))
        rows = [tuple(row[valid].tolist()) for row, valid in zip(ids, mask.bool(), strict=True)]
        self.model.adapters.choose(rows, self.model.word_embeddings)

    def _prefix(self, batch: dict[str, Tensor]) -> Prefix:
        self._choose_adapters(batch)
        prefix = self.model.embed(*self._images(batch), *self._language(batch), self.prepare_state(batch))
        return replace(prefix, encoded=batch.get(ENCODED_CONTEXT))

    def _encode(
        self, batch: dict[str, Tensor], prefix: Prefix, memory: MemoryState | None, queries: int
    ) -> tuple[EncodedPrefix, MemoryState | None, Tensor | None]:
        self._check_memory(memory, self._clips(batch, queries), batch[OBS_STATE].device)
        resets, padding = batch.get(MEMORY_RESET), batch.get(QUERY_IS_PAD)
        return self.model.encode(prefix, memory, queries=queries, reset=resets, skip=padding)

    def _memory_loss(
        self, tokens: Tensor, prefix: Prefix, batch: dict[str, Tensor], reduction: str, everywhere: Count
    ) -> Tensor:
        """Squared error of the actions that the memory's head predicts after each row's query."""
        assert self.model.memory is not None
        assert self.model.memory.head is not None
        predicted = self.model.memory.head(tokens, prefix.summary())
        actions, absent = self.prepare_action(batch), self._absent_dimensions(batch)
        if absent is not None:
            actions = actions.masked_fill(absent, 0.0)
        actions = actions[:, :, : predicted.shape[2]]
        return mean_of_valid(F.mse_loss(predicted, actions, reduction="none"), batch, reduction, everywhere=everywhere)

    def flow_loss(
        self,
        prefix: EncodedPrefix,
        batch: dict[str, Tensor],
        noise: Tensor,
        time: Tensor,
        reduction: str = "mean",
        *,
        clean: Tensor | None = None,
        everywhere: Count = at_least_one,
    ) -> Tensor:
        """Flow-matching loss of encoded rows; arguments and reduction as in `forward`."""
        flow = self._flow(prefix, batch, noise, time, reduction, clean=clean, everywhere=everywhere)
        return flow.loss(flow.target)

    def _flow(
        self,
        prefix: EncodedPrefix,
        batch: dict[str, Tensor],
        noise: Tensor,
        time: Tensor,
        reduction: str,
        *,
        clean: Tensor | None,
        everywhere: Count,
    ) -> Flow:
        self._choose_adapters(batch)
        actions, noise = self._actions_and_noise(batch, noise)
        given = self._clean_steps(noise, clean)
        if given is not None:
            time = time[:, None].masked_fill(given, 0.0)
        t = time.view(len(time), -1, 1)
        noisy = t * noise + (1 - t) * actions

        def reduce(losses: Tensor) -> Tensor:
            real = losses[:, :, : self.config.action_feature.shape[0]]
            return mean_of_valid(real, batch, reduction, given, everywhere=everywhere)

        return Flow(noisy, time, noise - actions, self.velocity(prefix, noisy, time), reduce)

    def velocity(self, prefix: EncodedPrefix, noisy: Tensor, time: Tensor) -> Tensor:
        """Of the flow at noisy actions [B × D, T, A] and times as in `Flow`, D of each encoded row: [B × D, T, A]."""
        return self.model.velocity(prefix.repeat(len(noisy) // prefix.batch_size), noisy, time)

    def draw_training(self, rows: int, device: torch.device) -> TrainingDraws:
        """What `forward` draws by itself in training for so many rows, in its order, from the global generator."""
        draws = rows * self.config.flow_draws
        noise = self.model.sample_noise((draws, self.config.chunk_size, self.config.max_action_dim), device)
        drawn: TrainingDraws = {"noise": noise, "time": self.model.sample_time(draws, device)}
        if self.config.rtc_training_delay:
            drawn["clean"] = self._draw_clean(draws, device)
        return drawn

    def _draw_clean(self, draws: int, device: torch.device) -> Tensor:
        return torch.randint(self.config.rtc_training_delay + 1, (draws, 1), device=device).squeeze(1)

    def _clean_steps(self, noise: Tensor, lengths: Tensor | None = None) -> Tensor | None:
        """[B × D, T] true for the steps that a draw is given clean; None where training gives none."""
        if not self.config.rtc_training_delay or not self.training:
            return None
        if lengths is None:
            lengths = self._draw_clean(len(noise), noise.device)
        return torch.arange(noise.shape[1], device=noise.device) < lengths[:, None]

    def _actions_and_noise(self, batch: dict[str, Tensor], noise: Tensor) -> tuple[Tensor, Tensor]:
        """Padded actions and noise [B × D, T, max_action_dim], both 0 in dimensions that the row's task lacks."""
        actions = self.prepare_action(batch)
        draws = len(noise) // len(actions)
        actions, absent = actions.repeat_interleave(draws, dim=0), self._absent_dimensions(batch)
        if absent is None:
            return actions, noise
        absent = absent.repeat_interleave(draws, dim=0)
        return actions.masked_fill(absent, 0.0), noise.masked_fill(absent, 0.0)

    def embed_camera(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, height, width] in [0, 1] → their tokens [B, N, H], as they may stand in a batch under
        `image_features_key`. Depends on nothing but the vision encoder and the connector."""
        (image, *_empty), _ = self.prepare_images({next(iter(self.config.image_features)): pictures})
        return self.model.embed_image(image)

    @property
    def encodes_context(self) -> bool:
        """Whether images and language go through the model on their own: nothing stands before them."""
        return self.config.fast_forward and not self.config.mem_at_start

    def encode_context(self, batch: dict[str, Tensor]) -> Tensor:
        """Keys and values [B, layers, 2, P, G × D] of images and language, as they may stand in a batch as
        `ENCODED_CONTEXT`. Depends on nothing but the vision-language model, where `encodes_context`."""
        assert isinstance(self.model.backbone, FastForward), "encodes_context"
        return self.model.backbone.context(self._prefix(batch)).packed()

    def _language(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Token ids and their mask, [B, N]."""
        return batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK]

    def _images(self, batch: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Of every camera its pictures in [-1, 1] or its features, and [B] whether it is there."""
        given = {camera: batch.get(image_features_key(camera)) for camera in self.config.image_features}
        features = [tokens for tokens in given.values() if tokens is not None]
        if not features:
            return self.prepare_images(batch)
        missing = [camera for camera, tokens in given.items() if tokens is None]
        if missing:
            raise ValueError(f"features must be given of all cameras or of none, got none of {', '.join(missing)}")
        dtype = self.model.vlm_with_expert.get_vlm_model().connector.modality_projection.proj.weight.dtype
        there = torch.ones(len(features[0]), dtype=torch.bool, device=features[0].device)
        return [tokens.to(dtype) for tokens in features], [there] * len(features)

    def _clips(self, batch: dict[str, Tensor], queries: int) -> int:
        rows = len(batch[OBS_STATE])
        if queries < 1 or rows % queries:
            raise ValueError(f"{rows} rows of a batch do not divide into clips of {queries} queries each")
        return rows // queries

    def _absent_dimensions(self, batch: dict[str, Tensor]) -> Tensor | None:
        """[B, 1, max_action_dim] true for dimensions the row's task lacks; None when it has them all.

        SmolVLA's own padding up to max_action_dim is not among them: it is treated as LeRobot treats it.
        """
        if ACTION_DIM_IS_PAD not in batch:
            return None
        absent = torch.atleast_2d(batch[ACTION_DIM_IS_PAD])[:, None, :]
        return F.pad(absent, (0, self.config.max_action_dim - absent.shape[-1]), value=False)

    # --------------------------------------------------------------- inference

    @torch.no_grad()
    def sample_actions_with(
        self,
        batch: dict[str, Tensor],
        memory: MemoryState | None = None,
        noise: Tensor | None = None,
        **kwargs: Unpack[RealTimeChunking],
    ) -> tuple[Tensor, MemoryState | None]:
        """One policy query without any hidden state.

        Args:
            batch: B rows of observations. `action_dim_is_pad` and `observation.memory_reset` are honoured as
                in training: dimensions the task lacks come out as exactly 0, before unnormalization.
            memory: before the query; None for the initial one.
            noise: [B, T, max_action_dim] of standard deviation 1, which `sampling_temperature` scales; drawn from the
                global generator when None.
            kwargs: of real-time chunking, as in LeRobot. With `prev_chunk_left_over` its guidance holds what is left of
                the chunk in execution, whether or not `rtc_config` is set.

        Returns:
            Actions [B, T, A], normalized, and the memory after the query (None without memory).

        Raises:
            ValueError: the memory is of another batch size or on another device.
        """
        if self.graphed is not None:
            return self.graphed(batch, memory, noise, **kwargs)
        prefix, memory = self.encode(batch, memory)
        return self.denoise(prefix, batch, noise, **kwargs), memory

    @torch.no_grad()
    def denoise(
        self,
        prefix: EncodedPrefix,
        batch: dict[str, Tensor],
        noise: Tensor | None = None,
        **kwargs: Unpack[RealTimeChunking],
    ) -> Tensor:
        """Actions [B, T, A], normalized, of encoded rows; arguments as in `sample_actions_with`."""
        self._choose_adapters(batch)
        if noise is None:
            shape = (prefix.batch_size, self.config.chunk_size, self.config.max_action_dim)
            noise = self.model.sample_noise(shape, prefix.device)
        absent = self._absent_dimensions(batch)
        if absent is None:
            absent = torch.zeros(1, dtype=torch.bool, device=noise.device)
        noise = self.config.sampling_temperature * noise.masked_fill(absent, 0.0)
        left_over, delay = kwargs.get("prev_chunk_left_over"), kwargs.get("inference_delay") or 0

        def velocity(x_t: Tensor, time: Tensor) -> Tensor:
            return self.model.velocity(prefix, x_t, time).masked_fill(absent, 0.0)

        if left_over is not None and 0 < delay <= self.config.rtc_training_delay:
            actions = self._denoise_behind(prefix, noise, absent, left_over[:, :delay])
        elif left_over is None and self.rtc_processor is None:
            actions = integrate(velocity, noise, self.config.num_steps)
        else:
            actions = euler_integrate(
                velocity,
                noise,
                self.config.num_steps,
                rtc_processor=self.rtc_processor or RTCProcessor(RTCConfig()),
                rtc_enabled=self._rtc_enabled() or left_over is not None,
                **kwargs,
            )
        actions = actions[:, :, : self.config.action_feature.shape[0]]
        return self._pi_aloha_encode_actions(actions) if self.config.adapt_to_pi_aloha else actions

    def _denoise_behind(self, prefix: EncodedPrefix, noise: Tensor, absent: Tensor, held: Tensor) -> Tensor:
        """Actions [B, T, max_action_dim] that begin with `held` [B, d, A], as `rtc_training_delay` has trained it."""
        delay, dimensions = held.shape[1:]
        noise = noise.clone()
        noise[:, :delay, :dimensions], noise[:, :delay, dimensions:] = held, 0.0
        clean = torch.arange(noise.shape[1], device=noise.device) < delay

        def velocity(x_t: Tensor, time: Tensor) -> Tensor:
            flow = self.model.velocity(prefix, x_t, time[:, None].masked_fill(clean, 0.0))
            return flow.masked_fill(absent, 0.0).masked_fill(clean[:, None], 0.0)

        return integrate(velocity, noise, self.config.num_steps)

    def draw_noise(self, generators: Sequence[np.random.Generator]) -> Tensor:
        """What actions are denoised from, [B, C, max_action_dim] standard normal, each row from its own generator."""
        shape = (self.config.chunk_size, self.config.max_action_dim)
        noise = np.stack([generator.standard_normal(shape, dtype=np.float32) for generator in generators])
        return torch.from_numpy(noise).to(next(self.parameters()).device)

    def reset(self, indices: list[int] | None = None) -> None:
        """A new episode begins, for all batch elements or for some.

        Memory and actions still to be executed are dropped. With `indices` only those elements are queried at
        the next `select_action`; the others finish their chunk, and their memory does not advance early.
        """
        if indices is None:
            self._memory: MemoryState | None = None
            self._chunk: Tensor | None = None  # [B, n_action_steps, A] of the last query of each element
            self._executed: list[int] = []  # how many actions of it each element has executed
            self._schedule = QuerySchedule(self.config.n_action_steps)
            return
        if self._memory is not None and self.model.memory is not None:
            self._memory = self._memory.put(indices, self.model.memory.initial(len(indices)).detach())
        for index in indices if self._chunk is not None else ():
            self._executed[index] = self.config.n_action_steps

    def forget(self) -> None:
        """The memory begins anew, of all batch elements; actions still to be executed stay planned."""
        if self._memory is not None and self.model.memory is not None:
            self._memory = self.model.memory.initial(self._memory.batch_size).detach()

    @torch.no_grad()
    def predict_action_chunk(
        self, batch: dict[str, Tensor], noise: Tensor | None = None, **kwargs: Unpack[RealTimeChunking]
    ) -> Tensor:
        """One policy query: actions [B, T, A], normalized. The memory advances by one.

        With `prev_chunk_left_over`, of LeRobot's real-time chunking, it advances as `QuerySchedule` says.
        """
        self.eval()
        batch = self._prepare_batch(batch)
        actions, memory = self.sample_actions_with(batch, self._memory, noise, **kwargs)
        if self._schedule.advances(kwargs.get("prev_chunk_left_over")):
            self._memory = memory
        self._schedule.plan(actions)
        return actions

    @torch.no_grad()
    def select_action(
        self, batch: dict[str, Tensor], noise: Tensor | None = None, **_: Unpack[RealTimeChunking]
    ) -> Tensor:
        """The next action [B, A], normalized, from a query every n_action_steps calls.

        Each element keeps its own count, so that elements reset on their own are queried on their own; those
        that are due together are one batch. `observation.memory_reset` resets elements as `reset` does.

        Raises:
            ValueError: another batch size or device than since the last reset.
        """
        assert not self._rtc_enabled(), "RTC needs predict_action_chunk; select_action knows no RTC"
        self.eval()
        batch = self._prepare_batch(batch)
        size = len(batch[OBS_STATE])
        if self._chunk is not None and len(self._chunk) != size:
            raise ValueError(
                f"the batch has {size} elements, but actions are planned for {len(self._chunk)}; "
                "call reset() when the number of environments changes"
            )
        if MEMORY_RESET in batch:
            self.reset(batch[MEMORY_RESET].nonzero().flatten().tolist())
        if due := list(range(size)) if self._chunk is None else self.due():
            self._query(batch, due, noise)
        assert self._chunk is not None
        action = self._chunk[range(size), self._executed]
        self._executed = [executed + 1 for executed in self._executed]
        return action

    def due(self) -> list[int]:
        """Elements of the batch of which the next `select_action` is a query; none known before the first one."""
        return [index for index, executed in enumerate(self._executed) if executed >= self.config.n_action_steps]

    def _query(self, batch: dict[str, Tensor], due: list[int], noise: Tensor | None) -> None:
        """Plan anew for the elements `due` of the batch, and advance their memory."""
        size = len(batch[OBS_STATE])
        memory = self._memory
        if memory is None and self.model.memory is not None:
            memory = self.model.memory.initial(size)
        self._check_memory(memory, size, batch[OBS_STATE].device)
        rows = {key: value[due] if _is_batched(value, size) else value for key, value in batch.items()}
        noise = None if noise is None else noise[due]
        actions, advanced = self.sample_actions_with(rows, memory and memory.select(due), noise)
        if memory is not None and advanced is not None:
            self._memory = memory.put(due, advanced)
        if self._chunk is None:
            self._chunk = actions[:, : self.config.n_action_steps].clone()
            self._executed = [0] * size
        self._chunk[due] = actions[:, : self.config.n_action_steps]
        for index in due:
            self._executed[index] = 0

    def get_memory(self) -> MemoryState | None:
        """A copy of the carried memory; None before the first query and without memory."""
        return self._memory and self._memory.clone()

    def set_memory(self, memory: MemoryState | None) -> None:
        """Carry this memory from now on. Actions still to be executed are dropped: the next call is a query.

        Raises:
            ValueError: the memory is of another number of tokens, width or cache size.
        """
        if memory is not None:
            self._check_shape(memory)
            memory = memory.clone().to(next(self.parameters()).device)
        self.reset()
        self._memory = memory

    def _check_shape(self, memory: MemoryState) -> None:
        if self.model.memory is None:
            raise ValueError("this policy has no memory (num_mem_tokens=0, mem_frames=0), so it cannot carry one")
        expected = self.model.memory.initial(memory.batch_size).shapes
        if memory.shapes != expected:
            raise ValueError(f"the memory must be of shapes {expected}, got {memory.shapes}")

    def _check_memory(self, memory: MemoryState | None, clips: int, device: torch.device) -> None:
        if memory is None:
            return
        self._check_shape(memory)
        if memory.batch_size != clips:
            raise ValueError(
                f"the carried memory is of {memory.batch_size} elements, the batch of {clips}; "
                "call reset() when the number of environments changes"
            )
        if memory.device != device:
            raise ValueError(
                f"the carried memory is on {memory.device}, the batch on {device}; "
                "move it with memory.to(device), or call reset()"
            )

    def _let_memory_grow(self) -> None:
        """A memory that has joined weighs more with every step that trains it."""
        memory = self.model.memory
        if self.training and memory is not None and next(memory.parameters()).requires_grad:
            memory.grow(self.config.mem_growth)

    # ------------------------------------------------------------- parameters

    def parameter_groups(self) -> dict[str, list[str]]:
        """Names of all parameters by the part of the model they belong to; every one in exactly one group.

        Raises:
            ValueError: a parameter that belongs to no group (LeRobot or transformers renamed something).
        """
        groups: dict[str, list[str]] = {group: [] for group in PARAMETER_GROUPS}
        for name, _ in self.named_parameters():
            groups[group_of(name)].append(name)
        return {group: names for group, names in groups.items() if names or group != "adapters"}

    def settle_precision(self) -> None:
        """Hold every parameter as precision.py says; to be called again once other parts are held fixed than before,
        and before anything is trained."""
        settle(self, self.parameter_groups(), self._stored, may_stay_narrow=VLM_GROUPS)

    def compute_in(self, dtype: torch.dtype) -> None:
        """Hold the vision-language model and the expert in `dtype`, for inference alone: it rounds weights.

        The memory, the projections of state and actions and the denoising stay float32.
        """
        for parameter in self.model.vlm_with_expert.parameters():
            parameter.data = parameter.data.to(dtype)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        **kwargs: Any,  # LeRobot's own, and those of the hub's client
    ) -> "SmolVLAMemoryPolicy":
        """As LeRobot's. The vision-language model's description is the checkpoint's own, where it has one.

        What learns is float32, whatever it was stored in; a `StoredNarrower` warning names what was not.
        """
        download = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
        if config is None:
            config = PreTrainedConfig.from_pretrained(pretrained_name_or_path, **download)
        config.vlm_model_name = vlm_described_in(pretrained_name_or_path, config.vlm_model_name, **download)
        if hasattr(config, "load_vlm_weights"):
            config.load_vlm_weights = False  # they are in the checkpoint, and need not be where it is opened
        return super().from_pretrained(pretrained_name_or_path, config=config, **kwargs)

    def _go_without_what_an_older_memory_lacks(self) -> None:
        """A memory that was trained without a path of its own to the context would be disturbed by a new one."""
        memory = self.model.memory
        stored = [name.removeprefix("model.memory.") for name in self._stored if name.startswith("model.memory.")]
        if memory is None or memory.reader is None or not stored:
            return
        if not any("reader." in name for name in stored):
            memory.reader, self.config.mem_reads_context = None, False
            self.model.train_what_the_memory_awaits()
            warnings.warn(
                "the stored memory was trained with mem_reads_context=false and stays without; a new memory needs "
                "weights without one, such as those of the policy that it joined",
                stacklevel=2,
            )

    def _new_adapter(self) -> tuple[str, ...]:
        """What the names of the last task's adapter begin with, where nothing of it is stored yet."""
        if self.model.adapters is None:
            return ()
        newest = f"model.adapters.of_task.{len(self.model.adapters.of_task) - 1}."
        return () if any(name.startswith(newest) for name in self._stored) else (newest,)

    def _tell_of_narrower_weights(self, model_file: str) -> None:
        learns = {name: parameter.dtype for name, parameter in self.named_parameters() if parameter.requires_grad}
        narrower = sorted({group_of(name) for name, dtype in learns.items() if self._stored.get(name, dtype) != dtype})
        if narrower:
            warnings.warn(
                f"{', '.join(narrower)} of {model_file} were stored in less than float32, which rounds the steps of "
                "training. They are loaded as they are, and are float32 from here on",
                StoredNarrower,
                stacklevel=2,
            )

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save_pretrained(save_directory, state_dict)
        save_vlm_description(save_directory, self.model.vlm_with_expert)

    @classmethod
    def _load_as_safetensor(
        cls, model: "SmolVLAMemoryPolicy", model_file: str, map_location: str, strict: bool
    ) -> "SmolVLAMemoryPolicy":
        """Load all weights; only the memory may be missing, as a whole (a checkpoint of plain SmolVLA).

        Projections of fewer dimensions than `max_state_dim` and `max_action_dim` are widened. A memory of before
        `key_bias`, `first_position` and `mem_reads_context` stays as it was. Always strict: `strict=False`, LeRobot's
        default, would go on with random weights and a warning.
        """
        model._stored = stored_dtypes(model_file)
        model._go_without_what_an_older_memory_lacks()
        begins = model._new_adapter()
        may_differ = (MEMORY_HEAD, *begins)
        missing = check_policy_weights(
            model, model_file, may_be_new="model.memory.", may_be_older=OLDER_MEMORY, may_differ=may_differ
        )
        make_room(model, model._stored)
        widened = widened_weights(model, model_file)
        stored = load_file(model_file, device=resolve_safetensors_device(map_location))
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if name.startswith(MEMORY_HEAD)}
        if any(stored[name].shape != shape for name, shape in shapes.items() if name in stored):
            stored = {name: tensor for name, tensor in stored.items() if not name.startswith(MEMORY_HEAD)}
        model.load_state_dict({**stored, **{key: each.weight for key, each in widened.items()}}, strict=False)
        model.widened = {key.split(".")[1]: (each.before, each.now) for key, each in widened.items()}
        if begins and model.config.adapter_start == "nearest":
            assert model.model.adapters is not None
            model.model.adapters.begin(model.model.word_embeddings)
        model.settle_precision()
        model._tell_of_narrower_weights(model_file)
        if missing <= OLDER_MEMORY.keys():
            for key in missing:
                model.get_buffer(key).fill_(OLDER_MEMORY[key])
        elif model.model.memory is not None:
            model.model.memory.initialize_tokens(model.model.end_of_utterance_embedding())
            ends = model.config.mem_at_start + model.config.mem_at_end
            model.model.memory.weigh_as(model.config.mem_weight / ends)
        return model


def _is_batched(value: object, batch_size: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch_size
