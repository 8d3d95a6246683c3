"""D. G. Podeti, "CNN's for Image Classification" (University of Adelaide).

Follows podeti.txt: sections 2.1 (architectures), 3.1 (augmentation), 4.1 (10 epochs, batch 128,
CosineAnnealingLR), 4.2 (grid search) and "Summary of Best Hyperparameters" (the rows below and their
validation accuracies, printed as "0.88%" and meaning 88 %).

Left open, and assumed here:
- the validation split: the text validates on a held-out part of the training set of unknown size. Ours train
  on all 50,000 images and report the test set;
- AlexNet's layout for 32×32: five convolutions and three linear layers as in torchvision's AlexNet, with 3×3
  kernels, stride 2 in the first, and 2×2 pooling (runner/models/alexnet.py);
- AlexNet's row names no augmentation: basic, like the other two best rows;
- MobileNetV2's "initial layers": stride 1 in the stem and in the first stage that strides, so that 32×32
  ends at 4×4 (runner/models/mobilenet.py);
- the scheduler steps per iteration, from the learning rate to zero over all steps.

Reproduce: runner train podeti-alexnet --data data/cifar10, likewise the others. Time on one GPU: not measured.
"""

from runner.recipe import Adam, Architecture, Augment, Cosine, Experiment, Recipe, Reported

BASIC = Augment(crop_padding=4, flip="random")
SUMMARY = "podeti.txt, Summary of Best Hyperparameters"

EXPERIMENTS = {
    "podeti-alexnet": Experiment(
        architecture=Architecture("runner.models.alexnet:AlexNet", {"dropout": 0.3}),
        recipe=Recipe(10, 128, Adam(1e-3, weight_decay=5e-4), Cosine(), BASIC),
        paper="podeti",
        reported=Reported(0.74, "validation", "best", SUMMARY),
        parameters=23_272_266,
        macs=62_742_528,
    ),
    "podeti-mobilenetv2": Experiment(
        architecture=Architecture("runner.models.mobilenet:mobilenet_v2", {"dropout": 0.2}),
        recipe=Recipe(10, 128, Adam(1e-2, weight_decay=1e-4), Cosine(), BASIC),
        paper="podeti",
        reported=Reported(0.80, "validation", "best", SUMMARY),
        parameters=2_236_682,
        macs=87_976_448,
    ),
}
