"""actpress.audit: every saved byte belongs to a module, and the total is that of saved_bytes."""

import pytest
import torch
from torch import nn

import actpress
from actpress import measure
from actpress.measure.audit import Saved
from actpress.methods import Division, Inverted


class Net(nn.Module):
    """A layer's input that ReLU saves too, and a tensor saved outside of any layer."""

    def __init__(self):
        super().__init__()
        self.first, self.relu, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 1)

    def forward(self, x):
        return self.last(self.relu(self.first(x))).exp()


MAP = 2 * 8 * 8 * 4  # bytes of one channel at batch 2


def test_every_byte_has_an_owner():
    net = Net()
    result = actpress.audit(net, (2, 3, 8, 8), methods=[Division()])
    assert result.stock == {
        "first": Saved(3 * MAP),
        "relu": Saved(4 * MAP, ("last",)),
        "": Saved(5 * MAP),
    }
    assert result.total() == measure.saved_bytes(lambda: net(torch.ones(2, 3, 8, 8)).sum())
    assert result.methods["Division"]["relu"].bytes == 4 * MAP // 32
    assert result.total("Division") < result.total()
    assert type(net.first) is nn.Conv2d and all(p.device.type == "cpu" for p in net.parameters())


def test_autocast_halves_what_is_kept():
    net = Net()
    full, half = (actpress.audit(net, (2, 3, 8, 8), dtype).total() for dtype in (torch.float32, torch.bfloat16))
    assert half == full / 2


def test_table_lists_the_largest_first_and_the_rest_as_a_count():
    lines = actpress.audit(Net(), (2, 3, 8, 8), methods=[Division()]).table(top=1).splitlines()
    # The last convolution saves a code of its own.
    assert lines[2].startswith("(model)") and lines[3].strip() == "3 more"
    assert lines[4].startswith("total") and lines[5].startswith("compression")


def test_bad_dtype_is_named():
    with pytest.raises(ValueError, match=r"dtype=torch.int8, allowed: torch.float32"):
        actpress.audit(Net(), (2, 3, 8, 8), torch.int8)


def test_two_settings_of_a_method_have_a_column_each():
    methods = [Division(bits=2), Division(bits=8), Division(bits=8), Inverted()]
    result = actpress.audit(nn.Sequential(Net(), nn.GELU()), (2, 3, 8, 8), methods=methods)
    assert list(result.methods) == ["Division(bits=2)", "Division(bits=8) #1", "Division(bits=8) #2", "Inverted"]
    assert result.total("Division(bits=2)") < result.total("Division(bits=8) #1") == result.total("Division(bits=8) #2")


def test_a_method_that_matches_nothing_says_so_in_its_column_and_stops_no_other():
    result = actpress.audit(Net(), (2, 3, 8, 8), methods=[Inverted(), Division()])
    assert result.unmatched == ("Inverted",)
    assert result.total("Inverted") == result.total() > result.total("Division")
    assert str(result).splitlines()[-1].split() == ["matches", "nothing"]
