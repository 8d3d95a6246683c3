"""Every command line is parsed in any order and form, and no word is ignored."""

import dataclasses
import itertools
import re
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
import pytest
import tyro
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data_prep.cli
from launch.quickstart import Quickstart
from runner import cli, experiments
from runner.common.command_line import (
    HELP,
    Flag,
    check_limits,
    options_of,
    parse_words,
    read_command,
    read_command_and_rest,
)
from runner.common.errors import UserError
from runner.config.train_config import TrainConfig

OUTSIDE = "tests.support.models.tiny"  # a module of experiments from outside
INSIDE = experiments.load() | experiments.load_grids()["podeti-grid"]
ALL = experiments.load((OUTSIDE,)) | INSIDE
OUTSIDE_RUNNER = {**data_prep.cli.COMMANDS, "quickstart": Quickstart}  # commands of other programs
COMMANDS = {"train": TrainConfig, **cli.COMMANDS, **OUTSIDE_RUNNER}
# Words that could be mistaken for the positional argument.
TEXT = st.sampled_from(["a", "b-1", "data/cifar10", *list(ALL)[:3]])
ALIASES = {"--recipe.epochs": "--epochs", "--recipe.batch-size": "--batch-size"}
ALIASES |= {"--recipe.optimizer.lr": "--lr", "--recipe.optimizer.weight-decay": "--weight-decay"}
UNNAMED = ("code",)  # fields whose options have no prefix


@dataclasses.dataclass(frozen=True)
class Drawn:
    """An option with a value; `path` is that of its field."""

    path: tuple[str, ...]
    value: Any

    @property
    def name(self) -> str:
        return f"--{'.'.join(part for part in self.path if part not in UNNAMED).replace('_', '-')}"


