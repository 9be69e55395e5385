"""Geodesics of the damped metric: curves of constant speed that turn no more than the outputs force them to."""

from fipgeo.geodesics.chart import Chart, as_chart
from fipgeo.geodesics.driver import geodesic
from fipgeo.geodesics.flow import Flow, Slope
from fipgeo.geodesics.frames import Frames, track
from fipgeo.geodesics.record import Geodesic
from fipgeo.geodesics.shooting import Shot, shoot
from fipgeo.geodesics.tableaux import TABLEAUX, Tableau

__all__ = [
    "TABLEAUX",
    "Chart",
    "Flow",
    "Frames",
    "Geodesic",
    "Shot",
    "Slope",
    "Tableau",
    "as_chart",
    "geodesic",
    "shoot",
    "track",
]
