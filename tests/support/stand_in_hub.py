"""A hub on this machine: what SmolVLA needs of the hub, in full size and its formats, with random weights."""

import hashlib
import http.server
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.utils.constants import OBS_IMAGES

from benchmarks.models import SIZES, features
from lerobot_policy_smolvla_memory.tiny_vlm import make_tiny_vlm

SMOLVLM, SMOLVLA = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct", "lerobot/smolvla_base"
SMOLVLA_PARAMETERS = 450_046_176
"""As LeRobot counts them when it trains from the hub's."""


def write_smolvlm(folder: Path, corpus: Sequence[str]) -> None:
    """Config, tokenizer and processor; of its 32 layers SmolVLA takes 16, whose weights it brings along."""
    full = SIZES["full"]
    make_tiny_vlm(folder, image_size=full.image, text_layers=32, corpus=corpus, dtype="bfloat16", **full.vlm)


def write_smolvla(folder: Path, vlm: Path, **settings: Any) -> None:
    """A policy of three cameras and six joints, in LeRobot's types: mostly bfloat16, which the VLM's config names.

    Args:
        settings: of its config, in place of smolvla_base's.
    """
    config = SmolVLAConfig(
        vlm_model_name=str(vlm),
        load_vlm_weights=False,
        device="cpu",
        **{"num_vlm_layers": 16, **settings},
        **features([f"{OBS_IMAGES}.camera{number}" for number in (1, 2, 3)], image=256, state=6, actions=6),
    )
    torch.manual_seed(0)
    policy = SmolVLAPolicy(config)
    policy.model.vlm_with_expert.vlm.to(torch.bfloat16)  # as LeRobot loads it
    config.vlm_model_name, config.load_vlm_weights = SMOLVLM, True
    policy.save_pretrained(folder)


class StandInHub:
    """Answers as the hub does, for as long as the block lasts.

    Args:
        repositories: id → folder; the hub has no others.

    Attributes:
        address: what HF_ENDPOINT has to be.
        asked: the paths it was asked for.
    """

    def __init__(self, repositories: Mapping[str, Path]):
        self.asked: list[str] = []
        asked = self.asked

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer()

            def do_GET(self) -> None:
                file = self.answer()
                if file is not None:
                    with file.open("rb") as content:
                        shutil.copyfileobj(content, self.wfile)

            def answer(self) -> Path | None:
                """Send the headers; the file to send after them, where there is one."""
                asked.append(self.path)
                repository = "/".join(self.path.removeprefix("/api/models").split("/")[1:3])
                folder = repositories.get(repository)
                file = folder and folder / self.path.removeprefix(f"/{repository}/resolve/main/")
                if file is None or not file.is_file():
                    self.send_response(404)
                    self.send_header("X-Error-Code", "EntryNotFound" if folder else "RepoNotFound")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return None
                self.send_response(200)
                self.send_header("X-Repo-Commit", hashlib.sha1(repository.encode()).hexdigest())
                self.send_header("ETag", f'"{hashlib.sha1(self.path.encode()).hexdigest()}"')
                self.send_header("Content-Length", str(file.stat().st_size))
                self.end_headers()
                return file

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
