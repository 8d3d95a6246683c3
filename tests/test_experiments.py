import json
import math
import sys
import types
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode

from data_prep import beton, sources, synthetic
from data_prep.sources import Source
from runner import experiments
from runner.common.errors import UserError
from runner.common.files import sha256_of
from runner.config.recipe import SGD, Experiment
from runner.models import transfer
from runner.models.dynamic import DynamicBlock
from runner.models.ghasemi import Net, repeats
from runner.models.resnet import BasicBlock
from runner.models.speedrun import SpeedNet
from runner.models.transfer import Pretrained
from runner.training import optim
from tests.support.processes import module, on_ranks

ALL = experiments.load()


def conv(channels_in: int, channels: int, side: int = 3, bias: bool = False) -> int:
    """Parameters of a convolution."""
    return channels_in * channels * side**2 + bias * channels


def linear(size_in: int, size: int) -> int:
    """Parameters of a linear layer."""
    return size_in * size + size


def ghasemi(widths: list[int], sizes: list[int], norm: bool) -> int:
    """Convolutions with bias, optional batch norm after each, linear layers (ghasemi.txt, listing)."""
    pairs = zip([3, *widths], widths, strict=False)
    convolutions = sum(conv(a, b, bias=True) + norm * 2 * b for a, b in pairs)
    return convolutions + sum(linear(a, b) for a, b in pairwise(sizes))


def dynamic(channels_in: int, channels: int) -> int:
    """Soni's block: a linear layer with three outputs, three convolutions, batch norm, and a 1×1 shortcut if needed."""
    shortcut = (conv(channels_in, channels, 1) + 2 * channels) if channels_in != channels else 0
    return linear(channels_in, 3) + 3 * conv(channels_in, channels) + 2 * channels + shortcut


FIVE, SIX, SEVEN = [32, 64, 128, 256, 512], [32, 64, 128, 256, 512, 512], [32, 64, 128, 256, 256, 512, 512]
EIGHT = [32, 64, 128, 128, 256, 256, 512, 512]
TWELVE = [32, 32, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512]
THREE_LINEARS = [2048, 512, 256, 10]
RESNET_18 = 11_689_512 - linear(512, 1000) - conv(3, 64, 7) + conv(3, 64) + linear(512, 10)
RESNET_50 = 25_557_032 - linear(2048, 1000) - conv(3, 64, 7) + conv(3, 64) + linear(2048, 10)
MOBILENET_V2 = 3_504_872 - linear(1280, 1000) + linear(1280, 10)
VIT_LAYER = 4 * 192 + linear(192, 3 * 192) + linear(192, 192) + linear(192, 768) + linear(768, 192)
# From the texts of the papers, or torchvision's published counts with the changed layers replaced.
EXPECTED_PARAMETERS = {
    "merabishvili": 4_916_284,
    "soni-2": dynamic(3, 64) + dynamic(64, 64) + linear(64, 10),
    "soni-4": dynamic(3, 64) + dynamic(64, 64) + dynamic(64, 128) + dynamic(128, 128) + linear(128, 10),
    "ghasemi-net": ghasemi(FIVE, THREE_LINEARS, norm=True),
    "ghasemi-1": ghasemi(TWELVE, [2048, 512, 256, 128, 10], norm=False),
    **{f"ghasemi-{n}": ghasemi(TWELVE, [2048, 10], norm=False) for n in (2, 3)},
    **{f"ghasemi-{n}": ghasemi(TWELVE, THREE_LINEARS, norm=False) for n in (4, 5)},
    **{f"ghasemi-{n}": ghasemi(SEVEN, THREE_LINEARS, norm=False) for n in (6, 12)},
    **{f"ghasemi-{n}": ghasemi(SIX, THREE_LINEARS, norm=False) for n in (7, 8, 9)},
    **{f"ghasemi-{n}": ghasemi(FIVE, THREE_LINEARS, norm=False) for n in (10, 11)},
    "ghasemi-13": ghasemi(EIGHT, THREE_LINEARS, norm=False),
    **{f"ghasemi-{n}": ghasemi(EIGHT, THREE_LINEARS, norm=True) for n in (14, 15)},
    "podeti-resnet18": RESNET_18,
    "resnet18-dropout": RESNET_18,
    "podeti-alexnet": sum(conv(a, b, bias=True) for a, b in ((3, 64), (64, 192), (192, 384), (384, 256), (256, 256)))
    + linear(1024, 4096)
    + linear(4096, 4096)
    + linear(4096, 10),
    **dict.fromkeys(("podeti-mobilenetv2", "sivva-1", "sivva-2", "transfer-mobilenetv2"), MOBILENET_V2),
    "transfer-resnet18": 11_689_512 - linear(512, 1000) + linear(512, 10),
    "resnet50": RESNET_50,
    "efficientnet-b0": 5_288_548 - linear(1280, 1000) + linear(1280, 10),
    "vit-tiny-4": conv(3, 192, 4, bias=True) + 65 * 192 + 192 + 12 * VIT_LAYER + 2 * 192 + linear(192, 10),
    # The whitening filters are frozen, their biases are not; batch norm has only biases; the last layer has none.
    "speedrun": 24 + sum(conv(a, b) + conv(b, b) + 2 * b for a, b in ((24, 64), (64, 256), (256, 256))) + 256 * 10,
}