def unmarked(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without `Annotated`, and the metadata of `Annotated`."""
    if get_origin(annotation) is Annotated:
        return annotation.__origin__, annotation.__metadata__
    return annotation, ()


def values(annotation: Any) -> st.SearchStrategy[Any]:
    """Values of an option of this type, within its limits."""
    kind, marks = unmarked(annotation)
    limits = {k: v for mark in marks if isinstance(mark, msgspec.Meta) for k in ("ge", "gt", "le", "lt")
              if (v := getattr(mark, k)) is not None}  # fmt: skip
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.integers(limits.get("ge", 0), min(limits.get("le", 99), limits.get("lt", 100) - 1))
    if kind is float:
        low, high = limits.get("ge", limits.get("gt", 0.0)), limits.get("le", limits.get("lt", 9.0))
        return st.floats(low, min(high, low + 9), exclude_min="gt" in limits, exclude_max="lt" in limits)
    if kind in (str, Path):
        return TEXT.map(kind)
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if get_origin(kind) in (Union, types.UnionType):
        return st.one_of(*(values(member) for member in get_args(kind) if member is not types.NoneType))
    assert get_origin(kind) is tuple, kind
    if get_args(kind)[-1] is Ellipsis:
        return st.lists(values(get_args(kind)[0]), min_size=1, max_size=3).map(tuple)
    return st.tuples(*map(values, get_args(kind)))


def leaves(default: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], st.SearchStrategy[Any]]:
    """A strategy for every option of a command or of a nested value, by the path of its field."""
    strategies = {}
    for name, annotation in get_type_hints(type(default), include_extras=True).items():
        kind, marks = unmarked(annotation)
        value = getattr(default, name)
        if tyro.conf.Positional in marks:
            continue
        if isinstance(value, msgspec.Struct) or dataclasses.is_dataclass(value):
            strategies |= leaves(value, (*path, name))
        elif isinstance(value, dict):
            strategies |= {(*path, name, key): values(type(one)) for key, one in value.items()}
        else:
            strategies[*path, name] = values(kind if not marks else annotation)
    return strategies


def changed(config: Any, path: tuple[str, ...], value: Any) -> Any:
    """A copy with one nested field changed."""
    if not path:
        return value
    if isinstance(config, dict):
        return {**config, path[0]: value}
    child = changed(getattr(config, path[0]), path[1:], value)
    if isinstance(config, msgspec.Struct):
        return msgspec.structs.replace(config, **{path[0]: child})
    return dataclasses.replace(config, **{path[0]: child})


@st.composite
def written(draw: st.DrawFn, option: Drawn, default: Any) -> list[list[str]]:
    """The words of an option, in one of its forms; a list may be split into several uses."""
    name = ALIASES[option.name] if option.name in ALIASES and draw(st.booleans()) else option.name
    name = name.replace("-", "_").replace("__", "--", 1) if draw(st.booleans()) else name
    if isinstance(option.value, bool) and "arguments" not in option.path:
        owner, dot, last = name.removeprefix("--").rpartition(".")
        return [[name if option.value else f"--{owner}{dot}no-{last}"]]
    if not isinstance(option.value, tuple):
        return [[f"{name}={option.value}"] if draw(st.booleans()) else [name, str(option.value)]]
    words = [str(value) for value in option.value]
    if option.path == ("code", "experiments_from"):  # takes one value at each use
        return [[f"{name}={word}"] if draw(st.booleans()) else [name, word] for word in words]
    if not isinstance(default, tuple) or (len(default) in (2, 3) and len(words) == len(default)):
        return [[name, *words]]
    cut = draw(st.integers(0, len(words) - 1))
    pieces = [words[:cut], words[cut:]] if cut else [words]
    return [[f"{name}={p[0]}"] if len(p) == 1 and draw(st.booleans()) else [name, *p] for p in pieces]


@st.composite
def command_lines(draw: st.DrawFn) -> tuple[Any, list[str]]:
    """A command, and words that are parsed to it."""
    command = draw(st.sampled_from(["train"] * 6 + list(COMMANDS)))
    if command == "train":
        name = draw(st.sampled_from(list(ALL)))
        request: Any = TrainConfig(name, Path("data"), ALL[name].architecture, ALL[name].recipe)
        positional = [name]
        required = {("data",)} | ({("experiments_from",)} if name not in INSIDE else set())
    else:
        request, positional, required = draw_required(draw, COMMANDS[command])
    options = leaves(request)
    options.pop(("pretrained",), None)  # changes an argument of the architecture; see test_timm.py
    if ("experiments_from",) in options:
        options["experiments_from",] = st.just((OUTSIDE,))
    selected = draw(st.lists(st.sampled_from(list(options)), unique=True, max_size=7)) if options else []
    pieces = []
    for path in dict.fromkeys([*selected, *required]):
        option = Drawn(path, draw(options[path]))
        flag = isinstance(option.value, bool) and path[0] not in ("architecture", "recipe")
        if flag and not option.value:
            continue  # a plain flag has no negative form
        default = option.value if path[0] == "architecture" else _at(request, path)
        request = changed(request, path, option.value)
        pieces.append(draw(written(option, default)))
    # The pieces of a list keep their order; everything else is shuffled.
    order = draw(st.permutations([k for k, forms in enumerate(pieces) for _ in forms]))
    remaining = {k: iter(forms) for k, forms in enumerate(pieces)}
    forms = [next(remaining[k]) for k in order]
    index = draw(st.integers(0, len(forms)))
    if 0 < index < len(forms) and order[index - 1] in order[index:]:
        index = 0  # after the first part of a list that goes on later, which word is the positional one is ambiguous
    marked = index == len(forms) and draw(st.booleans())
    if not marked and (len(positional) != 1 or get_origin(unmarked(_positional(type(request)))[0]) is tuple):
        index = 0  # a list before several positional words would take them
    forms = [*forms[:index], ["--", *positional] if marked else positional, *forms[index:]]
    return request, [command, *itertools.chain.from_iterable(forms)]


def draw_required(draw: st.DrawFn, kind: Any) -> tuple[Any, list[str], set[tuple[str, ...]]]:
    """A command with only what it requires, the words of its positional arguments, and the required options."""
    fields, words, required = {}, [], set()
    defaults = {field.name for field in dataclasses.fields(kind) if field.default is not dataclasses.MISSING}
    for name, annotation in get_type_hints(kind, include_extras=True).items():
        if tyro.conf.Positional in unmarked(annotation)[1]:
            fields[name] = draw(values(unmarked(annotation)[0]))
            words += map(str, fields[name] if isinstance(fields[name], tuple) else [fields[name]])
        elif name not in defaults:
            fields[name] = draw(values(annotation))
            required.add((name,))
    return kind(**fields), words, required


def _positional(kind: Any) -> Any:
    hints = get_type_hints(kind, include_extras=True).values()
    return next((hint for hint in hints if tyro.conf.Positional in unmarked(hint)[1]), None)


def _at(config: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        config = getattr(config, name)
    return config


def check(expected: Any, words: list[str]) -> None:
    name, *rest = words
    command = read_command(COMMANDS[name], rest, name) if name in OUTSIDE_RUNNER else cli.parse(words)
    assert (command.config if isinstance(command, cli.Train) else command) == expected, words


SETTINGS = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=300, **SETTINGS)
@given(command_lines())
def test_a_command_is_parsed_in_any_order_and_form(line: tuple[Any, list[str]]) -> None:
    check(*line)


@pytest.mark.every
@settings(max_examples=2000, **SETTINGS)
@given(command_lines())
def test_a_command_is_parsed_in_any_order_and_form_at_length(line: tuple[Any, list[str]]) -> None:
    check(*line)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("--data X podeti-resnet18", "podeti-resnet18"),
        ("--data X -- podeti-resnet18", "podeti-resnet18"),
        ("--data=X podeti-resnet18 --name podeti-alexnet", "podeti-resnet18"),
        ("--name podeti-alexnet --data X podeti-resnet18", "podeti-resnet18"),
        ("--experiments-from tests.support.models.tiny --data D tiny-norm", "tiny-norm"),
        ("--experiments-from=tests.support.models.tiny tiny-norm --data D", "tiny-norm"),
        ("--data D --experiments-from tests.support.models.tiny tiny-norm", "tiny-norm"),
        ("--overwrite tiny --data D --experiments_from=tests.support.models.tiny", "tiny"),
        ("--data D --seeds 0 1 podeti-resnet18", "podeti-resnet18"),
        (
            f"--experiments-from {OUTSIDE} tiny-norm --data D --experiments-from tests.support.models.ending",
            "tiny-norm",
        ),
        (
            "--data D --architecture.arguments.pooling max --architecture.arguments.frozen transfer-resnet18",
            "transfer-resnet18",
        ),
        ("--data D --architecture.arguments.no-frozen transfer-resnet18", "transfer-resnet18"),
        ("--data D --recipe.compile default soni-2", "soni-2"),
        ("--data D --recipe.no-drop-last=False soni-2", "soni-2"),
    ],
)
def test_a_name_is_found_at_any_position(line: str, name: str) -> None:
    config = cli.parse_train(line.split())
    assert config.experiment == name
    assert config.architecture.factory == ALL[name].architecture.factory
    assert dataclasses.replace(config.recipe, compile="none") == ALL[name].recipe


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train --name podeti-alexnet --data D", "NAME: expected the name of an experiment"),
        ("train --data D", "NAME: expected"),
        ("train --data D podeti-alexnet podeti-resnet18", "podeti-resnet18"),
        ("train --data D tinny", "no such experiment"),
        ("train --experiments-from no.such tiny --data D", "no.such"),
        ("train soni-2 --data D --epochs 3 --recipe.epochs 4", "expected once, found twice: 3 and 4"),
        ("train soni-2 --data D --data E", "expected once, found twice: D and E"),
        ("train soni-2 --data D --json --json", "expected once"),
        ("train soni-2 --data D --json=yes", "it is a flag"),
        ("train soni-2 --data D --name None", "--name None: expected a value"),
        ("train soni-2 --data D --seeds --json", "--seeds: expected one or more values (an integer), found none"),
        ("train soni-2 --data D --lr --json", "--lr: expected a value (a number), found none"),
        ("train soni-2 --data D --recipe.compile", "expected a value (none or default or reduce-overhead or max-auto"),
        (
            "train soni-2 --data D --recipe.optimizer.nesterov",
            "--recipe.optimizer.nesterov: the optimizer of soni-2 is RMSprop, which has --recipe.optimizer.lr, ",
        ),
        (
            "train vit-tiny-4 --data D --recipe.schedule.milestones 0.5",
            "--recipe.schedule.milestones: the schedule of vit-tiny-4 is Cosine, which has --recipe.schedule.warmup, ",
        ),
        (
            "train soni-2 --data D --recipe.optimizer SGD",
            "--recipe.optimizer: names a group of options; expected one of them, such as --recipe.optimizer.lr",
        ),
        ("train soni-2 --data D --bach-size 3", "no such option; expected --batch-size"),
        ("export --precision fp32 int8", "RUN: expected one, found none"),
        ("bench --precision fp32", "RUNS: expected at least one, found none"),
        (
            "export runs/x --precision",
            "--precision: expected one or more values (fp32 or fp16 or int8 or int8-cpu), found none",
        ),
        ("export --preci fp16 x", "--preci: no such option; expected --precision"),
        ("bench runs/x --batch 1 0", "--batch 0: expected an integer >= 1"),
        ("bench runs/x --seconds nan", "--seconds nan: expected a finite number"),
        ("predict m.onnx x.png --batch 0", "--batch 0"),
        ("trian soni-2", "trian: expected a command: train"),
        # Words after `--` are never options, and options are never values of a list.
        ("train soni-2 --data D -- --overwrite", "--overwrite: expected no further word"),
        ("train soni-2 --data D -- --data=E", "--data=E: expected no further word"),
        ("eval a -- --data=foo", "--data=foo: expected no further word"),
        ("engine r --target=SM89 --target=--json", "--target --json: expected a value, which does not begin with '-'"),
        ("engine r --target=SM89 --target=--", "--target --: expected a value, which does not begin with '-'"),
        ("train soni-2 --data D --seeds 0,1", "--seeds: expected one or more values (an integer), found 0,1"),
        ("train soni-2 --data D --seeds=0,1", "--seeds=0,1: expected an integer"),
        ("export r --precision FP16", "(fp32 or fp16 or int8 or int8-cpu), found FP16"),
        ("train soni-2 --data=", "--data '': expected a value, found an empty one"),
        ("train --data D --architecture.arguments.dropout 0.7", "NAME: expected"),
        ("train soni-4 --data D --architecture.arguments.gate", "--architecture.arguments.gate: expected a value"),
        ("train --data D --architecture.arguments.gate soni-4", "--architecture.arguments.gate: expected a value"),
        ("bench r --no-json", "--no-json: no such option"),
        ("--version junk", "--version: expected alone, found junk"),
        ("train soni-2 --data D --experiments-from=", "--experiments-from '': expected a value"),
        ("train soni-2 --data D --experiments-from=.foo", "--experiments-from .foo: expected an importable module"),
        ("train soni-2 --data D --experiments-from this.is.none", "expected an importable module"),
    ],
)
def test_an_invalid_command_line_is_reported(line: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        cli.parse(line.split())


@dataclasses.dataclass(frozen=True)
class Inner:
    """A nested value."""

    some_rate: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.5
    on: bool = False


@dataclasses.dataclass(frozen=True)
class Sample:
    """A command with an option of each kind."""

    inner: Inner = Inner()
    unnamed: Annotated[Inner, tyro.conf.arg(name="")] = Inner()
    numbers: tuple[Annotated[int, msgspec.Meta(ge=0)], ...] = ()
    pair: tuple[float, float] = (0.0, 0.0)
    texts: tuple[str, ...] = ()
    added: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    number: Annotated[int | None, tyro.conf.arg(aliases=("--nth",))] = None
    either: int | str | None = None
    kind: Literal["a", "b"] = "a"
    plain: Flag = False


@pytest.mark.parametrize(
    ("line", "positional", "words"),
    [
        # Lists take what can be a value of theirs; of one option they may stand in several places.
        ("--numbers 1 -2 x --pair 1 -inf 3 --texts a b", "x 3", "--numbers 1 -2 --pair 1 -inf --texts a b"),
        ("--numbers=1 2 --numbers 3", "2", "--numbers 1 3"),
        ("--texts a --texts=b c --texts d", "c", "--texts a b d"),
        ("--added a b --added=c d", "b d", "--added=a --added=c"),
        ("--nth=3x", None, "--nth 3x: expected an integer"),
        ("--kind a b --nth 1 2 --either x y", "b 2 y", "--kind=a --number=1 --either=x"),
        ("--either None", None, "--either None: expected a value; omit the option to leave it unset"),
        # Flags.
        ("--inner.on x --no-on --plain y", "x y", "--inner.on --no-on --plain"),
        ("--inner.on=FALSE --on=True --plain", "", "--inner.no-on --on --plain"),
        ("--inner.no-on=true --no-on=false", "", "--inner.no-on --on"),
        ("--inner.no-on=yes", None, "--inner.no-on=yes: expected no value; it is a flag"),
        ("--plain=true", None, "--plain=true: expected no value; it is a flag"),
        ("--help=true", None, "--help=true: expected no value; it is a flag"),
        ("--inner.on --inner.on=false", None, "--inner.on: expected once, found twice"),
        ("-h x", "x", "-h"),
        # Options of a dict.
        ("--arguments.a.b 1 --arguments.c d e", "e", "--arguments.a.b=1 --arguments.c=d"),
        ("--arguments.no-c d --arguments.e", "d", "--arguments.c=False --arguments.e=True"),
        ("--arguments.f=", "", "--arguments.f="),
        ("--arguments.c 1 --arguments.no-c", None, "--arguments.no-c: expected once, found twice: 1 and False"),
        # Names and counts.
        ("--inner.some_rate 1 --some-rate=2 -- --number 3", "--number 3", "--inner.some-rate=1 --some-rate=2"),
        ("--some-rate x", None, "--some-rate x: expected a number"),
        ("--pair 1 --plain", None, "--pair: expected 2 values (a number), found 1"),
        ("--pair 1 x --plain", None, "--pair: expected 2 values (a number), found 1 x"),
        ("--pair=x 1", None, "--pair=x: expected a number"),
        ("--pair=1 2 --either=-x", "", "--pair 1 2 --either=-x"),
        ("--pair", None, "--pair: expected 2 values (a number), found none"),
        ("--pair 1 -- 2", None, "--pair: expected 2 values (a number), found 1"),
        ("--texts a -- b", "b", "--texts=a"),
        ("--texts --plain", None, "--texts: expected one or more values, found none"),
        ("--number --plain", None, "--number: expected a value (an integer), found none"),
        ("--either", None, "--either: expected a value, found none"),
        ("--kind c", None, "--kind c: expected a or b"),
        ("--texts=a --texts=-b", None, "--texts -b: expected a value, which does not begin with '-'"),
        ("--texts=a --texts=-1", "", "--texts a -1"),
        ("--numbers=x", None, "--numbers=x: expected an integer"),
        ("--texts=", None, "--texts '': expected a value, found an empty one; omit the option to leave it unset"),
        ("--number=", None, "--number '': expected a value, found an empty one; omit the option to leave it unset"),
        ("--no 1", None, "--no: no such option; expected --on or --no-on or --nth"),
        ("--m 1", None, "--m: no such option; expected --inner.some-rate or --some-rate or --numbers"),
        ("--q 1", None, "--q: no such option; see --help"),
        ("--inner 1", None, "--inner: names a group of options; expected one of them, such as --inner.some-rate"),
        ("--arguments 1", None,
         "--arguments: names a group of options; expected one of them, such as --arguments.NAME"),
    ],
)  # fmt: skip
def test_each_kind_of_option(line: str, positional: str | None, words: str) -> None:
    """`words` are those of the options in the form that tyro parses, or the message where `positional` is None."""
    options = options_of(Sample) | HELP
    if positional is None:
        with pytest.raises(UserError, match=f"^{re.escape(words)}$"):
            parse_words(line.split(" "), options)
    else:
        parsed = parse_words(line.split(" "), options)
        assert (" ".join(parsed.positional), " ".join(parsed.words())) == (positional, words)


def test_kinds_of_a_field_declare_an_option_alike() -> None:
    """Words are assigned to options before the kind is known."""

    class One(msgspec.Struct):
        betas: tuple[float, float]
        rate: float

    class Other(msgspec.Struct):
        betas: float

    assert "--kind.rate" in options_of(dataclasses.make_dataclass("Alike", [("kind", One | Sample)]))
    with pytest.raises(TypeError, match=r"--kind\.betas: Other declares it with other values"):
        options_of(dataclasses.make_dataclass("Unlike", [("kind", One | Other)]))


@pytest.mark.parametrize(
    ("line", "positional", "words"),
    [
        ("--texts a b --arguments.x c", "b", "--texts=a --arguments.x=c"),  # a list keeps another value
        ("--arguments.x c --texts a", "c", "--arguments.x=True --texts=a"),  # this list would keep none
        ("--texts a b --texts c", "b", "--texts a c"),
        ("--texts a --texts b c --arguments.x d", "c", "--texts a b --arguments.x=d"),
        ("--arguments.x known --texts a b", "known", "--arguments.x=True --texts a b"),
        ("--texts a b --texts c d", "d", "--texts a b c"),
        ("--arguments.x c --arguments.y d", "d", "--arguments.x=c --arguments.y=True"),
        ("--arguments.x 1 --arguments.y=c --texts=c", "", "--arguments.x=1 --arguments.y=c --texts=c"),
        ("--arguments.x True --arguments.y .5 --pair 1 2", "", "--arguments.x=True --arguments.y=.5 --pair 1 2"),
        ("--texts a b x", "x", "--texts a b"),
        ("x --texts a b", "x", "--texts a b"),
    ],
)  # fmt: skip
def test_a_missing_positional_argument_is_the_most_likely_value(line: str, positional: str, words: str) -> None:
    parsed = parse_words(line.split(" "), options_of(Sample), True, lambda word: word == "known")
    assert (" ".join(parsed.positional), " ".join(parsed.words())) == (positional, words)
    if "x" not in positional:
        unchanged = parse_words(line.split(" "), options_of(Sample))
        assert not unchanged.positional


@dataclasses.dataclass(frozen=True)
class Shown:
    """A command with values that are optional."""

    number: Annotated[int, msgspec.Meta(ge=0)] | None = None
    other: float | None = 0.5
    either: int | str | None = None
    plain: int = 3


def test_an_optional_value_is_shown_like_another(capsys: pytest.CaptureFixture[str]) -> None:
    """No word stands for None: the option is left out."""
    with pytest.raises(SystemExit):
        read_command(Shown, ["--help"], "p")
    lines = {" ".join(line.strip("│ ").split()) for line in capsys.readouterr().out.splitlines()}
    assert {
        "--number INT (default: none)", "--other FLOAT (default: 0.5)", "--either {None}|INT|STR (default: None)",
        "--plain INT (default: 3)",
    } <= lines  # fmt: skip
    assert read_command(Shown, ["--number", "3", "--other=1"], "p") == Shown(3, 1.0)
    assert read_command(Shown, [], "p") == Shown()


@dataclasses.dataclass(frozen=True)
class Two:
    """A command with two positional words."""

    first: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FIRST")]
    second: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SECOND")]
    plain: Flag = False


def test_options_of_another_program_are_passed_on() -> None:
    """As `python -m launch` does, in the form that the other parses again."""
    words = ["--epochs", "3", "x", "--plain", "--seeds=1", "--recipe.no-drop-last", "--seeds", "2", "y"]
    others = options_of(TrainConfig)
    assert read_command_and_rest(Two, words, "p", others) == (
        Two("x", "y", plain=True),
        ["--recipe.epochs=3", "--seeds", "1", "2", "--recipe.no-drop-last"],
    )
    with pytest.raises(UserError, match=r"^FIRST: expected at least one, found none; see p --help$"):
        read_command(Two, ["--plain"], "p")
    with pytest.raises(UserError, match=r"^z: expected no further word; see p --help$"):
        read_command(Two, ["x", "y", "z"], "p")


@pytest.mark.parametrize(
    "content",
    [
        "1/0", "def f(:", "raise SystemExit(0)", "import nothing", "EXPERIMENTS = [1]", "EXPERIMENTS = {'x': 1}",
        "EXPERIMENTS, GRIDS = {}, [1]", "EXPERIMENTS, GRIDS = {}, {'x': {'y': 1}}",
    ],
)  # fmt: skip
def test_a_module_of_experiments_that_fails_is_reported(content: str, tmp_path: Path, monkeypatch) -> None:
    name = f"broken_{abs(hash(content))}"
    (tmp_path / f"{name}.py").write_text(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=f"--experiments-from {name}: expected an importable module with EXPERIMENTS"):
        cli.parse_train(["soni-2", "--data", "D", "--experiments-from", name])


def test_words_after_two_hyphens_are_positional() -> None:
    assert cli.parse(["report", "--", "-x", "y"]).runs == (Path("-x"), Path("y"))
    assert cli.parse(["eval", "--", "--json"]).run == Path("--json")
    assert cli.parse(["engine", "--target", "a", "b", "--", "c"]).target == ("a", "b")


@pytest.mark.parametrize(("word", "value"), [("=true", True), ("=False", False), ("", True)])
def test_a_boolean_may_have_a_value(word: str, value: bool) -> None:
    """As W&B's sweeps write them."""
    assert cli.parse_train(["soni-2", "--data", "D", f"--recipe.drop-last{word}"]).recipe.drop_last == value


def test_repeated_lists_are_concatenated() -> None:
    assert cli.parse_train(["soni-2", "--data", "D", "--seeds", "1", "--seeds", "2", "3"]).seeds == (1, 2, 3)


NUMBERS_WITHOUT_LIMITS: set[str] = set()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_has_limits(command: str) -> None:
    """The type of every number states its limits."""
    unlimited: set[str] = set()

    def visit(kind: Any, path: str) -> None:
        kind, marks = unmarked(kind)
        if any(isinstance(mark, msgspec.Meta) for mark in marks):
            return
        if kind in (int, float):
            unlimited.add(path)
        elif isinstance(kind, type) and (dataclasses.is_dataclass(kind) or issubclass(kind, msgspec.Struct)):
            for name, hint in get_type_hints(kind, include_extras=True).items():
                visit(hint, f"{path}.{name}")
        elif get_origin(kind) is not dict:
            for argument in get_args(kind):
                visit(argument, path)

    visit(COMMANDS[command], command)
    assert unlimited == NUMBERS_WITHOUT_LIMITS


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample(inner=Inner(some_rate=2.0)), "--inner.some-rate 2.0: expected a number < 1.0"),
        (Sample(unnamed=Inner(some_rate=0.0)), "--some-rate 0.0: expected a number > 0.0"),
        (Sample(inner=Inner(some_rate=float("inf"))), "--inner.some-rate inf: expected a finite number"),
        (Sample(numbers=(1, -2)), "--numbers -2: expected an integer >= 0"),
    ],
)
def test_a_number_beyond_a_limit_is_reported_with_its_option(sample: Sample, message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        check_limits(sample)
    check_limits(Sample(numbers=(0, 1), number=None))


@dataclasses.dataclass(frozen=True)
class Few:
    """A command with a list that has a longest length."""

    texts: Annotated[tuple[str, ...], msgspec.Meta(max_length=1)] = ()


def test_a_list_that_is_too_long_is_reported_with_its_option() -> None:
    with pytest.raises(UserError, match=r"^--texts .*: expected array of length <= 1$"):
        check_limits(Few(("a", "b")))


def test_limits_of_nested_numbers_are_checked() -> None:
    recipe = ALL["soni-2"].recipe
    with pytest.raises(UserError, match=r"optimizer\.lr nan: expected a finite number"):
        check_limits(changed(recipe, ("optimizer", "lr"), float("nan")))
