"Everything about the distribution is read from settings.ini; this file only hands it to setuptools."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]


def lines(key):
    return [line.strip() for line in cfg.get(key, "").splitlines() if line.strip()]


suffix = "_requirements"
extras = {key.removesuffix(suffix): lines(key) for key in cfg if key.endswith(suffix)}
extras["dev"] = sorted(set().union(*extras.values()))

stages = [
    "",
    "1 - Planning",
    "2 - Pre-Alpha",
    "3 - Alpha",
    "4 - Beta",
    "5 - Production/Stable",
    "6 - Mature",
    "7 - Inactive",
]
licenses = {"apache2": "Apache-2.0", "mit": "MIT"}
readme = here / "README.md"
docs_url = cfg["doc_host"] + cfg["doc_baseurl"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    url=cfg["git_url"],
    project_urls={"Documentation": docs_url, "Source": cfg["git_url"], "Issues": cfg["git_url"] + "/issues"},
    license=licenses[cfg["license"]],
    keywords=cfg["keywords"].split(),
    classifiers=[
        "Development Status :: " + stages[int(cfg["status"])],
        "Intended Audience :: " + cfg["audience"],
        "Intended Audience :: Science/Research",
        "Natural Language :: " + cfg["language"],
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    include_package_data=True,
    python_requires=">=" + cfg["min_python"],
    install_requires=lines("requirements"),
    extras_require=extras,
    entry_points={
        "console_scripts": lines("console_scripts"),
        # nbdev finds the symbols that can be linked from backticks through this entry point
        "nbdev": ["{0}={0}._modidx:d".format(cfg["lib_path"])],
    },
    zip_safe=False,
)
