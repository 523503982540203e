"""The card beside trained weights, what their file says, and the way to the hub."""

import json
import sys
from inspect import signature

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from micro import micro_model, run
from safetensors import safe_open
from tiny_ltx2 import VERSIONS, save_tiny_ltx2

import syncdpo.training.publish
from syncdpo.cli import main
from syncdpo.models.base_model import fingerprint
from syncdpo.models.ltx2 import LTX2
from syncdpo.models.model_card import PUBLISHED, model_card
from syncdpo.models.weights import FULL, LORA
from syncdpo.training.config import TrainConfig, load_config
from syncdpo.training.publish import CARD, about, on_hub, shareable, write_card

BASE = {"name": "Lightricks/LTX-2", "repository": "Lightricks/LTX-2", "version": "2.0"}


def card_of(base=BASE, clips=12, repository="", **settings):
    config = TrainConfig(**settings)
    text = model_card(
        "my-lora", base | {"fingerprint": "0123456789abcdef"}, vars(config), clips, "a: 1\n",
        repository,
    )  # fmt: skip
    return ModelCard(text), text


def test_the_hubs_own_reader_takes_it():
    card, text = card_of(lora_rank=8, rules="shift", steps=77)
    data = card.data.to_dict()
    assert data["base_model"] == "Lightricks/LTX-2"
    assert data["base_model_relation"] == "adapter"
    assert (data["library_name"], data["pipeline_tag"]) == ("diffusers", "text-to-video")
    assert {"lora", "ltx-2", "syncdpo"} <= set(data["tags"])
    for line in ("| clips | 12 |", "| rules | `shift` |", "| steps | `77` |", "0123456789abcdef"):
        assert line in text


def test_it_says_how_each_tool_loads_it():
    _, text = card_of(lora_rank=8, repository="me/my-lora")
    for words in (
        f'pipeline.load_lora_weights("me/my-lora", weight_name="{LORA}")',
        f"put `{LORA}` into `models/loras`",
        f"python -m ltx_pipelines.ti2vid_one_stage --lora {LORA} 1.0",
        f"syncdpo sample --model Lightricks/LTX-2 --weights {LORA}",
    ):
        assert words in text


def test_its_python_is_python():
    for settings in ({"lora_rank": 8}, {}):
        _, text = card_of(**settings)
        code = text.split("```python\n")[1].split("```")[0]
        compile(code, "card", "exec")


def test_all_weights_are_a_finetune_that_diffusers_alone_loads():
    card, text = card_of(method="sft")
    assert card.data.to_dict()["base_model_relation"] == "finetune"
    assert "lora" not in card.data.tags
    assert "LTX2VideoTransformer3DModel.from_pretrained" in text
    assert "load_lora_weights" not in text
    assert "| rules |" not in text  # which SFT has none of


@pytest.mark.parametrize("version", VERSIONS)
def test_a_base_from_a_folder_is_told_by_its_version(version):
    base = {"name": "my-folder", "repository": None, "version": version}
    card, text = card_of(base, lora_rank=2)
    assert card.data.base_model == PUBLISHED[version]
    assert f"version {version} (`my-folder`)" in text


def test_the_embedded_model_has_no_repository():
    base = {"name": "tiny", "repository": None, "version": "2.0"}
    card, text = card_of(base, lora_rank=2)
    assert card.data.base_model is None
    assert "load_lora_weights" not in text
    assert "syncdpo sample --model tiny" in text


# --- a run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_leaves_a_card_and_says_what_it_was(tmp_path, rank):
    folder = tmp_path / "secret place" / "my-run"
    run(folder, clips=9, steps=1, lora_rank=rank)
    card = ModelCard.load(folder / CARD)
    assert card.data.library_name == "diffusers"
    assert "# my-run" in card.text
    assert "| clips | 9 |" in card.text
    with safe_open(folder / (LORA if rank else FULL), "pt") as file:
        told = file.metadata()
    assert told["format"] == "pt"
    assert (told["base_model"], told["base_version"], told["method"]) == ("tiny", "2.0", "syncdpo")
    assert told["base_fingerprint"] == fingerprint(micro_model().transformer)
    settings = json.loads(told["settings"])
    assert (settings["steps"], settings["lora_rank"], settings["output"]) == (1, rank, "my-run")
    for text in (str(told), card.content):
        assert "secret place" not in text


