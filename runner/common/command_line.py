"""Parses command lines whose options are in any order and form, and converts them to the form that tyro parses.

The types that declare the options define their names and how many values each takes. Every word is therefore an
option, a value of an option, or a positional argument, regardless of where it stands. Repeated list options are
concatenated; repeating any other option is an error.
"""

import math
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from runner.common.console import call_parser
from runner.common.errors import UserError

NEGATIVE = re.compile(r"-(\d|\.\d|inf|nan).*")  # a negative number is not an option
NUMBER_OR_BOOL = re.compile(r"[-+.\d].*|True|False")
NUMBERS = {"int": "an integer", "float": "a number"}
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
NoneByDefault = tyro.conf.arg(help_behavior_hint="(default: none)")  # for lists, whose default tyro shows as nothing


def any_word(word: str) -> bool:
    """Accepts any word; for options whose values are text or paths."""
    return True


@dataclass(frozen=True)
class Option:
    """The declaration of one option.

    Attributes:
        name: name as shown in the help, such as `--recipe.optimizer.lr`.
        nargs: number of values: 0 for a flag, None for one or more.
        has_negative: whether the option is a flag with a `--no-` form. Such a flag also accepts `=true` and `=false`,
            the form that W&B sweeps use.
        accepts: function that returns whether a word can be a value of the option.
        expected: description of the values, for error messages.
        is_prefix: whether a dict key follows the name, as in `--architecture.arguments.dropout`.
        appends: whether each use of the option adds one value, so that positional arguments may follow it.
        path: dotted path of the field that the option sets, such as `recipe.optimizer.lr`.
    """

    name: str
    nargs: int | None
    has_negative: bool = False
    accepts: Callable[[str], bool] = any_word
    expected: str = "a value"
    is_prefix: bool = False
    appends: bool = False
    path: str = ""


@dataclass
class ParsedOption:
    """An option and its values on a command line.

    Attributes:
        spelling: the option as spelled on the command line.
        values: all values of the option.
        ambiguous: indices of the values that could be the positional argument instead.
        is_flag: whether the option was given without a value.
        appends: see Option.
    """

    spelling: str
    values: list[str]
    ambiguous: list[int] = field(default_factory=list)
    is_flag: bool = False
    appends: bool = False


@dataclass
class CommandLine:
    """A parsed command line.

    Attributes:
        positional: words that do not belong to any option.
        options: parsed options by name, in order of first use.
    """

    positional: list[str] = field(default_factory=list)
    options: dict[str, ParsedOption] = field(default_factory=dict)

    def for_tyro(self, words: list[str]) -> list[str]:
        """Returns all words in tyro's form: the positional arguments, and `words`, which are those of the options."""
        if any(word.startswith("-") for word in self.positional):  # after `--`, so that none is parsed as an option
            return [*words, "--", *self.positional]
        return [*self.positional, *words]

    def words(
        self, include: Mapping[str, Option] | None = None, exclude: Mapping[str, Option] | None = None
    ) -> list[str]:
        """Returns the words of the options in tyro's form: only options in `include`, and none in `exclude`."""
        words = []
        for name, option in self.options.items():
            if (include is not None and name not in include) or (exclude is not None and name in exclude):
                continue
            match option.values:
                case []:
                    words += [option.spelling]
                case [value]:
                    words += [f"{name}={value}"]
                case values if option.appends:
                    words += [f"{name}={value}" for value in values]
                case values:
                    words += [name, *values]
        return words


def options_of(kind: Any, prefix: str = "", path: str = "") -> dict[str, Option]:
    """Returns the options that a dataclass or struct declares, by spelling, including aliases and `--no-` forms.

    Args:
        kind: the dataclass or struct.
        prefix: prefix of the option names, such as `recipe.`.
        path: prefix of the dotted paths of the fields, such as `recipe.`.
    """
    options: dict[str, Option] = {}
    for field_name, annotation in get_type_hints(kind, include_extras=True).items():
        hint, metadata = _split_annotated(annotation)
        if _is_positional(annotation):
            continue
        field_path = f"{path}{field_name}"
        name = next((item.name for item in metadata if getattr(item, "name", None) is not None), field_name)
        dotted = f"{prefix}{name}".replace("_", "-")
        nested = _nested_types(hint)
        for nested_kind in nested:
            more = options_of(nested_kind, f"{dotted}." if name else prefix, f"{field_path}.")
            _check_same_form(options, more, nested_kind)
            options |= more
        if not nested:
            option = replace(_option(hint, f"--{dotted}"), path=field_path)
            option = replace(option, has_negative=hint is bool and tyro.conf.FlagCreatePairsOff not in metadata)
            option = replace(option, appends=tyro.conf.UseAppendAction in metadata)
            aliases = [alias for item in metadata for alias in getattr(item, "aliases", None) or ()]
            options |= dict.fromkeys([option.name, *aliases], option)
            if option.has_negative:
                owner, _, last = dotted.rpartition(".")
                options[f"--{owner}.no-{last}" if owner else f"--no-{last}"] = option
    return options


