"""The roofline: where a step stands, and that the drawing shows it."""

import dataclasses
import xml.etree.ElementTree as ET

import pytest
from plan_cases import plan

from jaxdist.plan.showing import roofline


def made(**bounds):
    rates = {"peak_flops_per_second": 100.0, "peak_bytes_per_second": 10.0}
    return dataclasses.replace(plan()[1], num_devices=2, flops_per_step=400.0, bound_seconds=bounds, **rates)


@pytest.mark.parametrize(
    ("bounds", "intensity", "reached", "roof"),
    [
        ({"compute": 2.0, "memory": 1.0, "network": 0.1}, 20.0, 100.0, 100.0),
        ({"compute": 2.0, "memory": 4.0, "network": 0.1}, 5.0, 50.0, 50.0),
        ({"compute": 2.0, "memory": 1.0, "network": 8.0}, 20.0, 25.0, 100.0),
    ],
)
def test_a_step_is_on_the_roof_unless_the_network_holds_it_down(bounds, intensity, reached, roof):
    at = roofline.place(made(**bounds))
    assert (at.intensity, at.reached, at.roof) == pytest.approx((intensity, reached, roof))


def test_the_drawing_is_svg_with_the_point_inside():
    svg = ET.fromstring(roofline.draw(made(compute=2.0, memory=1.0, network=8.0)))
    (circle,) = svg.iter("circle")
    assert roofline.LEFT < float(circle.get("cx")) < roofline.WIDTH - roofline.RIGHT
    assert roofline.TOP < float(circle.get("cy")) < roofline.HEIGHT - roofline.BOTTOM
    (roof,) = svg.iter("polyline")
    places = [tuple(map(float, each.split(","))) for each in roof.get("points").split()]
    assert places[0][1] > places[1][1] == places[2][1]
    assert float(circle.get("cy")) > places[1][1], "held down by the network, it is below the roof"
