"""Models of timm by name: found, built for the dataset, started from a file of weights, trained and deployed."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from launch import trials
from runner import cli, experiments
from runner.common.errors import UserError
from runner.common.files import sha256_of
from runner.config.recipe import Architecture, Argument
from runner.config.trust import TrustedCode
from runner.experiments import timm as timm_experiments
from runner.models import norm
from runner.training.model import build_for, build_model, count_parameters_and_macs
from tests.support.processes import launch, module, on_ranks, runner

SMALL = "lcnet_035"  # 0.4 M parameters


def names_printed(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    cli.parse(["list", *words])({})
    return capsys.readouterr().out.splitlines()


def test_names_are_those_of_timm(capsys: pytest.CaptureFixture[str]) -> None:
    expected = [f"timm/{name}" for name in timm.list_models() if name.startswith("convnext_a")]
    assert len(expected) >= 3
    assert names_printed(capsys, "--timm", "convnext_a*") == expected
    assert names_printed(capsys, "--timm", "timm/convnext_a*") == expected
    assert json.loads(names_printed(capsys, "--timm", "convnext_a*", "--json")[0]) == expected
    with pytest.raises(UserError, match=r"--timm 'nope\*': matches no model"):
        names_printed(capsys, "--timm", "nope*")
    with pytest.raises(UserError, match=r"--timm \* and --grids: expected one of them"):
        names_printed(capsys, "--timm", "*", "--grids")


UNKNOWN = ["timm/convnext_ato", "timm/convnext_atto.d2_in1k", "timm//etc/passwd", "timm/hf-hub:a/b"]


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_name_gets_suggestions(name: str) -> None:
    with pytest.raises(UserError, match=r"no such model of timm; expected timm/\w+.* \(all: runner list --timm"):
        experiments.get(name)


def test_a_pattern_selects_trials_of_a_sweep(small_data: Path) -> None:
    options = ["--data", str(small_data), "--lr", "0.01"]
    found = trials.expand(["timm/convnext_atto*"], [0, 1], None, options)
    assert {trial.config.experiment for trial in found} == {"timm/convnext_atto", "timm/convnext_atto_ols",
                                                            "timm/convnext_atto_rms"}  # fmt: skip
    assert len({trial.run.folder for trial in found}) == 6


def test_a_model_is_built_for_classes_and_image_size() -> None:
    for name, size in (("vit_tiny_patch16_224", 48), (SMALL, 64)):
        architecture = experiments.get(f"timm/{name}").architecture
        assert count_parameters_and_macs(build_for(architecture, 3, (3, size, size)), (3, size, size)) > (10**5, 10**6)
    at_32, at_64 = (
        count_parameters_and_macs(build_for(architecture, 10, (3, side, side)), (3, side, side)) for side in (32, 64)
    )
    assert at_32[0] == at_64[0] == sum(p.numel() for p in timm.create_model(SMALL, num_classes=10).parameters())
    assert at_32[1] < at_64[1]


def test_images_smaller_than_the_stride_need_a_resize() -> None:
    with pytest.raises(UserError, match=r"expected images of at least 32 pixels.*--recipe\.resize 32"):
        build_for(experiments.get(f"timm/{SMALL}").architecture, 10, (3, 28, 28))


def test_arguments_reach_the_model_or_are_refused() -> None:
    def built(name: str, **arguments: Argument) -> torch.nn.Module:
        return Architecture(f"runner.models.timm:{name}", arguments).build()

    assert built(SMALL, drop_rate=0.25).drop_rate == 0.25
    rates = [module.drop_prob for module in built("convnext_atto", drop_path_rate=0.25).modules()
             if isinstance(module, timm.layers.DropPath)]  # fmt: skip
    assert max(rates) == pytest.approx(0.25)
    with pytest.raises(UserError, match="unexpected keyword argument 'drop_path_rate'"):
        built("dla34", drop_path_rate=0.25)


def test_a_run_folder_may_name_models_of_timm_and_nothing_else_there(tmp_path: Path) -> None:
    experiments.check_trusted(experiments.get(f"timm/{SMALL}").architecture, TrustedCode(), tmp_path)
    for name in ("nope", "load_weights", "timm", "sha256_of", "Path", "_private"):
        with pytest.raises(UserError, match=r"expected a model of runner\.models"):
            experiments.check_trusted(Architecture(f"runner.models.timm:{name}"), TrustedCode(), tmp_path)


@pytest.mark.parametrize("name", ["hf-hub:timm/lcnet_050.ra2_in1k", "local-dir:/tmp", "lcnet_050.ra2_in1k"])
def test_a_run_folder_cannot_start_a_download(name: str) -> None:
    arguments: dict[str, Argument] = {"name": name, "drop_rate": 0.0, "drop_path_rate": 0.0, "weights": ""}
    with pytest.raises(UserError, match="expected a model that timm lists"):
        Architecture("runner.models.timm:build", arguments).build()


def weights_of(name: str, path: Path, classes: int) -> dict[str, torch.Tensor]:
    """Writes random weights in the layout of timm's files."""
    torch.manual_seed(9)
    state = timm.create_model(name, num_classes=classes).state_dict()
    if path.suffix == ".safetensors":
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    return state


