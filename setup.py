"""Package version (everything else is declared in pyproject.toml)."""

from setuptools import setup

setup(version="0.1.0")
