"""Experiments beyond the papers: their future work, and current methods.

Follows the future work of podeti.txt (ResNet-50, Vision Transformers, dropout in ResNet-18, transfer learning),
sivva.txt (EfficientNet, ResNet) and soni.txt, with modern recipes: Nesterov momentum or AdamW, warmup, cosine decay,
label smoothing, and mixup and CutMix for the transformer.

Not specified, assumed here: the papers report no results, so there is none to reproduce. Before training,
transfer learning loads torchvision's ImageNet weights from torch's cache or a file, or downloads them, and checks them
against the hash in the file name.

`speedrun` aims at 94% accuracy with test-time augmentation in the shortest time: images on the device, an
alternating flip, a whitening first layer, Muon for filters, label smoothing, and linear decay of the learning rate.
The 94% refers to the official images.

Reproduce: runner train speedrun --data data/cifar10, likewise the others. Time on one GPU: not measured.
"""

from runner.config.recipe import (
    SGD,
    AdamW,
    Architecture,
    Argument,
    Augment,
    Cosine,
    Experiment,
    Linear,
    Muon,
    Recipe,
)

BASIC = Augment(crop_padding=4, crop_fill="reflect", flip="random")


def _residual(factory: str, arguments: dict[str, Argument], parameters: int, macs: int) -> Experiment:
    recipe = Recipe(
        epochs=30,
        batch_size=512,
        optimizer=SGD(0.4, nesterov=True, weight_decay=5e-4),
        schedule=Cosine(warmup=0.1),
        augment=BASIC,
        label_smoothing=0.1,
    )
    return Experiment(Architecture(factory, arguments), recipe, "beyond", None, parameters, macs)


def _transfer(name: str, parameters: int, macs: int) -> Experiment:
    recipe = Recipe(
        epochs=5,
        batch_size=128,
        optimizer=SGD(0.02, nesterov=True, weight_decay=1e-4),
        schedule=Cosine(warmup=0.1),
        augment=Augment(flip="random"),
        normalize="imagenet",
        resize=224,
        label_smoothing=0.1,
    )
    arguments: dict[str, Argument] = {
        "name": name,
        "weights": "",
        "pooling": "average",
        "dropout": 0.2,
        "frozen": False,
    }
    architecture = Architecture("runner.models.transfer:Pretrained", arguments)
    return Experiment(architecture, recipe, "beyond", None, parameters, macs)


EXPERIMENTS = {
    "resnet18-dropout": _residual(
        "runner.models.resnet_torchvision:resnet18", {"dropout": 0.2}, 11_173_962, 555_422_720
    ),
    "resnet50": _residual("runner.models.resnet_torchvision:resnet50", {"dropout": 0.0}, 23_520_842, 1_297_829_888),
    "efficientnet-b0": Experiment(
        architecture=Architecture("runner.models.modern:efficientnet_b0", {"dropout": 0.2}),
        recipe=Recipe(
            epochs=60,
            batch_size=512,
            optimizer=AdamW(3e-3, weight_decay=0.05),
            schedule=Cosine(warmup=0.1),
            augment=BASIC,
            label_smoothing=0.1,
            ema=0.998,
        ),
        paper="beyond",
        parameters=4_020_358,
        macs=31_979_392,
    ),
    "vit-tiny-4": Experiment(
        architecture=Architecture("runner.models.modern:vit_tiny_4", {"dropout": 0.0}),
        recipe=Recipe(
            epochs=100,
            batch_size=512,
            optimizer=AdamW(1e-3, weight_decay=0.05),
            schedule=Cosine(warmup=0.1),
            augment=Augment(
                crop_padding=4, flip="random", brightness=0.2, contrast=0.2, saturation=0.2, mixup=0.2, cutmix=1.0
            ),
            label_smoothing=0.1,
            clip_gradient=1.0,
            channels_last=False,
        ),
        paper="beyond",
        parameters=5_362_762,
        macs=365_107_584,
    ),
    "transfer-resnet18": _transfer("resnet18", 11_181_642, 1_813_566_464),
    "transfer-mobilenetv2": _transfer("mobilenet_v2", 2_236_682, 299_507_072),
    "speedrun": Experiment(
        architecture=Architecture("runner.models.speedrun:SpeedNet"),
        recipe=Recipe(
            epochs=8,
            batch_size=2000,
            optimizer=Muon(
                0.24,
                momentum=0.6,
                unit_rows=True,
                other_lr=0.1,
                other_momentum=0.85,
                other_weight_decay=1e-4,
            ),
            schedule=Linear(),
            augment=Augment(crop_padding=2, crop_fill="reflect", flip="alternating"),
            label_smoothing=0.2,
            test_augmentation="flip-shift",
        ),
        paper="beyond",
        parameters=1_971_352,
        macs=118_147_360,
    ),
}
