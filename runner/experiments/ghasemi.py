"""F. Ghasemi, plain convolutional networks of several depths on CIFAR-10 (ghasemi.txt).

Follows ghasemi.txt: lines 101-114 (mean and deviation 0.5, no augmentation, batch 60), 128-165 (the listed `Net`),
215-243 (cross-entropy, Adam 5e-4, 30 epochs, constant rate) and the table on 367-382 (fifteen rows, each with
depth, optimizer, rate, batch, epochs, regularisation, normalisation and accuracy).

Left open, and assumed here:
- a depth "c-f" is c convolutions and f linear layers. Only 5-3 is listed; the rule for the others is that each of
  the five widths gets the same number of convolutions and the widest get what is left over
  (runner/models/ghasemi.py);
- "normalization" in the table is batch norm: none in rows 1 to 13. Those networks begin as He et al. initialise
  them: from torch's default, row 3's twelve convolutions under SGD at 5e-4 would stay where they are;
- SGD's momentum: 0.9. Weight decay where a row names it: 1e-3. Dropout where a row names it: 0.2, where the listing
  has it;
- 84 % for the listed network: the text gives it for its best model, which it lists as 5-3 and tabulates as 8-3.
The printed program evaluates without changing the network's mode, so dropout and batch norm were in training mode
there; ours are in evaluation mode. Accuracies are printed as whole numbers.

Reproduce: runner train ghasemi-net --data data/cifar10, likewise ghasemi-1 to ghasemi-15. Time on one GPU: not
measured.
"""

from runner.recipe import SGD, Adam, Architecture, Experiment, Recipe, Reported

# Trainable parameters without batch norm, and multiply-accumulates, by depth; a test counts both.
SIZES = {
    (5, 3): (2_751_562, 403_147_264),
    (6, 3): (5_111_370, 1_007_127_040),
    (7, 3): (5_701_450, 1_158_121_984),
    (8, 3): (5_849_034, 1_195_870_720),
    (12, 1): (7_682_602, 1_968_558_080),
    (12, 3): (8_845_098, 1_969_719_808),
    (12, 4): (8_876_714, 1_969_751_296),
}
NORM = {5: 1_984, 8: 3_776}  # batch norm's parameters, by convolutions

# Depth, optimizer, batch, epochs, regularisation, batch norm, accuracy in percent.
TABLE = (
    ((12, 4), Adam(1e-3), 64, 25, "", False, 69),
    ((12, 1), Adam(5e-4), 99, 30, "", False, 73),
    ((12, 1), SGD(5e-4), 99, 30, "", False, 67),
    ((12, 3), Adam(5e-4), 99, 30, "", False, 73),
    ((12, 3), Adam(5e-4), 60, 18, "", False, 74),
    ((7, 3), Adam(5e-4), 60, 18, "", False, 79),
    ((6, 3), Adam(5e-4), 60, 30, "", False, 80),
    ((6, 3), Adam(1e-4), 60, 20, "", False, 66),
    ((6, 3), Adam(5e-4, weight_decay=1e-3), 60, 20, "", False, 69),
    ((5, 3), Adam(5e-4, weight_decay=1e-3), 60, 20, "", False, 66),
    ((5, 3), Adam(5e-4), 60, 20, "dropout", False, 80),
    ((7, 3), Adam(5e-4), 60, 20, "dropout", False, 81),
    ((8, 3), Adam(5e-4), 60, 20, "dropout", False, 81),
    ((8, 3), Adam(5e-4), 60, 20, "dropout", True, 83),
    ((8, 3), Adam(5e-4), 60, 20, "", True, 84),
)


def _experiment(
    depth: tuple[int, int],
    optimizer: Adam | SGD,
    batch_size: int,
    epochs: int,
    regularisation: str,
    norm: bool,
    percent: int,
    source: str,
) -> Experiment:
    arguments = {
        "convolutions": depth[0],
        "linears": depth[1],
        "norm": norm,
        "dropout": 0.2 if regularisation == "dropout" else 0.0,
    }
    parameters, macs = SIZES[depth]
    return Experiment(
        architecture=Architecture("runner.models.ghasemi:Net", arguments),
        recipe=Recipe(epochs, batch_size, optimizer, normalize="half", drop_last=False),
        paper="ghasemi",
        reported=Reported(percent / 100, "test", "last", f"ghasemi.txt, {source}"),
        parameters=parameters + (NORM[depth[0]] if norm else 0),
        macs=macs,
    )


ROWS = {f"ghasemi-{n}": _experiment(*row, f"table, row {n}") for n, row in enumerate(TABLE, 1)}
EXPERIMENTS = {
    "ghasemi-net": _experiment((5, 3), Adam(5e-4), 60, 30, "dropout", True, 84, "listing and conclusion"),
    **ROWS,
}
GRIDS = {"ghasemi-table": ROWS}
