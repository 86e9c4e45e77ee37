"""A tiny SmolVLM, made here: what SmolVLA needs of its backbone, small enough to train on a laptop's CPU.

SmolVLA loads its vision-language model by name. `make_tiny_vlm` writes a folder that can stand in that place
without any network: configuration, seeded random weights, tokenizer and processor.

    folder = make_tiny_vlm(Path("outputs/tiny_vlm"), corpus=instructions)
    config = SmolVLAMemoryConfig(vlm_model_name=str(folder), load_vlm_weights=True, ...)

The weights are random, so everything has to be trained. It is for tests and simulated data, not for robots.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from lerobot_policy_smolvla_memory.pretrained_weights import no_progress_bar

RECORD_NAME = "tiny_vlm.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
VOCABULARY_SIZE = 512  # 256 bytes, the special tokens, and merges for the words of a few instructions

SPECIAL_TOKENS = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|pad|>",
    "unk_token": "<|unk|>",
}
IMAGE_TOKENS = {  # the names under which SmolVLA and the SmolVLM processor look them up
    "fake_image_token": "<fake_token_around_image>",
    "image_token": "<image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}


@dataclass(frozen=True)
class _Settings:
    """All that decides the contents of the folder; recorded in it, and compared before it is reused."""

    text_hidden: int
    text_layers: int
    head_dim: int
    vision_hidden: int
    vision_layers: int
    image_size: int
    patch_size: int
    scale_factor: int
    key_value_heads: int | None
    text_intermediate: int | None
    vision_intermediate: int | None
    vocabulary_size: int
    write_weights: bool
    seed: int
    corpus: list[str]
    dtype: str
    version: int = 2  # to be raised when this module writes something else for the same settings

    def __post_init__(self) -> None:
        for name in ("text_hidden", "vision_hidden"):
            width = getattr(self, name)
            if width % self.head_dim:
                raise ValueError(f"{name} must be a multiple of head_dim={self.head_dim}, got {width}")
        heads = self.text_hidden // self.head_dim
        if self.key_value_heads is not None and heads % self.key_value_heads:
            raise ValueError(f"key_value_heads must divide the {heads} heads, got {self.key_value_heads}")
        if self.vocabulary_size < VOCABULARY_SIZE:
            raise ValueError(f"vocabulary_size must be at least {VOCABULARY_SIZE}, got {self.vocabulary_size}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        patches = self.image_size // self.patch_size
        if self.image_size % self.patch_size or patches % self.scale_factor:
            raise ValueError(
                f"image_size must be a multiple of patch_size × scale_factor = "
                f"{self.patch_size} × {self.scale_factor}, got {self.image_size}"
            )

    @property
    def image_tokens(self) -> int:
        """Tokens per camera in the prefix."""
        return (self.image_size // self.patch_size // self.scale_factor) ** 2


def make_tiny_vlm(
    folder: Path,
    *,
    text_hidden: int = 96,
    text_layers: int = 4,
    head_dim: int = 24,
    vision_hidden: int = 96,
    vision_layers: int = 2,
    image_size: int = 64,
    patch_size: int = 16,
    scale_factor: int = 2,
    key_value_heads: int | None = None,
    text_intermediate: int | None = None,
    vision_intermediate: int | None = None,
    vocabulary_size: int = VOCABULARY_SIZE,
    write_weights: bool = True,
    seed: int = 0,
    corpus: Sequence[str] = (),
    dtype: str = "float32",
) -> Path:
    """Write a tiny SmolVLM to `folder`, or leave it as it is when it was written from the same settings.

    The folder appears in one step, complete or not at all. The global random state is left as it was.

    Args:
        folder: usable as `vlm_model_name` afterwards.
        text_hidden, text_layers: width H and depth of the language model.
        head_dim: of language and vision attention alike.
        vision_hidden, vision_layers: width and depth of the vision encoder.
        image_size, patch_size: in pixels. A camera becomes (image_size / patch_size / scale_factor)² tokens.
        scale_factor: how many patches per side are merged into one token.
        key_value_heads: of the language model; None gives every head its own.
        text_intermediate, vision_intermediate: widths of the feed-forward layers; None: twice the model's.
        vocabulary_size: rows of the embedding. The tokenizer fills as many of them as the corpus gives it words for.
        write_weights: false writes shapes only, for `load_vlm_weights=False`.
        corpus: instructions to train the tokenizer on. Sentences like these then take few tokens; any other
            text still tokenizes, byte by byte at worst.
        dtype: "float32", or "bfloat16" as SmolVLM2 is stored: weights, config and the text model's config.

    Raises:
        ValueError: sizes that do not divide each other, or `folder` holds something else.
    """
    settings = _Settings(
        text_hidden=text_hidden,
        text_layers=text_layers,
        head_dim=head_dim,
        vision_hidden=vision_hidden,
        vision_layers=vision_layers,
        image_size=image_size,
        patch_size=patch_size,
        scale_factor=scale_factor,
        key_value_heads=key_value_heads,
        text_intermediate=text_intermediate,
        vision_intermediate=vision_intermediate,
        vocabulary_size=vocabulary_size,
        write_weights=write_weights,
        seed=seed,
        corpus=list(corpus),
        dtype=dtype,
    )
    folder = Path(folder)
    if _is_written(folder, settings):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write(staging, settings)
        _move_into_place(staging, folder, settings)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _is_written(folder: Path, settings: _Settings) -> bool:
    record = folder / RECORD_NAME
    return record.is_file() and json.loads(record.read_text()) == asdict(settings)


def _move_into_place(staging: Path, folder: Path, settings: _Settings) -> None:
    try:
        staging.rename(folder)
    except OSError:
        # Another process may have written the same in the meantime, and be reading it: that one stays.
        if _is_written(folder, settings):
            return
        if not folder.is_dir():
            raise
        if not (folder / RECORD_NAME).is_file():
            raise ValueError(f"{folder} holds something that is not a tiny VLM; give another folder") from None
        shutil.rmtree(folder)
        staging.rename(folder)


def _write(folder: Path, settings: _Settings) -> None:
    tokenizer = _train_tokenizer(settings.corpus, settings.vocabulary_size)
    _processor(tokenizer, settings).save_pretrained(folder)
    config = _model_config(tokenizer, settings)
    if settings.write_weights:
        with torch.random.fork_rng(devices=[]), no_progress_bar():
            torch.manual_seed(settings.seed)
            model = SmolVLMForConditionalGeneration(config).to(DTYPES[settings.dtype])  # rounded
            config.dtype = config.text_config.dtype = DTYPES[settings.dtype]
            model.save_pretrained(folder)
    else:
        config.dtype = config.text_config.dtype = DTYPES[settings.dtype]
        config.save_pretrained(folder)
    (folder / RECORD_NAME).write_text(json.dumps(asdict(settings), indent=2))
    os.chmod(folder, 0o755)  # mkdtemp makes folders that only their owner can enter


def _train_tokenizer(corpus: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[*SPECIAL_TOKENS.values(), *IMAGE_TOKENS.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **SPECIAL_TOKENS, extra_special_tokens=dict(IMAGE_TOKENS)
    )


def _processor(tokenizer: PreTrainedTokenizerFast, settings: _Settings) -> SmolVLMProcessor:
    size = {"longest_edge": settings.image_size}
    return SmolVLMProcessor(
        SmolVLMImageProcessor(size=size, max_image_size=size),
        tokenizer,
        SmolVLMVideoProcessor(size=size, max_image_size=size),
        image_seq_len=settings.image_tokens,
    )


def _model_config(tokenizer: PreTrainedTokenizerFast, settings: _Settings) -> SmolVLMConfig:
    heads = settings.text_hidden // settings.head_dim
    return SmolVLMConfig(
        text_config={
            "model_type": "llama",
            "hidden_size": settings.text_hidden,
            "intermediate_size": settings.text_intermediate or 2 * settings.text_hidden,
            "num_hidden_layers": settings.text_layers,
            "num_attention_heads": heads,
            "num_key_value_heads": settings.key_value_heads or heads,
            "head_dim": settings.head_dim,
            # The full size even where the corpus is too small to fill it: the shapes then depend on the
            # settings only, and a checkpoint made with one corpus opens with another.
            "vocab_size": settings.vocabulary_size,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": settings.vision_hidden,
            "intermediate_size": settings.vision_intermediate or 2 * settings.vision_hidden,
            "num_hidden_layers": settings.vision_layers,
            "num_attention_heads": settings.vision_hidden // settings.head_dim,
            "image_size": settings.image_size,
            "patch_size": settings.patch_size,
        },
        scale_factor=settings.scale_factor,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKENS["image_token"]),
        pad_token_id=tokenizer.pad_token_id,
    )
