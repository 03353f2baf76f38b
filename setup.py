"""What pyproject.toml cannot say: the wheel holds the bundles and what is laid on them, see `medsd bundle`."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithBundles(build_py):
    """Copies `bundles/` and `configs/` into the package; an editable installation reads them where they are."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for path in sorted([*Path("bundles").iterdir(), *Path("configs").iterdir()]):
            place = Path(self.build_lib, "medsd", "shipped", path.parent)
            self.mkpath(str(place))
            self.copy_file(str(path), str(place))


setup(cmdclass={"build_py": WithBundles})
