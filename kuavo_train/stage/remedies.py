"""What a user can mend, as one line: a full disk, too little memory, a lost worker. All else is a fault of ours.

with reported_in_one_line(config):
    …
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from kuavo_train.config import RunConfig
from kuavo_train.data.workers import loss_of_worker
from kuavo_train.errors import ConfigError, RunError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FULL_TEXTS = ("No space left on device", "Disk quota exceeded", "File too large", "PytorchStreamWriter failed")
"""Of libraries that hand on no number: safetensors, torch."""
UNWRITABLE = {errno.EROFS, errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM}
NO_MEMORY_TEXTS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
PROCESS_GONE_TEXTS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


@contextmanager
def reported_in_one_line(config: RunConfig) -> Iterator[None]:
    """Raises `RunError` in place of what the user can mend."""
    try:
        yield
    except (ConfigError, RunError):
        raise
    except Exception as error:
        remedies = [text for cause in _causes(error) if (text := _remedy(cause, config))]
        if not remedies:
            raise
        raise RunError(remedies[0]) from error


def _remedy(error: BaseException, config: RunConfig) -> str | None:
    text = " ".join(str(error).split())[:300]
    number = error.errno if isinstance(error, OSError) else None
    if number in FULL or any(part in text for part in FULL_TEXTS):
        return f"there is no room to write: {text}; free some, below {config.outputs} or where it says"
    if number in UNWRITABLE:
        return f"a file cannot be had or written: {text}"
    if isinstance(error, MemoryError | RuntimeError):  # CUDA's are among the latter
        if isinstance(error, MemoryError) or any(part in text for part in NO_MEMORY_TEXTS):
            return _no_memory(text, config)
        if any(part in text for part in PROCESS_GONE_TEXTS):
            return "another process of this run has ended; its own message says why"
        return loss_of_worker(text)
    return None


def _no_memory(text: str, config: RunConfig) -> str:
    training = config.training
    frozen = "; ".join(
        f"training.{key}=[{', '.join(getattr(training, key))}]" for key in ("freeze_first_stage", "freeze")
    )
    return (
        f"out of memory: {text or 'there is no more'}; lower training.batch_size={training.batch_size} and raise "
        f"training.gradient_accumulation_steps={training.gradient_accumulation_steps} by as much, or freeze more "
        f"groups ({frozen}); if it was in a validation or a rollout, lower "
        f"validation.batch_size={config.validation.batch_size} or rollout.parallel={config.rollout.parallel}"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it was raised from or while handling, and so on."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        yield error
        seen.append(error)
        error = error.__cause__ or error.__context__
