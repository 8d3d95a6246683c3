"""D. G. Podeti, "CNN's for Image Classification" (University of Adelaide).

Follows podeti.txt: sections 2.1 (architectures), 3.1 (augmentation), 4.1 (10 epochs, batch 128,
CosineAnnealingLR), 4.2 (grid search) and "Summary of Best Hyperparameters" (the rows below and their
validation accuracies, printed as "0.88%" and meaning 88%).

Not specified, assumed here:
- the size of the validation split, held out of the training set: 5,000 images;
- AlexNet's layout for 32×32: five convolutions and three linear layers as in torchvision's AlexNet, with 3×3
  kernels, stride 2 in the first, and 2×2 pooling (runner/models/alexnet.py);
- augmentation of AlexNet's best row, which mentions none, unlike the other two: none;
- MobileNetV2's "initial layers": stride 1 in the stem and in the first strided stage, so that the last feature map
  is 4×4 (runner/models/mobilenet.py);
- ResNet-18's first convolution: 3×3 with stride 1, and no pooling after it, following the text;
- the strengths of color jitter in "advanced" augmentation: 0.2 each, and 0.1 for hue; momentum of SGD: 0.9;
- the last partial batch of an epoch: dropped;
- the scheduler: per step, from the peak learning rate to zero over all steps.

`podeti-grid` is the grid search of section 4.2: optimizer, learning rate, weight decay and augmentation for all
three models, and dropout for AlexNet: 64 trials.

Reproduce: runner train podeti-alexnet --data data/cifar10, likewise the others and the trials of the grid. Time
on one GPU: not measured.
"""

from dataclasses import replace
from itertools import product

from runner.config.recipe import SGD, Adam, Architecture, Augment, Cosine, Experiment, Optimizer, Recipe, Reported

BASIC = Augment(crop_padding=4, flip="random")
ADVANCED = replace(BASIC, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1)
SUMMARY = "podeti.txt, Summary of Best Hyperparameters"
HELD_OUT = 5_000


def _recipe(optimizer: Optimizer, augment: Augment) -> Recipe:
    return Recipe(10, 128, optimizer, Cosine(), augment, validation=HELD_OUT)


EXPERIMENTS = {
    "podeti-resnet18": Experiment(
        architecture=Architecture("runner.models.resnet_torchvision:resnet18", {"dropout": 0.0}),
        recipe=_recipe(Adam(1e-3, weight_decay=1e-4), BASIC),
        paper="podeti",
        reported=Reported(0.88, "validation", "best", SUMMARY),
        parameters=11_173_962,
        macs=555_422_720,
    ),
    "podeti-alexnet": Experiment(
        architecture=Architecture("runner.models.alexnet:AlexNet", {"dropout": 0.3}),
        recipe=_recipe(Adam(1e-3, weight_decay=5e-4), Augment()),
        paper="podeti",
        reported=Reported(0.74, "validation", "best", SUMMARY),
        parameters=23_272_266,
        macs=62_742_528,
    ),
    "podeti-mobilenetv2": Experiment(
        architecture=Architecture("runner.models.mobilenet:mobilenet_v2", {"dropout": 0.2}),
        recipe=_recipe(Adam(1e-2, weight_decay=1e-4), BASIC),
        paper="podeti",
        reported=Reported(0.80, "validation", "best", SUMMARY),
        parameters=2_236_682,
        macs=87_976_448,
    ),
}


def _grid() -> dict[str, Experiment]:
    """All trials by name, such as `podeti-grid/alexnet-adam-lr0.001-wd0.0005-basic-dropout0.3`."""
    trials = {}
    for model in ("resnet18", "alexnet", "mobilenetv2"):
        base = EXPERIMENTS[f"podeti-{model}"]
        dropouts = (0.3, 0.5) if model == "alexnet" else (None,)
        axes = (("sgd", "adam"), (1e-3, 1e-2), (5e-4, 1e-4), ("basic", "advanced"), dropouts)
        for optimizer, lr, decay, augment, dropout in product(*axes):
            name = f"podeti-grid/{model}-{optimizer}-lr{lr:g}-wd{decay:g}-{augment}"
            architecture = base.architecture
            if dropout is not None:
                name += f"-dropout{dropout:g}"
                architecture = replace(architecture, arguments={"dropout": dropout})
            kind = SGD if optimizer == "sgd" else Adam
            recipe = _recipe(kind(lr, weight_decay=decay), BASIC if augment == "basic" else ADVANCED)
            trials[name] = replace(base, architecture=architecture, recipe=recipe, reported=None)
    return trials


GRIDS = {"podeti-grid": _grid()}
