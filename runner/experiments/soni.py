"""A. Soni, S. Jain, dynamic-convolution blocks on CIFAR-10 (soni.txt).

Follows soni.txt: lines 25-45 (the block, the backbone, the classifier), 31 and 47 (Model 1: two blocks, RMSprop
1e-2, batch 64, 30 epochs), 59-63 (Model 2: four blocks from 64 to 128 channels, dropout, RMSprop 1e-3, batch 128,
40 epochs) and the tables on 83-95: 52.92% at epoch 30, 80.79% at epoch 38 (80.40% at epoch 40), on the test set.

Not specified, assumed here:
- the block is the dynamic convolution of Y. Chen et al. 2020 with K = 3 branches in every block (the text states
  three outputs for the first), combined as the sum of a_k · conv_k(x);
- the activation of a: softmax, as in Chen et al. With ReLU, all three can be 0
  (`--architecture.arguments.gate relu`);
- the shortcut between equal channels: the identity;
- channels of the four blocks: 64, 64, 128, 128; dropout 0.5; one 2×2 max pooling after the last block;
- normalization with mean and standard deviation 0.5, cross-entropy, no weight decay, the last partial batch dropped,
  torch's defaults for the other settings of RMSprop.
Trained in full, Model 1 exceeds the table by 11 points (runner/benchmarks/README.md says what that may mean).
The text also reports 52.45% at epoch 26 for Model 1; the table takes precedence.

Reproduce: runner train soni-2 --data data/cifar10, likewise soni-4. Time on one GPU: not measured.
"""

from runner.config.recipe import Architecture, Experiment, Recipe, Reported, RMSprop

EXPERIMENTS = {
    "soni-2": Experiment(
        architecture=Architecture("runner.models.dynamic:soni_2", {"gate": "softmax"}),
        recipe=Recipe(30, 64, RMSprop(1e-2), normalize="half"),
        paper="soni",
        reported=Reported(0.5292, "test", "last", "soni.txt, Model 1, table"),
        parameters=117_209,
        macs=118_752_073,
    ),
    "soni-4": Experiment(
        architecture=Architecture("runner.models.dynamic:soni_4", {"dropout": 0.5, "gate": "softmax"}),
        recipe=Recipe(40, 128, RMSprop(1e-3), normalize="half"),
        paper="soni",
        reported=Reported(0.8079, "test", "best", "soni.txt, Model 2, table"),
        parameters=790_943,
        macs=806_619_145,
    ),
}