def test_every_experiment_has_an_expected_size() -> None:
    assert EXPECTED_PARAMETERS.keys() == ALL.keys()


@pytest.mark.parametrize("name", ALL)
def test_the_stated_size_is_the_models_and_the_expected_one(name: str) -> None:
    experiment = ALL[name]
    model = experiment.architecture.build().eval()
    side = experiment.recipe.resize or 32
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        logits = model(torch.zeros(1, 3, side, side))
    assert logits.shape == (1, 10)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert parameters == experiment.parameters == EXPECTED_PARAMETERS[name]
    assert counter.get_total_flops() == 2 * experiment.macs


DIFFERENT = {(str(e.architecture), str(e.recipe.optimizer)): name for name, e in ALL.items()}
# Of these, the one with the least computation for every pair of factory and optimizer class.
QUICKEST = {
    (ALL[name].architecture.factory, type(ALL[name].recipe.optimizer)): name
    for name in sorted(DIFFERENT.values(), key=lambda name: -ALL[name].macs)
}
# One of those that have the same kinds of layers. In bf16 no others, because processors without it are 30 times slower.
ONE_OF_A_KIND = [
    "efficientnet-b0", "ghasemi-11", "merabishvili", "podeti-alexnet", "podeti-resnet18", "soni-2", "speedrun",
    "vit-tiny-4",
]  # fmt: skip

OTHERS = sorted({*QUICKEST.values()} - {*ONE_OF_A_KIND})
QUICK = {name for name in QUICKEST.values() if ALL[name].macs < 10**9} - {"speedrun", "resnet18-dropout"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.every) for name in DIFFERENT.values()],
)
def test_the_loss_falls_on_a_fixed_batch(name: str) -> None:
    """Within 50 steps, for every pair of architecture and optimizer."""
    torch.manual_seed(0)
    experiment = ALL[name]
    model = experiment.architecture.build()
    optimizer = optim.build_optimizer(experiment.recipe.optimizer, model)
    pixels, labels = synthetic.draw(4, seed=0, split=0)
    images, labels = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1, torch.from_numpy(labels)
    if name == "speedrun":
        model.initialize(lambda count: images)
    if experiment.recipe.resize:
        images = torch.nn.functional.interpolate(images, size=96)  # smaller than in the recipe, to be faster
    model = model.to(memory_format=torch.channels_last)
    losses = []
    for _ in range(50):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if min(losses) < 0.8 * losses[0]:
            return
    pytest.fail(f"from {losses[0]} to {min(losses)}")


@pytest.mark.every
@pytest.mark.processes
@pytest.mark.parametrize(
    ("processes", "precision", "names"),
    [
        pytest.param(2, "fp32", ONE_OF_A_KIND, id="2-fp32"),
        pytest.param(2, "fp32", OTHERS, id="2-fp32-others"),
        pytest.param(1, "fp32", sorted(ALL), id="1-fp32"),
        pytest.param(2, "bf16", ONE_OF_A_KIND, id="2-bf16"),
    ],
)
def test_every_experiment_trains_two_steps_and_evaluates(
    small: Source, tmp_path: Path, processes: int, precision: str, names: list[str]
) -> None:
    few = replace(small, train=sources.limit_split(small.train, 2), test=sources.limit_split(small.test, 1))
    beton.write(few, tmp_path / "data")
    program = ["tests.support.programs.every_experiment", tmp_path / "data", tmp_path, precision, *names]
    done = module(*on_ranks(processes), *program)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "found.json").read_text())
    assert sorted(results) == names
    for name, result in results.items():
        assert (result["images"], result["steps"]) == (10, 2), name
        assert math.isfinite(result["loss"]), name
        if (processes, precision) == (1, "fp32"):
            assert result["change"] < 1e-4, name


