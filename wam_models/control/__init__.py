"""Control in real time: the next chunk is planned while this one is executed.

``controller`` decides what the robot does at each tick and what is to be planned next, without a clock; ``limits``
bounds actions; ``rates`` fits the policy's rate to the robot's; ``runner`` has the clock and the thread that plans.
"""

from .controller import ControlConfig, Controller, Counts, PlanRequest, RanDryError
from .runner import Robot, run_in_real_time

__all__ = ["ControlConfig", "Controller", "Counts", "PlanRequest", "RanDryError", "Robot", "run_in_real_time"]
