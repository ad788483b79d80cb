"""What a compile will do and take, before any weight is read."""

from awqc.planning.plan import Plan, StagePlan, plan
from awqc.planning.rates import Rates, measure

__all__ = ["Plan", "Rates", "StagePlan", "measure", "plan"]
