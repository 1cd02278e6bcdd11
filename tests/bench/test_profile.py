"""The profile of a training step, on a CPU."""

import json

import pytest

from actpress.train.errors import InputError

SMALL = "--model=resnet20 --batch=2 --image-size=16 --num-classes=10 --precision=fp32 --no-channels-last --device=cpu"


def test_operations_of_a_step_are_listed_by_their_time(tmp_path, script, capsys):
    path = tmp_path / "profile.json"
    script("profile_step").main([*SMALL.split(), "--methods=none", f"--out={path}"])
    found = json.loads(path.read_text())
    assert found["setting"]["model"] == "resnet20" and found["profiled"] == 3
    profile = found["methods"]["none"]
    times = [kernel["ms"] for kernel in profile["kernels"]]
    assert times == sorted(times, reverse=True) and sum(times) == pytest.approx(profile["busy_ms"])
    calls = {kernel["kernel"]: kernel["calls"] for kernel in profile["kernels"]}
    assert calls["aten::conv2d"] == 19  # ResNet-20's convolutions, once a step
    assert capsys.readouterr().out.startswith("none: ")


def test_a_wrong_method_is_named(script):
    with pytest.raises(InputError, match=r"method 'nosuch' is unknown, allowed: .*division"):
        script("profile_step").main([*SMALL.split(), "--methods=nosuch"])