def _check_same_form(options: Mapping[str, Option], more: Mapping[str, Option], kind: type) -> None:
    """Raises TypeError if two kinds of a field declare an option in different forms.

    Words are assigned to options before the kind is known.
    """
    for name in options.keys() & more.keys():
        one, other = ((option.nargs, option.expected, option.appends) for option in (options[name], more[name]))
        if one != other:
            raise TypeError(
                f"{name}: {kind.__name__} declares it with other values than another type, {other} and {one}"
            )


def _split_annotated(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """Returns a type without its `Annotated` wrapper, and the metadata of the wrapper."""
    return (annotation.__origin__, annotation.__metadata__) if get_origin(annotation) is Annotated else (annotation, ())


def _nested_types(hint: Any) -> list[Any]:
    """Returns the dataclasses or structs that a field may hold; the list is empty for a plain value."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return [k for k in kinds if isinstance(k, type) and (is_dataclass(k) or issubclass(k, msgspec.Struct))]


def _option(hint: Any, name: str) -> Option:
    """Returns the option for a field that holds a plain value, list or dict."""
    if hint is bool:
        return Option(name, 0)
    if get_origin(hint) is dict:
        return Option(f"{name}.", 1, is_prefix=True)
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        accepts, expected = _accepts(kinds[0])
        return Option(name, None if kinds[-1] is Ellipsis else len(kinds), accepts=accepts, expected=expected)
    accepts, expected = _accepts(hint)
    return Option(name, 1, accepts=accepts, expected=expected)


def _accepts(hint: Any) -> tuple[Callable[[str], bool], str]:
    """Returns a predicate for words that can be values of this type, and a description of such words. The parser uses
    the predicate to find the end of a list."""
    hint, _ = _split_annotated(hint)
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not types.NoneType]
        return _accepts(kinds[0]) if len(kinds) == 1 else (any_word, "a value")
    if get_origin(hint) is Literal:
        return lambda word: word in get_args(hint), " or ".join(get_args(hint))
    if hint not in (int, float):
        return any_word, "a value"

    def is_number(word: str) -> bool:
        try:
            hint(word)
        except ValueError:
            return False
        return True

    return is_number, NUMBERS[hint.__name__]


def parse_words(
    words: Sequence[str],
    options: Mapping[str, Option],
    required: bool = False,
    is_known: Callable[[str], bool] = lambda word: False,
) -> CommandLine:
    """Parses the words of a command line into positional arguments and options.

    A list option takes all following words that can be its values. If the required positional argument is then
    missing, it is the last word that a list option or a dict option took, as in `--experiments-from mine NAME`.

    Args:
        words: the words after the name of the command.
        options: the declared options, by spelling.
        required: whether exactly one positional argument is required.
        is_known: function that returns whether an ambiguous word is certainly the positional argument.

    Raises:
        UserError: an option does not exist, lacks a value, or is repeated.
    """
    line, remaining = CommandLine(), list(words)
    while remaining:
        word = remaining.pop(0)
        if word == "--":
            line.positional += remaining
            break
        if not _is_option(word):
            line.positional.append(word)
            continue
        spelling, equals, value = word.partition("=")
        spelling = spelling.replace("_", "-")
        option = _find(spelling, options)
        values = [value] if equals else []
        negative = option.is_prefix and spelling.rpartition(".")[2].startswith("no-")
        if not negative and not (equals and option.nargs is None):
            values += _take_values(remaining, option, len(values))
        _check_values(option, spelling, values, equals, remaining)
        _add(line, option, spelling, values, bool(equals))
    if required and not line.positional:
        _take_positional(line, is_known)
    return line


def _take_positional(line: CommandLine, is_known: Callable[[str], bool]) -> None:
    """Makes the most likely ambiguous value the positional argument: a known word, or else the last word of a list."""
    candidates = [(option, index) for option in line.options.values() for index in option.ambiguous]
    if not candidates:
        return
    known = [(option, index) for option, index in candidates if is_known(option.values[index])]
    option, index = max(reversed(known or candidates), key=lambda candidate: len(candidate[0].values) > 1)
    line.positional.append(option.values.pop(index))
    if not option.values:  # an option of a dict
        option.values, option.is_flag = ["True"], True


def _take_values(remaining: list[str], option: Option, count: int) -> list[str]:
    """Removes the values of an option that already has `count` values from the front of the remaining words."""
    values: list[str] = []
    while remaining and not _is_option(remaining[0]):
        if option.nargs != 1 and not option.accepts(remaining[0]):
            break
        most = 1 if option.appends else option.nargs
        if most is not None and count + len(values) >= most:
            break
        values.append(remaining.pop(0))
    return values


def _find(spelling: str, options: Mapping[str, Option]) -> Option:
    """Returns the option with this spelling. Raises UserError, which suggests similar options, if there is none."""
    if spelling in options:
        return options[spelling]
    for option in options.values():
        if option.is_prefix and spelling.startswith(option.name):
            return option
    if group := [name for name in options if name.startswith(f"{spelling}.")]:
        example = f"{group[0]}NAME" if group[0].endswith(".") else group[0]
        raise UserError(f"{spelling}: names a group of options; expected one of them, such as {example}")
    near = get_close_matches(spelling, options, n=3) or [name for name in options if spelling.strip("-") in name][:3]
    raise UserError(f"{spelling}: no such option" + (f"; expected {' or '.join(near)}" if near else "; see --help"))


def _check_values(option: Option, spelling: str, values: list[str], equals: str, remaining: list[str]) -> None:
    """Raises UserError if an option has invalid values or too few values."""
    if "None" in values:
        raise UserError(f"{spelling} None: expected a value; omit the option to leave it unset")
    if "" in values and not option.is_prefix:
        raise UserError(f"{spelling} '': expected a value, found an empty one; omit the option to leave it unset")
    if option.nargs == 0 and equals and not (option.has_negative and values[0].lower() in ("true", "false")):
        raise UserError(f"{spelling}={values[0]}: expected no value; it is a flag")
    if option.nargs == 1 and values and not option.accepts(values[0]):
        raise UserError(f"{spelling} {values[0]}: expected {option.expected}")
    if option.nargs != 1:
        for value in values:
            if value.startswith("-") and not NEGATIVE.fullmatch(value):
                raise UserError(f"{spelling} {value}: expected {option.expected}, which does not begin with '-'")
            if not option.accepts(value):
                raise UserError(f"{spelling}={value}: expected {option.expected}")
    if len(values) < (1 if option.nargs is None else option.nargs) and not option.is_prefix:
        count = {None: "one or more values", 1: "a value"}.get(option.nargs, f"{option.nargs} values")
        found = [*values, *([] if not remaining or _is_option(remaining[0]) else remaining[:1])]
        kind = f" ({option.expected})" if option.expected != "a value" else ""
        raise UserError(f"{spelling}: expected {count}{kind}, found {' '.join(found) or 'none'}")


def _add(line: CommandLine, option: Option, spelling: str, values: list[str], equals: bool) -> None:
    """Adds an option and its checked values to a command line. Raises UserError if the option is repeated."""
    name, added = option.name, ParsedOption(spelling, values, appends=option.appends)
    if option.nargs == 0 and values:  # =true or =false
        owner, _, last = option.name.removeprefix("--").rpartition(".")
        negative = f"--{owner}.no-{last}" if owner else f"--no-{last}"
        is_true = (values[0].lower() == "true") != (spelling == negative)
        added = ParsedOption(option.name if is_true else negative, [])
    elif option.is_prefix:
        name = spelling
        if not values:  # a boolean, written as a flag
            owner, _, key = spelling.rpartition(".")
            name = f"{owner}.{key.removeprefix('no-')}"
            added = ParsedOption(spelling, [str(not key.startswith("no-"))], is_flag=True)
        elif not equals and not NUMBER_OR_BOOL.fullmatch(values[0]):
            added.ambiguous = [0]
    elif option.nargs is None and not equals and len(values) > 1 and option.accepts is any_word:
        added.ambiguous = [len(values) - 1]
    earlier = line.options.get(name)
    if earlier is None:
        line.options[name] = added
    elif option.nargs is None:
        earlier.ambiguous += [len(earlier.values) + index for index in added.ambiguous]
        earlier.values += values
    else:
        both = " and ".join(" ".join(one) for one in (earlier.values, added.values) if one)
        raise UserError(f"{spelling}: expected once, found twice" + (f": {both}" if both else ""))


def _is_option(word: str) -> bool:
    """Whether a word is an option, or `--`, after which there are none."""
    return word == "-h" or word.startswith("--")


def check_limits(config: Any) -> None:
    """Checks every number in a dataclass or struct, including nested ones, against the limits in its type.

    Raises:
        UserError: a number is outside its limits; the message names its option.
    """
    builtins = msgspec.to_builtins(config, enc_hook=str)
    try:
        msgspec.convert(builtins, type(config), dec_hook=lambda kind, value: kind(value))
    except msgspec.ValidationError as error:
        expected, _, location = str(error).partition(" - at `$.")
        value: Any = builtins
        for key in re.findall(r"[^.\[\]`]+", location):
            value = value[int(key) if isinstance(value, list | tuple) else key]
        if isinstance(value, float) and not math.isfinite(value):
            expected = "a finite number"
        path = re.sub(r"\[.*|`", "", location)
        names = [option.name for option in options_of(type(config)).values() if option.path == path]
        expected = re.sub(r"`(\w+)`", lambda kind: NUMBERS.get(kind[1], kind[1]), expected.removeprefix("Expected "))
        raise UserError(f"{names[0] if names else path} {value}: expected {expected}") from None


HELP = dict.fromkeys(("-h", "--help"), Option("--help", 0))  # every command has this option
registry = ConstructorRegistry()  # customizes how tyro parses types


@registry.primitive_rule
def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Parses `int | None` as `int`: an option that is left out is None, and no word represents None."""
    kinds = [kind for kind in get_args(info.type) if kind is not type(None)]
    if get_origin(info.type) not in (Union, types.UnionType) or len(kinds) != 1:
        return None
    inner = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kinds[0], info.markers))
    if not isinstance(inner, PrimitiveConstructorSpec):
        return None
    return replace(inner, str_from_instance=lambda value: ["none"] if value is None else inner.str_from_instance(value))


