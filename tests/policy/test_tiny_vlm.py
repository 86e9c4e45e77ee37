"""The tiny vision-language model that tests and simulation use in place of SmolVLM2."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from kuavo_sim.tasks import TASKS
from lerobot_policy_smolvla_memory import tiny_vlm
from lerobot_policy_smolvla_memory.tiny_vlm import make_tiny_vlm
from lerobot_policy_smolvla_memory.tiny_vlm_words import WORDS

SENTENCE = "Pick up the package from the conveyor belt, weigh it on the electronic scale"
SMALL = {
    "text_hidden": 32,
    "text_layers": 1,
    "head_dim": 16,
    "vision_hidden": 32,
    "vision_layers": 1,
    "image_size": 32,
}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_equal_settings_write_equal_bytes_and_another_seed_does_not(tmp_path):
    first = contents(make_tiny_vlm(tmp_path / "a", corpus=[SENTENCE], **SMALL))
    assert contents(make_tiny_vlm(tmp_path / "b", corpus=[SENTENCE], **SMALL)) == first
    other = contents(make_tiny_vlm(tmp_path / "c", corpus=[SENTENCE], seed=1, **SMALL))
    assert other["model.safetensors"] != first["model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_the_folder_is_reused_when_it_fits_and_written_anew_when_not(tmp_path):
    folder = make_tiny_vlm(tmp_path / "vlm", **SMALL)
    (folder / "mark").touch()
    make_tiny_vlm(folder, **SMALL)
    assert (folder / "mark").exists()
    make_tiny_vlm(folder, seed=1, **SMALL)
    assert not (folder / "mark").exists()


def test_of_two_processes_that_write_the_same_the_second_leaves_the_first_ones(tmp_path, monkeypatch):
    folder, write, inside = tmp_path / "vlm", tiny_vlm._write, []

    def write_while_another_does(staging, settings):
        write(staging, settings)
        if not inside:
            inside.append(0)
            inside.append(make_tiny_vlm(folder, text_layers=1, vision_layers=1).stat().st_ino)

    monkeypatch.setattr(tiny_vlm, "_write", write_while_another_does)
    make_tiny_vlm(folder, text_layers=1, vision_layers=1)
    assert inside == [0, folder.stat().st_ino]
    assert [path.name for path in tmp_path.iterdir()] == ["vlm"]


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    thesis = tmp_path / "mine" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    with pytest.raises(ValueError, match="holds something that is not a tiny VLM"):
        make_tiny_vlm(thesis.parent, **SMALL)
    assert thesis.read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_the_global_random_state_is_left_as_it_was(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    make_tiny_vlm(tmp_path / "vlm", **SMALL)
    assert torch.equal(torch.rand(1), expected)


def test_instructions_of_the_corpus_take_few_tokens_and_others_still_tokenize(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(make_tiny_vlm(tmp_path / "vlm", corpus=[SENTENCE], **SMALL))
    assert len(tokenizer(SENTENCE).input_ids) <= 2 * len(SENTENCE.split())
    foreign = "Ünrelated: 42 kg\n"
    assert tokenizer.decode(tokenizer(foreign).input_ids) == foreign


def test_transformers_opens_it_by_name(tmp_path):
    folder = make_tiny_vlm(tmp_path / "vlm", text_hidden=96, text_layers=4, vision_layers=2, vision_hidden=96)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.config.text_config.num_hidden_layers == 4
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    names = ("fake_image_token", "global_image_token", "image_token", "end_of_utterance_token")
    assert len({getattr(tokenizer, f"{name}_id") for name in names}) == 4
    image = torch.zeros(1, 3, 64, 64)
    features = model.model.connector(model.model.vision_model(pixel_values=image).last_hidden_state)
    assert features.shape == (1, 4, 96)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"text_hidden": 100}, "text_hidden must be a multiple of head_dim=24, got 100"),
        ({"image_size": 40}, "image_size must be a multiple of patch_size × scale_factor = 16 × 2, got 40"),
        ({"image_size": 48}, "image_size must be a multiple of patch_size × scale_factor = 16 × 2, got 48"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(tmp_path, sizes, message):
    with pytest.raises(ValueError, match=message):
        make_tiny_vlm(tmp_path / "vlm", **sizes)


def test_a_tokenizer_of_words_alone_serves_instructions_it_was_not_made_from(tmp_path):
    folder = make_tiny_vlm(
        tmp_path / "vlm", corpus=[" ".join(WORDS.split())], vocabulary_size=1024, write_weights=False, **SMALL
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lengths = [len(tokenizer(job.instruction)["input_ids"]) for job in TASKS.values()]
    assert max(lengths) <= 70  # of at most 96; made from 512 tokens they were 118
    assert not any(job.instruction[:40] in WORDS for job in TASKS.values())
