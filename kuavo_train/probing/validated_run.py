"""What a probe needs of a trained run."""

from lerobot.processor import PolicyProcessorPipeline

from kuavo_train.data.dataset import MixedDataset
from kuavo_train.errors import ConfigError
from kuavo_train.evaluation.validation import Validator
from kuavo_train.runs.trained_run import TrainedRun


class NothingToProbe(ConfigError):
    """The run has nothing that the probe could measure."""


def validator_of(run: TrainedRun, dataset: MixedDataset, preprocessor: PolicyProcessorPipeline) -> Validator:
    """One that validates as the run did."""
    settings = run.settings.validation
    return Validator(
        dataset,
        run.normalization,
        preprocessor,
        draws=settings.draws,
        batch_size=settings.batch_size,
        autocast=run.autocast,
    )
