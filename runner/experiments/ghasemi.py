"""F. Ghasemi, plain convolutional networks of several depths on CIFAR-10 (ghasemi.txt).

Follows ghasemi.txt: lines 101-114 (mean and standard deviation 0.5, no augmentation, batch size 60), 128-165 (the
listed `Net`), 215-243 (cross-entropy, Adam 5e-4, 30 epochs, constant learning rate) and the table on 367-382
(fifteen rows of depth, optimizer, learning rate, batch size, epochs, regularization, normalization and accuracy).

Not specified, assumed here:
- a depth "c-f" is c convolutions and f linear layers. Only 5-3 is listed; for the others each of the five widths
  gets the same number of convolutions, and the widest get the remainder (runner/models/ghasemi.py);
- "normalization" in the table is batch norm, absent in rows 1 to 13. Those networks use He initialization: with
  torch's default, row 3's twelve convolutions would not train with SGD at 5e-4;
- momentum of SGD: 0.9. Weight decay in rows that mention it: 1e-3. Dropout in rows that mention it: 0.2, at the
  position of the listing;
- 84% for the listed network: the text reports it for its best model, listed as 5-3 and tabulated as 8-3.
The printed program never calls `eval()`, so it evaluates with dropout and batch norm in training mode; this project
evaluates in evaluation mode. The paper rounds accuracies to whole numbers.

Reproduce: runner train ghasemi-net --data data/cifar10, likewise ghasemi-1 to ghasemi-15. Time on one GPU: not
measured.
"""

from runner.config.recipe import SGD, Adam, Architecture, Argument, Experiment, Recipe, Reported

# Trainable parameters without batch norm, and multiply-accumulates, by depth; tested.
SIZES = {
    (5, 3): (2_751_562, 403_147_264),
    (6, 3): (5_111_370, 1_007_127_040),
    (7, 3): (5_701_450, 1_158_121_984),
    (8, 3): (5_849_034, 1_195_870_720),
    (12, 1): (7_682_602, 1_968_558_080),
    (12, 3): (8_845_098, 1_969_719_808),
    (12, 4): (8_876_714, 1_969_751_296),
}
NORM = {5: 1_984, 8: 3_776}  # parameters of batch norm, by number of convolutions

# Depth, optimizer, batch size, epochs, regularization, batch norm, accuracy in percent.
TABLE: tuple[tuple[tuple[int, int], SGD | Adam, int, int, str, bool, int], ...] = (
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
    regularization: str,
    norm: bool,
    percent: int,
    source: str,
) -> Experiment:
    arguments: dict[str, Argument] = {
        "convolutions": depth[0],
        "linears": depth[1],
        "norm": norm,
        "dropout": 0.2 if regularization == "dropout" else 0.0,
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
