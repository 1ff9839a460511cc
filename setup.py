"""Puts the studies and notebooks of the checkout into the package that is built. All else stands in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithProject(build_py):
    """The package, and in its folder ``project`` what `steph.PROJECT` names; a link to the checkout needs no copies."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        project = Path(self.build_lib, "steph", "project")
        shutil.rmtree(project, ignore_errors=True)
        for folder in ("data_manifest", "notebooks"):
            shutil.copytree(folder, project / folder, ignore=shutil.ignore_patterns(".*"))
        for file in ("_toc.yml", "constraints.txt", "pyproject.toml"):
            shutil.copy(file, project)


setup(cmdclass={"build_py": WithProject})
