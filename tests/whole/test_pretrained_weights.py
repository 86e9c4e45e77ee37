"""Starting from pretrained weights: what is taken over, and that nothing is ever put in their place."""

import http.server
import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from commands import command
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from safetensors.torch import load_file, save_file

from kuavo_train.command_line import set_hub
from kuavo_train.compose import compose_run
from kuavo_train.stage.description import describe
from kuavo_train.stage.findings import Findings, NotReady
from kuavo_train.stage.lineage import Start
from kuavo_train.stage.setup import OpenedStage, open_stage
from lerobot_policy_smolvla_memory.tiny_vlm import make_tiny_vlm

Overrides = Callable[..., list[str]]


def open_first_stage(overrides: list[str]) -> tuple[OpenedStage | None, str]:
    """The stage, and all that is wrong with it."""
    configs, findings = compose_run(overrides), Findings()
    stage = None
    with suppress(NotReady):
        stage = open_stage(configs[0], [config.stage for config in configs], Start(), Accelerator(cpu=True), findings)
    return stage, "\n".join(findings.problems)


@pytest.fixture
def plain_smolvla(small_run: Overrides, tmp_path: Path) -> Path:
    """A folder as LeRobot writes it for its own SmolVLA, in the sizes of the small run."""
    stage, problems = open_first_stage(small_run("policy.num_mem_tokens=0"))
    assert stage is not None, problems
    config = stage.built.policy.config
    fields = {name: getattr(config, name) for name in SmolVLAConfig.__dataclass_fields__}
    torch.manual_seed(5)
    SmolVLAPolicy(SmolVLAConfig(**fields)).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def test_plain_smolvla_is_taken_over_whole_and_only_the_memory_is_new(
    small_run: Overrides, plain_smolvla: Path
) -> None:
    stage, problems = open_first_stage(small_run(f"policy.pretrained_path={plain_smolvla}", "policy.num_mem_tokens=2"))
    assert stage is not None, problems
    weights, stored = stage.built.policy.state_dict(), load_file(plain_smolvla / "model.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in stored.items())
    assert {name.split(".")[1] for name in weights.keys() - stored.keys()} == {"memory"}
    assert "widened" not in describe(stage.findings)


def test_a_memory_that_the_base_has_met_goes_on_as_it_is_and_at_full_weight(
    small_run: Overrides, tmp_path: Path
) -> None:
    stage, problems = open_first_stage(small_run("policy.num_mem_tokens=2"))
    assert stage is not None, problems
    stage.built.policy.save_pretrained(tmp_path / "base")
    stored = load_file(tmp_path / "base" / "model.safetensors")
    begun = (f"policy.pretrained_path={tmp_path / 'base'}", "seed=1", "policy.mem_weight=0.1")
    stage, problems = open_first_stage(small_run(*begun, "policy.num_mem_tokens=2"))
    assert stage is not None, problems
    weights = stage.built.policy.state_dict()
    assert any(name.startswith("model.memory.") for name in stored)
    assert all(torch.equal(weights[name], value) for name, value in stored.items())
    assert weights["model.memory.key_bias"] == 0  # and nothing grows in anew
    _, problems = open_first_stage(small_run(*begun, "policy.num_mem_tokens=0"))
    assert "model.memory.mem_tokens is not part of this policy" in problems


def test_a_base_of_32_dimensions_takes_more_and_the_table_says_so(small_run: Overrides, plain_smolvla: Path) -> None:
    wider = (f"policy.pretrained_path={plain_smolvla}", "policy.max_action_dim=40", "policy.max_state_dim=36")
    stage, problems = open_first_stage(small_run(*wider))
    assert stage is not None, problems
    assert "widened: action_in_proj 32 → 40, action_out_proj 32 → 40, state_proj 32 → 36 dimensions" in describe(
        stage.findings
    )
    _, problems = open_first_stage(small_run(wider[0], "policy.max_action_dim=24"))
    assert "max_action_dim must be at least 32, what the weights were trained with" in problems


def test_weights_that_do_not_fit_are_listed(small_run: Overrides, plain_smolvla: Path) -> None:
    file = plain_smolvla / "model.safetensors"
    weights = load_file(file)
    del weights["model.state_proj.bias"]
    save_file(weights, file)
    _, problems = open_first_stage(small_run(f"policy.pretrained_path={plain_smolvla}"))
    assert "1 of its weights\n  model.state_proj.bias is missing" in problems


def test_a_damaged_file_is_named(small_run: Overrides, plain_smolvla: Path) -> None:
    (plain_smolvla / "model.safetensors").write_bytes(b"half a download")
    _, problems = open_first_stage(small_run(f"policy.pretrained_path={plain_smolvla}"))
    assert (
        f"policy.pretrained_path must be something to load policy weights from, got the folder {plain_smolvla}"
        in problems
    )


def test_a_vlm_that_cannot_be_had_is_not_replaced_by_a_random_one(small_run: Overrides, tmp_path: Path) -> None:
    _, problems = open_first_stage(small_run("tiny_vlm=null", "policy.vlm_model_name=nobody/no-vlm"))
    assert "policy.vlm_model_name must be a folder, or a hub id that can be had, got nobody/no-vlm" in problems
    assert "give the folder: policy.vlm_model_name=/path/to/no-vlm" in problems
    nowhere = ("policy.vlm_model_name=/nowhere/no-vlm", "policy.pretrained_path=/nowhere/no-policy")
    _, problems = open_first_stage(small_run("tiny_vlm=null", *nowhere))
    for folder in nowhere:
        key, path = folder.split("=")
        assert f"{key} must be an existing folder or a hub id, got '{path}'" in problems
    vlm = make_tiny_vlm(tmp_path / "vlm", image_size=32)
    given = small_run("tiny_vlm=null", f"policy.vlm_model_name={vlm}", "policy.load_vlm_weights=true")
    weights = load_file(vlm / "model.safetensors")
    del weights["model.text_model.norm.weight"]
    save_file(weights, vlm / "model.safetensors", metadata={"format": "pt"})
    _, problems = open_first_stage(given)
    no_policy = f"policy.vlm_model_name must be something to load policy weights from, got the folder {vlm}: "
    assert no_policy + "UnfitWeights" in problems
    assert "1 of its weights\n  model.text_model.norm.weight is missing" in problems
    (vlm / "model.safetensors").unlink()
    _, problems = open_first_stage(given)
    assert no_policy + "OSError" in problems


def test_a_frozen_vlm_without_pretrained_weights_has_to_be_allowed(small_run: Overrides, tmp_path: Path) -> None:
    vlm = make_tiny_vlm(tmp_path / "vlm", image_size=32, write_weights=False)
    frozen = ("training.freeze_first_stage=[connector]", "tiny_vlm=null", f"policy.vlm_model_name={vlm}")
    _, problems = open_first_stage(small_run(*frozen))
    assert "a frozen VLM must have pretrained weights, got none (policy.load_vlm_weights=false)" in problems
    allowed = small_run(*frozen, "allow_random_frozen_vlm=true", "policy.tokenizer_max_length=300")
    stage, problems = open_first_stage(allowed)
    assert stage is not None, problems


@pytest.fixture
def empty_hub() -> Iterator[tuple[str, list[str]]]:
    """Address of a hub that has nothing, and the paths it was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

        do_GET = do_HEAD  # noqa: N815 - named by http.server

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ([], "looked for at {address}"),
        pytest.param(["offline=true"], "looked for only in the local cache (offline)", marks=pytest.mark.slow),
    ],
)
def test_a_mirror_is_asked_in_place_of_the_hub_and_offline_nobody(
    small_run: Overrides, empty_hub: tuple[str, list[str]], tmp_path: Path, more: list[str], reason: str
) -> None:
    """In a process of its own: the hub's library reads whom to ask when it is imported."""
    address, asked = empty_hub
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    overrides = small_run("policy.pretrained_path=nobody/nothing", f"hf_endpoint={address}", *more)
    done = subprocess.run(
        command("kuavo_train.preflight", *overrides, "--json"),
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    problems = json.loads(done.stdout)["problems"]
    assert any(f"got nobody/nothing, {reason.format(address=address)}" in problem for problem in problems), problems
    assert bool(asked) == (more == [])
    assert not asked or any(path.startswith("/nobody/nothing/resolve/main/") for path in asked), asked


def test_the_hubs_library_is_told_whom_to_ask_and_whether(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_ENDPOINT", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "as it was")
    config = compose_run()[0]
    set_hub(config)
    assert (os.environ["HF_ENDPOINT"], os.environ["HF_HUB_OFFLINE"]) == ("as it was", "as it was")
    set_hub(replace(config, hf_endpoint="https://mirror.example", offline=True))
    assert (os.environ["HF_ENDPOINT"], os.environ["HF_HUB_OFFLINE"]) == ("https://mirror.example", "1")