def test_the_cards_settings_are_a_configuration(tmp_path):
    run(tmp_path / "run", steps=1, lora_rank=2, rules="shift")
    text = (tmp_path / "run" / CARD).read_text()
    (tmp_path / "settings.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    config = load_config(tmp_path / "settings.yaml")
    assert (config.lora_rank, config.rules, config.output) == (2, "shift", "run")


def test_a_run_from_a_lora_names_the_base_and_not_the_lora(tmp_path):
    """The fingerprint is of what was there before `weights`."""
    run(tmp_path / "first", steps=1, lora_rank=2)
    run(tmp_path / "second", steps=1, lora_rank=2, weights=str(tmp_path / "first"))
    with safe_open(tmp_path / "second" / LORA, "pt") as file:
        told = file.metadata()
    assert told["base_fingerprint"] == fingerprint(micro_model().transformer)
    assert json.loads(told["settings"])["weights"] == "first"


def test_ltx2_says_its_version(tmp_path):
    model = LTX2(save_tiny_ltx2(tmp_path / "ltx"), frames=17, height=64, width=64)
    config = TrainConfig(
        model=str(tmp_path / "ltx"), output=str(tmp_path / "run"), lora_rank=2, data="a/b/cache"
    )
    told = about(config, model)
    assert (told["base_model"], told["base_version"]) == ("ltx", "2.3")
    (tmp_path / "run").mkdir()
    write_card(config, told, clips=3)
    card = ModelCard.load(tmp_path / "run" / CARD)
    assert card.data.base_model == PUBLISHED["2.3"]
    assert str(tmp_path) not in card.content


@pytest.mark.parametrize(
    ("name", "is_one"),
    [("Lightricks/LTX-2", True), ("tiny", False), ("/models/ltx", False), ("./ltx/x", False),
     ("~/ltx", False), ("a/b/c", False)],
)  # fmt: skip
def test_repositories_are_told_from_folders(name, is_one):
    assert on_hub(name) == is_one


def test_a_folder_that_looks_like_a_repository_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "models" / "ltx").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not on_hub("models/ltx")
    assert shareable(TrainConfig(model="models/ltx")).model == "ltx"


# --- the hub --------------------------------------------------------------------------------------


class Hub:
    """In the place of the hub's client: writes down what it is asked for."""

    calls: list
    fails = None

    def create_repo(self, repository, **options):
        self.calls.append(("create", repository, options))

    def upload_folder(self, **options):
        self.calls.append(("upload", options["repo_id"], options))
        if self.fails:
            raise self.fails


@pytest.fixture
def hub(monkeypatch):
    Hub.calls, Hub.fails = [], None
    monkeypatch.setattr(syncdpo.training.publish, "HfApi", Hub)
    monkeypatch.setattr(syncdpo.training.publish, "get_token", lambda: "hf_nothing")
    return Hub


def test_weights_and_card_go_to_the_hub_and_nothing_else_does(tmp_path, hub, capsys):
    run(tmp_path, steps=1, lora_rank=2, push_to_hub="me/my-lora")
    (_, made, how), (_, to, upload) = hub.calls
    assert made == to == "me/my-lora"
    assert how == {"private": True, "exist_ok": True}
    assert sorted(upload["allow_patterns"]) == [CARD, LORA]
    assert upload["folder_path"] == tmp_path
    assert "# my-lora" in (tmp_path / CARD).read_text()
    assert "https://huggingface.co/me/my-lora" in capsys.readouterr().err


def test_nothing_goes_there_unasked(tmp_path, hub):
    run(tmp_path, steps=1, lora_rank=2)
    assert not hub.calls


@pytest.mark.parametrize(
    "error", [ConnectionError("no route\nat all"), RuntimeError(""), OSError()]
)
def test_a_failed_upload_ends_in_a_sentence_and_loses_nothing(tmp_path, hub, error):
    hub.fails = error
    with pytest.raises(OSError, match=r"push_to_hub: me/x did not take .*`hf upload me/x") as told:
        run(tmp_path, steps=1, lora_rank=2, push_to_hub="me/x")
    assert "\n" not in str(told.value)
    assert {LORA, CARD, "log.jsonl", "checkpoint-000001.safetensors"} <= {
        path.name for path in tmp_path.iterdir()
    }
    micro_model().load_weights(tmp_path)


def test_the_client_is_the_hubs():
    """What stands in for it here has its methods, with these options."""
    create = signature(huggingface_hub.HfApi.create_repo).parameters
    assert {"private", "exist_ok"} <= create.keys()
    upload = signature(huggingface_hub.HfApi.upload_folder).parameters
    assert {"repo_id", "folder_path", "allow_patterns", "commit_message"} <= upload.keys()


def test_what_the_hub_cannot_take_is_refused_before_training(tmp_path, hub, monkeypatch):
    with pytest.raises(ValueError, match="push_to_hub: "):
        run(tmp_path, push_to_hub="not a repository")
    monkeypatch.setattr(syncdpo.training.publish, "get_token", lambda: None)
    with pytest.raises(ValueError, match=r"push_to_hub: .*hf auth login"):
        run(tmp_path, push_to_hub="me/x")
    assert not list(tmp_path.iterdir())


def test_the_command_line_says_so_with_exit_code_2(tmp_path, hub, monkeypatch, capsys):
    monkeypatch.setattr(syncdpo.training.publish, "get_token", lambda: None)
    arguments = ("train", "--data", tmp_path, "--push-to-hub", "me/x", "--output", tmp_path / "o")
    monkeypatch.setattr(sys, "argv", ["syncdpo", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("syncdpo: push_to_hub: ")
