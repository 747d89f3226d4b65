"""Packaging, read from settings.ini so that names, versions and requirements live in one place."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
ini = ConfigParser(delimiters=["="], interpolation=None)
ini.read(root / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
notebooks = {f"visionbench.{room}": f"nbs/{room}" for room in ("experiments", "dashboards")}  # they ship in the wheel; visionbench.runs.execute finds them

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(root / "README.md").read_text(encoding="utf-8") if (root / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    url=f"https://github.com/{cfg['user']}/{cfg['repo']}",
    packages=[*find_packages(include=["visionbench", "visionbench.*"]), *notebooks],
    package_dir=notebooks,
    package_data={name: ["*.ipynb"] for name in notebooks},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={key.removesuffix("_requirements"): cfg[key].split() for key in cfg if key.endswith("_requirements")},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
