"""key=value arguments of scripts."""

import pytest

from actpress.train import arguments


def test_arguments_take_the_type_of_their_default():
    defaults = {"batch": 64, "share": 0.5, "compile": False, "methods": (), "out": None}
    given = ["batch=8", "compile=true", "methods=none, some", "out=x=y", "share=1"]
    expected = {"batch": 8, "share": 1.0, "compile": True, "methods": ("none", "some"), "out": "x=y"}
    assert arguments.read(given, defaults) == expected


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("batches=8", "argument 'batches=8', allowed: batch=..., compile=..."),
        ("batch", "argument 'batch', allowed"),
        ("batch=many", "batch=many, allowed: whole numbers from 0"),
        ("batch=-1", "batch=-1, allowed: numbers from 0"),
        ("compile=maybe", "compile=maybe, allowed: true, false"),
    ],
)
def test_a_wrong_argument_is_named(argument, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        arguments.read([argument], {"batch": 64, "compile": False})
