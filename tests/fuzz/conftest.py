"""Profiles of the fuzz tests: `gate`, a few seconds for each property and the same examples every
time, and `long` for `make fuzz`, with others in every round.

The failing examples of `long` are kept in `.fuzz/`, outside git, and tried first the next time. One
that showed a defect of ours also becomes an `@example` of its property.
"""

from pathlib import Path

from hypothesis import HealthCheck, configuration, settings

configuration.set_hypothesis_home_dir(Path(__file__).parents[2] / ".fuzz")
USUAL = {
    "deadline": None,  # tests.helpers.bounds counts processor time instead
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}
settings.register_profile("gate", max_examples=100, derandomize=True, **USUAL)
settings.register_profile("long", max_examples=1000, **USUAL)
settings.load_profile("gate")
