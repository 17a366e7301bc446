"""No step of the methods that run in parts copies a value of the host to the device where it is used."""

import pytest

from tests.unit import test_daformer_method as daformer
from tests.unit import test_u2pl as u2pl
from tests.unit import test_unimatch_method as unimatch
from tests.unit.host_values import HostValues


@pytest.mark.parametrize("name", ["daformer/toy_blv", "hrda/toy", "mic/toy", "mic/gta5_to_cityscapes_hrda"])
def test_of_domain_adaptation(name, tmp_path):
    words = ["method.mask_block=16"] if name.startswith("mic") else []
    method = daformer.small(name, tmp_path, *words)
    daformer.step(method)  # what is made once
    streams = daformer.batches(classes=method.model.num_classes)
    with HostValues() as values:
        for part in method(streams, 1):
            part["loss"].backward()
        method.after_step(1)
    assert values.count == 0


@pytest.mark.parametrize("kind", ["unimatch", "unimatch_v2", "u2pl"])
def test_of_semi_supervised_learning(kind):
    method = (u2pl.method() if kind == "u2pl" else unimatch.method(kind)).train()
    streams = (u2pl if kind == "u2pl" else unimatch).batches()
    with HostValues() as values:
        for part in [method(streams, 0)] if kind == "u2pl" else method(streams, 0):
            part["loss"].backward()
        method.after_step(0)
    assert values.count == 0
