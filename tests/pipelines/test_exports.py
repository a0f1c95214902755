"""Every job has one front door, and importing the package of jobs loads nothing heavy."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import pytest

from dit_attn import pipelines

JOBS = ("anomaly", "benchmark", "calibrate", "compare", "head_search", "high_resolution", "inspect")


def test_importing_the_jobs_loads_nothing_heavy() -> None:
    code = "import sys, dit_attn.pipelines; assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_name_of_the_package_is_that_of_its_job() -> None:
    for name in pipelines.__all__:
        assert name in dir(pipelines) and inspect.isclass(getattr(pipelines, name)), name
    with pytest.raises(AttributeError, match="no attribute 'Plan'"):
        _ = pipelines.Plan


@pytest.mark.parametrize("job", JOBS)
def test_every_job_exports_what_a_user_calls(job: str) -> None:
    package = importlib.import_module(f"dit_attn.pipelines.{job}")
    assert package.__all__ == sorted(package.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name))
    for name in package.__all__:
        found = getattr(package, name)
        assert not inspect.ismodule(found), name
        if inspect.isclass(found) or inspect.isfunction(found):
            assert inspect.getdoc(found), name


def test_the_function_of_a_job_has_its_name_whatever_is_imported_first() -> None:
    code = (
        "import importlib, pkgutil, sys\n"
        "for job in sys.argv[1:]:\n"
        "    for name in [name for name in sys.modules if name.partition('.')[0] == 'dit_attn']:\n"
        "        del sys.modules[name]\n"  # so that this job is the first one; torch need not be loaded again
        "    package = importlib.import_module(f'dit_attn.pipelines.{job}')\n"
        "    for module in pkgutil.iter_modules(package.__path__):\n"
        "        importlib.import_module(f'{package.__name__}.{module.name}')\n"
        "    assert callable(getattr(package, job)), job"
    )
    subprocess.run([sys.executable, "-c", code, "calibrate", "compare", "inspect"], check=True)