def start_from(name: str, path: Path, classes: int = 10) -> dict[str, torch.Tensor]:
    """The initial weights of `--pretrained PATH`."""
    words = [f"timm/{name}", "--data", "nowhere", "--pretrained", str(path)]
    config = cli.parse_train(words)
    model = build_model(config.architecture, config.recipe, 0, no_images, None, classes)
    return model.state_dict()


def no_images(count: int) -> torch.Tensor:
    raise AssertionError("weights of a file are not fitted to images")


def test_batch_norm_with_an_activation_is_not_synchronized() -> None:
    """A conversion would lose the activation, which timm computes in the same layer."""
    with pytest.raises(UserError, match=r"expected a model with nn\.BatchNorm2d, found timm\..*BatchNormAct2d"):
        norm.convert_sync_batch_norm(timm.create_model(SMALL))


def test_a_resumed_run_does_not_need_the_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    weights_of(SMALL, path, classes=1000)
    config = cli.parse_train([f"timm/{SMALL}", "--data", "nowhere", "--pretrained", str(path)])
    path.unlink()
    with pytest.raises(UserError, match="found none"):
        build_model(config.architecture, config.recipe, 0, no_images, None)
    build_model(config.architecture, config.recipe, 0, no_images, None, resumed=True)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_training_starts_from_a_file_of_weights(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    state = weights_of(SMALL, path, classes=1000)
    started = start_from(SMALL, path)
    assert started["classifier.weight"].shape[0] == 10
    rest = started.keys() - {"classifier.weight", "classifier.bias"}
    assert len(rest) > 100
    assert all(torch.equal(started[key], state[key]) for key in rest)
    again = start_from(SMALL, path)
    assert all(torch.equal(tensor, again[key]) for key, tensor in started.items())
    features = path.with_name(f"features{suffix}")
    (save_file if suffix == ".safetensors" else torch.save)({key: state[key] for key in rest}, features)
    started = start_from(SMALL, features)
    assert all(torch.equal(started[key], state[key]) for key in rest)
    same_classes = start_from(SMALL, path, classes=1000)
    assert all(torch.equal(same_classes[key], tensor) for key, tensor in state.items())


def test_a_model_of_one_image_size_adapts_the_weights(tmp_path: Path) -> None:
    name, path = "vit_tiny_patch16_224", tmp_path / "weights.pth"
    state = weights_of(name, path, classes=1000)
    started = start_from(name, path)
    assert started["pos_embed"].shape == (1, 5, 192)  # 2×2 patches and the class token, from 14×14
    assert torch.equal(started["blocks.3.mlp.fc1.weight"], state["blocks.3.mlp.fc1.weight"])


def test_other_files_are_refused(tmp_path: Path) -> None:
    other, cut = tmp_path / "other.pth", tmp_path / "cut.safetensors"
    weights_of("lcnet_050", other, classes=1000)
    with pytest.raises(UserError, match=rf"--pretrained {other}: expected weights of timm/{SMALL}: .*size mismatch"):
        start_from(SMALL, other)
    state = weights_of(SMALL, cut, classes=1000)
    del state["conv_stem.weight"]
    save_file(state, cut)
    with pytest.raises(UserError, match=r"conv_stem\.weight"):
        start_from(SMALL, cut)
    cut.write_bytes(cut.read_bytes()[:1000])
    with pytest.raises(UserError, match=f"--pretrained {cut}: expected weights of timm/{SMALL}"):
        start_from(SMALL, cut)
    with pytest.raises(UserError, match="expected a file with weights, found none"):
        start_from(SMALL, tmp_path / "none.pth")
    with pytest.raises(UserError, match=r"--pretrained: .*has no pretrained weights"):
        cli.parse_train(["soni-2", "--data", "nowhere", "--pretrained", str(other)])
    both = ["--pretrained", str(other), "--architecture.arguments.weights", str(other)]
    with pytest.raises(UserError, match="--pretrained and --start-from: expected one of them"):
        cli.parse_train([f"timm/{SMALL}", "--data", "d", "--pretrained", str(other), "--start-from", "run"]).check()
    with pytest.raises(UserError, match="expected one of them"):
        cli.parse_train([f"timm/{SMALL}", "--data", "nowhere", *both])


def test_a_hash_in_the_name_of_a_file_is_compared(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    weights_of(SMALL, path, classes=1000)
    stated = next(digest for end in range(8, 64) if re.search("[a-f]", digest := sha256_of(path)[:end]))
    named = path.rename(tmp_path / f"{SMALL}-{stated}.pth")
    assert start_from(SMALL, named)
    wrong = named.rename(tmp_path / f"{SMALL}-0000000f.pth")
    with pytest.raises(UserError, match=r"expected SHA-256 0000000f…, found"):
        start_from(SMALL, wrong)
    assert start_from(SMALL, wrong.rename(tmp_path / f"{SMALL}-20240531.pth"))  # a date


def test_commands_without_timm_do_not_import_it() -> None:
    program = "import sys, runner.experiments as e; e.get('soni-2'); print({'timm', 'torch'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.every
@pytest.mark.processes
def test_a_pretrained_model_is_trained_resumed_and_scored(small_data: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    weights_of(SMALL, weights, classes=1000)
    name, run = f"timm/{SMALL}", tmp_path / f"timm/{SMALL}" / "seed-0"
    words = ["train", name, "--data", small_data, "--runs", tmp_path, "--batch-size", 64]
    done = launch(2, *words, "--max-steps", 3, "--checkpoint-every", 2, "--pretrained", weights)
    assert done.returncode == 0, done.stderr
    recorded = json.loads((run / "run.json").read_text())
    assert recorded["overrides"]["architecture.arguments.weights"] == ["", str(weights)]
    assert recorded["parameters"] > 10**5
    assert recorded["macs"] > 10**5
    weights.unlink()  # needed once
    done = runner("eval", run, "--device", "cpu")
    assert done.returncode == 0, done.stderr


# Twelve families: convolutions, transformers, MLPs, and mixtures of them. timm has models with few layers of some.
FAMILIES = ["edgenext_xx_small", "ghostnet_050", "mixer_s32_224", "mobilenetv3_small_100", "poolformer_s12",
            "pvt_v2_b0", "regnetx_002", "test_convnext", "test_efficientnet", "test_nfnet", "test_resnet", "test_vit",
            ]  # fmt: skip


@pytest.mark.every
@pytest.mark.processes
@pytest.mark.parametrize("ranks", [1, 2])
def test_twelve_families_train_two_steps(ranks: int, small_data: Path, tmp_path: Path) -> None:
    names = [timm_experiments.PREFIX + name for name in FAMILIES]
    done = module(*on_ranks(ranks), "tests.support.programs.every_experiment", small_data, tmp_path, "fp32", *names)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "found.json").read_text())
    assert sorted(results) == sorted(names)
    for name, result in results.items():
        assert result["steps"] == 2, name
        if ranks == 1:
            assert result["change"] < 1e-4, name


# An export takes minutes, so that of the others, whose layers are mostly those of these, only the training is tested.
EXPORTED = ["mixer_s32_224", "poolformer_s12", "test_convnext", "test_efficientnet", "test_nfnet", "test_resnet",
            "test_vit"]  # fmt: skip


@pytest.mark.every
@pytest.mark.parametrize("name", EXPORTED)
def test_families_are_exported_scored_and_built(name: str, small_data: Path, tmp_path: Path) -> None:
    """After two steps nothing is learned, so int8 may differ from the model; then the gate says so."""
    run = tmp_path / f"timm/{name}" / "seed-0"
    options = ["--data", small_data, "--runs", tmp_path, "--max-steps", 2, "--batch-size", 64, "--device", "cpu"]
    for words in (
        ["train", f"timm/{name}", *options],
        ["export", run, "--precision", "fp32", "fp16", "int8", "--calibration", 64],
        ["engine", run, "--precision", "fp32", "fp16", "int8"],
    ):
        done = runner(*words)
        assert done.returncode == 0, done.stderr
    runner("parity", run, "--device", "cpu")
    rows = {row["precision"]: row for row in json.loads((run / "deploy/parity.json").read_text())["rows"]}
    assert rows.keys() == {"fp32", "fp16", "int8"}
    assert rows["fp32"]["passed"]
    assert len(list(run.glob("deploy/*.engine"))) == 3
    shutil.rmtree(run)
