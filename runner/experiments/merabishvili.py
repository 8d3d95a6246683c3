"""G. Merabishvili, A. Mohammad, M. F. Khan, "Enhancing CIFAR-10 Performance With Modified ResNet" (NYU, 2024).

Follows merabishvili.txt: "Architecture" and "Figure 1: Model Summary" (the layer table, 4,916,284 parameters),
"Methodology" (random crop and flip, per-channel mean and standard deviation, Adam, a learning rate scheduler),
"Introduction" (test accuracy 94.16%) and "Results" (60 epochs; validation accuracy 94.25% at a loss of 0.6888,
training accuracy 99.36% at a loss of 0.5652).

Not specified, assumed here:
- batch size 128 and peak learning rate 1e-3 of Adam;
- the scheduler: cosine decay to zero over all steps;
- label smoothing 0.1: not mentioned, but necessary for a training loss of 0.565 at 99.36% accuracy (the minimum
  of cross-entropy with smoothing 0.1 over ten classes is 0.500);
- crop padding 4; the last partial batch of an epoch is dropped;
- the validation split, whose size is unknown: this project trains on all 50,000 images.

Reproduce: runner train merabishvili --data data/cifar10. Time on one GPU: not measured.
"""

from runner.config.recipe import Adam, Architecture, Augment, Cosine, Experiment, Recipe, Reported

EXPERIMENTS = {
    "merabishvili": Experiment(
        architecture=Architecture("runner.models.resnet:merabishvili"),
        recipe=Recipe(
            epochs=60,
            batch_size=128,
            optimizer=Adam(1e-3),
            schedule=Cosine(),
            augment=Augment(crop_padding=4, flip="random"),
            label_smoothing=0.1,
        ),
        paper="merabishvili",
        reported=Reported(0.9416, "test", "last", "merabishvili.txt, Introduction"),
        parameters=4_916_284,
        macs=769_040_976,
    ),
}
