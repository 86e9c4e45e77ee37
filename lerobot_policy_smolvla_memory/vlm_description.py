"""What a checkpoint must know of its vision-language model to be opened anywhere: architecture and tokenizer.

    <checkpoint>/vlm/      config, tokenizer and processor as transformers saves them; the weights are in the checkpoint

LeRobot stores the model's name alone. It loads the rest from the hub, or from a folder of the machine where the
checkpoint was written.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import snapshot_download
from huggingface_hub.constants import CONFIG_NAME

if TYPE_CHECKING:
    from lerobot.policies.smolvla.smolvlm_with_expert import SmolVLMWithExpertModel

VLM_FOLDER = "vlm"


def save_vlm_description(checkpoint: Path, vlm_with_expert: "SmolVLMWithExpertModel") -> None:
    """Write the description beside the config, and let the config name it in place of a local folder."""
    folder = checkpoint / VLM_FOLDER
    vlm_with_expert.config.save_pretrained(folder)
    vlm_with_expert.processor.save_pretrained(folder)
    file = checkpoint / CONFIG_NAME
    config = json.loads(file.read_text())
    if Path(config["vlm_model_name"]).is_dir():
        config["vlm_model_name"] = VLM_FOLDER
        file.write_text(json.dumps(config, indent=4))


def vlm_described_in(
    checkpoint: str | Path,
    vlm_model_name: str,
    **download: Any,  # each argument has the type that the hub's client gives it
) -> str:
    """What transformers can open: the checkpoint's own description where it has one, else `vlm_model_name`.

    Args:
        checkpoint: folder or hub id.
        download: of `snapshot_download`, such as `revision`.
    """
    folder = Path(checkpoint) / VLM_FOLDER
    if folder.is_dir():
        return str(folder)
    if vlm_model_name != VLM_FOLDER:
        return vlm_model_name
    if Path(checkpoint).is_dir():
        raise FileNotFoundError(f"{folder} must hold the config and tokenizer of the vision-language model")
    return str(Path(snapshot_download(str(checkpoint), allow_patterns=f"{VLM_FOLDER}/*", **download)) / VLM_FOLDER)
