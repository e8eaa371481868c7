"""The five tasks of the stream: pictures and questions that the general mix does not have."""

from collections.abc import Callable
from random import Random

from mini_vqa.domains.charts import chart
from mini_vqa.domains.diagrams import diagram
from mini_vqa.domains.maps import land
from mini_vqa.domains.microscope import field
from mini_vqa.domains.roads import road
from mini_vqa.questions import Picture

DOMAINS: dict[str, Callable[[Random], Picture]] = {
    "maps": land,
    "microscope": field,
    "roads": road,
    "diagrams": diagram,
    "charts": chart,
}
