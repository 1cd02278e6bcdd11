"""What commands share: options of tools and their one-line errors, exit codes."""

import sys
from dataclasses import dataclass, field

import pytest

from actpress.train import command
from actpress.train.errors import InputError, Unreadable


@dataclass
class Fields:
    image_size: int = field(default=64, metadata={"help": "pixels"})
    compile: bool = False
    channels_last: bool = True
    device: str = "auto"


def parser() -> command.Parser:
    made = command.Parser("What it does.")
    made.add_fields(Fields, device="cpu")
    made.add_argument("--methods", type=command.names, default=("none",))
    made.add_argument("--budget", type=command.seconds, default=1.0)
    made.add_choice("--profile", ("full", "tiny"), "which sizes")
    return made


def test_options_have_the_types_of_their_fields():
    defaults = {"image_size": 64, "compile": False, "channels_last": True, "device": "cpu"}
    defaults |= {"methods": ("none",), "budget": 1.0, "profile": "full"}
    assert vars(parser().parse_args([])) == defaults
    given = [
        "--image-size",
        "8",
        "--compile",
        "--no-channels-last",
        "--device",
        "x=y",
        "--budget",
        ".5",
        "--profile",
        "tiny",
    ]
    expected = {"image_size": 8, "compile": True, "channels_last": False, "device": "x=y"}
    expected |= {"methods": ("none", "some"), "budget": 0.5, "profile": "tiny"}
    assert vars(parser().parse_args([*given, "--methods=none, some"])) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--image 8", "argument '--image', allowed: --help, --image-size, --compile, --channels-last, --device"),
        ("image_size=8", "argument 'image_size=8', allowed: --help"),
        ("--image-size many", "argument --image-size: many, allowed: whole numbers from 0"),
        ("--image-size -1", "argument --image-size: -1, allowed: whole numbers from 0"),
        ("--image-size", "argument --image-size: expected one argument"),
        ("--budget nan", "argument --budget: nan, allowed: numbers from 0"),
        ("--profile huge", "argument --profile: huge, allowed: full, tiny"),
    ],
)
def test_a_wrong_option_is_named_on_one_line(arguments, message):
    with pytest.raises(InputError) as caught:
        parser().parse_args(arguments.split())
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(["--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "What it does." in out and "--channels-last, --no-channels-last" in out
    assert "pixels (64)" in out and "which sizes: full, tiny" in out


def test_a_command_that_is_no_parser_prints_its_text_for_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scripts/some.py", "--help"])
    assert command.main(lambda: pytest.fail("ran"), "What it does.") == 0
    assert capsys.readouterr().out == "usage: python scripts/some.py [arguments]\n\nWhat it does.\n"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("x=1, allowed: 2"), 2, "error: x=1, allowed: 2\n"),
        (Unreadable("no record at a.json"), 2, "error: no record at a.json\n"),
        (KeyboardInterrupt(), 130, "interrupted; the same command resumes where it stopped\n"),
    ],
)
def test_expected_errors_become_one_line_and_an_exit_code(monkeypatch, capsys, error, code, message):
    def fail():
        raise error

    monkeypatch.setattr(sys, "argv", ["scripts/some.py"])
    assert command.main(fail) == code
    assert capsys.readouterr().err == message
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    if code == 2:
        with pytest.raises(type(error)):
            command.main(fail)
    assert command.main(lambda: None) == 0 and command.main(lambda: 3) == 3