def test_sonis_block_matches_its_formula() -> None:
    """ReLU(BN(Σ_k a_k · conv_k(x) + shortcut(x))), computed for each branch and image separately."""
    torch.manual_seed(0)
    for channels_in, channels in ((3, 64), (64, 64), (64, 128)):
        block = DynamicBlock(channels_in, channels, branches=3, gate="softmax")
        images = torch.randn(5, channels_in, 8, 8)
        filters = block.convolutions.weight.view(channels, 3, channels_in, 3, 3)
        rows = []
        for image in images:
            means = torch.stack([image[c].mean() for c in range(channels_in)])
            a = torch.softmax(block.attention[2].weight @ means + block.attention[2].bias, 0)
            branches = [torch.nn.functional.conv2d(image[None], filters[:, k], padding=1)[0] for k in range(3)]
            rows.append(sum(a[k] * branches[k] for k in range(3)))
        shortcut = block.shortcut(images) if channels_in != channels else images
        expected = torch.relu(block.norm(torch.stack(rows) + shortcut))
        torch.testing.assert_close(block(images), expected, atol=1e-5, rtol=1e-4)
        spread = filters[:, 0].std().item()
        assert spread == pytest.approx((2 / (9 * channels_in)) ** 0.5, rel=0.1)


def test_ghasemis_rule_yields_the_listed_network_for_5_3() -> None:
    """ghasemi.txt, listing: layer by layer."""
    model = Net(5, 3, norm=True, dropout=0.2)
    expected = []
    for k, (a, b) in enumerate(((3, 32), (32, 64), (64, 128), (128, 256), (256, 512))):
        expected += [("dropout", 0.2)] if k == 4 else []
        expected += [("conv", a, b, 3, 2 if k == 1 else 1, 1), ("relu",), ("norm", b)]
    layers = []
    for layer in model.features:
        match layer:
            case torch.nn.Conv2d():
                sizes = layer.kernel_size[0], layer.stride[0], layer.padding[0]
                layers.append(("conv", layer.in_channels, layer.out_channels, *sizes))
            case torch.nn.ReLU():
                layers.append(("relu",))
            case torch.nn.BatchNorm2d():
                layers.append(("norm", layer.num_features))
            case torch.nn.Dropout():
                layers.append(("dropout", layer.p))
    assert layers == expected
    assert model.pool.size == 2
    sizes = [(m.in_features, m.out_features) for m in model.classifier if isinstance(m, torch.nn.Linear)]
    assert sizes == [(2048, 512), (512, 256), (256, 10)]
    assert [repeats(n) for n in (5, 8, 12)] == [[1] * 5, [1, 1, 2, 2, 2], [2, 2, 2, 3, 3]]


def test_speednets_first_layer_whitens(small: Source) -> None:
    images = torch.from_numpy(small.train.images).permute(0, 3, 1, 2).float() / 127.5 - 1
    model = SpeedNet()
    model.initialize(lambda count: images[:count])
    out = model.whiten(images)[:, :12].transpose(0, 1).flatten(1)
    covariance = out @ out.T / out.shape[1]
    assert (covariance - torch.diag(covariance.diagonal())).abs().max() < 0.02
    assert covariance.diagonal().max() < 1.02
    assert covariance.diagonal()[-4:].min() > 0.9 or covariance.diagonal()[:4].min() > 0.9
    torch.testing.assert_close(model.whiten(images)[:, 12:], -model.whiten(images)[:, :12])


