"""G. Merabishvili, A. Mohammad, M. F. Khan, "Enhancing CIFAR-10 Performance With Modified ResNet" (NYU, 2024).

Follows merabishvili.txt: "Architecture" and "Figure 1: Model Summary" (the layer table, 4,916,284 parameters),
"Methodology" (random crop and flip, dataset mean and deviation, Adam, a learning rate scheduler) and "Results"
(60 epochs; test 94.16 %, best validation 94.25 %, training 99.36 % at losses 0.6888 and 0.5652).

Left open, and assumed here:
- batch size 128 and peak learning rate 1e-3 of Adam: neither is given;
- the scheduler: a cosine to zero over all steps;
- label smoothing 0.1: not named, but a training loss of 0.565 at 99.36 % accuracy cannot be without it (the
  least cross-entropy at smoothing 0.1 over ten classes is 0.500);
- crop padding 4; the last partial batch of an epoch is left out;
- the validation split of unknown size: ours train on all 50,000 images.

Reproduce: runner train merabishvili --data data/cifar10. Time on one GPU: not measured.
"""

from runner.recipe import Adam, Architecture, Augment, Cosine, Experiment, Recipe, Reported

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
