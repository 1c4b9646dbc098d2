"""The drawing of efficiency."""

import dataclasses
import xml.etree.ElementTree as ET

from plan_cases import plan

from jaxdist.plan import device_sweep
from jaxdist.plan.showing import efficiency_chart


def test_each_number_of_devices_is_a_point_that_sinks_where_the_network_bounds():
    bounds = {"compute": 1.0, "memory": 0.1, "network": 0.1}
    first = dataclasses.replace(plan()[1], num_devices=8, global_batch_size=8, bound_seconds=bounds)
    slow = dataclasses.replace(first, num_devices=64, global_batch_size=64, bound_seconds=bounds | {"network": 4.0})
    svg = ET.fromstring(efficiency_chart.draw(device_sweep.rows([first, slow])))
    one, two = svg.iter("circle")
    assert float(two.get("cx")) > float(one.get("cx"))
    assert float(two.get("cy")) > float(one.get("cy"))
    assert one.get("fill") != two.get("fill")
    assert "bound by network" in ET.tostring(two, encoding="unicode")