def test_imagenet_weights_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_images(count: int) -> torch.Tensor:
        raise AssertionError("must not be called: 5,000 images of 224×224 are 3 GB")

    model = Pretrained("resnet18", weights=str(tmp_path / "missing.pth"))
    with pytest.raises(UserError, match="expected a file, found none; download https"):
        model.initialize(no_images)
    state = torchvision.models.resnet18().state_dict()
    path = tmp_path / "resnet18.pth"
    torch.save(state, path)
    model.weights = str(path)
    with pytest.raises(UserError, match=r"expected SHA-256 f37072fd…, found"):
        model.initialize(no_images)
    weights = types.SimpleNamespace(url=f"https://nowhere.invalid/resnet18-{sha256_of(path)[:8]}.pth")
    monkeypatch.setitem(transfer.WEIGHTS, "resnet18", weights)
    model.initialize(no_images)
    assert torch.equal(model.features[0].weight, state["conv1.weight"])
    assert torch.equal(model.features[4][1].conv2.weight, state["layer1.1.conv2.weight"])
    assert torch.equal(model.features[7][0].bn2.running_var, state["layer4.0.bn2.running_var"])
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(UserError, match="cannot be downloaded"):
        Pretrained("resnet18").initialize(no_images)
    assert list((tmp_path / "hub").rglob("*.pth")) == []


def test_frozen_features_do_not_change() -> None:
    model = Pretrained("resnet18", frozen=True).train()
    before = {name: tensor.clone() for name, tensor in model.features.state_dict().items()}
    optimizer = optim.build_optimizer(SGD(0.1), model)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.features.state_dict().items())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == linear(512, 10)


def test_the_grids_contain_every_trial_once() -> None:
    grids = experiments.load_grids()
    podeti = grids["podeti-grid"]
    assert len(podeti) == 16 + 32 + 16
    assert len({str(trial) for trial in podeti.values()}) == 64
    trial = podeti["podeti-grid/alexnet-sgd-lr0.01-wd0.0001-advanced-dropout0.5"]
    assert trial.recipe.optimizer == SGD(0.01, weight_decay=1e-4)
    assert trial.recipe.augment.hue == 0.1
    assert trial.architecture.arguments == {"dropout": 0.5}
    best = podeti["podeti-grid/resnet18-adam-lr0.001-wd0.0001-basic"]
    assert best.recipe == ALL["podeti-resnet18"].recipe
    assert experiments.get("podeti-grid/resnet18-adam-lr0.001-wd0.0001-basic") == best
    assert list(grids["ghasemi-table"]) == [f"ghasemi-{n}" for n in range(1, 16)]
    with pytest.raises(UserError, match=r"podeti-grid/resnet18-adam-lr0\.001"):
        experiments.get("podeti-grid/resnet18-adam-lr0.002-wd0.0001-basic")


def test_merabishvili_matches_the_papers_table() -> None:
    """merabishvili.txt, Figure 1: every row's parameters, in order."""
    first, second, third = 39_204, 156_816, 627_264  # 3×3 convolutions at 66, 132 and 264 channels
    table = [1_782, 132]
    table += 3 * [first, 132, first, 132]
    table += [78_408, 264, second, 264, 8_712, 264] + 3 * [second, 264, second, 264]
    table += [313_632, 528, third, 528, 34_848, 528] + 2 * [third, 528, third, 528]
    table += [264 * 10 + 10]
    model = ALL["merabishvili"].architecture.build()
    sizes = [
        sum(p.numel() for p in module.parameters())
        for module in model.modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.BatchNorm2d | torch.nn.Linear)
    ]
    assert sizes == table
    assert sum(table) == 4_916_284
    assert sum(isinstance(module, BasicBlock) for module in model.modules()) == 10


def test_mobilenet_ends_at_four_by_four() -> None:
    model = ALL["podeti-mobilenetv2"].architecture.build()
    assert model.features(torch.zeros(1, 3, 32, 32)).shape == (1, 1280, 4, 4)


def test_alexnet_has_the_dropout_of_its_arguments() -> None:
    model = ALL["podeti-alexnet"].architecture.build()
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.3}


def test_an_unknown_name_gets_suggestions() -> None:
    with pytest.raises(UserError, match="podeti-alexnet"):
        experiments.get("podeti-alexnt")


def test_a_duplicate_name_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("twice")
    module.EXPERIMENTS = {"merabishvili": ALL["merabishvili"]}
    monkeypatch.setitem(sys.modules, "twice", module)
    with pytest.raises(ValueError, match="already exists"):
        experiments.load(("twice",))


def test_every_paper_documents_its_sources_and_assumptions() -> None:
    for paper in {f"runner.experiments.{e.paper}" for e in ALL.values()}:
        text = sys.modules[paper].__doc__
        assert all(part in text for part in ("Follows", "Not specified", "Reproduce:")), paper
    assert all(isinstance(e, Experiment) and (e.reported or e.paper == "beyond") for e in ALL.values())
