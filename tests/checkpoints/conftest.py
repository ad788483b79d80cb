"""Hypothesis for these tests: no deadline, since a shared machine may pause any example."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "checkpoints", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("checkpoints")
