"""Commands that only plan start without torch, which takes a second to import."""

import subprocess
import sys

import pytest

from tests.helpers.ray_cluster import HERE


@pytest.mark.parametrize("module", ["flows.config.run_config", "flows.cli.run"])
def test_a_recipe_is_read_without_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'ray', 'prefect'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
