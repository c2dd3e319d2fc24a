"""The command line: which configuration is read, and how mistakes end."""

import re
from pathlib import Path

import pytest
import torch

from sat.errors import CheckpointError, ConfigError
from sat.sampling.cli import main, read_config
from tests.sampling.conftest import Trained
from tests.tiny import ROOT, TINY


@pytest.mark.parametrize("place", ["", "4", "2", "4/mp_rank_00_model_states.pt"])
def test_a_run_directory_says_how_it_was_trained(trained: Trained, place: str) -> None:
    load = str(trained.run / place)
    config = read_config([], load, ["args.batch_size=3"])
    assert config["model"]["network_config"]["params"]["hidden_size"] == 32
    assert (config["args"]["load"], config["args"]["batch_size"]) == (load, 3)
    assert read_config([], None, [f"args.load={load}"])["args"]["load"] == load


def test_files_given_with_base_win_over_the_run_directory(trained: Trained) -> None:
    config = read_config([str(TINY)], str(trained.run), [])
    assert config["model"]["network_config"]["params"]["hidden_size"] == 96
    assert config["args"]["load"] == str(trained.run)


def test_a_path_is_taken_as_it_is() -> None:
    """Not as YAML, in which these are a number, a mapping and a text with a comment."""
    for load in ("1000", "{a: b}", "run #2"):
        assert read_config([str(TINY)], load, [])["args"]["load"] == load


def test_a_checkpoint_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give --load RUN_DIRECTORY, or --base with configuration files"):
        read_config([], None, [])
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*nowhere; give a file"):
        read_config([], str(tmp_path / "nowhere"), [])
    file = tmp_path / "weights.pt"
    torch.save({"module": {"unknown.weight": torch.zeros(1)}}, file)
    with pytest.raises(ConfigError, match=r"the configuration names no model, and .*weights\.pt is no released one"):
        read_config([], str(file), [])


def test_print_config_shows_who_set_what_and_the_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    configs = ROOT / "configs"
    main(["--base", str(configs / "cogvideox_5b.yaml"), str(configs / "inference.yaml"), "--print-config"])
    lines = capsys.readouterr().out.splitlines()
    assert any("mode: inference" in line and "inference.yaml line" in line for line in lines)
    assert any("enabled: true" in line and "cogvideox_5b.yaml line" in line for line in lines)
    assert lines[-1] == ("# 49 frames of 480x720 -> 13 latent frames of 60x90 -> grid 13x30x45, 17,550 + 226 tokens")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --load RUN_DIRECTORY, or --base with configuration files"),
        (["--base", "none.yaml"], "cannot read the configuration none.yaml"),
        (["--base", str(TINY), "--prompt", "x"], "args.load is not set; give a file, an iteration folder or"),
        (["--base", str(TINY), "--load", "nowhere", "--prompt", "x"], "there is no checkpoint nowhere"),
        (["--base", str(TINY), "args.batch_sise=2"], "unknown key args.batch_sise .*; did you mean 'batch_size'"),
        (["--base", str(TINY)], "args.input_file is not set"),
    ],
)
def test_mistakes_end_in_one_message_and_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert len(output.err.splitlines()) == 1
    assert "error: " in output.err
    assert re.search(message, output.err)


def test_the_layout_of_training_is_not_that_of_sampling(tmp_path: Path) -> None:
    (tmp_path / "training_config.yaml").write_text(
        "args: {model_parallel_size: 2, sequence_parallel: true, batch_size: 3}\n"
    )
    config = read_config([], str(tmp_path), [])
    assert config["args"].plain() == {"batch_size": 3, "load": str(tmp_path)}
    config = read_config([], str(tmp_path), ["args.model_parallel_size=4"])
    assert config["args"]["model_parallel_size"] == 4
