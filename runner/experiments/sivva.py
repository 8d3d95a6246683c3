"""S. Sivva et al., transfer learning with MobileNetV2 on CIFAR-10 (sivva.txt).

Follows sivva.txt: lines 19-20 (50,000 and 10,000 images, resized to 224, ImageNet's mean and standard deviation), 36-48
(Model 1: pretrained MobileNetV2 with global max pooling, Adam 1e-3, batch 32, 5 epochs) and 68-76 (Model 2: global
average pooling, SGD 1e-2 with momentum 0.8). Reported on lines 52-58 (train 75%, test 73%) and 80-84 (88%, 85%).

Not specified, assumed here:
- whether the features are frozen: all weights are trained (`--architecture.arguments.frozen` trains only the last
  layer);
- the head: torchvision's, dropout 0.2 and one linear layer;
- the pretrained weights: torchvision's IMAGENET1K_V1;
- interpolation: bilinear;
- weight decay: none; the last partial batch of an epoch: dropped. The title also mentions ResNet, but all reported
  results are MobileNetV2's.

Reproduce: runner train sivva-2 --data data/cifar10, likewise sivva-1. Time on one GPU: not measured.
"""

from typing import Literal

from runner.config.recipe import SGD, Adam, Architecture, Argument, Experiment, Optimizer, Recipe, Reported


def _experiment(pooling: Literal["max", "average"], optimizer: Optimizer, accuracy: float, lines: str) -> Experiment:
    arguments: dict[str, Argument] = {
        "name": "mobilenet_v2",
        "weights": "",
        "pooling": pooling,
        "dropout": 0.2,
        "frozen": False,
    }
    return Experiment(
        architecture=Architecture("runner.models.transfer:Pretrained", arguments),
        recipe=Recipe(5, 32, optimizer, normalize="imagenet", resize=224),
        paper="sivva",
        reported=Reported(accuracy, "test", "last", f"sivva.txt, {lines}"),
        parameters=2_236_682,
        macs=299_507_072,
    )


EXPERIMENTS = {
    "sivva-1": _experiment("max", Adam(1e-3), 0.73, "Model 1"),
    "sivva-2": _experiment("average", SGD(1e-2, momentum=0.8), 0.85, "Model 2"),
}