def read_command(kind: Any, words: Sequence[str], prog: str) -> Any:
    """Parses words into a command of the type `kind`, and checks that its numbers are within their limits.

    Raises:
        UserError: the words are not a valid command line.
        SystemExit: code 0 after --help.
    """
    return read_command_and_rest(kind, words, prog, {})[0]


def read_command_and_rest(
    kind: Any, words: Sequence[str], prog: str, others: Mapping[str, Option]
) -> tuple[Any, list[str]]:
    """Like `read_command`, for a command that forwards options: also returns the words of the options in `others`."""
    hints = get_type_hints(kind, include_extras=True).values()
    positional = [hint for hint in hints if _is_positional(hint)]
    required = len(positional) == 1 and not _is_list(positional[0])
    own = options_of(kind) | HELP
    line = parse_words(words, {**others, **own}, required)
    if positional and not line.positional and "--help" not in line.options:
        # Checked here because tyro would parse the values of a list as positional arguments.
        metavar = next(item.metavar for item in _split_annotated(positional[0])[1] if getattr(item, "metavar", None))
        raise UserError(f"{metavar}: expected {'one' if required else 'at least one'}, found none; see {prog} --help")
    if "" in line.positional:
        raise UserError(f"'': expected a name or a path, found an empty one; see {prog} --help")
    if len(line.positional) > len(positional) and not any(_is_list(hint) for hint in positional):
        raise UserError(f"{line.positional[len(positional)]}: expected no further word; see {prog} --help")
    command = parse_with_tyro(kind, line.for_tyro(line.words(include=own)), prog)
    check_limits(command)
    return command, line.words(exclude=own)


def parse_with_tyro(kind: Any, words: Sequence[str], prog: str, **more: Any) -> Any:
    """Parses words in tyro's form; `more` is passed to tyro.cli. Raises the same errors as `read_command`."""
    with registry:
        config = (tyro.conf.AvoidSubcommands,)
        return call_parser(lambda: tyro.cli(kind, args=words, prog=prog, config=config, **more))


def _is_positional(hint: Any) -> bool:
    return tyro.conf.Positional in _split_annotated(hint)[1]


def _is_list(hint: Any) -> bool:
    return get_origin(_split_annotated(hint)[0]) is tuple
